"""Commands that change: add, reset, ignore, purge, doctor."""

import asyncio
import getpass
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from aiotracker import BaseTracker, Query, Status, Task, Where, open_tracker

from . import options, render
from .ids import IdReader
from .looking import find
from .session import FAILED, refuse, run, store_url

__all__ = ["add", "doctor", "ignore", "purge", "reset"]

Verb = Literal["reset", "ignore", "purge"]
PAST: Final = {"reset": "reset", "ignore": "ignored", "purge": "purged"}
NAMED: Final = 10  # ids that are shown before anything is changed
AT_ONCE: Final = 1_000  # changes under way at once
SPARED: Final = timedelta(hours=1)  # purge leaves younger records


class Pick(msgspec.Struct):
    """What a change would hit, as it was found."""

    ids: list[str] = []
    held: int = 0  # passed over, since somebody holds them
    young: int = 0  # passed over by purge
    missing: list[str] = []  # named, and not there


@options.filtered
def reset(
    ctx: typer.Context,
    filters: Where,
    ids: options.Ids = None,
    from_step: Annotated[
        str | None,
        typer.Option("--from-step", metavar="NAME", help="Forget this step, and those that were first started after."),
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    reason: options.Reason = "",
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Makes tasks pending again, with all their attempts before them: those named, or those that the filters match.

    Finished steps are kept, so that a pipeline goes on at the step that failed.
    """
    change = Changing(
        ctx, store_url(ctx, store), "reset", ids or [], filters, force=force, reason=reason, from_step=from_step
    )
    change.carry_out(dry_run=dry_run, yes=yes, as_json=json)


@options.filtered
def ignore(
    ctx: typer.Context,
    filters: Where,
    ids: options.Ids = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    reason: options.Reason = "",
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Sets tasks aside: nobody runs them until they are reset."""
    change = Changing(ctx, store_url(ctx, store), "ignore", ids or [], filters, force=force, reason=reason)
    change.carry_out(dry_run=dry_run, yes=yes, as_json=json)


@options.filtered
def purge(
    ctx: typer.Context,
    filters: Where,
    ids: options.Ids = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also tasks that somebody holds, and those that were changed within the last hour."
        ),
    ] = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Removes the records of tasks: the store forgets that they were ever run.

    Files with long output of `map` are not removed.
    """
    change = Changing(ctx, store_url(ctx, store), "purge", ids or [], filters, force=force)
    change.carry_out(dry_run=dry_run, yes=yes, as_json=json)


class Changing:
    """One change of many tasks: found, shown, confirmed, and then made to just those."""

    def __init__(
        self,
        ctx: typer.Context,
        url: str,
        verb: Verb,
        ids: list[str],
        filters: Where,
        *,
        force: bool,
        reason: str = "",
        from_step: str | None = None,
    ) -> None:
        if not ids and not filters:
            raise refuse(f"{verb} takes ids or filters, such as --status failed; for all tasks give every status")
        self._ctx = ctx
        self._url = url
        self._verb: Verb = verb
        self._ids = list(dict.fromkeys(ids))
        self._filters = filters
        self._force = force
        self._reason = reason
        self._from_step = from_step

    def carry_out(self, *, dry_run: bool, yes: bool, as_json: bool) -> None:
        """Does it, or shows what it would do."""
        pick = run(self._ctx, self._pick())
        many = f"{len(pick.ids):,} task{'' if len(pick.ids) == 1 else 's'}"
        told = not as_json and (dry_run or not yes)
        if told:
            self._show(pick, f"{many} would be {PAST[self._verb]}", dry_run)
        changed = 0
        if pick.ids and not dry_run:
            if not yes:
                self._confirm(many)
            changed = run(self._ctx, self._apply(pick.ids))
        if as_json:
            render.json_document(
                {
                    "verb": self._verb,
                    "dry_run": dry_run,
                    "matched": len(pick.ids),
                    "changed": changed,
                    "held": pick.held,
                    "young": pick.young,
                    "missing": pick.missing,
                    "ids": pick.ids[:NAMED],
                }
            )
        elif not dry_run:
            print_line(f"{changed:,} {PAST[self._verb]}")
            if not told:
                self._show_passed_over(pick)
        if pick.missing:
            raise typer.Exit(FAILED)

    def _show(self, pick: Pick, headline: str, dry_run: bool) -> None:
        # A dry run's answer is its output; before a question it is for the person alone.
        line = print_line if dry_run else render.say
        line(headline + (":" if pick.ids else ""))
        for task_id in pick.ids[:NAMED]:
            line(f"  {render.safe(task_id)}")
        if len(pick.ids) > NAMED:
            line(f"  ... and {len(pick.ids) - NAMED:,} more")
        self._show_passed_over(pick)

    def _show_passed_over(self, pick: Pick) -> None:
        if pick.held:
            render.say(f"{pick.held:,} passed over: somebody holds them; --force takes their leases away")
        if pick.young:
            render.say(f"{pick.young:,} passed over: changed within the last hour; --force purges them too")
        for task_id in pick.missing:
            render.say(f"there is no task {task_id!r}, or the filters do not match it")

    def _confirm(self, many: str) -> None:
        if not sys.stdin.isatty():
            raise refuse(f"nothing was changed: nobody is here to confirm; --yes {self._verb}s {many}")
        if not typer.confirm(f"{self._verb} {many}?", err=True):
            render.say("nothing was changed")
            raise typer.Exit(FAILED)

    async def _pick(self) -> Pick:
        pick = Pick()
        async with open_tracker(self._url, read_only=True) as tracker:
            found = self._named(tracker, pick) if self._ids else find(tracker, self._filters)
            async for task in found:
                self._judge(task, tracker.now(), pick)
        return pick

    async def _named(self, tracker: BaseTracker[Any, Any], pick: Pick) -> AsyncIterator[Task]:
        query = Query.build(self._filters)
        for task_id in self._ids:
            task = await tracker.load(task_id)
            if task is None or not query.matches(task):
                pick.missing.append(task_id)
            else:
                yield task

    def _judge(self, task: Task, now: datetime, pick: Pick) -> None:
        if not self._force and task.lease is not None and task.lease.expires_at > now:
            pick.held += 1
        elif not self._force and self._verb == "purge" and now - task.update_time < SPARED:
            pick.young += 1
        elif not self._is_so_already(task):
            pick.ids.append(task.id)

    def _is_so_already(self, task: Task) -> bool:
        if self._verb == "ignore":
            return task.status is Status.IGNORED
        return (
            self._verb == "reset"
            and task.status is Status.PENDING
            and not (task.attempts or task.backoff or (task.steps and self._from_step))
        )

    async def _apply(self, ids: list[str]) -> int:
        changed, by = 0, _person()
        async with open_tracker(self._url) as tracker:
            for some in _batches(ids, AT_ONCE):
                if self._verb == "reset":
                    changed += await tracker.reset(
                        *some, from_step=self._from_step, force=self._force, reason=self._reason, by=by, **self._filters
                    )
                elif self._verb == "ignore":
                    changed += await tracker.ignore(
                        *some, force=self._force, reason=self._reason, by=by, **self._filters
                    )
                else:
                    changed += await tracker.purge(*some, force=self._force, by=by, **self._filters)
        return changed


def _person() -> str:
    """Who types this, for the record."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = f"user {os.getuid()}"
    return f"{name}@{socket.gethostname()}"[:200]


def add(
    ctx: typer.Context,
    ids: options.Ids = None,
    null: options.Null = False,
    data: Annotated[
        str | None, typer.Option("--data", metavar="JSON", help="Kept with each of them, as its input.")
    ] = None,
    priority: Annotated[int, typer.Option("--priority", help="Higher ones are worked on first.")] = 0,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Adds pending tasks; those that are there already stay as they are. Without ids, they come from standard input."""
    try:
        value = None if data is None else msgspec.json.decode(data)
    except msgspec.DecodeError as exc:
        raise refuse(f"--data takes JSON: {exc}") from exc

    async def work() -> tuple[int, int]:
        reader = IdReader(sys.stdin.fileno(), nul=null, refuse=render.say) if not ids else None
        new = 0
        async with open_tracker(store_url(ctx, store)) as tracker:
            async for some in _read_batches(reader) if reader is not None else _given(ids or []):
                added = await asyncio.gather(*(tracker.add(task_id, value, priority=priority) for task_id in some))
                new += sum(added)
        return new, 0 if reader is None else reader.refused

    new, refused = run(ctx, work())
    if json:
        render.json_document({"added": new, "refused": refused})
    else:
        print_line(f"{new:,} added")
    if refused:
        raise typer.Exit(FAILED)


async def _given(ids: list[str]) -> AsyncIterator[Sequence[str]]:
    for some in _batches(ids, AT_ONCE):
        yield some


async def _read_batches(reader: IdReader) -> AsyncIterator[Sequence[str]]:
    some: list[str] = []
    async for task_id in reader:
        some.append(task_id)
        if len(some) == AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _batches(ids: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def doctor(
    ctx: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Cut out what is damaged, and keep it aside.")] = False,
    dry_run: options.DryRun = False,
    yes: options.Yes = False,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Looks for damage in the store, and repairs it when asked; what is cut out is set aside, never thrown away.

    Exit status: 0 if the store is sound (or is so now), 1 if it is damaged. --json: one object.
    """
    from aiotracker.doctor import Report, examine

    url = store_url(ctx, store)

    async def look(repairing: bool) -> Report:
        return await examine(url, repair=repairing)

    report = run(ctx, look(False))
    if not report.ok and repair and not dry_run:
        if not yes:
            _print_report(report, render.say)
            if not sys.stdin.isatty():
                raise refuse("nothing was changed: nobody is here to confirm; --yes repairs it")
            if not typer.confirm("cut out what is damaged, and set it aside?", err=True):
                raise typer.Exit(FAILED)
        report = run(ctx, look(True))
    if json:
        render.json_document(msgspec.structs.asdict(report) | {"ok": report.ok})
    else:
        _print_report(report, print_line)
        if not report.ok and not report.repaired:
            render.say("`aiotracker doctor --repair` cuts out what is damaged, and sets it aside")
    raise typer.Exit(0 if report.ok or report.repaired else FAILED)


def _print_report(report: Any, line: Any) -> None:
    sound = "sound" if report.ok else "repaired" if report.repaired else "damaged"
    line(f"{report.url}: {sound}, {report.tasks:,} records")
    for problem in report.problems:
        where = problem.path if problem.offset is None else f"{problem.path}, byte {problem.offset:,}"
        line(f"  {render.safe(where)}: {render.safe(problem.what)}")
        for task_id in problem.lost:
            line(f"    the latest state of {render.safe(task_id)} is lost")
    if report.set_aside:
        line(f"set aside: {report.set_aside}")


def print_line(text: str) -> None:
    """A line of output."""
    sys.stdout.write(text + "\n")
