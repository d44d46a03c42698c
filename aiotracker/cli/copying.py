"""Commands for stores as a whole: copy, init."""

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from aiotracker import BaseTracker, open_tracker
from aiotracker.copying import CopyReport, Progress
from aiotracker.copying import copy as copy_store
from aiotracker.urls import shown

from . import options, render
from .changing import print_line
from .session import FAILED, refuse, run, store_url

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["copy", "init"]

PROBLEMS_SHOWN: Final = 20
LINE_EVERY: Final = 5.0  # seconds between lines
PHASES: Final = {"copy": "copied", "verify": "compared"}


def copy(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="FROM", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TO", show_default=False)],
    held: Annotated[
        bool, typer.Option("--held", help="Also tasks that somebody holds, as they are, with their leases.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Also where TO has another task of this id, which is lost."),
    ] = False,
    dry_run: options.DryRun = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Afterwards, read both stores again and compare.")
    ] = True,
    json: options.Json = False,
) -> None:
    """Copies all tasks of one store to another, and compares. Both are URLs of stores.

    FROM may also be abstract-tracker:DIR or abstract-tracker:s3://BUCKET/PREFIX, for the files of abstract_tracker
    (?endpoint_url=, ?region= and ?profile= may follow the latter).

    Started again, it copies only what is missing or has changed: so it may be interrupted, and a large store can be
    copied while workers are at it, and once more when they have been stopped. What has gone on in TO stays.

    Left out are tasks that somebody holds: stop the workers first. With --held they are copied with their leases; TO
    keeps them held until these end, and how the holder ends them it does not learn.

    Exit status: 0 only if all is there. --json: one object.
    """

    async def work() -> CopyReport:
        try:
            with Bar() if sys.stderr.isatty() else Lines() as display:
                return await copy_store(
                    source,
                    target,
                    held=held,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    verify=verify,
                    on_progress=display,
                )
        except ModuleNotFoundError as exc:
            raise refuse(str(exc)) from exc
        except asyncio.CancelledError:
            render.say("interrupted; started again, it goes on where it was")
            raise

    report = run(ctx, work())
    if json:
        render.json_document(msgspec.structs.asdict(report) | {"ok": report.ok})
    else:
        print_line(_summary(report))
        if report.failed:
            _print_problems(report)
    raise typer.Exit(0 if report.ok else FAILED)


def _summary(report: CopyReport) -> str:
    parts = [f"{report.created:,} new", f"{report.replaced:,} replaced", f"{report.unchanged:,} there already"]
    if report.newer:
        parts.append(f"{report.newer:,} further on in the target")
    if report.passed_over:
        parts.append(f"{report.passed_over:,} other file{'' if report.passed_over == 1 else 's'} passed over")
    if report.verified is not None:
        parts.append(f"{report.verified:,} compared and there")
    tense = "would be copied: " if report.dry_run else ""
    return f"{_tasks(report.read)}, {tense}{', '.join(parts)}"


def _tasks(number: int) -> str:
    return f"{number:,} task{'' if number == 1 else 's'}"


def _print_problems(report: CopyReport) -> None:
    kinds = ", ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in report.failed.items())
    render.say(f"not all is there: {kinds}")
    for problem in report.problems[:PROBLEMS_SHOWN]:
        render.say(f"  {render.safe(problem.id)}: {problem.kind.replace('_', ' ')}: {render.safe(problem.what)}")
    if (more := sum(report.failed.values()) - PROBLEMS_SHOWN) > 0:
        render.say(f"  ... and {more:,} more; --json shows up to a thousand")
    if "held" in report.failed:
        render.say("stop the workers, and copy again; or --held copies tasks with their leases, see --help")


class Lines:
    """For logs: a line every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_EVERY

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __call__(self, progress: Progress) -> None:
        """Shows how far it is."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY
            of = "" if progress.total is None else f" of {progress.total:,}"
            render.say(f"{progress.done:,}{of} {PHASES[progress.phase]}")


class Bar:
    """For a person: a bar for copying and one for comparing, drawn by a thread of its own."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)
        self._bar_of: dict[str, TaskID] = {}

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows how far it is."""
        phase = progress.phase
        if phase not in self._bar_of:
            self._bar_of[phase] = self._bars.add_task(PHASES[phase], total=None)
        self._bars.update(self._bar_of[phase], completed=progress.done, total=progress.total)


def init(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Argument(metavar="[URL]", show_default=False)] = None,
    json: options.Json = False,
    store: options.Store = None,
) -> None:
    """Makes a store: PostgreSQL's schema, DynamoDB's table. May be called again.

    The other kinds of stores make themselves when they are first opened; they are opened, and thereby made.
    """
    url = url or store_url(ctx, store)

    async def work() -> bool:
        try:
            tracker: BaseTracker[Any, Any] = open_tracker(url)
        except ModuleNotFoundError as exc:
            raise refuse(str(exc)) from exc
        await tracker.init()
        async with tracker:
            return type(tracker).init is not BaseTracker.init

    is_needed = run(ctx, work())
    if json:
        render.json_document({"url": shown(url), "needs_init": is_needed})
    else:
        rest = "" if is_needed else "; stores of this kind also make themselves when they are first opened"
        print_line(f"{shown(url)} is ready{rest}")
