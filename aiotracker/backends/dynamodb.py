"""DynamoDBTracker: one item a task, in a table that several jobs may share.

    task        S  partition key: "default/order-17", the namespace and the id; "default=9e12..." with the SHA-256 of an
                   id that is too long for a key
    record      S  the record, as JSON
    write_id    S  names the latest write: what a guarded write compares
    status      S  for people and filters, like the next one
    error_type  S  of the latest error
    shard       S  "default/3": partition key of the index, which spreads over a few of them
    place       S  sort key of the index:
                     ready/2147483648/2026-11-24T12:25:09.123456Z    may be claimed; first by priority
                     timed/2026-11-24T12:26:09.123456Z               from then on: a lease ends, or a wait
                     exhausted/2026-11-24T12:25:09.123456Z           since then
                     ignored/2026-11-24T12:25:09.123456Z
                   A task that has succeeded has neither of the two, and so is not in the index.
    expires     N  when DynamoDB may remove it: final records of trackers with `ttl=`

The item "!aiotracker" says which format this is, and how many shards there are.

Every write is one PutItem under a condition, and a refused one is told what is stored. The index is no copy: it names
tasks, and their records are then read, strongly consistent. It lags behind the table, so it may miss what was written
a moment ago: that nothing is left to do is believed the table alone.
"""

import asyncio
import random
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Final
from zlib import crc32

from typing_extensions import ParamSpec, TypeVar, Unpack

from .._core.query import GroupBy, Query
from .._core.task import Status, Task
from .._core.transitions import Claim, Fail, Postpone, Release, Renew, Succeed
from ..contract import UNKNOWN, Claimable, Transition, _Unknown, in_order
from ..errors import (
    ConflictError,
    InvalidValueError,
    RecordTooLargeError,
    StoreCorruptedError,
    StoreError,
    StoreUnavailableError,
)
from ..tracker import BaseTracker, Options
from ._aws import CONNECTIONS, ClientOptions
from ._aws_requests import ServiceTime, TaskTurns, patiently, together
from ._dynamodb import (
    BEGINS,
    OPEN,
    PLACES,
    SHARDS,
    Candidates,
    ConditionError,
    Entry,
    Item,
    ItemTooLargeError,
    Table,
    place_of,
    seconds_later,
    stamp,
    time_of,
)

if TYPE_CHECKING:
    from ..running import RunningTask
    from ..work import WorkSummary

__all__ = ["DynamoDBTracker"]

