"""The contract as a test class. See `ConformanceSuite`."""

import pytest

from ._base import HOSTILE_IDS, Base, MakeTracker
from .backoff import Backoff
from .cancellation import Cancellation, InAnyio
from .crashes import Crashes, Durability
from .fan_out import FanOut, FanOutOverTheStore
from .fences import AHolderThatWasOvertaken, Fences
from .hooks import Hooks
from .leases import ALostLeaseStopsTheWork, OneLiveLease
from .lifecycle import Lifecycle, Typed
from .managing import Adding, Changing, Finding, Waiting, WithoutScan
from .outcomes import Calls, Outcomes, Values
from .querying import Querying
from .replies import GuardedWrites, LostReplies, StaleKnowledge
from .steps import Steps

__all__ = ["HOSTILE_IDS", "Base", "ConformanceSuite", "MakeTracker"]


@pytest.mark.asyncio
class ConformanceSuite(
    OneLiveLease,
    ALostLeaseStopsTheWork,
    Outcomes,
    Values,
    Calls,
    Fences,
    AHolderThatWasOvertaken,
    Crashes,
    Durability,
    Cancellation,
    InAnyio,
    Backoff,
    LostReplies,
    StaleKnowledge,
    GuardedWrites,
    Steps,
    FanOut,
    FanOutOverTheStore,
    Adding,
    Changing,
    Finding,
    Querying,
    Waiting,
    WithoutScan,
    Lifecycle,
    Typed,
    Hooks,
):
    """The guarantees, as tests of any backend.

    A backend proves itself with a subclass in a test file; pytest-asyncio may be in auto or strict mode::

        class TestMine(ConformanceSuite):
            has_scan = True  # the backend implements scan
            has_delete = True  # ... and delete
            has_processes = True  # several processes can use one store

            @pytest.fixture
            def make_tracker(self, tmp_path):
                return lambda **options: MyTracker(tmp_path / "store", **options)

            @pytest.fixture
            def store_url(self, tmp_path):
                return f"my_package.tests:open_mine:{tmp_path / 'store'}"

    `make_tracker` gives, with each call, another worker on the same store, not open, with the options of `BaseTracker`
    that it is given; the store is empty when a test begins. `store_url` says how another process opens that store:
    see `open_store`. Without processes it is not needed.

    Where the package `hypothesis` is installed, it makes up the queries that are compared.

    Leases must be judged by the `clock` that the tracker is given: the suite moves time.
    """
