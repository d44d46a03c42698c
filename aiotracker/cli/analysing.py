"""Commands that ask about a store as a whole: sql, export."""

import asyncio
import csv as csv_format
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from aiotracker import BaseTracker, Status, Where, analytics, open_tracker

from . import options, render
from .changing import print_line
from .remembered import RESERVED
from .session import FAILED, refuse, run, store_url

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Format", "Table", "export", "sql"]

ROWS: Final = 1_000  # that a person wants to see at once
LINE_EVERY: Final = 5.0  # seconds between lines
SKIP: Final = frozenset({RESERVED})


class Format(StrEnum):
    """Of a file."""

    PARQUET = "parquet"
    CSV = "csv"
    JSONL = "jsonl"


class Table(StrEnum):
    """What its rows are."""

    TASKS = "tasks"
    ERRORS = "errors"
    STEPS = "steps"


@options.filtered
def sql(
    ctx: typer.Context,
    filters: Where,
    query: Annotated[str, typer.Argument(metavar="QUERY", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV, with a line of names.")] = False,
    store: options.Store = None,
) -> None:
    """Answers a SELECT over the tables tasks, errors and steps, in DuckDB's SQL; on any kind of store.

    "describe tasks" shows the columns. Not on a terminal: tab-separated, without a head. What the query names is first
    read from the store; filters, where there are any, make that less. The query can change nothing.
    """
    if json and csv:
        raise refuse("--json and --csv: give one of them")
    meter = Meter("read")

    async def work() -> None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            with meter:
                meter.expect(await _total(tracker, filters))
                found = analytics.sql_batches(tracker, query, skip=SKIP, on_progress=meter, **filters)
                try:
                    first = await anext(found)
                except OSError as exc:
                    render.say(str(exc))
                    raise typer.Exit(FAILED) from exc
            await _print(first, found, json=json, csv=csv)

    run(ctx, work())


async def _print(first: Any, rest: AsyncIterator[Any], *, json: bool, csv: bool) -> None:
    names = first.schema.names
    writer = csv_format.writer(sys.stdout, lineterminator="\n")
    if csv:
        writer.writerow(names)
    if not (json or csv) and render.is_terminal():
        shown = (await _rows(first))[: ROWS + 1]
        async for batch in rest:
            if len(shown) <= ROWS:
                shown += (await _rows(batch))[: ROWS + 1 - len(shown)]
        render.table(names, [[_text(value) for value in row] for row in shown[:ROWS]])
        if len(shown) > ROWS:
            render.say(f"more rows are not shown than the first {ROWS:,}; add a limit, or use --csv")
        return
    batch = first
    while batch is not None:
        for row in await _rows(batch):
            if json:
                render.json_line(_encoder.encode(dict(zip(names, map(_number, row), strict=True))))
            elif csv:
                writer.writerow([_text(value) for value in row])
            else:
                render.table(names, [[_text(value) for value in row]])
        batch = await anext(rest, None)


_encoder: Final = msgspec.json.Encoder(enc_hook=str)  # of what JSON has no word for


async def _rows(batch: Any) -> list[tuple[Any, ...]]:
    """Not as dicts: two columns may have one name. On a thread, since the first time zone is read from a file."""
    return await asyncio.to_thread(lambda: list(zip(*map(_values, batch.columns), strict=True)))


def _values(column: Any) -> list[Any]:
    if getattr(column.type, "tz", None) is None:
        return column.to_pylist()  # type: ignore[no-any-return]  # pyarrow has no types
    # Always UTC here, which thereby is not looked up: a small machine may have no list of time zones.
    naive = column.cast(f"timestamp[{column.type.unit}]").to_pylist()
    return [None if time is None else time.replace(tzinfo=UTC) for time in naive]


def _number(value: Any) -> Any:
    """Sums of whole numbers come as decimals."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _text(value: Any) -> str:
    value = _number(value)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raw = _encoder.encode(value).decode()
    return raw[1:-1] if raw.startswith('"') else raw


@options.filtered
def export(
    ctx: typer.Context,
    filters: Where,
    path: Annotated[Path, typer.Argument(metavar="PATH", show_default=False)],
    format: Annotated[
        Format | None, typer.Option("--format", help="By default, what the path ends in.", show_default=False)
    ] = None,
    table: Annotated[Table, typer.Option("--table", help="A row for each task, or each of their errors or steps.")] = (
        Table.TASKS
    ),
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="NAME", help="By default all; may be repeated.")
    ] = None,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Writes tasks into a file: PATH.parquet, PATH.csv, or PATH.jsonl with whole records.

    The file appears when it is whole, and takes the place of what was there. --json: one object.
    """
    meter = Meter("written")

    async def work() -> int:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            with meter:
                meter.expect(await _total(tracker, filters))
                try:
                    return await analytics.export(
                        tracker,
                        path,
                        format=None if format is None else format.value,
                        table=table.value,
                        columns=columns or None,
                        skip=SKIP,
                        on_progress=meter,
                        **filters,
                    )
                except OSError as exc:
                    render.say(f"{path} cannot be written: {exc.strerror or exc}")
                    raise typer.Exit(FAILED) from exc

    tasks = run(ctx, work())
    if json:
        render.json_document({"tasks": tasks, "path": str(path)})
    else:
        print_line(f"{tasks:,} task{'' if tasks == 1 else 's'} written to {path}")


async def _total(tracker: BaseTracker[Any, Any], filters: Where) -> int | None:
    """How many tasks will be read; `None` where finding that out would be a second walk over all of them."""
    if filters.keys() - {"status"}:
        return None
    counts = await tracker.count()
    given = filters.get("status")
    return sum(counts[status] for status in (Status if given is None else given))


class Meter:
    """How far it is: a bar on a terminal, a line now and then elsewhere, on standard error."""

    def __init__(self, done: str) -> None:
        self._done = done
        self._total: int | None = None
        self._next = time.monotonic() + LINE_EVERY
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(
                *columns,
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(done, total=None)

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int | None) -> None:
        """How many tasks there are; `None`: not known."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def __call__(self, tasks: int) -> None:
        """Shows how far it is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=tasks)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY
            of = "" if self._total is None else f" of {self._total:,}"
            render.say(f"{tasks:,}{of} {self._done}")
