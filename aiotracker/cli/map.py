"""`aiotracker map`: a command for each of many ids, resumable, retried, shared by any number of terminals."""

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from aiotracker import Postpone, Retry, RunningTask, Task, WorkSummary, open_tracker, stop_on_signals
from aiotracker.urls import path_of

from . import options, render
from .command import CannotStart, CommandFailed, CommandTimeout, OutputError, Runner, Template
from .ids import IdReader
from .progress import Bar, Display, Lines, LogLines, Tally
from .remembered import remember
from .session import FAILED, INTERRUPTED, USAGE, line_for, refuse, run, store_url

__all__ = ["map_ids"]

RUNS_KEPT: Final = 5  # failed runs, in a task's data
WAIT_FOR_ROOM: Final = 1.0  # seconds, where the machine cannot start one more process
FILES_A_JOB: Final = 8  # descriptors: pipes on both sides, output files, the watch on the process


def map_ids(
    ctx: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND [ARG]...", show_default=False, help="{} in it stands for the id.")
    ],
    ids: Annotated[
        Path | None,
        typer.Option("--ids", metavar="FILE", help="Where the ids are, one a line; by default standard input."),
    ] = None,
    null: options.Null = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Commands at once; by default one a processor.")
    ] = None,
    max_attempts: Annotated[int, typer.Option("--max-attempts", min=1, help="How often each id is tried.")] = 3,
    delay: Annotated[
        float,
        typer.Option("--delay", min=0, metavar="SECONDS", help="Before the second attempt; doubled with each further."),
    ] = 1.0,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="A command that runs longer has failed.")
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(
            "--lease", metavar="SECONDS", help="After a crash, others take over what this process held after so long."
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            min=0,
            metavar="SECONDS",
            help="After Ctrl-C, what commands under way have to end; by default as long as they take.",
        ),
    ] = None,
    shell: Annotated[
        bool, typer.Option("--shell", help="The command is one string for /bin/sh; ids are quoted in it.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Where output over 8 KB goes. By default beside a file: or folder: store, named like it with -output "
            "at the end, and for other stores .aiotracker-output in the current folder.",
        ),
    ] = None,
    new_command: Annotated[
        bool, typer.Option("--new-command", help="Let this command take the place of the one that the store remembers.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="At the end, print the summary as a JSON object.")] = False,
    store: options.Store = None,
) -> None:
    """Runs a command once for each id; the ids come from standard input, one a line.

    Every {} in the command is replaced by the id; where there is none, the id is added as the last argument. No shell
    is involved, whatever is in the id, unless --shell is given; write {} without quotes then. The command finds
    AIOTRACKER_ID, AIOTRACKER_ATTEMPT and AIOTRACKER_FENCE (a number that grows with each claim of the id) in its
    environment, and nothing on its standard input.

    Interrupted and started again, it goes on where it was. Started in several terminals on one store, the work is
    shared; each of them ends when all of its ids are done. Exit code, standard output and standard error are kept with
    each task (`aiotracker show ID`): of the run that succeeded in its result, of those that failed in its data.

    The first Ctrl-C lets the commands under way end, the second ends them. Exit status: 0 if all ids have succeeded, 1
    if not, 2 if it was called wrongly, 130 if it was interrupted.
    """
    if shell and len(command) != 1:
        raise refuse("with --shell the command is one string: put it in quotes")
    if not command[0]:
        raise refuse("the command is empty")
    for name, value in (("--timeout", timeout), ("--lease", lease)):
        if value is not None and not 0 < value < float("inf"):
            raise refuse(f"{name} takes a positive number of seconds")
    template = Template(command, shell)
    url = store_url(ctx, store)
    try:
        fd = sys.stdin.fileno() if ids is None else os.open(ids, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise refuse(
            f"ids cannot be read from {'standard input' if ids is None else ids}: {exc.strerror or exc}"
        ) from exc
    if os.isatty(fd):
        render.say("ids from the terminal, one a line; Ctrl-D ends them")
    job = Job(
        url=url,
        template=template,
        fd=fd,
        nul=null,
        jobs=jobs or _processors(),
        retry=Retry(max_attempts, delay=delay),
        timeout=timeout,
        grace=float("inf") if grace is None else grace,
        options={} if lease is None else {"lease": lease},
        output=output.absolute() if output is not None else output_folder(url),
        new_command=new_command,
        as_json=json,
    )
    code = run(ctx, job.run())
    raise typer.Exit(code)


def output_folder(url: str) -> Path:
    """Beside a store of files; in the current folder otherwise."""
    scheme, _, rest = url.partition(":")
    path = path_of(rest.partition("?")[0]).rstrip("/")
    return Path(f"{path}-output" if scheme in ("file", "folder") and path else ".aiotracker-output").absolute()


class Job(msgspec.Struct, kw_only=True):
    """One call of `map`."""

    url: str
    template: Template
    fd: int
    nul: bool
    jobs: int
    retry: Retry
    timeout: float | None
    grace: float
    options: dict[str, Any]
    output: Path
    new_command: bool
    as_json: bool

    async def run(self) -> int:
        """Does it all; the exit status."""
        if self.template.is_one_program:
            await asyncio.to_thread(self._check_program)
        _raise_limits(64 + FILES_A_JOB * self.jobs)
        runner = Runner(self.output, self.timeout)
        async with open_tracker(self.url, retry=self.retry, **self.options) as tracker:
            await remember(tracker, self.template, replace=self.new_command)
            with _at_once(runner) as signals:
                async with stop_on_signals(*signals) as stop:
                    return await self._work(tracker, runner, stop)

    def _check_program(self) -> None:
        # Before anything is claimed, and before there is a store.
        import shutil

        name = "/bin/sh" if self.template.shell else self.template.command[0]
        if shutil.which(name) is None:
            there = os.path.exists(name) and "/" in name
            why = "it cannot be executed" if there else "there is no such command"
            raise CannotStart(f"{name!r} cannot be run: {why}")

    async def _work(self, tracker: Any, runner: Runner, stop: asyncio.Event) -> int:
        ids = IdReader(self.fd, nul=self.nul, refuse=lambda line: display.say(line))
        tally = Tally(ids, self.jobs)
        display: Display = Bar(tally) if sys.stderr.isatty() else Lines(tally)
        began = asyncio.get_running_loop().time()
        body = Body(self, runner, tally, display, stop)
        async with display:
            with _warnings_to(display):
                try:
                    summary = await tracker.work(
                        body,
                        ids=ids,
                        concurrency=self.jobs,
                        retry=self.retry,
                        stop=stop,
                        grace=self.grace,
                        on_done=body.done,
                    )
                except asyncio.CancelledError:
                    _take_back_cancel()
                    summary = tally.summary(asyncio.get_running_loop().time() - began)
                tally.finish(summary)
        code = 0
        if body.fatal is not None:
            code = USAGE if isinstance(body.fatal, CannotStart) else FAILED
        elif summary.stopped or summary.released:
            code = INTERRUPTED
        elif not summary.ok or ids.refused:
            code = FAILED
        self._tell(summary, body.fatal, ids.refused)
        return code

    def _tell(self, summary: WorkSummary, fatal: Exception | None, refused: int) -> None:
        render.say(str(summary))
        if fatal is not None:
            render.say(f"stopped: {fatal}")
        elif summary.stopped:
            render.say("interrupted; started again, it goes on where it was")
        if refused:
            render.say(f"passed over, since they cannot be ids: {refused:,}")
        if summary.exhausted or summary.unmet:
            render.say(
                f"failed for good: {summary.exhausted + summary.unmet:,}; see `{line_for(self.url, 'errors')}`, and "
                f"run them again after `{line_for(self.url, 'reset', '--status', 'exhausted')}`"
            )
        if self.as_json:
            render.json_document(
                msgspec.structs.asdict(summary)
                | {
                    "seconds": round(summary.seconds, 3),
                    "rate": round(summary.rate, 3),
                    "refused": refused,
                    "ok": summary.ok and fatal is None and not refused,
                }
            )


class Body:
    """What is done with one claimed task."""

    def __init__(self, job: Job, runner: Runner, tally: Tally, display: Display, stop: asyncio.Event) -> None:
        self._job = job
        self._runner = runner
        self._tally = tally
        self._display = display
        self._stop = stop
        self.fatal: Exception | None = None

    async def __call__(self, task: RunningTask[Any, Any]) -> None:
        self._tally.began(task.id)
        try:
            await self._run(task)
        except CommandFailed:
            self._tally.failed(task.id, again=task.attempts < self._job.retry.max_attempts)
            raise
        except BaseException as exc:
            self._tally.put_off(task.id, released=isinstance(exc, asyncio.CancelledError))
            raise
        finally:
            self._tally.ended()

    async def _run(self, task: RunningTask[Any, Any]) -> None:
        template = self._job.template
        try:
            outcome = await self._runner.run(template.argv(task.id), task.id, attempt=task.attempts, fence=task.fence)
        except CannotStart as exc:
            if not template.is_one_program:
                raise CommandFailed(str(exc)) from None
            self._give_up(exc)
        except OutputError as exc:
            self._give_up(exc)
        except OSError as exc:
            self._display.say(f"no room for one more process ({exc.strerror}); {task.id} is tried again")
            raise Postpone(WAIT_FOR_ROOM) from exc
        else:
            kept = outcome.as_json()
            if outcome.timed_out or outcome.problem is not None:
                _keep_failure(task, kept)
            if outcome.timed_out:
                raise CommandTimeout(f"ran longer than its timeout of {self._job.timeout:g} s")
            if outcome.problem is not None:
                raise CommandFailed(outcome.problem)
            task.result = kept

    def _give_up(self, exc: Exception) -> None:
        """Every other id would meet the same; this one is given back."""
        self.fatal = self.fatal or exc
        self._stop.set()
        raise Postpone(0) from exc

    def done(self, task: Task) -> None:
        """A task has become final here."""
        self._tally.done(task)
        if task.status != "succeeded":
            self._display.failure(task)


def _keep_failure(task: RunningTask[Any, Any], kept: dict[str, Any]) -> None:
    data = task.data
    if data is not None and not isinstance(data, dict):
        return  # somebody's own value, which has no room for ours; the error's message tells the exit code
    runs = (data or {}).get("runs")
    before = runs if isinstance(runs, list) else []
    task.data = {**(data or {}), "runs": [*before, {"attempt": task.attempts, **kept}][-RUNS_KEPT:]}


@contextmanager
def _at_once(runner: Runner) -> Iterator[list[signal.Signals]]:
    """What a second signal does: it cancels, so that commands are ended and tasks given back. A third one kills.

    Yields:
        The signals that are not ignored: those that a script in the background ignores stay so.
    """
    me = asyncio.current_task()
    assert me is not None
    loop = asyncio.get_running_loop()
    caught = 0

    def cancel(number: int, frame: object) -> None:
        nonlocal caught
        caught += 1
        loop.call_soon_threadsafe(me.cancel if caught == 1 else runner.kill)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, cancel) for number in wanted}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_to(display: Display) -> Iterator[None]:
    logger = logging.getLogger("aiotracker")
    handler, propagate = LogLines(display), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _take_back_cancel() -> None:
    me = asyncio.current_task()
    while me is not None and me.cancelling():
        me.uncancel()


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1  # not on Linux


def _raise_limits(files: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        most = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
