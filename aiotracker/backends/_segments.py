"""A log of objects, apart from any store: what they are called, what is in them, and which answers count.

    log/03/000000000017.jsonl                        segment 17 of shard 3: a line about itself, and one commit
    checkpoints/03/000000000015-a1b2c3-f/0000.jsonl.gz   all records of the shard as of segment 15, in one or more parts
    floor/03.json                                    the number of that checkpoint; only ever grows

A segment is put under the next number where nothing is stored, so of many writers one wins it. Old segments are
deleted, and then a number is free again: a writer that was stalled for long could put one where nobody reads any
more (a ghost), and believe that it counts. So no segment is deleted before the floor has stood at or above it for an
hour, and no answer about a number counts later than ten minutes after its writer knew to be at the end of the log,
unless the floor, read afterwards, is still below. All of that by the store's own clock, as its answers tell it.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Final

import msgspec

from ..errors import StoreCorruptedError
from ._log import Entry, Index, check_line, closed, commits, parse

__all__ = [
    "CLOSE",
    "Floor",
    "Request",
    "Segment",
    "Times",
    "checkpoint_prefix",
    "chunks_of",
    "floor_key",
    "number_of",
    "pack_part",
    "part_key",
    "raised",
    "read_segment",
    "request_key",
    "segment_key",
    "segment_prefix",
    "shard_of",
    "split",
    "write_segment",
]

PART_BYTES: Final = 8 * 1024 * 1024  # of records in a part of a checkpoint, before it is packed
CHUNK_BYTES: Final = 256 * 1024  # of records that are read before others have their turn
LINES: Final = 500  # of a commit in a checkpoint
CLOSE: Final = timedelta(seconds=10)  # by which the views that two machines have of the store's time may differ
SPACING: Final = 300.0  # seconds between two floors that are remembered


class Times(msgspec.Struct, frozen=True):
    """How long things count, in seconds by the store's clock."""

    trust: float = 600.0  # an answer about the next number, after the end of the log was known
    keep: float = 3600.0  # a segment, after the floor was raised above it


class Segment(msgspec.Struct, frozen=True):
    """What a segment says of itself, in its first line."""

    segment: int  # its number; the first one is 1
    shard: int
    nonce: str  # names this very segment
    before: str  # the nonce of the segment before; empty: this is the first
    time: datetime  # the store's, as its writer knew it
    turn: float = 0.0  # seconds that its writer needs to see that it has its turn, and to write

    @property
    def writer(self) -> str:
        """Which tracker wrote it."""
        return self.nonce.partition("-")[0]


class Request(msgspec.Struct, frozen=True):
    """Somebody wants to write to a shard, and never is in time."""

    nonce: str  # names this very request
    after: int  # the latest segment that it knows
    turn: float  # seconds that it needs
    time: datetime  # the store's, as it knows it

    @property
    def writer(self) -> str:
        """Which tracker asks."""
        return self.nonce.partition("-")[0]


class Floor(msgspec.Struct, frozen=True):
    """Up to where a shard's segments are in a checkpoint, which has been read back."""

    floor: int  # the number of a segment
    nonce: str  # of that segment
    time: datetime  # of that segment
    checkpoint: str  # the name of the checkpoint
    parts: int  # that it has
    earlier: tuple[tuple[int, datetime], ...] = ()  # floors before, oldest first, and when they were raised
    swept: int = 0  # segments up to here were deleted

    def stood(self, at: float, keep: float, modified: datetime | None) -> int:
        """Up to which number segments may be deleted.

        Args:
            at: The store's time.
            keep: Seconds for which a floor must have stood.
            modified: When this floor was raised, by the store's clock.
        """
        floors = [*self.earlier, *([] if modified is None else [(self.floor, modified)])]
        return max((number for number, since in floors if since.timestamp() + keep < at), default=0)


def raised(old: Floor | None, modified: datetime | None, new: Floor, at: float, keep: float) -> Floor:
    """The new floor, which remembers since when earlier ones have stood.

    Args:
        old: The floor before.
        modified: When that was raised, by the store's clock.
        new: The floor to come.
        at: The store's time.
        keep: Seconds for which a floor must have stood before segments are deleted.
    """
    if old is None:
        return new
    earlier = list(old.earlier)
    if modified is not None and (not earlier or (modified - earlier[-1][1]).total_seconds() >= SPACING):
        earlier.append((old.floor, modified))
    # Of those that have stood long enough, the latest says it all.
    while len(earlier) > 1 and earlier[1][1].timestamp() + keep < at:
        del earlier[0]
    return msgspec.structs.replace(new, earlier=tuple(earlier), swept=max(old.swept, new.swept))


# -- names


