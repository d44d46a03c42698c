"""The log on S3 with one of its remedies taken out: the simulation must notice each, or a test of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any, Final
from unittest import mock

from aiotracker.backends._archive import Archive, Stood
from aiotracker.backends._segments import Floor, Segment, split
from aiotracker.backends._shard import Shard, _Pending, _State
from tests.backends import test_s3_log_protocol as protocol
from tests.services.simulated_s3 import Object, SimulatedStore

__all__ = ["MUTATIONS", "NAMED"]


async def _yes(*args: Any, **more: Any) -> bool:
    return True


async def _no(*args: Any, **more: Any) -> bool:
    return False


_put = SimulatedStore.put


def _put_over(self: SimulatedStore, key: str, body: bytes, absent: bool, match: str | None) -> str:
    return _put(self, key, body, absent and not key.startswith("log/"), match)


def _put_floor_over(self: SimulatedStore, key: str, body: bytes, absent: bool, match: str | None) -> str:
    is_floor = key.startswith("floor/")
    return _put(self, key, body, absent and not is_floor, None if is_floor else match)


_floor, _put_segment, _counts = Archive.floor, Shard._put_segment, Shard._counts


async def _put_after_the_floor(self: Shard, state: _State, pending: _Pending) -> bool:
    stood = await _floor(self._archive)

    async def counts(state: _State, answered: Sequence[float | None]) -> bool:
        async def before() -> Stood:
            return stood

        with mock.patch.object(self._archive, "floor", before):
            return await _counts(self, state, answered)

    with mock.patch.object(self, "_counts", counts):
        return await _put_segment(self, state, pending)


async def _trusts_without_a_date(self: Shard, state: _State, answered: Sequence[float | None]) -> bool:
    return await _counts(self, state, [state.known_at if at is None else at for at in answered])


def _stood_at_once(self: Floor, at: float, keep: float, modified: datetime | None) -> int:
    return self.floor


async def _settle_nothing(self: Shard, pending: _Pending) -> bool:
    if pending is not self._pending or pending.may_be_stored:
        self._pending = None
        return False
    return await _settle(self, pending)


_settle = Shard._settle
_get = Archive.get


@contextmanager
def _checkpoints_unread() -> Iterator[None]:
    put_new = Archive._put_new
    sent: dict[tuple[int, str], bytes] = {}

    async def put(self: Archive, key: str, body: bytes) -> None:
        await put_new(self, key, body)
        sent[id(self), key] = body

    async def get(self: Archive, key: str) -> Any:
        stored, at = await _get(self, key)
        body = sent.pop((id(self), key), None)
        if body is not None and isinstance(stored, Object):
            return stored._replace(body=body), at
        return stored, at

    with mock.patch.object(Archive, "_put_new", put), mock.patch.object(Archive, "get", get):
        yield


async def _forgets_its_own(self: Shard, state: _State) -> list[str] | None:
    nonces = await _read_after_conflict(self, state)
    return nonces if nonces is None else []


_read_after_conflict, _read_one = Shard._read_after_conflict, Shard._read_one


def _read_unchained(self: Shard, state: _State, number: int, body: bytes) -> Segment | None:
    state.nonce = split("", body)[0].before
    return _read_one(self, state, number, body)


MUTATIONS: Final[dict[str, Callable[[], AbstractContextManager[Any]]]] = {
    "a segment is put without If-None-Match": lambda: mock.patch.object(SimulatedStore, "put", _put_over),
    "the floor is put without If-Match": lambda: mock.patch.object(SimulatedStore, "put", _put_floor_over),
    "answers are trusted for ever": lambda: mock.patch.object(Shard, "_counts", _yes),
    "answers without a date are trusted": lambda: mock.patch.object(Shard, "_counts", _trusts_without_a_date),
    "the floor is read before the PUT": lambda: mock.patch.object(Shard, "_put_segment", _put_after_the_floor),
    "a checkpoint is not read back": _checkpoints_unread,
    "segments are deleted at once": lambda: mock.patch.object(Floor, "stood", _stood_at_once),
    "a PUT that was not answered is not sent again": lambda: mock.patch.object(Shard, "_settle", _settle_nothing),
    "a write of one's own is not recognised": lambda: mock.patch.object(
        Shard, "_read_after_conflict", _forgets_its_own
    ),
    "what is forgotten has not counted": lambda: mock.patch.object(Shard, "_has_counted", _no),
    "what is forgotten has counted": lambda: mock.patch.object(Shard, "_has_counted", _yes),
    "segments need not follow each other": lambda: mock.patch.object(Shard, "_read_one", _read_unchained),
    "a refusal is told without a look": lambda: mock.patch.object(Shard, "_is_latest", _yes),
}

# Without these nothing untrue is told in the simulation: one makes it known earlier what has become of a write, the
# other one is there for stores that are damaged.
NAMED: Final[dict[str, Callable[[], None]]] = {
    "a PUT that was not answered is not sent again": lambda: (
        protocol.TestLostAnswers().test_the_same_put_is_sent_again_as_it_is_before_any_other("lost")
    ),
    "segments need not follow each other": lambda: (
        protocol.TestReading().test_segments_that_do_not_follow_each_other_are_damage()
    ),
}
