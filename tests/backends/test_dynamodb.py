"""What is particular to DynamoDBTracker."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from botocore.exceptions import ClientError  # type: ignore[import-untyped]  # ships no types

from aiotracker import (
    ConflictError,
    InvalidValueError,
    RecordTooLargeError,
    Retry,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
    Task,
    TaskLockedError,
    TaskSucceededError,
    clock,
)
from aiotracker.backends._aws import ClientOptions
from aiotracker.backends._aws_requests import ServiceTime, TaskTurns, together
from aiotracker.backends._dynamodb import Table, place_of
from aiotracker.backends.dynamodb import DynamoDBTracker
from aiotracker.testing import FakeClock
from aiotracker.testing.conformance._base import until
from tests.conftest import require
from tests.services.dynalite import DynaliteServer, dynalite_path
from tests.services.dynamodb import (
    TABLE,
    DynamoDBService,
    dynalite_dynamodb,
    made_table,
    moto_dynamodb,
    raw_client,
    shared_session,
)
from tests.services.moto import free_port

__all__ = ["dynalite_dynamodb", "moto_dynamodb"]  # fixtures

_tables = itertools.count(1)


@pytest.fixture
def service(moto_dynamodb: DynamoDBService) -> DynamoDBService:
    return moto_dynamodb


@pytest.fixture(params=["moto_dynamodb", "dynalite_dynamodb"])
def either(request: pytest.FixtureRequest) -> DynamoDBService:
    found: DynamoDBService = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def namespace(service: DynamoDBService) -> str:
    return service.namespace()


@pytest.fixture
def raw(service: DynamoDBService) -> Iterator[Any]:
    client = raw_client(service.url)
    yield client
    client.close()


class Between:
    """A client between a tracker and the service: `plan` says what happens to a request."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.meta = client.meta
        self.requests: Counter[str] = Counter()
        self.plan: Callable[[str, dict[str, Any]], Any] = lambda operation, arguments: None

    def __getattr__(self, operation: str) -> Any:
        method = getattr(self._client, operation)

        async def request(**arguments: Any) -> Any:
            self.requests[operation] += 1
            answer = self.plan(operation, arguments)
            if isinstance(answer, Exception):
                raise answer
            return await method(**arguments) if answer is None else answer

        return request


@asynccontextmanager
async def between(service: DynamoDBService) -> AsyncIterator[Between]:
    async with shared_session().client("dynamodb", endpoint_url=service.url) as client:
        yield Between(client)


async def _until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds, seconds=30)


def refusal(code: str, status: int = 400, message: str = "injected") -> ClientError:
    meta = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": meta}, "PutItem")


# -- requests


async def test_a_new_lifecycle_is_two_requests(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace) as tracker:
        before = tracker.requests
        async with tracker.run("job"):
            pass
        assert tracker.requests - before == 2


async def test_a_refused_claim_is_one_request_that_tells_the_record(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace) as one, service.tracker(namespace) as two:
        async with one.run("job") as task:
            before = two.requests
            with pytest.raises(TaskLockedError) as locked:
                async with two.run("job"):
                    pass
            assert two.requests - before == 1
            assert locked.value.task.fence == task.fence
        with pytest.raises(TaskSucceededError):
            async with two.run("job"):
                pass
        assert two.requests - before == 2


async def test_a_service_that_does_not_tell_the_record_of_a_refusal_is_asked_for_it(
    dynalite_dynamodb: DynamoDBService,
) -> None:
    namespace = dynalite_dynamodb.namespace()
    async with dynalite_dynamodb.tracker(namespace) as tracker:
        async with tracker.run("job"):
            pass
        before = tracker.requests
        with pytest.raises(TaskSucceededError):
            async with tracker.run("job"):
                pass
        assert tracker.requests - before == 2


async def test_a_task_that_was_added_before_is_picked_and_run_with_two_writes(
    service: DynamoDBService, namespace: str
) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        await tracker.add_many(f"job-{index}" for index in range(20))
        client.requests.clear()
        await tracker.work(_nothing)
        assert client.requests["put_item"] == 40
        assert client.requests["get_item"] == 0
        assert 1 <= client.requests["scan"] <= 2, "before it ends, the table is asked"


