"""DynamoDBTracker: answers in parts, refusals, tables that are not as they should be, and what others do in between."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]  # ships no types

from aiotracker import (
    InvalidValueError,
    RecordTooLargeError,
    Retry,
    Status,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
)
from aiotracker.backends import _dynamodb, dynamodb
from aiotracker.backends.dynamodb import DynamoDBTracker
from aiotracker.testing import FakeClock
from tests.backends.test_dynamodb import Between, between, refusal
from tests.services.dynamodb import TABLE, DynamoDBService, moto_dynamodb

__all__ = ["moto_dynamodb"]  # fixtures

Plan = Callable[[str, dict[str, Any]], Any]


@pytest.fixture
def service(moto_dynamodb: DynamoDBService) -> DynamoDBService:
    return moto_dynamodb


@pytest.fixture
def namespace(service: DynamoDBService) -> str:
    return service.namespace()


def refusing(error: ClientError, *operations: str, times: int = 1_000_000) -> Plan:
    """Refuses these operations, for so many times."""
    left = [error] * min(times, 1000)

    def plan(operation: str, arguments: dict[str, Any]) -> Any:
        return left.pop() if operation in operations and left else None

    return plan


def on(client: Between, namespace: str = "default", table: str = TABLE, **options: Any) -> DynamoDBTracker:
    return DynamoDBTracker(table, namespace=namespace, client=client, **options)


# -- answers in parts


async def test_what_comes_in_many_pages_is_found_and_counted_once(
    service: DynamoDBService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamodb, "CHUNK", 2)
    ids = [f"job-{number}" for number in range(7)]
    table = f"new-{uuid4().hex[:8]}"
    async with between(service) as client:
        await on(client, table=table).create_table()
    async with between(service) as client, on(client, table=table) as tracker:
        await tracker.add_many(ids)
        async with tracker.run("job-6"):
            pass

        def one_at_a_time(operation: str, arguments: dict[str, Any]) -> None:
            if operation == "scan":
                arguments["Limit"] = 3
            if operation == "query":
                arguments["Limit"] = 1

        client.plan = one_at_a_time
        assert sorted([task.id async for task in tracker.find()]) == ids
        assert await tracker.count() == {Status.PENDING: 6, Status.SUCCEEDED: 1}
        assert await tracker.count(status="pending") == {Status.PENDING: 6}
        assert {task.id for task in (await tracker.claimable(10)).tasks} == set(ids[:6])


async def test_keys_that_are_never_processed_are_told_in_time(service: DynamoDBService, namespace: str) -> None:
    def nothing(operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "batch_get_item":
            answer = {"Responses": {TABLE: []}, "UnprocessedKeys": arguments["RequestItems"]}
            return answer | {"ResponseMetadata": {"HTTPStatusCode": 200}}
        return None

    async with between(service) as client, on(client, namespace, lease=0.3) as tracker:
        await tracker.add("job")
        client.plan = nothing
        with pytest.raises(StoreUnavailableError, match="1 keys were not processed"):
            [task async for task in tracker.find(status="pending")]


async def test_counts_by_anything_else_than_the_status_read_the_records(
    service: DynamoDBService, namespace: str
) -> None:
    async with service.tracker(namespace, retry=Retry(1)) as tracker:
        for task_id, error in (("a", ValueError), ("b", KeyError), ("c", ValueError)):
            with pytest.raises(error):
                async with tracker.run(task_id):
                    raise error
        assert await tracker.count(by="error_type") == {"ValueError": 2, "KeyError": 1}
        assert (tracker.table, tracker.namespace) == (TABLE, namespace)


# -- writes


async def test_a_record_that_cannot_be_stored_is_refused_and_changes_nothing(
    service: DynamoDBService, namespace: str
) -> None:
    async with between(service) as client, on(client, namespace) as tracker:
        await tracker.add("job")
        task = await tracker.load("job")
        assert task is not None
        with pytest.raises(InvalidValueError, match="cannot be stored as JSON"):
            await tracker.dump(task.replace(data=object()))
        too_large = refusal("ValidationException", 400, "Item size has exceeded the maximum allowed size")
        client.plan = refusing(too_large, "put_item")
        with pytest.raises(RecordTooLargeError, match="'job'"):
            await tracker.dump(task.replace(note="x"))
        client.plan = lambda operation, arguments: None
        assert await tracker.load("job") == task


async def test_what_one_machine_has_written_comes_before_what_the_next_one_makes_of_it(
    service: DynamoDBService, namespace: str, clock: FakeClock
) -> None:
    async with service.tracker(namespace, clock=clock) as tracker:
        clock.jump(1.5)
        await tracker.add("job")
        first = await tracker.load("job")
        clock.jump(-1.5)  # another machine, a second or so behind
        await tracker.ignore("job")
        second = await tracker.load("job")
    assert first is not None
    assert second is not None
    assert second.status is Status.IGNORED
    assert second.update_time >= first.update_time > clock.now()


# -- the table


async def described(service: DynamoDBService, client: Between) -> dict[str, Any]:
    answer: dict[str, Any] = await client._client.describe_table(TableName=service.table)
    return answer


@pytest.mark.parametrize("at_first", ["unknown", "CREATING", "an index that is not ready"])
async def test_a_new_table_is_waited_for_until_it_can_be_used(
    service: DynamoDBService, monkeypatch: pytest.MonkeyPatch, at_first: str
) -> None:
    table = f"slow-{uuid4().hex[:8]}"
    async with between(service) as client:
        answer = await described(service, client)
        asked: list[str] = []

        def slow(operation: str, arguments: dict[str, Any]) -> Any:
            if operation != "describe_table":
                return None
            asked.append(operation)
            if len(asked) > 1:
                return None
            if at_first == "unknown":
                return refusal("ResourceNotFoundException")
            changed = {"TableStatus": "CREATING"} if at_first == "CREATING" else {"GlobalSecondaryIndexes": indexes}
            return answer | {"Table": answer["Table"] | changed}

        indexes = [index | {"IndexStatus": "CREATING"} for index in answer["Table"]["GlobalSecondaryIndexes"]]
        client.plan = slow
        assert await on(client, table=table).create_table()
        assert len(asked) == 2
        monkeypatch.setattr(_dynamodb, "CREATE_TIME", 0.0)
        asked.clear()
        with pytest.raises(StoreUnavailableError, match="still not active"):
            await on(client, table=table).create_table()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"TableStatus": "DELETING"}, "cannot be used: it is DELETING"),
        ({"GlobalSecondaryIndexes": []}, "no index 'aiotracker'"),
        ({"KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}]}, "another kind of table"),
    ],
)
async def test_a_table_that_is_there_and_will_not_do_is_refused(
    service: DynamoDBService, changed: dict[str, Any], said: str
) -> None:
    async with between(service) as client:
        answer = await described(service, client)

        def other(operation: str, arguments: dict[str, Any]) -> Any:
            return answer | {"Table": answer["Table"] | changed} if operation == "describe_table" else None

        client.plan = other
        with pytest.raises(StoreError, match=said):
            await on(client).create_table()


async def test_an_index_that_the_service_does_not_know_is_told(service: DynamoDBService, namespace: str) -> None:
    async with between(service) as client, on(client, namespace) as tracker:
        missing = refusal("ValidationException", 400, "The table does not have the specified index: aiotracker")
        client.plan = refusing(missing, "query")
        with pytest.raises(StoreError, match="no index 'aiotracker'"):
            await tracker.claimable(1)


async def test_what_the_service_may_not_or_need_not_remove_is_no_error_where_nobody_relies_on_it(
    service: DynamoDBService,
) -> None:
    denied = refusal("AccessDeniedException")
    async with between(service) as client:
        client.plan = refusing(denied, "update_time_to_live")
        await on(client).create_table()
        await on(client, ttl=3600).create_table()  # it is enabled, as can be seen
        client.plan = refusing(denied, "describe_time_to_live")
        async with on(client, ttl=3600):  # perhaps it is
            pass
        client.plan = refusing(denied, "update_time_to_live", "describe_time_to_live")
        with pytest.raises(StoreError, match="no permission"):
            await on(client, ttl=3600).create_table()
        client.plan = refusing(refusal("InternalServerError", 500), "describe_time_to_live")
        with pytest.raises(StoreUnavailableError):
            await on(client, ttl=3600).open()


@pytest.mark.parametrize("marker", [{}, {"format": {"N": "1"}}, {"format": {"S": "1"}, "shards": {"N": "4"}}])
async def test_a_damaged_marker_is_named(service: DynamoDBService, marker: dict[str, Any]) -> None:
    async with between(service) as client:
        answer = {"Item": {"task": {"S": "!aiotracker"}} | marker, "ResponseMetadata": {"HTTPStatusCode": 200}}
        client.plan = lambda operation, arguments: answer if operation == "get_item" else None
        with pytest.raises(StoreCorruptedError, match=r"'!aiotracker'.* is damaged"):
            await on(client).open()


async def test_a_table_that_another_worker_marks_at_the_same_time_is_ours_too(service: DynamoDBService) -> None:
    table = f"new-{uuid4().hex[:8]}"
    async with between(service) as client:
        await on(client, table=table).create_table()
        await client._client.delete_item(TableName=table, Key={"task": {"S": "!aiotracker"}})
        async with on(client, table=table, read_only=True) as reader:  # which marks nothing
            assert [task async for task in reader.find()] == []
        put = client._client.put_item

        async def overtaken(**arguments: Any) -> Any:
            client._client.put_item = put
            await put(TableName=table, Item=arguments["Item"] | {"shards": {"N": "2"}})
            return await put(**arguments)

        client._client.put_item = overtaken
        async with on(client, table=table) as tracker:
            assert tracker._shards == 2
