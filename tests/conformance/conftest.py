"""How often the suite runs on two servers of one kind."""

import pytest

# One tracker, on a second server that answers a little otherwise: what looks at the tracker's own awaits, and not at
# the answers, is run on the first one alone, and on both by `make chaos`.
SECOND_SERVERS = ("TestDynamoDBOnMoto", "TestS3OnMoto")
OWN_AWAITS = (
    "test_a_cancel_at_every_await_",
    "test_the_same_where_each_request_",
    "test_500_contended_updates_",
    "test_under_random_faults_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.parent is not None and item.parent.name in SECOND_SERVERS and item.name.startswith(OWN_AWAITS):
            item.add_marker(pytest.mark.chaos)
