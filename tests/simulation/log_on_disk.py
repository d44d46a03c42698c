"""The log engine on a simulated machine, and the oracle that says whether it kept its promises."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final
from unittest import mock

from aiotracker import Status, StoreCorruptedError, StoreError, Task
from aiotracker.backends import _log_files
from aiotracker.backends._log import Index, Wanted
from aiotracker.backends._log_files import Files

from .disk import FOLDER, Machine, Process
from .oracle import Broken, Oracle, Seen, seen_of

__all__ = ["simulate"]

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
# So that a log of some kilobytes goes through all that a large one does.
SMALL: Final[dict[str, Any]] = {"READ_BYTES": 700, "COMPACT_LINES": 2, "CAUGHT_UP_BYTES": 300, "LOOKS": 5}


class Append:
    """Adds one name to what a record has gone through; a `take` only where nobody else holds it."""

    def __init__(self, task_id: str, name: str, kind: str, pad: int) -> None:
        self.task_id = task_id
        self.name = name
        self.kind = kind
        self._pad = pad

    def __call__(self, task: Task | None, now: datetime) -> Task | None:
        seen = seen_of(task)
        if self.kind == "take" and seen and seen[-1].startswith("take"):
            return task
        if self.kind == "give" and not (seen and seen[-1].split()[:2] == ["take", self.name.split()[1]]):
            return task
        data = {"seen": [*seen, self.name], "pad": "x" * self._pad}
        if task is None:
            return Task(id=self.task_id, status=Status.PENDING, data=data, create_time=now, update_time=now)
        return task.replace(data=data)


class Run:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.machine = Machine(self.chance)
        self.oracle = Oracle()
        self.commits = 0
        self._serial = 0
        self._plan()

    @property
    def trace(self) -> list[str]:
        """What happened, for people."""
        return self.machine.trace

    @property
    def losses(self) -> int:
        """Of power."""
        return self.machine.lost_power

    def _plan(self) -> None:
        chance, machine = self.chance, self.machine
        length = chance.choice((150, 300, 600))
        machine.kills_at = {self._moment(length) for _ in range(chance.choice((0, 0, 1, 2, 4)))}
        machine.power_loss_at = {self._moment(length) for _ in range(chance.choice((0, 1, 1, 2)))}
        if chance.random() < 0.3:
            machine.failing_syncs = {chance.randrange(60) for _ in range(chance.choice((1, 2)))}
        machine.spite = {what for what in ("power", "sync", "mixture") if chance.random() < 0.25}
        if chance.random() < 0.2:
            begin = chance.randrange(length)
            machine.full = range(begin, begin + chance.randrange(80))
        self._writers = chance.choice((1, 2, 2, 3))
        self._reader = chance.random() < 0.5
        self._rounds = chance.randrange(3, 12)
        self._compacts = chance.choice((0.0, 0.1, 0.4))
        self._ids = [f"task-{n}" for n in range(chance.choice((1, 2, 4)))]

    def _moment(self, length: int) -> tuple[str, int]:
        # Those between a write and its sync are few, and the ones that matter most.
        kind, share = self.chance.choice((("call", 1), ("write", 4), ("sync", 12), ("answer", 12), ("rename", 100)))
        return kind, self.chance.randrange(1 + length // share)

    def run(self) -> None:
        boots = 0
        while True:
            lost_power = self.machine.lost_power
            for _ in range(self._writers):
                self.machine.process(self._write)
            if self._reader and boots:
                self.machine.process(self._read)
            self.machine.run()
            boots += 1
            if self.machine.lost_power == lost_power and boots > 1:
                break
        self._end()

    def _end(self) -> None:
        """Whatever has happened: who opens the store now finds all that was promised."""
        machine = self.machine
        machine.kills_at, machine.power_loss_at, machine.failing_syncs = set(), set(), set()
        machine.full, machine.spite = range(0), set()
        for inode in machine.inodes:
            inode.failed = False
        if self.chance.random() < 0.7:
            machine.lose_power()
        machine.process(self._look)
        machine.run()

    # -- processes

    def _files(self, process: Process, *, read_only: bool = False) -> Files:
        return Files(
            FOLDER,
            fsync=True,
            read_only=read_only,
            allow_unsafe=False,
            max_record_bytes=100_000,
            now=lambda: NOW,
            disk=process.disk,
        )

    def _write(self, process: Process) -> None:
        who, left = f"p{process.number}", self._rounds
        while left > 0:
            files = self._files(process)
            calls: list[Any] = []
            files.on_thread = calls.append
            try:
                files.open()
                files.read()
                while left > 0:
                    left -= 1
                    try:
                        self._commit(process, who, files)
                    except StoreError as exc:
                        if files._broken is not None or self.chance.random() < 0.2:
                            raise
                        self._check_error(who, exc)
                    if self.chance.random() < self._compacts:
                        files.start_compaction()
                    while calls:
                        calls.pop(0)()
            except StoreError as exc:
                left -= 1
                self._check_error(who, exc)
            while calls:
                calls.pop(0)()
            files.close()
            while calls:
                calls.pop(0)()

    def _commit(self, process: Process, who: str, files: Files) -> None:
        promised = self.oracle.promised()
        if self.chance.random() < 0.2:
            wanted = [Wanted(look=_state)]
        else:
            wanted = [self._wanted(who) for _ in range(self.chance.choice((1, 1, 1, 2, 4)))]
        appends = {
            (want.task_id, want.transition.name)
            for want in wanted
            if isinstance(want.transition, Append) and want.transition.kind == "append"
        }
        self.oracle.together.append(appends)
        self.machine.trace.append(f"      {who} commits {[_name(want) for want in wanted]}")
        try:
            taken = files.commit(wanted)
        except StoreError:
            if files._broken is None:
                # A failure that was taken back leaves no trace.
                self.oracle.never.update(name for _, name in appends)
            raise
        self.commits += 1
        self.machine.trace.append(f"      {who} has committed")
        assert taken == len(wanted)
        for want in wanted:
            if want.error is not None:
                raise want.error
            if want.look is None:
                self.oracle.answer(who, want.task_id, seen_of(want.answer), promised)
            else:
                self.oracle.snapshot(who, want.answer, promised)
        self.machine.call(process, "answer")

    def _wanted(self, who: str) -> Wanted:
        self._serial += 1
        if self.chance.random() < 0.1:
            return Wanted(look=_state)
        kind = self.chance.choice(("append", "append", "take", "give"))
        task_id, pad = self.chance.choice(self._ids), self.chance.choice((0, 0, 0, 50, 400))
        name = f"{kind:6} {who}" + ("" if kind == "give" else f" {self._serial:04}")
        return Wanted(task_id, Append(task_id, name, kind, pad), f"w{self._serial}")

    def _read(self, process: Process) -> None:
        who, left = f"reader p{process.number}", self._rounds
        while left > 0:
            files = self._files(process, read_only=True)
            try:
                files.open()
                files.read()
                while left > 0:
                    left -= 1
                    self._ask(process, who, files)
            except StoreError as exc:
                left -= 1
                if "no log" not in str(exc) or self.oracle.told:  # it may not have been created yet
                    self._check_error(who, exc)
            files.close()

    def _ask(self, process: Process, who: str, files: Files) -> None:
        promised, want = self.oracle.promised(), Wanted(look=_state)
        files.commit([want])
        self.oracle.snapshot(who, want.answer, promised)
        self.machine.call(process, "answer")

    def _look(self, process: Process) -> None:
        files = self._files(process)
        files.open()
        files.read()
        self._ask(process, "whoever comes last", files)
        files.close()

    def _check_error(self, who: str, exc: StoreError) -> None:
        self.machine.trace.append(f"      {who}: {exc}")
        expected = ("the disk of", "input/output error", "was given up until", "could not be synced", "no store")
        if isinstance(exc, StoreCorruptedError) or not any(text in str(exc) for text in expected):
            raise Broken(f"{who}: {exc}") from exc


def _state(index: Index) -> dict[str, Seen]:
    return {task_id: seen_of(index.get(task_id)) for task_id in index.entries}


def _name(want: Wanted) -> str:
    return f"{want.task_id}: {want.transition.name}" if isinstance(want.transition, Append) else "look"


@contextmanager
def _small() -> Iterator[None]:
    with mock.patch.multiple(_log_files, **SMALL):
        yield


def simulate(seed: int) -> Run:
    """Runs one seed.

    Raises:
        AssertionError: A promise was broken, with `trace`: what led to it.
    """
    run = Run(seed)
    logger = logging.getLogger("aiotracker")
    was_off, logger.disabled = logger.disabled, True  # torn tails and full disks are what this is about
    try:
        with _small():
            run.run()
    except Exception as exc:
        run.machine.end()
        exc.trace = run.machine.trace  # type: ignore[attr-defined]  # for who replays it
        raise
    finally:
        logger.disabled = was_off
    return run
