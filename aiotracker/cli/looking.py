"""Commands that only read: ls, show, count, errors."""

import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final, cast

import msgspec
import typer

from aiotracker import BaseTracker, GroupBy, Query, Status, Task, Where, open_tracker
from aiotracker.causes import Cause, Causes
from aiotracker.urls import shown

from . import options, render
from .command import CommandFailed, CommandTimeout
from .remembered import RESERVED
from .session import FAILED, line_for, refuse, run, store_url

__all__ = ["count", "errors", "find", "ls", "show"]

PAGE: Final = 100  # tasks that a person wants to see at once
TOP: Final = 10  # ... and causes
TRACEBACK_LINES: Final = 12  # of a cause: its end says most
BAR: Final = 24  # characters

_OUTCOMES: Final = {
    "error": "error (of the work)",
    "timeout": "timeout (not of the work, but of what it waited for or how long it may take)",
    "lease_lost": "lease_lost (not of the work: its worker died, was paused or cut off, or the lease was taken away)",
    "cancelled": "cancelled (not of the work: its worker was told to stop)",
}


@options.filtered
def ls(
    ctx: typer.Context,
    filters: Where,
    running: Annotated[
        bool,
        typer.Option("--running", help="Those under way: who is on what, since when, how far, how long is the lease."),
    ] = False,
    order_by: Annotated[
        str | None,
        typer.Option(
            "--order-by",
            metavar="FIELD",
            help="id, create_time, update_time, start_time, finish_time, not_before, priority or attempts; "
            "with a - before it descending.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=0, help=f"How many; 0: all. By default {PAGE} on a terminal, and all elsewhere."),
    ] = None,
    only_ids: Annotated[bool, typer.Option("--ids", help="Ids alone, one a line.")] = False,
    null: options.Null = False,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Lists tasks. Not on a terminal: tab-separated, without a head; --json: one JSON object a line.

    Columns: id, status, attempts, time of the last change, latest error. With --running: id, worker, start, attempts,
    progress, seconds left of the lease, note or step under way.
    """
    if running:
        if "status" in filters:
            raise refuse("--running is a --status of its own: give one of them")
        filters["status"] = Status.IN_PROGRESS
    bare = only_ids or null
    most: int | None
    if limit is None:
        most = PAGE if render.is_terminal() and not (bare or json) else None
    else:
        most = limit or None
    order = order_by or ("start_time" if running else None)

    async def work() -> None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            found = _first(find(tracker, filters, order, None if most is None else most + 2), most)
            if bare:
                async for task in found:
                    render.ids([task.id], nul=null)
            elif json:
                async for task in found:
                    render.json_line(task.encode())
            elif running:
                await _table(("id", "worker", "since", "attempts", "progress", "lease", "note"), found, _running_row)
            else:
                await _table(("id", "status", "attempts", "changed", "error"), found, _row)
            if limit is None and most is not None:
                left = sum((await _counts(tracker, filters)).values()) - most
                if left > 0:
                    render.say(f"{left:,} more are not shown; --limit 0 shows all")

    run(ctx, work())


async def find(
    tracker: BaseTracker[Any, Any], filters: Where, order_by: str | None = None, limit: int | None = None
) -> AsyncIterator[Task]:
    """The tasks that match, without the one that is ours."""
    async for task in tracker.find(order_by=order_by, limit=limit, **filters):
        if task.id != RESERVED:
            yield task


async def _first(tasks: AsyncIterator[Task], most: int | None) -> AsyncIterator[Task]:
    shown = itertools.count(1)
    async for task in tasks:
        yield task
        if next(shown) == most:
            return


async def _table(columns: tuple[str, ...], tasks: AsyncIterator[Task], row: Any) -> None:
    if render.is_terminal():
        render.table(columns, [row(task) async for task in tasks])
    else:
        async for task in tasks:
            render.table(columns, [row(task)])


def _row(task: Task) -> tuple[str, ...]:
    error = task.errors[-1] if task.errors and task.status is not Status.SUCCEEDED else None
    message = "" if error is None else f"{error.type}: {error.message}".partition("\n")[0]
    return task.id, task.status, str(task.attempts), render.moment(task.update_time), message


def _running_row(task: Task) -> tuple[str, ...]:
    lease = task.lease
    left = "" if lease is None else _left(lease.expires_at)
    progress = "" if task.progress is None else f"{task.progress:g}"
    step = next((step.name for step in reversed(task.steps) if step.status is Status.IN_PROGRESS), "")
    return (
        task.id,
        "" if lease is None else lease.worker,
        render.moment(task.start_time),
        str(task.attempts),
        progress,
        left,
        task.note or step,
    )


def _left(expires_at: datetime) -> str:
    seconds = (expires_at - datetime.now(UTC)).total_seconds()
    if not render.is_terminal():
        return f"{seconds:.1f}"
    return f"{render.span(seconds)} left" if seconds > 0 else f"over since {render.span(-seconds)}"


@options.filtered
def count(
    ctx: typer.Context,
    filters: Where,
    by: options.By = "status",
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Counts tasks: by status or, with --by, by something else. --json: one object.

    --by error_type and --by fingerprint count by the latest error, also of tasks that have succeeded since; --by worker
    by who holds a task or, if nobody does, whose attempt failed last; --by step by where tasks stand in their pipeline.
    What has nothing of the kind is counted last, under an empty name.
    """

    async def work() -> None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            counts = await _counts(tracker, filters, by)
        if by == "status":
            counts["total"] = sum(counts.values())
        if json:
            render.json_document(counts)
        else:
            nothing = "(none)" if render.is_terminal() else ""
            render.table((by, "tasks"), [(name or nothing, _number(tasks)) for name, tasks in counts.items()])

    run(ctx, work())


def _number(value: int) -> str:
    return f"{value:,}" if render.is_terminal() else str(value)


async def _counts(tracker: BaseTracker[Any, Any], filters: Where, by: str = "status") -> dict[str, int]:
    found = await tracker.count(by=cast(GroupBy, by), **filters)
    ours = await tracker.load(RESERVED)
    if ours is not None and Query.build(filters).matches(ours):
        found[ours.status if by == "status" else ""] -= 1
    if by == "status":
        return {status.value: found[status] for status in Status}
    return {name: tasks for name, tasks in sorted(found.items(), key=_rank) if tasks}


def _rank(item: tuple[str, int]) -> tuple[bool, int, str]:
    name, tasks = item
    return not name, -tasks, name


@options.filtered
def errors(
    ctx: typer.Context,
    filters: Where,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=0, help=f"How many; 0: all. By default {TOP} on a terminal, and all elsewhere."),
    ] = None,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Shows what went wrong, by cause: how often, when, where, some ids, and the line that runs them again.

    Of each failed or exhausted task (or as --status says), the latest error counts; errors of one type and place whose
    messages differ in numbers, names and addresses alone are one cause. Faults of the work come first; then what it ran
    on: workers that died, time limits. Not on a terminal, columns: tasks, of these exhausted, type, message, first,
    last, sample ids, last outcome, place, fingerprint. --json: one array, with the latest traceback of each.
    """
    filters.setdefault("status", [Status.FAILED, Status.EXHAUSTED])
    causes = Causes()

    async def work() -> None:
        url = store_url(ctx, store)
        async with open_tracker(url, read_only=True) as tracker:
            async for task in find(tracker, filters):
                causes.add(task)
        found = causes.sorted()
        most = limit if limit is not None else TOP if render.is_terminal() and not json else 0
        shown = found[: most or None]
        if json:
            render.json_document(shown)
        elif not render.is_terminal():
            render.table((), map(_cause_row, shown))
        elif not found:
            render.say("no task has failed")
        else:
            _print_causes(shown, url)
            if len(found) > len(shown):
                render.say(f"causes not shown: {len(found) - len(shown):,}; --limit 0 shows all")

    run(ctx, work())


def _cause_row(cause: Cause) -> tuple[str, ...]:
    return (
        str(cause.count),
        str(cause.exhausted),
        cause.type,
        cause.message,
        render.moment(cause.first),
        render.moment(cause.last),
        " ".join(cause.ids),
        cause.outcome or "",
        cause.place,
        cause.fingerprint,
    )


def _print_causes(causes: list[Cause], url: str) -> None:
    page = render.Page()
    is_fault: bool | None = None
    for cause in causes:
        if cause.is_fault is not is_fault:
            is_fault = cause.is_fault
            page.head("Faults of the work" if is_fault else "Not the work's fault, but of what it ran on")
        place = f", in {cause.place}" if cause.place else ""
        page.line(f"{cause.count:,} x {cause.type}", f"{cause.message}{place}")
        rest = cause.count - cause.exhausted
        page.line("exhausted", f"{cause.exhausted:,}" + (f", {rest:,} are tried again" if rest else ""), indent=2)
        if cause.outcome not in ("error", None):
            page.line("last outcome", cause.outcome, indent=2)
        page.line("first", f"{render.moment(cause.first)}, last {render.moment(cause.last)}", indent=2)
        page.line("ids", " ".join(cause.ids) + (" ..." if cause.count > len(cause.ids) else ""), indent=2)
        _traceback(page, cause.type, cause.traceback, lines=TRACEBACK_LINES)
        page.line("again", _line_for_reset(cause, url), indent=2)


def _line_for_reset(cause: Cause, url: str) -> str:
    # Without a status, those that have succeeded since would be run again too.
    words = ["--status", "exhausted"] + (["--status", "failed"] if cause.count > cause.exhausted else [])
    return line_for(url, "reset", "--fingerprint", cause.fingerprint, *words)


def _traceback(page: render.Page, kind: str, text: str, *, lines: int | None = None) -> None:
    # Of a command, the traceback would show our own lines alone.
    if kind not in (CommandFailed.__name__, CommandTimeout.__name__):
        end = text.rstrip("\n").split("\n")
        page.block("traceback", "\n".join(end if lines is None else end[-lines:]), indent=2)


def show(
    ctx: typer.Context,
    task_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Shows all that is known about one task: steps, attempts, lease, errors with tracebacks, data and result."""

    async def work() -> Task | None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            return await tracker.load(task_id)

    task = run(ctx, work())
    if task is None:
        render.say(f"there is no task {task_id!r} in {shown(store_url(ctx, store))}")
        raise typer.Exit(FAILED)

    async def print_it() -> None:
        if json:
            render.json_document(task.encode())
        else:
            _print(task)

    run(ctx, print_it())


def _print(task: Task) -> None:
    page = render.Page()
    page.line("id", task.id)
    page.line("status", task.status)
    page.line("attempts", str(task.attempts))
    page.line("fence", str(task.fence))
    page.line("last outcome", _OUTCOMES.get(task.last_outcome or "", ""))
    page.line("priority", str(task.priority) if task.priority else "")
    page.line("progress", "" if task.progress is None else f"{task.progress:g}")
    page.line("note", task.note or "")
    page.line("created", render.moment(task.create_time))
    page.line("started", render.moment(task.start_time))
    page.line("finished", render.moment(task.finish_time))
    page.line("changed", render.moment(task.update_time))
    page.line("not before", render.moment(task.not_before))
    if (lease := task.lease) is not None:
        page.line("held by", lease.worker)
        page.line("since", render.moment(lease.acquired_at), indent=2)
        page.line("lease ends", render.moment(lease.expires_at), indent=2)
    for change in task.changes:
        why = f": {change.reason}" if change.reason else ""
        page.line("by hand", f"{change.verb} {render.moment(change.time)}, by {change.by}{why}")
    _print_steps(page, task)
    for error in task.errors:
        page.line("error", f"attempt {error.attempt}, {render.moment(error.time)}, by {error.worker or 'nobody'}")
        page.block(error.type, error.message, indent=2)
        page.line("fingerprint", error.fingerprint, indent=2)
        _traceback(page, error.type, error.traceback)
    if task.data is not None:
        _value(page, "data", task.data)
    if task.result is not None:
        _value(page, "result", task.result)


def _print_steps(page: render.Page, task: Task) -> None:
    """A line for each step: when, how long, which attempt, and where in the time that all of them took."""
    if not task.steps:
        return
    page.head("steps", blank=False)
    width = max(len(step.name) for step in task.steps)
    bars = _bars(task)
    for step, bar in zip(task.steps, bars, strict=True):
        took = "" if step.seconds is None else f", {render.span(step.seconds)}"
        again = "" if step.attempts == 1 else f", attempt {step.attempts}"
        page.line(
            step.name.ljust(width),
            f"{bar}{step.status}, {render.moment(step.start_time)}{took}{again}",
            indent=2,
            style=step.status,
        )
        if step.result is not None:
            _value(page, "result", step.result, indent=6)
        if step.error is not None:
            page.line("error", f"{step.error.type}: {step.error.message}", indent=6)


def _bars(task: Task) -> list[str]:
    """Which part of the time from the first step's start to the last one's end each of them took."""
    until = max((time for step in task.steps if (time := step.finish_time or step.start_time)), default=None)
    starts = [step.start_time for step in task.steps if step.start_time is not None]
    if not render.is_terminal() or until is None or not starts or until <= min(starts):
        return [""] * len(task.steps)
    begin, whole = min(starts), (until - min(starts)).total_seconds()
    bars = []
    for step in task.steps:
        start = (step.start_time or begin) - begin
        end = (step.finish_time or until) - begin
        left = min(BAR - 1, int(BAR * start.total_seconds() / whole))
        right = max(left + 1, round(BAR * end.total_seconds() / whole))
        bars.append("·" * left + "━" * (right - left) + "·" * (BAR - right) + " ")
    return bars


def _value(page: render.Page, label: str, value: Any, *, indent: int = 0) -> None:
    """Long text in an object stands as text, since a person cannot read it as one line of JSON."""
    runs = value.get("runs") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(runs, list):
        for kept in runs:
            _value(page, "run that failed", kept, indent=indent)
        value = {name: inner for name, inner in value.items() if name != "runs"}
        if not value:
            return
    if not (isinstance(value, dict) and any(isinstance(inner, str) and "\n" in inner for inner in value.values())):
        page.block(label, msgspec.json.format(msgspec.json.encode(value), indent=2).decode(), indent=indent)
        return
    page.line(
        label,
        ", ".join(f"{name} {inner}" for name, inner in value.items() if type(inner) in (int, float, bool)) or "…",
        indent=indent,
    )
    for name, inner in value.items():
        if isinstance(inner, str):
            page.block(name, inner, indent=indent + 2)
        elif type(inner) not in (int, float, bool):
            _value(page, name, inner, indent=indent + 2)