async def _nothing(task: Any) -> None:
    pass


async def test_a_client_makes_one_try_with_short_time_outs(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace, lease=60) as tracker:
        config = tracker._table._client.meta.config
        assert config.retries["total_max_attempts"] == 1
        assert config.read_timeout + config.connect_timeout < tracker.lease / 3


# -- the index


async def test_what_the_index_does_not_know_yet_is_run_before_work_ends(
    service: DynamoDBService, namespace: str
) -> None:
    ran: list[str] = []

    async def note(task: Any) -> None:
        ran.append(task.id)

    async with between(service) as client:
        client.plan = lambda operation, arguments: (
            {"Items": [], "ResponseMetadata": {"HTTPHeaders": {}}} if operation == "query" else None
        )
        async with DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
            await tracker.add_many(f"job-{index}" for index in range(30))
            assert (await tracker.work(note, concurrency=4)).succeeded == 30
    assert sorted(ran) == sorted(f"job-{index}" for index in range(30))


async def test_a_worker_that_waits_for_ever_never_reads_the_whole_table(
    service: DynamoDBService, namespace: str
) -> None:
    stop = asyncio.Event()
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        working = asyncio.create_task(tracker.work(_nothing, forever=True, stop=stop))
        await _until(lambda: client.requests["query"] >= 3 * 8)
        await tracker.add("job")
        await tracker.wait("job", timeout=20)
        stop.set()
        await working
        assert client.requests["scan"] == 0