def shard_of(task_id: str, shards: int) -> int:
    """Which shard a task is in: part of the format."""
    return zlib.crc32(task_id.encode()) % shards


def segment_prefix(shard: int) -> str:
    """What the keys of a shard's segments begin with."""
    return f"log/{shard:02}/"


def segment_key(shard: int, number: int) -> str:
    """The key of a segment."""
    return f"{segment_prefix(shard)}{number:012}.jsonl"


def request_key(shard: int) -> str:
    """The key of the requests of those who want to have a turn."""
    return f"turn/{shard:02}.json"


def checkpoint_prefix(shard: int) -> str:
    """What the keys of a shard's checkpoints begin with."""
    return f"checkpoints/{shard:02}/"


def part_key(shard: int, checkpoint: str, part: int) -> str:
    """The key of a part of a checkpoint."""
    return f"{checkpoint_prefix(shard)}{checkpoint}/{part:04}.jsonl.gz"


def floor_key(shard: int) -> str:
    """The key of a shard's floor."""
    return f"floor/{shard:02}.json"


def number_of(key: str, prefix: str) -> int | None:
    """The number in the key of a segment, or of a part of a checkpoint; `None`: it is none of ours."""
    digits = key[len(prefix) : len(prefix) + 12]
    return int(digits) if len(digits) == 12 and digits.isdecimal() and digits.isascii() else None


# -- segments

_encode: Final = msgspec.json.Encoder().encode
_decode_segment: Final = msgspec.json.Decoder(Segment).decode


def write_segment(about: Segment, data: bytes) -> bytes:
    """The object of a segment.

    Args:
        about: What it says of itself.
        data: One commit.
    """
    return closed(_encode(about)[:-1]) + data


def split(path: str, body: bytes) -> tuple[Segment, int]:
    """What a segment says of itself, and where its commit begins.

    Raises:
        StoreCorruptedError: It is damaged.
    """
    begin = body.find(b"\n") + 1
    line = body[:begin]
    if not check_line(line):
        raise _damaged(path, 0, "its first line is not whole")
    try:
        return _decode_segment(line), begin
    except msgspec.DecodeError as exc:
        raise _damaged(path, 0, f"its first line cannot be read: {exc}") from exc


def read_segment(path: str, body: bytes, begin: int, index: Index) -> None:
    """Applies a segment's commit to the index.

    Raises:
        StoreCorruptedError: It is damaged.
    """
    data = body[begin:]
    parsed = parse(data, begin, index)
    if parsed.damage is not None:
        raise _damaged(path, parsed.damage.offset, parsed.damage.reason)
    if parsed.end != len(body) or not data:
        raise _damaged(path, parsed.end, "it ends before its commit does")


# -- checkpoints


def parts_of(entries: list[Entry]) -> Iterator[list[Entry]]:
    """The records of each part of a checkpoint; of an empty one there is one part."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        part.append(entry)
        size += len(entry.line)
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part or not entries:
        yield part


def pack_part(checkpoint: str, part: int, entries: Iterable[Entry]) -> bytes:
    """The object of a part of a checkpoint."""
    about = closed(_encode({"checkpoint": checkpoint, "part": part})[:-1])
    return gzip.compress(about + b"".join(commits(entries, LINES)), 1, mtime=0)


def chunks_of(path: str, checkpoint: str, part: int, body: bytes) -> list[bytes]:
    """What is in a part, in pieces that are quickly read; each a number of commits.

    Raises:
        StoreCorruptedError: It is damaged.
    """
    try:
        data = gzip.decompress(body)
    except (OSError, EOFError, zlib.error) as exc:
        raise _damaged(path, None, str(exc)) from exc
    begin = data.find(b"\n") + 1
    if data[:begin] != closed(_encode({"checkpoint": checkpoint, "part": part})[:-1]):
        raise _damaged(path, None, "it is of another checkpoint")
    chunks = []
    while begin < len(data):
        mark = data.find(b'\n{"mark":', begin + CHUNK_BYTES)
        end = len(data) if mark == -1 else data.find(b"\n", mark + 1) + 1
        chunks.append(data[begin : end or len(data)])
        begin = end or len(data)
    return chunks


def read_chunk(path: str, chunk: bytes, index: Index) -> None:
    """Applies a piece of a part to the index.

    Raises:
        StoreCorruptedError: It is damaged.
    """
    parsed = parse(chunk, 0, index)
    if parsed.damage is not None or parsed.end != len(chunk):
        raise _damaged(path, None, "a commit in it is not whole")


def _damaged(path: str, offset: int | None, reason: str) -> StoreCorruptedError:
    where = "" if offset is None else f" at byte {offset}"
    return StoreCorruptedError(f"{path} is damaged{where}: {reason}; nothing was changed", path, offset)
