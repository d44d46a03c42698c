"""Queries: the same answer from every store, to whatever is asked."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from importlib.util import find_spec
from math import inf
from time import monotonic
from typing import Any, ClassVar, Final

import pytest

from ..._core.fingerprint import fingerprint
from ..._core.query import GROUPS, ORDERS, GroupBy, Query, Where, group_of
from ..._core.task import Failure, LastOutcome, Lease, Status, Step, Task
from ...tracker import BaseTracker
from .._clock import FakeClock
from ._base import Base, MakeTracker, needs_scan

__all__ = ["Querying"]

TASKS: Final = 40
ID_PARTS: Final = ("a", "B", "a/", "%", "é", "job-", "😀")
TYPES: Final = ("ValueError", "KeyError", "日本")
WORKERS: Final = ("w1", 'w"2', "w%")
STEPS: Final = ("fetch", "parse", "load")
DATA: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"n": 1},
    {"n": True},
    {"n": 1.5},
    {"n": None},
    {"n": "1"},
    {"n": [1, {"m": 2}]},
    {"n": {"m": 'q"'}},
    {"country": "DE", "n": 1},
    {"a'b": 1},
)


def _tasks(now: datetime) -> list[Task]:
    """All sorts of records, always the same ones."""
    chance = random.Random(7)

    def time() -> datetime:
        return now + timedelta(hours=chance.randrange(4))

    def failure() -> Failure:
        kind, message = chance.choice(TYPES), f"row {chance.randrange(9)} {chance.choice(('is bad', 'is gone'))}"
        # Records of older releases have no fingerprint.
        name = chance.choice(("", fingerprint(kind, message)))
        return Failure(1, time(), chance.choice(WORKERS), kind, message, "", name)

    def step(name: str) -> Step:
        return Step(name, chance.choice((Status.SUCCEEDED, Status.FAILED, Status.IN_PROGRESS)), start_time=now)

    outcomes: tuple[LastOutcome | None, ...] = (None, "error", "timeout", "lease_lost", "cancelled")
    tasks = []
    for number in range(TASKS):
        status = chance.choice(list(Status))
        lease = None
        if status is Status.IN_PROGRESS:
            lease = Lease(f"token-{number}", chance.choice(WORKERS), now, now + timedelta(hours=9), 32_400.0)
        tasks.append(
            Task(
                id=f"{chance.choice(ID_PARTS)}{number}",
                status=status,
                attempts=chance.randrange(4),
                fence=number,
                data=chance.choice((None, 1, [1], *DATA)),
                steps=tuple(step(name) for name in STEPS[: chance.randrange(4)]),
                errors=tuple(failure() for _ in range(chance.randrange(3))),
                last_outcome=chance.choice(outcomes),
                create_time=time(),
                update_time=time(),
                start_time=chance.choice((None, time())),
                finish_time=chance.choice((None, time())),
                not_before=chance.choice((None, time())),
                priority=chance.randrange(-1, 3),
                lease=lease,
            )
        )
    return tasks


@needs_scan
class Querying(Base):
    """The `hypothesis` package asks the questions; without it these tests are skipped.

    Attributes:
        query_examples: How many questions are asked at random, always the same ones.
        query_seconds: After so many seconds the others are not asked.
    """

    query_examples: ClassVar[int] = 40
    query_seconds: ClassVar[float] = 1.0

    @pytest.mark.skipif(find_spec("hypothesis") is None, reason='hypothesis is not there: pip install "hypothesis"')
    async def test_every_question_has_the_answer_that_a_look_at_every_record_gives(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker:
            tasks = _tasks(clock.now())
            await asyncio.gather(*(tracker.dump(task) for task in tasks))
            for by in GROUPS:
                assert await tracker.count(by=by) == Counter(group_of(task, by) for task in tasks), by
            # Hypothesis knows no event loop: it asks from a thread, and is answered on ours.
            loop = asyncio.get_running_loop()

            def answer(*question: Any) -> None:
                asyncio.run_coroutine_threadsafe(_check(tracker, tasks, *question), loop).result(60)

            await asyncio.to_thread(_ask, answer, clock.now(), self.query_examples, self.query_seconds)


def _ask(answer: Callable[..., None], now: datetime, examples: int, seconds: float) -> None:
    from hypothesis import HealthCheck, example, given, settings
    from hypothesis import strategies as st

    times = st.integers(-1, 5).map(lambda hours: now + timedelta(hours=hours))
    causes = [fingerprint(kind, message) for kind in TYPES for message in ("row 1 is bad", "row 1 is gone")]
    sides = [f"{what}_{side}" for what in ("created", "updated", "finished") for side in ("before", "after")]
    filters: dict[str, st.SearchStrategy[Any]] = {
        "status": st.sampled_from(list(Status)) | st.lists(st.sampled_from(list(Status)), min_size=1, unique=True),
        "prefix": st.sampled_from(["", "none", *ID_PARTS]),
        "data": st.sampled_from(DATA),
        "error_type": st.sampled_from(["none", *TYPES]),
        "worker": st.sampled_from(["none", *WORKERS]),
        "last_outcome": st.sampled_from(["error", "timeout", "lease_lost", "cancelled"]),
        "fingerprint": st.sampled_from(["0" * 12, *causes]),
        "step": st.sampled_from(["none", *STEPS]),
        "step_status": st.sampled_from(["in_progress", "failed", "succeeded"]),
        "min_attempts": st.integers(0, 4),
        **dict.fromkeys(sides, times),
    }
    # One or two at a time: of more, nothing is left.
    wheres = st.lists(st.sampled_from(sorted(filters)), min_size=1, max_size=2, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: filters[name] for name in names})
    )
    orders = [None, *ORDERS, *(f"-{order}" for order in ORDERS)]
    # Each filter once, before chance has its turn.
    first: list[dict[str, Any]] = [
        {"status": Status.FAILED},
        {"prefix": "job-"},
        {"data": {"n": True}},
        {"data": {"n": 1}, "status": [Status.PENDING, Status.FAILED]},
        {"error_type": "ValueError"},
        {"worker": 'w"2'},
        {"last_outcome": "lease_lost"},
        {"fingerprint": causes[0]},
        {"step": "parse"},
        {"step_status": "failed"},
        {"step": "parse", "step_status": "failed"},
        {"min_attempts": 2},
        *({side: now + timedelta(hours=2)} for side in sides),
    ]
    until = monotonic() + seconds

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        where=wheres, order_by=st.sampled_from(orders), limit=st.none() | st.integers(0, 12), by=st.sampled_from(GROUPS)
    )
    def ask(where: dict[str, Any], order_by: str | None, limit: int | None, by: GroupBy) -> None:
        nonlocal until
        if monotonic() > until:
            return
        try:
            answer(where, order_by, limit, by)
        except BaseException:
            until = inf  # to find the smallest one that fails, whatever that takes
            raise

    for number, where in enumerate(first):
        ask = example(
            where, orders[number % len(orders)], 5 if number % 4 == 3 else None, GROUPS[number % len(GROUPS)]
        )(ask)
    ask()


async def _check(
    tracker: BaseTracker[Any, Any],
    tasks: list[Task],
    where: Where,
    order_by: str | None,
    limit: int | None,
    by: GroupBy,
) -> None:
    query = Query.build(where, order_by=order_by, limit=limit)
    expected = query.sorted(task for task in tasks if query.matches(task))
    found = [task.id async for task in tracker.find(order_by=order_by, limit=limit, **where)]
    if order_by is not None:
        assert found == [task.id for task in expected][:limit]
    else:
        assert len(set(found)) == len(found) == len(expected[:limit])
        assert set(found) <= {task.id for task in expected}
    assert await tracker.count(by=by, **where) == Counter(group_of(task, by) for task in expected)