async def test_what_the_index_says_of_the_past_is_not_told(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        await tracker.add("done")
        await tracker.add("open")
        old = [await client._client.query(**_of_shard(namespace, shard)) for shard in range(8)]
        async with tracker.run("done"):
            pass
        answers = {f"{namespace}/{shard}": answer for shard, answer in enumerate(old)}

        def stale(operation: str, arguments: dict[str, Any]) -> Any:
            if operation != "query" or arguments["ExpressionAttributeValues"][":low"]["S"] != "ready/":
                return None
            return answers[arguments["ExpressionAttributeValues"][":shard"]["S"]]

        client.plan = stale
        assert [task.id async for task in tracker.find(status="pending")] == ["open"]
        claimable = await tracker.claimable(10)
        assert [task.id for task in claimable.tasks] == ["open"]


def _of_shard(namespace: str, shard: int) -> dict[str, Any]:
    return {
        "TableName": TABLE,
        "IndexName": "aiotracker",
        "KeyConditionExpression": "#shard = :shard",
        "ExpressionAttributeNames": {"#shard": "shard"},
        "ExpressionAttributeValues": {":shard": {"S": f"{namespace}/{shard}"}},
    }


async def test_what_has_succeeded_is_not_in_the_index(service: DynamoDBService, namespace: str, raw: Any) -> None:
    async with service.tracker(namespace) as tracker:
        await tracker.add("job")
        assert sum(raw.query(**_of_shard(namespace, shard))["Count"] for shard in range(8)) == 1
        async with tracker.run("job"):
            pass
    assert sum(raw.query(**_of_shard(namespace, shard))["Count"] for shard in range(8)) == 0


async def test_consistent_queries_do_not_use_the_index(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client:
        tracker = DynamoDBTracker(TABLE, namespace=namespace, client=client, consistent_queries=True)
        async with tracker:
            await tracker.add("job")
            assert [task.id async for task in tracker.find(status="pending")] == ["job"]
            assert (await tracker.count(status="pending"))[Status.PENDING] == 1
            assert client.requests["query"] == 0


async def test_counts_by_status_read_no_records(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        await tracker.add_many(f"job-{index}" for index in range(7))
        async with tracker.run("job-0"):
            pass
        client.requests.clear()
        assert (await tracker.count(status=["pending", "failed"])) == {Status.PENDING: 6}
        assert await tracker.count() == {Status.PENDING: 6, Status.SUCCEEDED: 1}
        assert client.requests["batch_get_item"] == 0


def test_places_have_the_order_of_priority_and_age() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def place(priority: int, seconds: float, **fields: Any) -> str | None:
        moment = now + timedelta(seconds=seconds)
        status = fields.pop("status", Status.PENDING)
        return place_of(
            Task(id="x", status=status, create_time=moment, update_time=moment, priority=priority, **fields)
        )

    assert place(2**31, 9) < place(5, 1) < place(5, 1.000001) < place(0, 0) < place(-(2**31), 0)  # type: ignore[operator]  # none is None
    assert place(9, 0, not_before=now) == "timed/2026-01-01T00:00:00.000000Z"
    assert place(9, 0, status=Status.EXHAUSTED) == "exhausted/2026-01-01T00:00:00.000000Z"
    assert place(9, 0, status=Status.SUCCEEDED) is None


async def test_the_highest_priority_comes_first_among_many_shards(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace) as tracker:
        for index in range(40):
            await tracker.add(f"job-{index}", priority=index)
        claimable = await tracker.claimable(5)
        assert [task.priority for task in claimable.tasks] == [39, 38, 37, 36, 35]
        assert claimable.next_due is not None, "there are more"


# -- the table


async def test_a_missing_table_says_how_to_make_it(service: DynamoDBService) -> None:
    tracker = DynamoDBTracker("no-such-table", endpoint_url=service.url, session=shared_session())
    with pytest.raises(StoreError, match=r"no table 'no-such-table'.*create_table\(\)"):
        await tracker.open()


async def test_create_table_may_be_called_again(either: DynamoDBService) -> None:
    tracker = DynamoDBTracker(f"new-{next(_tables)}", endpoint_url=either.url, session=shared_session())
    assert await tracker.create_table() is True
    assert await tracker.create_table() is False
    await tracker.init()
    async with tracker:
        await tracker.add("job")
        with pytest.raises(StoreError, match="open"):
            await tracker.create_table()


async def test_create_table_does_not_block_the_event_loop(service: DynamoDBService) -> None:
    clock._boot_id.cache_clear()  # as in a new process
    assert await DynamoDBTracker(TABLE, endpoint_url=service.url, session=shared_session()).create_table() is False


async def test_create_table_takes_more_settings(service: DynamoDBService, raw: Any) -> None:
    name = f"new-{next(_tables)}"
    throughput = {"ReadCapacityUnits": 7, "WriteCapacityUnits": 8}
    tracker = DynamoDBTracker(name, endpoint_url=service.url, session=shared_session())
    await tracker.create_table(BillingMode="PROVISIONED", ProvisionedThroughput=throughput)
    table = raw.describe_table(TableName=name)["Table"]
    for told in (table, table["GlobalSecondaryIndexes"][0]):
        assert {key: told["ProvisionedThroughput"][key] for key in throughput} == throughput


async def test_another_kind_of_table_is_refused_and_not_changed(either: DynamoDBService) -> None:
    raw = raw_client(either.url)
    table = f"other-{next(_tables)}"
    raw.create_table(
        TableName=table,
        AttributeDefinitions=[{"AttributeName": "key", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "key", "KeyType": "HASH"}],
        BillingMode="PAY_PER_REQUEST",
    )
    tracker = DynamoDBTracker(table, endpoint_url=either.url, session=shared_session())
    for use in (tracker.open, tracker.create_table):
        with pytest.raises(StoreError, match="another kind of table"):
            await use()
    assert raw.scan(TableName=table)["Count"] == 0
    raw.close()


async def test_a_table_without_the_index_says_so(either: DynamoDBService) -> None:
    raw = raw_client(either.url)
    table = f"bare-{next(_tables)}"
    raw.create_table(
        TableName=table,
        AttributeDefinitions=[{"AttributeName": "task", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "task", "KeyType": "HASH"}],
        BillingMode="PAY_PER_REQUEST",
    )
    raw.close()
    async with DynamoDBTracker(table, endpoint_url=either.url, session=shared_session()) as tracker:
        async with tracker.run("job"):
            pass
        with pytest.raises(StoreError, match="no index 'aiotracker'"):
            await tracker.claimable(1)
        assert await tracker.count() == {Status.SUCCEEDED: 1}


async def test_a_newer_format_is_refused(service: DynamoDBService, raw: Any) -> None:
    name = f"new-{next(_tables)}"
    tracker = DynamoDBTracker(name, endpoint_url=service.url, session=shared_session())
    await tracker.create_table()
    raw.update_item(
        TableName=name,
        Key={"task": {"S": "!aiotracker"}},
        UpdateExpression="SET #format = :two",
        ExpressionAttributeNames={"#format": "format"},
        ExpressionAttributeValues={":two": {"N": "2"}},
    )
    with pytest.raises(StoreError, match="format 2"):
        await tracker.open()


async def test_all_trackers_use_the_shards_that_the_table_says(service: DynamoDBService, raw: Any) -> None:
    name = f"new-{next(_tables)}"
    tracker = DynamoDBTracker(name, endpoint_url=service.url, session=shared_session())
    await tracker.create_table()
    raw.update_item(
        TableName=name,
        Key={"task": {"S": "!aiotracker"}},
        UpdateExpression="SET shards = :one",
        ExpressionAttributeValues={":one": {"N": "1"}},
    )
    async with tracker:
        await tracker.add_many(["a", "b", "c", "d"])
        items = raw.scan(TableName=name)["Items"]
        assert {item["shard"]["S"] for item in items if "shard" in item} == {"default/0"}


async def test_namespaces_are_kept_apart(service: DynamoDBService) -> None:
    a, b = service.namespace(), service.namespace()
    async with service.tracker(a) as one, service.tracker(b) as two, service.tracker(a[:-1]) as three:
        await one.add("job", 1)
        await one.add("x" * 2048, 1)
        await two.add("job", 2)
        for tracker, count in ((one, 2), (two, 1), (three, 0)):
            assert sum((await tracker.count()).values()) == count
            assert sum((await tracker.count(status="pending")).values()) == count
        assert await two.purge(status=list(Status), force=True) == 1
        assert sum((await one.count()).values()) == 2


@pytest.mark.parametrize("namespace", ["", "a/b", "a=b", "!a", "x" * 101, "ä", None])
def test_a_namespace_that_cannot_be_is_refused(namespace: Any) -> None:
    with pytest.raises(InvalidValueError, match="namespace"):
        DynamoDBTracker(TABLE, namespace=namespace)


@pytest.mark.parametrize("table", ["", "ab", "a b c", "x" * 256, None])
def test_a_name_that_no_table_can_have_is_refused(table: Any) -> None:
    with pytest.raises(InvalidValueError, match="table"):
        DynamoDBTracker(table)


# -- time to live


async def test_a_final_record_expires_and_reset_takes_that_back(
    service: DynamoDBService, namespace: str, raw: Any
) -> None:
    def item(task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = raw.get_item(TableName=TABLE, Key={"task": {"S": f"{namespace}/{task_id}"}})["Item"]
        return found

    async with service.tracker(namespace, ttl=7200) as tracker:
        async with tracker.run("done") as task:
            assert "expires" not in item("done")
        expires = int(item("done")["expires"]["N"])
        assert 7199 < expires - task.record.update_time.timestamp() < 7203
        with pytest.raises(ValueError, match="x"):
            async with tracker.run("failed", retry=Retry(max_attempts=1)):
                raise ValueError("x")
        assert "expires" in item("failed")
        await tracker.reset("done", "failed")
        assert "expires" not in item("done")
        assert "expires" not in item("failed")
    async with service.tracker(namespace) as tracker:
        async with tracker.run("done"):
            pass
        assert "expires" not in item("done")


async def test_a_tracker_with_ttl_refuses_a_table_that_removes_nothing(service: DynamoDBService, raw: Any) -> None:
    name = f"new-{next(_tables)}"
    await DynamoDBTracker(name, endpoint_url=service.url, session=shared_session()).create_table()
    raw.update_time_to_live(TableName=name, TimeToLiveSpecification={"Enabled": False, "AttributeName": "expires"})
    tracker = DynamoDBTracker(name, endpoint_url=service.url, session=shared_session(), ttl=3600)
    with pytest.raises(StoreError, match="time to live"):
        await tracker.open()
    assert await tracker.create_table() is False
    async with tracker:
        await tracker.add("job")


@pytest.mark.parametrize("ttl", [0, 3599, -1, True, "1", float("nan")])
def test_a_ttl_below_an_hour_is_refused(ttl: Any) -> None:
    with pytest.raises(InvalidValueError, match="ttl"):
        DynamoDBTracker(TABLE, ttl=ttl)


# -- records


async def test_the_largest_record_is_stored_and_a_larger_one_refused(either: DynamoDBService) -> None:
    task_id = "x" * 2030  # the longest key, whose hash it is not yet
    async with either.tracker("n" * 17) as tracker:
        assert tracker._key(task_id).startswith("n" * 17 + "/")
        await tracker.purge(task_id, force=True)
        await tracker.add(task_id)
        task = await tracker.load(task_id)
        assert task is not None
        room = tracker.max_record_bytes - len(task.replace(data="").encode())
        task = await tracker.dump(task.replace(data="x" * (room - 20)))
        assert await tracker.load(task_id) == task
        with pytest.raises(RecordTooLargeError) as too_large:
            await tracker.dump(task.replace(data="x" * room + "more than there is room"))
        assert too_large.value.limit == tracker.max_record_bytes < 400 * 1024
        assert await tracker.load(task_id) == task
        await tracker.purge(task_id, force=True)


async def test_an_id_too_long_for_a_key_is_kept_under_its_hash(
    service: DynamoDBService, namespace: str, raw: Any
) -> None:
    task_id = "long/" + "x" * 2043
    async with service.tracker(namespace) as tracker:
        await tracker.add(task_id)
        await tracker.add("long/ but not as long")
        assert (await tracker.load(task_id)).id == task_id  # type: ignore[union-attr]  # it is there
        assert {task.id async for task in tracker.find(prefix="long/")} == {task_id, "long/ but not as long"}
        assert {task.id async for task in tracker.find(prefix=task_id)} == {task_id}
    keys = {item["task"]["S"] for item in raw.scan(TableName=TABLE)["Items"]}
    assert sum(key.startswith(f"{namespace}=") and len(key) == len(namespace) + 65 for key in keys) == 1


async def test_a_damaged_item_is_named(service: DynamoDBService, namespace: str, raw: Any) -> None:
    key = f"{namespace}/job"
    async with service.tracker(namespace) as tracker:
        raw.put_item(TableName=TABLE, Item={"task": {"S": key}, "write_id": {"S": "x"}, "record": {"S": "{"}})
        with pytest.raises(StoreCorruptedError) as corrupted:
            await tracker.load("job")
        assert corrupted.value.path == key
        await tracker.add("other")
        stolen = raw.get_item(TableName=TABLE, Key={"task": {"S": f"{namespace}/other"}})["Item"]
        raw.put_item(TableName=TABLE, Item=stolen | {"task": {"S": key}})
        with pytest.raises(StoreCorruptedError, match="another task, 'other'"):
            await tracker.load("job")
        raw.delete_item(TableName=TABLE, Key={"task": {"S": key}})


async def test_a_conflict_tells_what_is_stored(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace) as tracker:
        await tracker.add("job", 1)
        old = await tracker.load("job")
        assert old is not None
        new = await tracker.dump(old.replace(data=2))
        for write in (tracker.dump(old.replace(data=3)), tracker.delete(old)):
            with pytest.raises(ConflictError) as conflict:
                await write
            assert conflict.value.current == new
        await tracker.delete(new)
        with pytest.raises(ConflictError) as conflict:
            await tracker.dump(new)
        assert not conflict.value.known, "a service that never tells looks the same"


# -- what goes wrong


async def test_throttled_requests_are_sent_again_within_the_lease(service: DynamoDBService, namespace: str) -> None:
    throttlings = ["ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded"]
    codes = itertools.cycle(code for throttling in throttlings for code in (throttling, None, None))

    def throttled(operation: str, arguments: dict[str, Any]) -> Any:
        code = next(codes)
        return None if code is None else refusal(code)

    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        client.plan = throttled
        async with tracker.run("job") as task:
            task.result = 1
        await tracker.add("other")
        assert [task.id async for task in tracker.find(status="pending")] == ["other"]
        assert (await tracker.work(_nothing, concurrency=1)).succeeded == 1
        client.plan = lambda operation, arguments: None
        assert await tracker.count() == {Status.SUCCEEDED: 2}


async def test_while_it_is_throttled_all_requests_slow_down(service: DynamoDBService, namespace: str) -> None:
    async with (
        between(service) as client,
        DynamoDBTracker(TABLE, namespace=namespace, client=client, lease=3.0) as tracker,
    ):
        client.plan = lambda operation, arguments: refusal("ThrottlingException")
        client.requests.clear()
        with pytest.raises(StoreUnavailableError, match="Throttling"):
            await tracker.load("job")
        with pytest.raises(StoreUnavailableError, match="Throttling"):
            async for _ in tracker.find():
                pass
        assert client.requests.total() < 40, "in a second"


@asynccontextmanager
async def one_after_another(seconds: float) -> AsyncIterator[str]:
    """A service that takes this long for each answer, also to those who have gone meanwhile; its URL."""
    loop = asyncio.get_running_loop()
    free_at = 0.0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal free_at
        free_at = max(free_at, loop.time()) + seconds
        await asyncio.sleep(free_at - loop.time())
        return web.Response(text="{}", content_type="application/x-amz-json-1.0")

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_service_that_is_asked_for_more_than_it_can_answer_in_time_is_asked_for_less() -> None:
    keys = 100
    async with one_after_another(0.01) as url, AsyncExitStack() as stack:
        session = await asyncio.to_thread(shared_session)
        options = ClientOptions(session=session, endpoint_url=url, request_time=0.3)
        assert options.connections * 0.01 > 2 * options.request_time, "all at once are too many"
        table = Table(TABLE, options, ServiceTime(FakeClock()))
        await table.connect(stack)

        async def read(key: str) -> None:
            while True:
                try:
                    await table.get(key)
                    return
                except StoreUnavailableError:
                    assert table.requests < 5 * keys

        await together(read(f"key-{number}") for number in range(keys))


async def test_a_write_does_not_wait_for_ever_for_others(service: DynamoDBService, namespace: str) -> None:
    async with service.tracker(namespace) as tracker:
        assert tracker._turns._patience == tracker.lease / 3
        tracker._turns = TaskTurns(0.01)
        async with tracker._turns.turn("job"):
            with pytest.raises(StoreUnavailableError, match="did not answer others that write 'job'"):
                await tracker.add("job")
        await tracker.add("job")


async def test_unprocessed_keys_are_asked_for_again(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        await tracker.add_many(["a", "b", "c"])
        asked: list[int] = []

        def one_at_a_time(operation: str, arguments: dict[str, Any]) -> Any:
            if operation != "batch_get_item":
                return None
            (wanted,) = arguments["RequestItems"].values()
            asked.append(len(wanted["Keys"]))
            if len(asked) % 2:
                left = {TABLE: wanted}
                return {"Responses": {TABLE: []}, "UnprocessedKeys": left, "ResponseMetadata": {"HTTPHeaders": {}}}
            return None

        client.plan = one_at_a_time
        assert {task.id async for task in tracker.find(status="pending")} == {"a", "b", "c"}
        assert len(asked) > 1


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (refusal("InternalServerError", 500), StoreUnavailableError, "InternalServerError"),
        (refusal("", 503), StoreUnavailableError, "503"),
        (refusal("TransactionConflictException"), StoreUnavailableError, "two writes met"),
        (refusal("ThrottlingException"), StoreUnavailableError, "Throttling"),
        (refusal("AccessDeniedException"), StoreError, r"dynamodb:GetItem on arn:aws:dynamodb:\*:\*:table/tasks "),
        (refusal("UnrecognizedClientException"), StoreError, "credentials were refused"),
        (refusal("InvalidSignatureException"), StoreError, "clock is wrong"),
        (refusal("ResourceNotFoundException"), StoreError, "create_table"),
        (refusal("SomethingNewException"), StoreError, "SomethingNewException: injected"),
        (ConnectionResetError("reset"), StoreUnavailableError, "reset"),
    ],
    ids=lambda value: str(value)[:70],
)
async def test_errors_are_told_apart_by_their_code(
    service: DynamoDBService, namespace: str, error: Exception, kind: type[Exception], said: str
) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        client.plan = lambda operation, arguments: error
        with pytest.raises(StoreError, match=said) as raised:
            await tracker.load("job")
        assert isinstance(raised.value, StoreUnavailableError) is (kind is StoreUnavailableError)
        assert raised.value.__cause__ is error


async def test_a_write_whose_reply_was_lost_is_recognised(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client, DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
        lost: list[Any] = []
        real = client._client.put_item

        async def put_item(**arguments: Any) -> Any:
            answer = await real(**arguments)
            if len(lost) < 2:
                lost.append(answer)
                raise ConnectionResetError("the reply was lost")
            return answer

        client._client.put_item = put_item
        async with tracker.run("job") as task:
            assert task.attempts == 1
        assert len(lost) == 2
        stored = await tracker.load("job")
        assert stored is not None
        assert (stored.status, stored.attempts) == (Status.SUCCEEDED, 1)


async def test_an_endpoint_where_nobody_answers_is_unavailable(namespace: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    tracker = DynamoDBTracker(TABLE, endpoint_url=url, session=shared_session(), lease=0.9)
    with pytest.raises(StoreUnavailableError, match=url):
        await tracker.open()


async def test_missing_credentials_say_what_to_set(service: DynamoDBService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    tracker = DynamoDBTracker(TABLE, endpoint_url=service.url)
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        await tracker.open()


async def test_a_missing_region_says_what_to_set(service: DynamoDBService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(StoreError, match="region="):
        await DynamoDBTracker(TABLE).open()


async def test_an_unknown_profile_is_named(service: DynamoDBService) -> None:
    with pytest.raises(StoreError, match="no-such-profile"):
        await DynamoDBTracker(TABLE, endpoint_url=service.url, profile="no-such-profile").open()


async def test_a_client_that_is_passed_in_is_not_closed(service: DynamoDBService, namespace: str) -> None:
    async with shared_session().client("dynamodb", endpoint_url=service.url) as client:
        async with DynamoDBTracker(TABLE, namespace=namespace, client=client) as tracker:
            await tracker.add("job")
        assert (await client.describe_table(TableName=TABLE))["Table"]["TableName"] == TABLE
    with pytest.raises(InvalidValueError, match="client="):
        DynamoDBTracker(TABLE, client=client, region="us-east-1")


async def test_a_server_that_is_killed_and_started_again_loses_nothing_acknowledged(tmp_path: Path) -> None:
    require(dynalite_path(), "dynalite (npm): tests/services/install_dynalite.sh")
    done: list[str] = []

    async def note(task: Any) -> None:
        await asyncio.sleep(0)

    server = DynaliteServer(tmp_path / "store")
    try:
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(made_table, server.url)
        async with DynamoDBTracker(TABLE, endpoint_url=server.url, session=shared_session(), lease=30.0) as tracker:
            ids = [f"job-{index}" for index in range(150)]
            working = asyncio.create_task(
                tracker.work(note, ids=ids, concurrency=16, on_done=lambda task: done.append(task.id))
            )
            await _until(lambda: len(done) >= 50)
            await asyncio.to_thread(server.kill)
            acknowledged = list(done)
            await asyncio.to_thread(server.start)
            for task_id in acknowledged:
                task = await tracker.load(task_id)
                assert task is not None
                assert task.status is Status.SUCCEEDED
            assert (await working).succeeded == 150
            assert await tracker.count() == {Status.SUCCEEDED: 150}
    finally:
        await asyncio.to_thread(server.kill)
