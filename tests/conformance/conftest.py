"""How much of the suite runs where one tracker is tried on two servers of one kind."""

import pytest

# What looks at the tracker's own awaits, and not at the server's answers.
OWN_AWAITS = (
    "test_a_cancel_at_every_await_",
    "test_the_same_where_each_request_",
    "test_500_contended_updates_",
    "test_under_random_faults_",
)
# Many processes at once are tried on the other server, which is quicker at them.
PROCESSES = (
    "test_of_4_",
    "test_4_processes_",
    "test_two_workers_",
    "test_what_a_process_",
    "test_the_end_of_asyncio_run_",
)
# Where servers differ: whatever races, is fenced, expires or loses a reply.
RACES = (
    "test_of_1",
    "test_of_4_",
    "test_4_processes_",
    "test_two_workers_",
    "test_an_overtaken_holder_",
    "test_every_claim_gets_",
    "test_an_expired_lease_",
    "test_what_a_dead_worker_",
    "test_what_a_process_",
    "test_the_end_of_asyncio_run_",
    "test_dump_",
    "test_delete_",
    "test_an_end_",
    "test_a_claim_is_recognised",
    "test_all_these_ids_",
)

LEFT_OUT = {"TestS3OnMoto": OWN_AWAITS + PROCESSES}
SOME = {
    "TestS3OnCeph": RACES,
    "TestDynamoDBOnMoto": tuple(name for name in RACES if name not in PROCESSES),
    # A log in memory decides, as that of the file store does; the rest is what its requests can do to it.
    "TestS3LogOnMoto": ("test_of_100_", "test_dump_", "test_delete_", "test_an_end_", "test_a_claim_is_recognised"),
    "TestS3LogOnCeph": ("test_of_10", "test_4_processes_"),
    "TestPostgresThroughPgBouncer": ("test_of_1", "test_of_4_", "test_4_processes_", "test_dump_", "test_delete_"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rest is for `make chaos`."""
    for item in items:
        where = "" if item.parent is None else item.parent.name
        if item.name.startswith(LEFT_OUT.get(where, ())) or (where in SOME and not item.name.startswith(SOME[where])):
            item.add_marker(pytest.mark.chaos)
