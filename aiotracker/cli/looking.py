"""Commands that only read: ls, show, count, errors."""

import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
import typer

from aiotracker import BaseTracker, Query, Status, Task, Where, open_tracker

from . import options, render
from .causes import Causes
from .command import CommandFailed, CommandTimeout
from .remembered import RESERVED
from .session import FAILED, refuse, run, store_url

__all__ = ["count", "errors", "find", "ls", "show"]

PAGE: Final = 100  # tasks that a person wants to see at once


def ls(
    ctx: typer.Context,
    status: options.Statuses = None,
    running: Annotated[
        bool,
        typer.Option("--running", help="Those under way: who is on what, since when, how far, how long is the lease."),
    ] = False,
    prefix: options.Prefix = None,
    error_type: options.ErrorType = None,
    worker: options.Worker = None,
    last_outcome: options.LastOutcome = None,
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
    if running and status:
        raise refuse("--running is a --status of its own: give one of them")
    filters = options.where([Status.IN_PROGRESS] if running else status, prefix, error_type, worker, last_outcome)
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


def count(
    ctx: typer.Context,
    status: options.Statuses = None,
    prefix: options.Prefix = None,
    error_type: options.ErrorType = None,
    worker: options.Worker = None,
    last_outcome: options.LastOutcome = None,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Counts tasks by status. --json: one object."""
    filters = options.where(status, prefix, error_type, worker, last_outcome)

    async def work() -> None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            counts = await _counts(tracker, filters)
        counts["total"] = sum(counts.values())
        if json:
            render.json_document(counts)
        else:
            render.table(("status", "tasks"), [(name, _number(tasks)) for name, tasks in counts.items()])

    run(ctx, work())


def _number(value: int) -> str:
    return f"{value:,}" if render.is_terminal() else str(value)


async def _counts(tracker: BaseTracker[Any, Any], filters: Where) -> dict[str, int]:
    found = await tracker.count(**filters)
    ours = await tracker.load(RESERVED)
    if ours is not None and Query.build(filters).matches(ours):
        found[ours.status] -= 1
    return {status.value: found[status] for status in Status}


def errors(
    ctx: typer.Context,
    prefix: options.Prefix = None,
    error_type: options.ErrorType = None,
    worker: options.Worker = None,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Shows what went wrong, by cause: how often, when first and last, and some ids.

    Of each failed or exhausted task, the latest error counts; messages that differ in numbers, names and addresses
    alone are one cause. Columns: tasks, of these exhausted, type, message, first, last, sample ids. --json: one array.
    """
    filters = options.where([Status.FAILED, Status.EXHAUSTED], prefix, error_type, worker)
    causes = Causes()

    async def work() -> None:
        async with open_tracker(store_url(ctx, store), read_only=True) as tracker:
            async for task in find(tracker, filters):
                causes.add(task)
        found = causes.sorted()
        if json:
            render.json_document(found)
            return
        if not found and render.is_terminal():
            render.say("no task has failed")
            return
        render.table(
            ("tasks", "exhausted", "type", "message", "first", "last", "ids"),
            [
                (
                    _number(cause.count),
                    _number(cause.exhausted),
                    cause.type,
                    cause.message,
                    render.moment(cause.first),
                    render.moment(cause.last),
                    " ".join(cause.ids),
                )
                for cause in found
            ],
        )

    run(ctx, work())


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
        render.say(f"there is no task {task_id!r} in {store_url(ctx, store)}")
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
    page.line("last outcome", task.last_outcome or "")
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
    for step in task.steps:
        took = "" if step.seconds is None else f", {render.span(step.seconds)}"
        again = "" if step.attempts == 1 else f", attempt {step.attempts}"
        page.line("step", f"{step.name}: {step.status}, {render.moment(step.start_time)}{took}{again}")
        if step.result is not None:
            _value(page, "result", step.result, indent=2)
        if step.error is not None:
            page.line("error", f"{step.error.type}: {step.error.message}", indent=2)
    for error in task.errors:
        page.line("error", f"attempt {error.attempt}, {render.moment(error.time)}, by {error.worker or 'nobody'}")
        page.block(error.type, error.message, indent=2)
        # Of a command, the traceback would show our own lines alone.
        if error.type not in (CommandFailed.__name__, CommandTimeout.__name__):
            page.block("traceback", error.traceback, indent=2)
    if task.data is not None:
        _value(page, "data", task.data)
    if task.result is not None:
        _value(page, "result", task.result)


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
