"""SQL over any store: the tables that a query names are read into DuckDB, which has no access to anything else.

They go into a database in a temporary folder, which is removed at the end, so that a store may be larger than memory
and a query may read a table as often as it likes.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from typing_extensions import Unpack

from .._core.query import Where
from .._core.task import Task
from ..errors import InvalidValueError
from ..tracker import BaseTracker
from ._extra import driver, in_thread
from ._tables import TABLES, builder, pieces

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

__all__ = ["sql", "sql_batches"]

T = TypeVar("T")

MEMORY: Final = "512MB"  # that DuckDB takes before it uses its temporary folder
THREADS: Final = 4  # at the most: each takes memory of its own
RESULT_ROWS: Final = 10_000  # of a batch
_TYPES: Final = {"string": "VARCHAR", "int64": "BIGINT", "float64": "DOUBLE", "timestamp": "TIMESTAMPTZ"}
Wanted = Mapping[str, Sequence[str]]  # columns by table
_EVERYTHING: Final[Wanted] = {table: [column.name for column in columns] for table, columns in TABLES.items()}

Parameters = Sequence[Any] | Mapping[str, Any]


async def sql(
    tracker: BaseTracker[Any, Any],
    query: str,
    parameters: Parameters | None = None,
    *,
    skip: Collection[str] = (),
    on_progress: Callable[[int], object] | None = None,
    **where: Unpack[Where],
) -> "pa.Table":
    """Answers a SELECT over the tables `tasks`, `errors` and `steps` of any store, in DuckDB's SQL.

    First what the query names is read: of tables the rows, and of these the columns. That is a walk over all tasks
    that match `where`, and needs no more than permission to read. Each task is as it was at some moment meanwhile.

    Args:
        tracker: The store; may be `read_only`.
        query: One SELECT (or FROM, WITH, SUMMARIZE, DESCRIBE, EXPLAIN ...). It has no access to files, the
            network or Python's variables, and cannot change the store.
        parameters: For `?` or `$name` in the query.
        skip: Ids of tasks that are left out.
        on_progress: Called with the number of tasks read so far.
        **where: See `Where`; reads only tasks that match, which is faster where the store has an index.

    Returns:
        The whole result as a pyarrow Table; `sql_batches` gives a large one in pieces. Times are in UTC.

    Raises:
        InvalidValueError: The query cannot be run; the message is DuckDB's. Mistakes in names are found before the
            store is read.
        ModuleNotFoundError: duckdb or pyarrow is not installed.
        OSError: The folder for temporary files is full.
        StoreError: The store cannot be read.
    """
    batches = sql_batches(tracker, query, parameters, skip=skip, on_progress=on_progress, **where)
    found = [batch async for batch in batches]
    table: pa.Table = driver("pyarrow").Table.from_batches(found)
    return table


async def sql_batches(
    tracker: BaseTracker[Any, Any],
    query: str,
    parameters: Parameters | None = None,
    *,
    skip: Collection[str] = (),
    on_progress: Callable[[int], object] | None = None,
    **where: Unpack[Where],
) -> "AsyncIterator[pa.RecordBatch]":
    """Like `sql`, but gives the result in pieces, as pyarrow's record batches: at least one, which may have no rows.

    Neither the store nor the answer need fit into memory. Arguments and errors are those of `sql`.
    """
    tracker._query(where)  # a filter with a mistake is told before anything is done
    database = _Database()
    try:
        await in_thread(database.open)
        if await database.run(partial(database.prepare, query, parameters)):
            done = 0
            async for tasks, set_size in pieces(tracker, where, skip):
                set_size(await database.run(partial(database.add, tasks)))
                done += len(tasks)
                if on_progress is not None:
                    on_progress(done)
        batch = await database.run(partial(database.ask, query, parameters))
        while batch is not None:
            yield batch
            batch = await database.run(database.more)
    finally:
        await in_thread(database.close)


class _Database:
    """DuckDB, as far as we use it. All but `run` is for threads, one at a time."""

    _connection: "duckdb.DuckDBPyConnection"
    _rows: "pa.RecordBatchReader"

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._builders: dict[str, Callable[[Sequence[Task]], pa.RecordBatch]] = {}

    def open(self) -> None:
        """Imports DuckDB, and makes a database that has access to nothing else."""
        self._arrow, self._duckdb = driver("pyarrow"), driver("duckdb")
        folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="aiotracker-sql-", ignore_cleanup_errors=True)
        )
        with self._written():
            self._connection = self._duckdb.connect(
                os.path.join(folder, "tables.duckdb"),
                config={
                    "memory_limit": MEMORY,
                    "threads": str(min(THREADS, os.cpu_count() or 1)),
                    "temp_directory": folder,
                    "autoinstall_known_extensions": "false",
                    "autoload_known_extensions": "false",
                    "python_enable_replacements": "false",
                },
            )
        self._stack.callback(self._connection.close)
        self._connection.execute("SET TimeZone = 'UTC'")
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET lock_configuration = true")

    def close(self) -> None:
        """Removes it."""
        self._stack.close()

    async def run(self, fn: Callable[[], T]) -> T:
        """Runs a function on a thread; if we are cancelled meanwhile, so is what it asks of DuckDB."""
        return await in_thread(fn, interrupt=self._connection.interrupt)

    def prepare(self, query: str, parameters: Parameters | None) -> bool:
        """Makes the tables, still empty; whether there is anything to be read into them."""
        with self._translated():
            statements = self._connection.extract_statements(query)
        if len(statements) != 1:
            raise InvalidValueError(f"a query is one statement, and these are {len(statements)}: {query!r}")
        kind = statements[0].type.name
        if kind not in ("SELECT", "EXPLAIN", "MULTI"):  # MULTI: PIVOT, of DuckDB 2
            raise InvalidValueError(f"a query is a SELECT and changes nothing; this is {kind}: {query!r}")
        wanted = self._named(query)
        try:
            self._make(wanted)
            self._bind(query, parameters)
        except self._duckdb.Error:
            # What it needs may not have been understood; a mistake is one with all tables there too.
            for table in wanted:
                self._connection.execute(f"DROP TABLE IF EXISTS {table}")
            wanted = _EVERYTHING
            with self._translated():
                self._make(wanted)
                self._bind(query, parameters)
        # In one transaction rows go to the file as they come, and not into a log before.
        self._connection.execute("BEGIN")
        self._builders = {table: builder(table, names) for table, names in wanted.items()}
        return bool(wanted)

    def _named(self, query: str) -> Wanted:
        """What a query names, read from its syntax tree; everything where that does not tell."""
        row = self._connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
        tree = msgspec.json.decode(row[0]) if row else {"error": True}
        if tree.get("error"):
            return _EVERYTHING
        tables: set[str] = set()
        rows: set[str] = set()  # names of whole rows, which a query may use like a column
        alone: set[str] = set()
        names: set[str] = set()
        for node in _nodes(tree):
            kind = node.get("type")
            if kind in ("STAR", "SHOW_REF") or node.get("ref_type") == "NATURAL" or node.get("column_name_alias"):
                return _EVERYTHING
            if kind == "BASE_TABLE":
                tables.add(node["table_name"].lower())
                rows.update((node["table_name"].lower(), node["alias"].lower()))
            path = node.get("column_names") or []
            if len(path) == 1:
                alone.add(path[0].lower())
            names.update(name.lower() for name in (*path, *(node.get("using_columns") or [])))
        if alone & rows:
            return _EVERYTHING
        return {
            table: [name for name in columns if name in names] or [columns[0]]
            for table, columns in _EVERYTHING.items()
            if table in tables
        }

    def _make(self, wanted: Wanted) -> None:
        for table, names in wanted.items():
            types = {column.name: _TYPES[column.kind] for column in TABLES[table]}
            columns = ", ".join(f'"{name}" {types[name]}' for name in names)
            self._connection.execute(f"CREATE TABLE {table} ({columns})")

    def _bind(self, query: str, parameters: Parameters | None) -> Any:
        return self._connection.sql(query, params=parameters)

    def add(self, tasks: Sequence[Task]) -> int:
        """Adds the rows of these tasks; how many bytes they were."""
        size = 0
        for table, build in self._builders.items():
            batch = build(tasks)
            size += batch.nbytes
            if batch.num_rows:
                self._connection.register("incoming", self._arrow.Table.from_batches([batch]))
                with self._written():
                    self._connection.execute(f"INSERT INTO {table} SELECT * FROM incoming")
                self._connection.unregister("incoming")
        return size

    def ask(self, query: str, parameters: Parameters | None) -> "pa.RecordBatch":
        """Runs the query; the first rows, or none of the right types."""
        with self._written():
            self._connection.execute("COMMIT")
        with self._translated():
            relation = self._bind(query, parameters)
            if relation is None:
                raise InvalidValueError(f"this gives no rows: {query!r}")
            self._rows = relation.to_arrow_reader(RESULT_ROWS)
        first = self.more()
        return self._arrow.RecordBatch.from_pylist([], schema=self._rows.schema) if first is None else first

    def more(self) -> "pa.RecordBatch | None":
        """The next rows of the result; `None`: there are no more."""
        with self._translated():
            try:
                return self._rows.read_next_batch()
            except StopIteration:
                return None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (self._duckdb.Error, self._arrow.ArrowException) as exc:
            raise InvalidValueError(f"{exc}".strip()) from exc

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except self._duckdb.IOException as exc:
            raise OSError(f"the temporary database cannot be written: {exc}") from exc


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects of a syntax tree."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
