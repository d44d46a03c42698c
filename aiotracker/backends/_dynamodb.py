"""The table of the DynamoDB tracker: its requests, and what places its index has for tasks."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from .._core.codec import FORMAT
from .._core.task import Status, Task
from ..contract import Claimable
from ..errors import StoreCorruptedError, StoreError, StoreUnavailableError
from ._aws import ClientOptions, connect
from ._aws_requests import BusyError, Refusal, Sender, ServiceTime, meaning, patiently

__all__ = [
    "BEGINS",
    "OPEN",
    "PLACES",
    "SHARDS",
    "Candidates",
    "ConditionError",
    "Entry",
    "Item",
    "ItemTooLargeError",
    "Table",
    "place_of",
    "seconds_later",
    "stamp",
    "time_of",
]

Item = dict[str, dict[str, str]]
INDEX: Final = "aiotracker"
MARKER: Final = "!aiotracker"
SHARDS: Final = 8  # of a new table; a partition of an index takes a thousand writes a second
SPREAD: Final = 2**31  # makes of a priority a number that is never negative
CREATE_TIME: Final = 180.0  # seconds
OPEN: Final = frozenset({Status.PENDING, Status.FAILED, Status.IN_PROGRESS})
NEW: Final = "attribute_not_exists(task)"
SAME: Final = "write_id = :version"
BEGINS: Final = "begins_with(#place, :low)"
FROM: Final = "#place >= :low"
# Where the index has the tasks of each status; those that succeeded are not in it.
PLACES: Final[Mapping[Status, frozenset[str]]] = {
    Status.PENDING: frozenset({"ready/", "timed/"}),
    Status.FAILED: frozenset({"ready/", "timed/"}),
    Status.IN_PROGRESS: frozenset({"timed/"}),
    Status.EXHAUSTED: frozenset({"exhausted/"}),
    Status.IGNORED: frozenset({"ignored/"}),
}


# -- the index


def place_of(task: Task) -> str | None:
    """Where the index has it; `None`: it does not."""
    match task.status:
        case Status.SUCCEEDED:
            return None
        case Status.EXHAUSTED | Status.IGNORED:
            return f"{task.status}/{stamp(task.update_time)}"
    due = task.not_before if task.lease is None else task.lease.expires_at
    if due is None:
        return f"ready/{SPREAD - task.priority:010d}/{stamp(task.create_time)}"
    return f"timed/{stamp(due)}"


def stamp(moment: datetime) -> str:
    """A time as text whose order is that of times."""
    return f"{moment.astimezone(UTC).isoformat(timespec='microseconds')[:26]}Z"


def time_of(place: str) -> datetime:
    """The time in a place that has one."""
    return datetime.fromisoformat(place.rpartition("/")[2])


def seconds_later(moment: datetime, seconds: float) -> datetime:
    return datetime.fromtimestamp(moment.timestamp() + seconds, UTC)


class Entry(NamedTuple):
    """One entry of the index."""

    place: str
    key: str


class Candidates:
    """Records, as far as they may be claimed, and when more may be."""

    def __init__(self, now: datetime) -> None:
        self.tasks: list[Task] = []
        self._now = now
        self._next_due: datetime | None = None

    def see(self, task: Task) -> None:
        if task.status.is_final:
            return
        due = task.lease.expires_at if task.lease is not None else task.not_before
        if due is None or due <= self._now:
            self.tasks.append(task)
        else:
            self.later(due)

    def later(self, due: datetime) -> None:
        if self._next_due is None or due < self._next_due:
            self._next_due = due

    def claimable(self, limit: int, is_cut: bool) -> Claimable:
        # Among equals at random, so that not all workers begin with the same.
        self.tasks.sort(key=lambda task: (-task.priority, random.random()))
        is_cut |= len(self.tasks) > limit
        return Claimable(self.tasks[:limit], self._now if is_cut else self._next_due)


class ConditionError(Exception):
    """The condition of a write did not hold; nothing was changed."""

    def __init__(self, item: Item | None) -> None:
        super().__init__("the condition did not hold")
        self.item = item  # what is stored, where the service tells


class ItemTooLargeError(Exception):
    """The service does not take an item of this size."""


class Table:
    """One table, behind a few requests, each of which is sent once.

    What they raise: `BusyError`, refused for now, nothing was changed; `StoreUnavailableError`, no answer;
    `StoreError`, it would not help to ask again.
    """

    def __init__(self, name: str, options: ClientOptions, time: ServiceTime) -> None:
        self.name = name
        self.time = time
        self.requests = 0
        self._options = options
        self._client: Any = None
        self._sender = Sender(options, time)

    def __str__(self) -> str:
        return f"table {self.name!r}{self._where()}"

    def _where(self) -> str:
        if self._options.endpoint_url is not None:
            return f" at {self._options.endpoint_url}"
        return f" in {self._client.meta.region_name}" if self._client is not None else ""

    async def connect(self, stack: AsyncExitStack) -> None:
        self._sender = Sender(self._options, self.time)
        client = (await connect("dynamodb", self._options, stack)).client

        def forget() -> None:
            self._client = None

        stack.callback(forget)
        self._client = client

    # -- one item

    async def get(self, key: str) -> Item | None:
        answer = await self._send("get_item", Key={"task": {"S": key}}, ConsistentRead=True)
        item: Item | None = answer.get("Item")
        return item

    async def put(self, item: Item, version: str | None) -> None:
        await self._send("put_item", Item=item, **_condition(version))

    async def delete(self, key: str, version: str | None) -> None:
        await self._send("delete_item", Key={"task": {"S": key}}, **_condition(version))

    # -- many

    async def batch_get(self, keys: list[str]) -> tuple[list[Item], list[str]]:
        """The items, and the keys that must be asked for again."""
        wanted = {
            "Keys": [{"task": {"S": key}} for key in keys],
            "ConsistentRead": True,
            "ProjectionExpression": "task, write_id, #record",
            "ExpressionAttributeNames": {"#record": "record"},
        }
        answer = await self._send("batch_get_item", is_of_table=False, RequestItems={self.name: wanted})
        left = [key for table in answer.get("UnprocessedKeys", {}).values() for key in table["Keys"]]
        return next(iter(answer["Responses"].values()), []), [key["task"]["S"] for key in left]

    async def query(
        self, shard: str, condition: str, low: str, start: Item | None, limit: int | None = None
    ) -> tuple[list[Item], Item | None]:
        """A page of the entries of a shard, in the order of their places, and where the next one starts."""
        where: dict[str, Any] = {
            "IndexName": INDEX,
            "KeyConditionExpression": f"#shard = :shard AND {condition}",
            "ExpressionAttributeNames": {"#shard": "shard", "#place": "place", "#status": "status"},
            "ExpressionAttributeValues": {":shard": {"S": shard}, ":low": {"S": low}},
            "ProjectionExpression": "task, #place, #status",
        }
        if limit is not None:
            where["Limit"] = limit
        return await self._page("query", where, start)

    async def entries(self, shard: str, low: str, limit: int) -> list[Entry]:
        """The first ones of a shard from this place on."""
        entries: list[Entry] = []
        start: Item | None = None
        while len(entries) < limit:
            page, start = await self.query(shard, FROM, low, start, limit - len(entries))
            entries += [Entry(item["place"]["S"], item["task"]["S"]) for item in page]
            if start is None:
                break
        return entries

    async def scan(self, where: dict[str, Any], start: Item | None) -> tuple[list[Item], Item | None]:
        """A page of the table, and where the next one starts."""
        return await self._page("scan", where | {"ConsistentRead": True}, start)

    async def _page(self, operation: str, where: dict[str, Any], start: Item | None) -> tuple[list[Item], Item | None]:
        if start is not None:
            where = where | {"ExclusiveStartKey": start}
        answer = await self._send(operation, **where)
        return answer.get("Items", []), answer.get("LastEvaluatedKey") or None

    # -- the table itself

    async def create(self, settings: Mapping[str, Any]) -> bool:
        """Creates it, unless it is there, and waits until it can be used; whether it is new."""
        index: dict[str, Any] = {
            "IndexName": INDEX,
            "KeySchema": _key_schema("shard", "place"),
            "Projection": {"ProjectionType": "INCLUDE", "NonKeyAttributes": ["status", "error_type"]},
        }
        if "ProvisionedThroughput" in settings:
            index["ProvisionedThroughput"] = settings["ProvisionedThroughput"]
        table: dict[str, Any] = {
            "AttributeDefinitions": [
                {"AttributeName": name, "AttributeType": "S"} for name in ("task", "shard", "place")
            ],
            "KeySchema": _key_schema("task"),
            "GlobalSecondaryIndexes": [index],
            "BillingMode": "PAY_PER_REQUEST",
        }
        is_new = True
        try:
            await self._send("create_table", **(table | dict(settings)))
        except TableThereError:
            is_new = False
        until = asyncio.get_running_loop().time() + CREATE_TIME
        while not await self._is_active():
            if asyncio.get_running_loop().time() > until:
                raise StoreUnavailableError(f"{self} is still not active after {CREATE_TIME:g} s")
            await asyncio.sleep(random.uniform(0.05, 0.3))
        return is_new

    async def _is_active(self) -> bool:
        try:
            table = (await self._send("describe_table"))["Table"]
        except NoTableError:
            return False  # it was just created, and not everybody knows yet
        if table["TableStatus"] in ("DELETING", "ARCHIVED", "INACCESSIBLE_ENCRYPTION_CREDENTIALS"):
            raise StoreError(f"{self} cannot be used: it is {table['TableStatus']}")
        if table.get("KeySchema") != _key_schema("task"):
            raise self._schema_error()
        index = next((index for index in table.get("GlobalSecondaryIndexes", ()) if index["IndexName"] == INDEX), None)
        if index is None:
            raise self._index_error()
        return table["TableStatus"] in ("ACTIVE", "UPDATING") and index.get("IndexStatus", "ACTIVE") == "ACTIVE"

    async def enable_ttl(self, *, is_needed: bool) -> None:
        """Lets the service remove what has expired.

        Args:
            is_needed: That it cannot is an error.
        """
        try:
            await self._send(
                "update_time_to_live", TimeToLiveSpecification={"Enabled": True, "AttributeName": "expires"}
            )
        except StoreError as exc:
            # It may be enabled already, which is refused; or there is no permission, or no such request.
            if is_needed and (isinstance(exc, StoreUnavailableError) or not await self._has_ttl()):
                raise

    async def check_ttl(self) -> None:
        """Raises `StoreError` where nothing would ever be removed, if that can be found out."""
        try:
            has_ttl = await self._has_ttl()
        except StoreUnavailableError:
            raise
        except StoreError:
            return  # no permission to look
        if not has_ttl:
            raise StoreError(
                f"{self} removes nothing, and this tracker has ttl=: enable time to live on its attribute 'expires', "
                "as create_table() does"
            )

    async def _has_ttl(self) -> bool:
        answer = await self._send("describe_time_to_live")
        told = answer.get("TimeToLiveDescription", {})
        return told.get("TimeToLiveStatus") in ("ENABLED", "ENABLING") and told.get("AttributeName") == "expires"

    async def identify(self, seconds: float, *, may_write: bool) -> int:
        """Checks that it is one of ours, and reads into how many shards its index is spread, which is written once.

        Args:
            seconds: For which it is asked again while there is no answer.
            may_write: A new table is marked as ours.
        """
        marker = {
            "task": {"S": MARKER},
            "write_id": {"S": MARKER},
            "format": {"N": str(FORMAT)},
            "shards": {"N": str(SHARDS)},
        }
        while (item := await patiently(lambda: self.get(MARKER), seconds)) is None:
            if not may_write:
                return SHARDS
            try:
                await patiently(lambda: self.put(marker, None), seconds)
            except ConditionError:
                pass  # somebody else was faster, or it was us
        try:
            stored_format, shards = int(item["format"]["N"]), int(item["shards"]["N"])
        except (KeyError, ValueError) as exc:
            raise StoreCorruptedError(f"the item {MARKER!r} of {self} is damaged: {exc!r}", MARKER) from exc
        if stored_format != FORMAT:
            raise StoreError(
                f"{self} has format {stored_format}, and this release of aiotracker knows format {FORMAT}: use the "
                "release that wrote it, or a newer one; nothing was changed"
            )
        return shards

    # -- how

    async def _send(self, operation: str, *, is_of_table: bool = True, **arguments: Any) -> Any:
        """Sends a request when it has its turn, and translates what goes wrong."""
        client = self._client
        if client is None:
            raise StoreError("this DynamoDBTracker is not open; use `async with`, or await open()")
        if is_of_table:
            arguments["TableName"] = self.name

        async def request() -> tuple[Any, Any]:
            self.requests += 1
            answer = await getattr(client, operation)(**arguments)
            return answer, answer

        said = f"{self}: {operation}"
        return await self._sender.send(said, request, lambda refusal: self._means(operation, said, refusal))

    def _means(self, operation: str, said: str, refusal: Refusal) -> Exception:
        message = refusal.message
        match refusal.code:
            case "ConditionalCheckFailedException":
                return ConditionError(refusal.response.get("Item") or None)
            case "TransactionConflictException" | "ReplicatedWriteConflictException":
                return BusyError(f"two writes met: {said}: {refusal}")
            case "ResourceInUseException":
                return TableThereError(f"{said}: {refusal}")
            case "ResourceNotFoundException" | "TableNotFoundException":
                return self._index_error() if "index" in message.lower() else self._no_table()
            case "AccessDeniedException":
                return StoreError(self._denied(operation, message))
            case "ValidationException" if "item size" in message.lower():
                return ItemTooLargeError(f"{said}: {refusal}")
            case "ValidationException" if "index" in message.lower() and operation == "query":
                return self._index_error()
            case "ValidationException" if "key" in message.lower() and operation in ("get_item", "put_item"):
                return self._schema_error()
        return meaning(said, refusal)

    def _no_table(self) -> "NoTableError":
        return NoTableError(
            f"there is no {self}: create it with `aiotracker init URL` or `await DynamoDBTracker({self.name!r}, "
            "...).create_table()`, or correct the name, the region or the endpoint"
        )

    def _index_error(self) -> StoreError:
        return StoreError(
            f"{self} has no index {INDEX!r} that can be used; it is made by create_table(), and else needs the "
            "partition key 'shard' and the sort key 'place', both strings, and the attributes 'status' and 'error_type'"
        )

    def _schema_error(self) -> StoreError:
        return StoreError(
            f"{self} is another kind of table: ours have the partition key 'task', a string, and no sort key. Nothing "
            "was changed; give the name of another table"
        )

    def _denied(self, operation: str, message: str) -> str:
        action = "".join(word.capitalize() for word in operation.split("_"))
        index = f"/index/{INDEX}" if operation == "query" else ""
        name = self.name.rpartition("table/")[2] if self.name.startswith("arn:") else self.name
        return (
            f"no permission for {operation} on {self}: dynamodb:{action} on arn:aws:dynamodb:*:*:table/{name}{index} "
            f"is needed. The service said: {message or 'access denied'}"
        )


class NoTableError(StoreError):
    """There is no such table."""


class TableThereError(StoreError):
    """There is such a table, or it is just being changed."""


def _condition(version: str | None) -> dict[str, Any]:
    condition: dict[str, Any] = {
        "ConditionExpression": NEW if version is None else SAME,
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
    if version is not None:
        condition["ExpressionAttributeValues"] = {":version": {"S": version}}
    return condition


def _key_schema(*names: str) -> list[dict[str, str]]:
    return [{"AttributeName": name, "KeyType": kind} for name, kind in zip(names, ("HASH", "RANGE"), strict=False)]
