"""Writes the tasks of a store into one file."""

import os
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, Protocol

from typing_extensions import Unpack

from .._core.query import Where
from .._core.task import Task
from ..errors import InvalidValueError
from ..tracker import BaseTracker
from ._extra import driver, in_thread
from ._tables import builder, check_columns, pieces, schema

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Format", "Table", "export", "to_arrow"]

Format = Literal["parquet", "csv", "jsonl"]
Table = Literal["tasks", "errors", "steps"]

FORMATS: Final = ("parquet", "csv", "jsonl")
GROUP_ROWS: Final = 100_000  # of a row group, in parquet ...
GROUP_BYTES: Final = 32 * 1024 * 1024  # ... unless they are this large


async def to_arrow(
    tracker: BaseTracker[Any, Any],
    *,
    table: Table = "tasks",
    columns: Sequence[str] | None = None,
    order_by: str | None = None,
    limit: int | None = None,
    skip: Collection[str] = (),
    on_progress: Callable[[int], object] | None = None,
    **where: Unpack[Where],
) -> "pa.Table":
    """The tasks that match as a pyarrow Table, for notebooks: `.to_pandas()`, `polars.from_arrow(...)`.

    Args:
        tracker: The store; may be `read_only`.
        table: `tasks`; or `errors` or `steps`, with a row for each that these tasks keep.
        columns: Which, in this order; by default all. Few are faster.
        order_by: As for `find`.
        limit: Tasks at the most.
        skip: Ids of tasks that are left out.
        on_progress: Called with the number of tasks read so far.
        **where: See `Where`.

    Returns:
        A table in memory; a million tasks take some 300 MB.

    Raises:
        InvalidValueError: A filter, table or column is not known.
        ModuleNotFoundError: pyarrow is not installed.
        StoreError: The store cannot be read.
    """
    pyarrow = await in_thread(partial(driver, "pyarrow"))
    names = check_columns(table, columns)
    build = builder(table, names)
    kept = []
    done = 0
    async for tasks, set_size in pieces(tracker, where, skip, order_by=order_by, limit=limit):
        kept.append(await in_thread(partial(build, tasks)))
        set_size(kept[-1].nbytes)
        done += len(tasks)
        if on_progress is not None:
            on_progress(done)
    made: pa.Table = pyarrow.Table.from_batches(kept, schema=schema(table, names))
    return made


async def export(
    tracker: BaseTracker[Any, Any],
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    table: Table = "tasks",
    columns: Sequence[str] | None = None,
    order_by: str | None = None,
    limit: int | None = None,
    skip: Collection[str] = (),
    on_progress: Callable[[int], object] | None = None,
    **where: Unpack[Where],
) -> int:
    """Writes the tasks that match into one file, a piece at a time, so that memory stays bounded.

    The file appears under its name when it is whole, and then takes the place of what was there. Until then it is
    beside it, with `.part` at its end; a failure or cancellation removes it.

    Args:
        tracker: The store; may be `read_only`.
        path: Where to.
        format: `parquet`; `csv`, with a line of names; or `jsonl`: the whole records as they are stored, one JSON
            object a line. By default what the path ends in.
        table: `tasks`; or `errors` or `steps`, with a row for each that these tasks keep. Not for `jsonl`, whose
            records hold both.
        columns: Which, in this order; by default all. Not for `jsonl`.
        order_by: As for `find`; some stores then first read everything.
        limit: Tasks at the most.
        skip: Ids of tasks that are left out.
        on_progress: Called with the number of tasks written so far.
        **where: See `Where`.

    Returns:
        How many tasks were read. Each is in the file as it was at some moment meanwhile.

    Raises:
        InvalidValueError: A filter, format, table or column is not known.
        ModuleNotFoundError: pyarrow is not installed; `jsonl` does not need it.
        OSError: The file cannot be written.
        StoreError: The store cannot be read.
    """
    path = Path(path)
    kind = format or path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise InvalidValueError(f"format is {', '.join(FORMATS)}, not {kind!r}; the path may end in it: tasks.parquet")
    names = check_columns(table, columns)
    if kind == "jsonl" and (table != "tasks" or columns is not None):
        raise InvalidValueError("jsonl holds whole records, with their errors and steps: no table or columns")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    writer: _Writer = _Lines(part) if kind == "jsonl" else _Rows(part, kind, table, names)
    done = 0
    try:
        await in_thread(writer.open)
        async for tasks, set_size in pieces(tracker, where, skip, order_by=order_by, limit=limit):
            set_size(await in_thread(partial(writer.write, tasks)))
            done += len(tasks)
            if on_progress is not None:
                on_progress(done)
        await in_thread(partial(writer.finish, path))
    finally:
        await in_thread(writer.close)
    return done


class _Writer(Protocol):
    """A file that is being written; all on threads, one at a time."""

    def open(self) -> None:
        """Makes it."""

    def write(self, tasks: Sequence[Task]) -> int:
        """Writes these tasks; how many bytes they were."""

    def finish(self, path: Path) -> None:
        """Writes the rest, and gives the file its name."""

    def close(self) -> None:
        """Removes what is not finished."""


class _Lines:
    """JSON Lines of whole records."""

    def __init__(self, part: Path) -> None:
        self._part = part
        self._file: BinaryIO | None = None

    def open(self) -> None:
        self._file = self._part.open("xb")

    def write(self, tasks: Sequence[Task]) -> int:
        assert self._file is not None
        return self._file.write(b"".join([b"%b\n" % task.encode() for task in tasks]))

    def finish(self, path: Path) -> None:
        assert self._file is not None
        self._file.close()
        os.replace(self._part, path)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            finally:
                self._part.unlink(missing_ok=True)


class _Rows:
    """Parquet or CSV, written by pyarrow: rows gather to groups of a size that readers like."""

    def __init__(self, part: Path, kind: str, table: str, names: Sequence[str]) -> None:
        self._part = part
        self._kind = kind
        self._table = table
        self._names = names
        self._writer: Any = None
        self._waiting: list[pa.RecordBatch] = []

    def open(self) -> None:
        self._arrow = driver("pyarrow")
        self._build = builder(self._table, self._names)
        types = schema(self._table, self._names)
        self._part.open("xb").close()  # Python's errors say more
        if self._kind == "parquet":
            self._writer = driver("pyarrow.parquet").ParquetWriter(self._part, types, compression="zstd")
        else:
            self._writer = driver("pyarrow.csv").CSVWriter(self._part, types)

    def write(self, tasks: Sequence[Task]) -> int:
        batch = self._build(tasks)
        self._waiting.append(batch)
        rows = sum(batch.num_rows for batch in self._waiting)
        if rows >= GROUP_ROWS or sum(batch.nbytes for batch in self._waiting) >= GROUP_BYTES:
            self._flush()
        size: int = batch.nbytes
        return size

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._arrow.Table.from_batches(self._waiting))
            self._waiting = []

    def finish(self, path: Path) -> None:
        self._flush()
        self._writer.close()
        os.replace(self._part, path)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._waiting = []
                self._writer.close()
        finally:
            self._part.unlink(missing_ok=True)