D = TypeVar("D", default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")
P = ParamSpec("P")


KEY_BYTES: Final = 2048  # of a partition key
BATCH: Final = 100  # keys of a BatchGetItem
MIN_TTL: Final = 3600.0  # seconds; a younger record may still be needed to recognise a write whose reply was lost
REQUEST_TIME: Final = 5.0  # seconds
PATIENCE: Final = 10.0  # seconds for which a read is tried again at the most
CHUNK: Final = 200  # records that are decoded before others have their turn
LATER: Final = 60.0  # seconds; when a worker that has nothing to do, and waits for ever, looks at the latest
CLOSE: Final = timedelta(seconds=3)  # that two machines may differ in what they think is the service's time
# Of many claims one wins, and the others are refused; who holds a task must not wait behind anybody.
UNQUEUED: Final = (Claim, Renew, Succeed, Fail, Release, Postpone)

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_TABLE: Final = re.compile(r"[A-Za-z0-9_.-]{3,255}|arn:\S+")


class DynamoDBTracker(BaseTracker[D, R]):
    """Keeps tasks in a DynamoDB table, which is made with `create_table` or as the documentation says.

    A lifecycle on a new id is two requests: PutItem if there is no such item, PutItem if it is as it was. So it is on a
    task that `work` has picked. A refusal is one request too, and tells the record. Renewals are one more each, at a
    third of the lease: none for tasks that take less.

    Queries by status other than `succeeded` use an index that follows within about a second; what it names is read
    from the table. All others read the whole table. The service's own clock, as its answers tell it, decides about
    leases. A record takes up to 400,000 bytes.

    In a global table, conditions are only kept within one region: let all workers use the same.

    Args:
        table: Its name or ARN.
        namespace: Several jobs share a table; this one is kept to itself. 1 to 100 letters, digits, `-`, `_` and `.`.
        client: An aiobotocore client for DynamoDB to use, with its own settings; it is not closed.
        session: An aioboto3 or aiobotocore session to make the client with.
        endpoint_url: Of another service than AWS.
        region: Of the table.
        profile: A name in `~/.aws/config`.
        ttl: Seconds, an hour or more, after which DynamoDB may remove a task that succeeded, is exhausted or ignored.
            By default they are kept. The same id can be run again then.
        consistent_queries: Queries by status read the whole table too, and so miss nothing.
        connections: Requests under way at once.
        **options: As for `BaseTracker`.

    Raises:
        InvalidValueError: An argument cannot be taken.
    """

    max_record_bytes: ClassVar[int] = 400_000  # an item takes 409,600, its key and other attributes included

    def __init__(
        self,
        table: str,
        *,
        namespace: str = "default",
        client: Any = None,
        session: Any = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        ttl: float | None = None,
        consistent_queries: bool = False,
        connections: int = CONNECTIONS,
        **options: Unpack[Options[D, R]],
    ) -> None:
        super().__init__(**options)
        if not isinstance(table, str) or not _TABLE.fullmatch(table):
            raise InvalidValueError(
                f"table takes the name of a table, 3 to 255 letters, digits and '-_.', not {table!r}"
            )
        if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
            raise InvalidValueError(f"namespace takes 1 to 100 letters, digits, '-', '_' and '.', not {namespace!r}")
        if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not MIN_TTL <= ttl < 1e10):
            raise InvalidValueError(f"ttl takes a number of seconds, an hour or more, not {ttl!r}")
        self._ttl = ttl
        self._namespace = namespace
        self._consistent = consistent_queries
        self._shards = SHARDS
        self._patient_for = min(self._patience, PATIENCE)
        self._table = Table(
            table,
            ClientOptions(
                client=client,
                session=session,
                endpoint_url=endpoint_url,
                region=region,
                profile=profile,
                connections=connections,
                request_time=min(REQUEST_TIME, max(1.0, self._patience / 2)),
            ),
            ServiceTime(self.clock),
        )
        self._turns = TaskTurns(self._patience)
        self._waiting = 0  # calls of `work` that wait for ever
        self._ending = 0  # ... and that end when all is done

    @property
    def table(self) -> str:
        """Its name."""
        return self._table.name

    @property
    def namespace(self) -> str:
        """What keeps these tasks apart from those of other jobs."""
        return self._namespace

    @property
    def requests(self) -> int:
        """How many requests this tracker has sent."""
        return self._table.requests

    # -- the contract

    async def connect(self, stack: AsyncExitStack) -> None:
        await self._table.connect(stack)
        self._shards = await self._table.identify(self._patient_for, may_write=not self.read_only)
        if self._ttl is not None and not self.read_only:
            await self._table.check_ttl()
        self.clock_uncertainty = self._table.time.uncertainty

    def now(self) -> datetime:
        return self._table.time.now()

    async def load(self, task_id: str) -> Task | None:
        task_id = self._check_id(task_id)
        item = await self._table.get(self._key(task_id))
        return None if item is None else self._decoded(item)

    async def dump(self, task: Task) -> Task:
        self._check_writable("dump")
        self._check_id(task.id)
        # A write_id that is the version already would not show that anything was written.
        new = task.replace(write_id=self.new_id()) if task.write_id in ("", task.version) else task
        try:
            raw = new.encode()
        except ValueError as exc:
            raise InvalidValueError(str(exc)) from exc
        if len(raw) > self.max_record_bytes:
            raise self._too_large(task, len(raw))
        try:
            await self._table.put(self._item(new, raw), task.version)
        except ConditionError as exc:
            raise self._conflict(task, exc) from exc
        except ItemTooLargeError as exc:
            raise self._too_large(task, len(raw)) from exc
        return new.replace(version=new.write_id)

    def update(
        self, task_id: str, transition: Transition, *, known: Task | _Unknown | None = UNKNOWN
    ) -> Awaitable[Task | None]:
        def rule(task: Task | None, now: datetime) -> Task | None:
            # What one machine has written comes before what the next one makes of it.
            if task is not None and timedelta() < task.update_time - now <= CLOSE:
                now = task.update_time
            return transition(task, now)

        if isinstance(transition, UNQUEUED):
            return self._update(task_id, rule, known)
        return self._in_turn(task_id, rule, known)

    async def _in_turn(self, task_id: str, rule: Transition, known: Task | _Unknown | None) -> Task | None:
        async with self._turns.turn(task_id):
            return await self._update(task_id, rule, known)

    async def delete(self, task: Task) -> None:
        self._check_writable("delete")
        try:
            await self._table.delete(self._key(task.id), task.version)
        except ConditionError as exc:
            raise self._conflict(task, exc) from exc

    async def scan(self, query: Query) -> AsyncIterator[Task]:
        tasks = self._scan_index(query) if self._is_indexed(query) else self._scan_table(query)
        async for task in in_order(query, tasks):
            yield task

    async def tally(self, query: Query, by: GroupBy) -> Counter[str]:
        if by != "status" or query != Query(statuses=query.statuses):
            return await super().tally(query, by)
        counts: Counter[str] = Counter()
        pages = self._index_pages(query) if self._is_indexed(query) else self._table_pages(query, "task, #status")
        async for page in pages:
            counts.update(Status(item["status"]["S"]) for item in page)
        return counts

    async def work(
        self, fn: "Callable[[RunningTask[D, R]], Awaitable[object]]", *, forever: bool = False, **options: Any
    ) -> "WorkSummary":
        """As `BaseTracker.work`. Before it ends, the whole table is read once, as the index may not know yet what was
        just added; with `forever=True`, which never ends, it is not.
        """
        if forever:
            self._waiting += 1
        else:
            self._ending += 1
        try:
            return await super().work(fn, forever=forever, **options)
        finally:
            if forever:
                self._waiting -= 1
            else:
                self._ending -= 1

    async def claimable(self, limit: int) -> Claimable:
        found = await self._look_at_index(limit)
        if found.tasks or found.next_due is not None:
            return found
        if self._waiting and not self._ending:
            return Claimable([], seconds_later(self.now(), LATER))
        return await self._look_at_table(limit)

    # -- what is claimable

    async def _look_at_index(self, limit: int) -> Claimable:
        shards = self._shard_names()
        edge = f"timed/{stamp(self.now())}"
        ready: list[Entry] = []
        timed: list[Entry] = []
        is_cut = False
        full: list[str] = []  # shards with so many ready ones that what comes behind was not seen
        for shard, found in zip(shards, await self._entries(shards, "ready/", limit), strict=True):
            count = bisect_left(found, Entry("timed/", ""))
            ready += found[:count]
            timed += found[count:]
            if count == limit:
                full.append(shard)
            is_cut |= len(found) == limit and found[-1].place <= edge
        for found in await self._entries(full, "timed/", limit):
            timed += found
        timed.sort()
        due = timed[: bisect_left(timed, Entry(edge, "\U0010ffff"))]
        # Among equals at random: workers that see the same must not all try the same.
        ready.sort(key=lambda entry: (entry.place[:16], random.random()))
        candidates = Candidates(self.now())
        for task in await self._records([entry.key for entry in (*ready[:limit], *due[:limit])]):
            candidates.see(task)
        if len(due) < len(timed):
            candidates.later(time_of(timed[len(due)].place))
        return candidates.claimable(limit, is_cut or max(len(ready), len(due)) > limit)

    async def _entries(self, shards: list[str], low: str, limit: int) -> list[list["Entry"]]:
        """The first entries of each shard from this place on, in their order."""
        return await together(self._patiently(self._table.entries, shard, low, limit) for shard in shards)

    async def _look_at_table(self, limit: int) -> Claimable:
        found = Candidates(self.now())
        async for task in self._scan_table(Query(statuses=OPEN)):
            found.see(task)
            if len(found.tasks) > limit:
                break
        return found.claimable(limit, False)

    # -- queries

    def _is_indexed(self, query: Query) -> bool:
        return not self._consistent and query.statuses is not None and Status.SUCCEEDED not in query.statuses

    def _shard_names(self) -> list[str]:
        return [f"{self._namespace}/{number}" for number in range(self._shards)]

    async def _index_pages(self, query: Query) -> AsyncIterator[list[Item]]:
        """What the index says of the tasks with these statuses; each key once."""
        assert query.statuses is not None
        seen: set[str] = set()  # one that is changed meanwhile may come again in another place
        words = {status.value for status in query.statuses}
        for low in sorted(set().union(*(PLACES[status] for status in query.statuses))):
            for shard in self._shard_names():
                start: Item | None = None
                while True:
                    page, start = await self._patiently(self._table.query, shard, BEGINS, low, start)
                    new = [item for item in page if item["status"]["S"] in words and item["task"]["S"] not in seen]
                    seen.update(item["task"]["S"] for item in new)
                    if new:
                        yield new
                    if start is None:
                        break

    async def _scan_index(self, query: Query) -> AsyncIterator[Task]:
        async for page in self._index_pages(query):
            keys = [item["task"]["S"] for item in page]
            for first in range(0, len(keys), BATCH):
                for task in await self._records(keys[first : first + BATCH]):
                    yield task

    async def _table_pages(self, query: Query, attributes: str) -> AsyncIterator[list[Item]]:
        """The items of this namespace with these statuses, strongly consistent."""
        values = {":with_id": f"{self._namespace}/{query.prefix}", ":with_hash": f"{self._namespace}="}
        condition = "(begins_with(task, :with_id) OR begins_with(task, :with_hash))"
        if len(values[":with_id"].encode()) > KEY_BYTES:
            condition, values = "begins_with(task, :with_hash)", {":with_hash": values[":with_hash"]}
        if query.statuses is not None:
            words = {f":status_{number}": status.value for number, status in enumerate(sorted(query.statuses))}
            condition += f" AND #status IN ({', '.join(words)})"
            values |= words
        where: dict[str, Any] = {
            "FilterExpression": condition,
            "ExpressionAttributeValues": {name: {"S": value} for name, value in values.items()},
            "ProjectionExpression": attributes,
        }
        # Both are reserved words.
        if names := {f"#{name}": name for name in ("status", "record") if f"#{name}" in attributes + condition}:
            where["ExpressionAttributeNames"] = names
        start: Item | None = None
        while True:
            page, start = await self._patiently(self._table.scan, where, start)
            if page:
                yield page
            if start is None:
                return

    async def _scan_table(self, query: Query) -> AsyncIterator[Task]:
        async for page in self._table_pages(query, "task, write_id, #record"):
            for number, item in enumerate(page):
                if number % CHUNK == CHUNK - 1:
                    await asyncio.sleep(0)
                yield self._decoded(item)

    async def _records(self, keys: list[str]) -> list[Task]:
        """Those that are there, strongly consistent, in no order."""
        batches = [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]
        tasks: list[Task] = []
        for items in await together(self._batch(batch) for batch in batches):
            tasks += map(self._decoded, items)
            await asyncio.sleep(0)
        return tasks

    async def _batch(self, keys: list[str]) -> list[Item]:
        items: list[Item] = []
        until = time.monotonic() + self._patience
        while keys:
            found, left = await self._patiently(self._table.batch_get, keys)
            items += found
            if left and len(left) == len(keys):
                if time.monotonic() > until:
                    raise StoreUnavailableError(f"{self._table}: BatchGetItem: {len(left)} keys were not processed")
                await asyncio.sleep(random.uniform(0.02, 0.2))
            keys = left
        return items

    async def _patiently(self, request: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Asks again while there is no answer, for a while."""
        return await patiently(lambda: request(*args, **kwargs), self._patient_for)

    # -- records and items

    def _key(self, task_id: str) -> str:
        key = f"{self._namespace}/{task_id}"
        if len(key) > KEY_BYTES // 4 and len(key.encode()) > KEY_BYTES:
            return f"{self._namespace}={sha256(task_id.encode()).hexdigest()}"
        return key

    def _item(self, task: Task, raw: bytes) -> Item:
        key = self._key(task.id)
        item: Item = {
            "task": {"S": key},
            "status": {"S": task.status.value},
            "write_id": {"S": task.write_id},
            "record": {"S": raw.decode()},
        }
        place = place_of(task)
        if place is not None:
            item["shard"] = {"S": f"{self._namespace}/{crc32(key.encode()) % self._shards}"}
            item["place"] = {"S": place}
        if task.errors and task.errors[-1].type:
            item["error_type"] = {"S": task.errors[-1].type[:100]}
        if self._ttl is not None and task.status.is_final:
            item["expires"] = {"N": str(int(task.update_time.timestamp() + self._ttl) + 1)}
        return item

    def _decoded(self, item: Item) -> Task:
        key = item["task"]["S"]
        try:
            task = Task.decode(item["record"]["S"], version=item["write_id"]["S"])
        except (KeyError, ValueError) as exc:
            raise StoreCorruptedError(
                f"the item {key!r} of {self._table} is damaged, or no task at all: {exc!r}. Repair it, or remove it",
                key,
            ) from exc
        if self._key(task.id) != key:
            raise StoreCorruptedError(f"the item {key!r} of {self._table} holds another task, {task.id!r}", key)
        return task

    def _conflict(self, task: Task, exc: "ConditionError") -> ConflictError:
        # Not every service tells what is stored; then nothing is known.
        current = None if exc.item is None else self._decoded(exc.item)
        return ConflictError(f"another version of {task.id!r} is stored", current)

    def _too_large(self, task: Task, size: int) -> RecordTooLargeError:
        return RecordTooLargeError(
            f"the record of {task.id!r} would take {size:,} bytes, and {self.max_record_bytes:,} are the most; keep "
            "large values elsewhere, in S3 say, and their key here",
            task.id,
            size,
            self.max_record_bytes,
        )

    # -- the table

    async def init(self) -> None:
        await self.create_table()

    async def create_table(self, **settings: Any) -> bool:
        """Creates the table with its index, and waits until it can be used; for a tracker that is not open. A table
        that is there already is checked.

        Args:
            **settings: More arguments of CreateTable, such as `Tags=[...]`, `DeletionProtectionEnabled=True`, or
                `BillingMode="PROVISIONED", ProvisionedThroughput={...}`, which the index gets too; by default what is
                used is paid.

        Returns:
            Whether it is new.

        Raises:
            StoreError: It cannot be created, or the one that is there is another kind of table.
        """
        if self._stack is not None:
            raise StoreError("create_table() comes first: this tracker is open, so its table is there")
        await asyncio.to_thread(self.clock.boot)  # the first look reads a file
        async with AsyncExitStack() as stack:
            await self._table.connect(stack)
            is_new = await self._table.create(settings)
            await self._table.enable_ttl(is_needed=self._ttl is not None)
            await self._table.identify(self._patient_for, may_write=True)
        return is_new
