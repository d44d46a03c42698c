"""A simulated machine: processes that take turns at every call to the system, and a disk that loses what is not synced.

Everything follows from one random generator: the same seed gives the same run. Each simulated thread is a real one, but
only one of them runs at a time, and gives way only inside of a call to the simulated system.
"""

import contextlib
import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from aiotracker.backends._filesystem import Disk

__all__ = ["FOLDER", "Killed", "Machine", "Process", "Stuck"]

FOLDER: Final = Path("/simulated")
PAGE: Final = 128  # bytes that reach the disk together; a real one is larger, and tears less
SWITCH: Final = 0.3  # chance that another thread goes on at a call
SWITCH_AT_SYNC: Final = 0.7
PIECES: Final = 3  # into which a write falls at most, for those who look meanwhile
MAX_CALLS: Final = 30_000


class Killed(BaseException):
    """This process is no more; raised by each of its calls."""


class Stuck(AssertionError):
    """Nobody can go on, or nobody gets anywhere."""


class Inode:
    """A file: as processes see it, and as it is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.data = bytearray()
        self.durable = b""
        self.dirty: set[int] = set()  # pages that the system would still write
        self.sizes: list[int] = []  # that it had since it was synced
        self.failed = False  # some of it could not be synced, and is still there
        self.readers: set[Process] = set()  # of something that is not synced
        self.links = 0
        self.holder: OpenFile | None = None  # of its lock

    def mark(self, begin: int, end: int) -> None:
        self.dirty.update(range(begin // PAGE, (max(begin, end - 1)) // PAGE + 1))

    def sync(self) -> None:
        """What is dirty is on the disk now."""
        new = bytearray(self.durable[: len(self.data)].ljust(len(self.data), b"\0"))
        for page in self.dirty:
            piece = self.data[page * PAGE : (page + 1) * PAGE]
            new[page * PAGE : page * PAGE + len(piece)] = piece
        self.durable = bytes(new)
        self.forget()

    def forget(self) -> None:
        """Nothing is dirty any more, on the disk or not."""
        self.dirty.clear()
        self.sizes.clear()
        self.readers.clear()

    def lose_power(self, chance: random.Random) -> None:
        """Of what was not synced, some pages had reached the disk, in any order, and so had the length."""
        size = chance.choice([len(self.durable), *self.sizes])
        new = bytearray(self.durable[:size].ljust(size, b"\0"))
        share = chance.choice((0.0, 0.3, 0.5, 0.8, 1.0))
        for page in sorted(self.dirty):
            if chance.random() < share:
                piece = self.data[page * PAGE : min((page + 1) * PAGE, size)]
                new[page * PAGE : page * PAGE + len(piece)] = piece
        self.data, self.durable, self.failed = new, bytes(new), False
        self.forget()
        self.holder = None


class OpenFile:
    """What descriptors refer to; a lock is its own."""

    def __init__(self, inode: Inode, process: "Process") -> None:
        self.inode = inode
        self.process = process
        self.references = 1
        self.fails = False  # its next sync says that pages were lost


class Process:
    """One simulated process."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self.number = number
        self.dead = False
        self.dirty_before: set[int] = set()  # pages of the log, when it locked
        self.truncate_fails = False  # the next one does
        self.must_live = False  # a kill now would make two faults of one
        self.files: dict[int, OpenFile] = {}
        self.disk = SimulatedDisk(machine, self)

    def die(self) -> None:
        """As by SIGKILL: locks and descriptors are gone, what was written stays written."""
        self.dead = True
        for file in self.files.values():
            if file.inode.holder is file:
                file.inode.holder = None
        self.files.clear()


class Thread:
    """One thread of a simulated process."""

    def __init__(self, machine: "Machine", process: Process, run: Callable[[], None]) -> None:
        self.process = process
        self.waits_for: OpenFile | None = None  # whose lock is another's
        self.done = False
        self.error: BaseException | None = None
        self._machine = machine
        self._run = run
        self._go = threading.Lock()
        self._go.acquire()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        self._go.acquire()
        try:
            self._run()
        except Killed:
            pass
        except BaseException as exc:
            self.error = exc
        self.done = True
        self._machine.back.release()

    def resume(self) -> None:
        """Lets it run until it gives way."""
        self._go.release()
        self._machine.back.acquire()
        if self.done:
            self._thread.join()
            if self.error is not None:
                raise self.error

    def give_way(self) -> None:
        self._machine.back.release()
        self._go.acquire()

    @property
    def can_run(self) -> bool:
        if self.done:
            return False
        return self.process.dead or self.waits_for is None or self.waits_for.inode.holder is None


class Machine:
    """The machine, and what goes wrong on it.

    Args:
        chance: Of everything.

    Attributes:
        trace: What happened, for people.
        calls: How many calls to the system there were.
        kills_at: At which calls whoever makes it is killed: which kind of call, and the how manyeth of that.
        power_loss_at: At which calls the power is lost.
        failing_syncs: Which syncs fail.
        spite: What happens once, where it matters most: "power" is lost when somebody has been answered and not all is
            synced, or when a "mixture" of one's own and what a killed one left is to be synced; a "sync" fails when
            somebody else has read what is to be synced.
        full: From which call on until which one the disk is full.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.trace: list[str] = []
        self.calls = 0
        self.syncs = 0
        self.kills_at: set[tuple[str, int]] = set()
        self.power_loss_at: set[tuple[str, int]] = set()
        self._kinds: Counter[str] = Counter()
        self.failing_syncs: set[int] = set()
        self.spite: set[str] = set()
        self.full = range(0)
        self.lost_power = 0
        self.back = threading.Lock()
        self.back.acquire()
        self.inodes: list[Inode] = []
        self.names: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self._pending: list[tuple[str, ...]] = []  # changes of names since the folder was synced
        self._pending_inodes: list[Inode | None] = []
        self._threads: list[Thread] = []
        self._current: Thread | None = None
        self._favoured: Process | None = None  # goes on before the others, for a while
        self._favoured_until = 0
        self._next_fd = 3
        self._processes = 0

    # -- processes

    def process(self, run: Callable[[Process], None]) -> Process:
        """Starts one."""
        self._processes += 1
        process = Process(self, self._processes)
        self.start(process, lambda: run(process))
        return process

    def start(self, process: Process, run: Callable[[], None]) -> None:
        self._threads.append(Thread(self, process, run))

    def run(self) -> None:
        """Until all threads have ended."""
        while True:
            self._threads = [thread for thread in self._threads if not thread.done]
            if not self._threads:
                return
            ready = [thread for thread in self._threads if thread.can_run]
            if not ready:
                raise Stuck("every thread waits for a lock")
            favoured = [thread for thread in ready if thread.process is self._favoured]
            if favoured and self.calls < self._favoured_until and self.chance.random() < 0.8:
                ready = favoured
            self._current = self.chance.choice(ready)
            self._current.waits_for = None
            self._current.resume()

    def end(self) -> None:
        """Ends what still runs, after an error."""
        for thread in self._threads:
            thread.process.die()
        for thread in self._threads:
            while not thread.done:
                self._current = thread
                with contextlib.suppress(BaseException):
                    thread.resume()

    def call(self, process: Process, what: str, *, quiet: bool = False) -> None:
        """The beginning of a call: here others get a turn, and bad things happen."""
        thread = self._current
        assert thread is not None
        if process.dead:
            raise Killed
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise Stuck("it goes on for ever")
        if not quiet:
            self.trace.append(f"{self.calls:5} p{process.number} {what}")
        kind = what.partition(" ")[0]
        self._kinds[kind] += 1
        moments = {(kind, self._kinds[kind]), ("call", self.calls)}
        if moments & self.power_loss_at or (kind == "answer" and self._is_spiteful("power", self._has_unsynced())):
            self.lose_power()
        elif moments & self.kills_at and not process.must_live:
            self.trace.append(f"      p{process.number} is killed")
            process.die()
            if self.chance.random() < 0.5:
                # Soon: when others go on with what it left.
                self.power_loss_at.add(
                    self.chance.choice((("call", self.calls + 25), ("sync", self._kinds["sync"] + 1)))
                )
        elif self.chance.random() < (SWITCH_AT_SYNC if kind == "sync" else SWITCH):
            thread.give_way()
        if process.dead:
            raise Killed

    def _is_spiteful(self, what: str, is_moment: bool) -> bool:
        """Whether that happens now, where it matters most."""
        if is_moment and what in self.spite and self.chance.random() < 0.3:
            self.spite.remove(what)
            return True
        return False

    def _has_unsynced(self) -> bool:
        return any(inode.dirty for inode in self.inodes[1:])  # the first is that of the lock

    def spites_mixture(self, process: Process, inode: Inode) -> bool:
        """Whether the power is lost as one syncs what is its own together with what a killed one left."""
        left = inode.dirty & process.dirty_before
        return self._is_spiteful("mixture", bool(left and inode.dirty - left))

    def sync_fails(self, process: Process, inode: Inode) -> bool:
        """Whether this one does."""
        self.syncs += 1
        if not inode.dirty:
            return False
        was_read = any(reader is not process for reader in inode.readers)
        if self.syncs in self.failing_syncs or self._is_spiteful("sync", was_read):
            # It opens the store again, and writes, before those go on who have read what it takes back.
            self._favoured, self._favoured_until = process, self.calls + 80
            return True
        return False

    def wait_for(self, file: OpenFile) -> None:
        """Until its lock is free."""
        thread = self._current
        assert thread is not None
        while file.inode.holder is not None:
            thread.waits_for = file
            thread.give_way()
            if file.process.dead:
                raise Killed

    # -- the disk

    def new_inode(self) -> Inode:
        inode = Inode(len(self.inodes))
        self.inodes.append(inode)
        return inode

    def new_fd(self, process: Process, file: OpenFile) -> int:
        self._next_fd += 1
        process.files[self._next_fd] = file
        return self._next_fd

    def change(self, *change: str, inode: Inode | None = None) -> None:
        """Of names: ("create", name), ("rename", old, new) or ("remove", name)."""
        self._apply(self.names, change, inode)
        for each in self.inodes:
            each.links = sum(one is each for one in self.names.values())
        self._pending.append(change)
        self._pending_inodes.append(inode)

    @staticmethod
    def _apply(names: dict[str, Inode], change: tuple[str, ...], inode: Inode | None) -> None:
        if change[0] == "create":
            assert inode is not None
            names[change[1]] = inode
        elif change[1] in names:
            moved = names.pop(change[1])
            if change[0] == "rename":
                names[change[2]] = moved

    def sync_names(self) -> None:
        self.durable_names = dict(self.names)
        self._pending.clear()
        self._pending_inodes.clear()

    def lose_power(self) -> None:
        """Every process ends, and the disk is as it had been written."""
        self.trace.append("      the power is lost")
        self.lost_power += 1
        for thread in self._threads:
            thread.process.die()
        names = dict(self.durable_names)
        keep = self.chance.choice((0.0, 0.5, 1.0))
        for change, inode in zip(self._pending, self._pending_inodes, strict=True):
            if self.chance.random() < keep:
                self._apply(names, change, inode)
        self.names = names
        self.sync_names()
        for each in self.inodes:
            each.lose_power(self.chance)
            each.links = sum(one is each for one in names.values())


class SimulatedDisk(Disk):
    """The calls, as one process makes them."""

    def __init__(self, machine: Machine, process: Process) -> None:
        self._machine = machine
        self._process = process

    def _call(self, what: str, *, quiet: bool = False) -> None:
        self._machine.call(self._process, what, quiet=quiet)

    def _file(self, fd: int) -> OpenFile:
        if self._process.dead:
            raise Killed
        return self._process.files[fd]

    def open(self, path: Path, flags: int) -> int:
        machine, name = self._machine, path.name
        self._call(f"open {name}")
        inode = machine.names.get(name)
        if inode is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            inode = machine.new_inode()
            machine.change("create", name, inode=inode)
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        if flags & os.O_TRUNC and inode.data:
            del inode.data[:]
            inode.sizes.append(0)
        return machine.new_fd(self._process, OpenFile(inode, self._process))

    def dup(self, fd: int) -> int:
        file = self._file(fd)
        file.references += 1
        return self._machine.new_fd(self._process, file)

    def close(self, fd: int) -> None:
        self._call("close", quiet=True)
        file = self._process.files.pop(fd)
        file.references -= 1
        if file.references == 0 and file.inode.holder is file:
            file.inode.holder = None

    def read(self, fd: int, size: int, offset: int) -> bytes:
        self._call(f"read at {offset}", quiet=True)
        file = self._file(fd)
        inode = file.inode
        if inode.dirty:
            inode.readers.add(self._process)
        file.fails = file.fails or inode.failed
        return bytes(inode.data[offset : offset + size])

    def read_file(self, path: Path) -> bytes:
        self._call(f"read {path.name}")
        inode = self._machine.names.get(path.name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return bytes(inode.data)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        machine, inode = self._machine, self._file(fd).inode
        cuts = sorted(machine.chance.randrange(len(data) + 1) for _ in range(machine.chance.randrange(PIECES)))
        begin = 0
        for end in (*cuts, len(data)):
            self._call(f"write {end - begin} to #{inode.number} at {offset + begin}")
            if machine.calls in machine.full and offset + end > len(inode.data):
                raise OSError(errno.ENOSPC, "no space left")
            if len(inode.data) < offset + end:
                inode.data.extend(bytes(offset + end - len(inode.data)))
                inode.sizes.append(offset + end)
            inode.data[offset + begin : offset + end] = data[begin:end]
            inode.mark(offset + begin, offset + end)
            begin = end

    def truncate(self, fd: int, size: int) -> None:
        inode = self._file(fd).inode
        self._call(f"truncate #{inode.number} to {size}")
        if self._process.truncate_fails:
            self._process.truncate_fails = False
            raise OSError(errno.EIO, "input/output error")
        del inode.data[size:]
        inode.failed = False
        inode.sizes.append(size)
        if size % PAGE:
            inode.mark(size - 1, size)

    def sync(self, fd: int) -> None:
        machine, file = self._machine, self._file(fd)
        inode = file.inode
        self._call(f"sync #{inode.number}")
        if machine.spites_mixture(self._process, inode):
            machine.lose_power()
            raise Killed
        if machine.sync_fails(self._process, inode):
            machine.trace.append("      it fails")
            # The system forgets what it could not write: if that was a writer's own, it can take it back. What a
            # disk loses of others, and says to somebody else, nobody can make good.
            files = self._process.files.values()
            writes = any(other.inode.number == 0 and other.inode.holder is other for other in files)
            if writes and machine.chance.random() < 0.3:
                self._process.truncate_fails = True  # then all of it is written later, and nothing is lost
            else:
                # Each who has read some of it is told, once; and each who still does, before it is taken back.
                for process in inode.readers:
                    for other in process.files.values():
                        other.fails = other.fails or other.inode is inode
                if writes:
                    inode.failed = bool(inode.dirty - self._process.dirty_before)
                    inode.dirty &= self._process.dirty_before
                    self._process.must_live = True
            file.fails = False
            raise OSError(errno.EIO, "input/output error")
        if file.fails:
            file.fails = False
            raise OSError(errno.EIO, "input/output error")
        inode.sync()

    def sync_folder(self, path: Path) -> None:
        self._call("sync the folder")
        self._machine.sync_names()

    def size_and_links(self, fd: int) -> tuple[int, int]:
        self._call("look", quiet=True)
        inode = self._file(fd).inode
        return len(inode.data), inode.links

    def identity(self, fd: int) -> tuple[int, int]:
        return -id(self._process), self._file(fd).inode.number

    def lock(self, fd: int) -> None:
        file = self._file(fd)
        self._call(f"lock #{file.inode.number}")
        if file.inode.holder is not file:
            self._machine.wait_for(file)
            file.inode.holder = file
            if file.inode.number == 0:
                logs = [other.inode for other in self._process.files.values() if other.inode is not file.inode]
                self._process.dirty_before = set().union(*(inode.dirty for inode in logs))

    def try_lock(self, fd: int) -> bool:
        file = self._file(fd)
        self._call(f"try to lock #{file.inode.number}")
        if file.inode.holder not in (None, file):
            return False
        file.inode.holder = file
        return True

    def unlock(self, fd: int) -> None:
        file = self._file(fd)
        self._call(f"unlock #{file.inode.number}")
        self._process.must_live = False
        if file.inode.holder is file:
            file.inode.holder = None

    def view(self, fd: int, size: int) -> Any:
        return _View(self._file(fd).inode, size)

    def exists(self, path: Path) -> bool:
        return path == FOLDER or path.name in self._machine.names

    def is_folder(self, path: Path) -> bool:
        return path == FOLDER

    def names(self, folder: Path) -> list[str]:
        self._call("list", quiet=True)
        return sorted(self._machine.names)

    def make_folder(self, path: Path) -> None:
        pass

    def check_local(self, path: Path, allow_unsafe: bool) -> None:
        pass

    def rename(self, old: Path, new: Path) -> None:
        self._call(f"rename {old.name} to {new.name}")
        self._machine.change("rename", old.name, new.name)

    def remove(self, path: Path) -> None:
        self._call(f"remove {path.name}")
        if path.name in self._machine.names:
            self._machine.change("remove", path.name)

    def pause(self, seconds: float) -> None:
        self._call("pause", quiet=True)
        thread = self._machine._current
        assert thread is not None
        thread.give_way()

    def start(self, run: Callable[[], None], name: str) -> None:
        self._machine.start(self._process, run)


class _View:
    def __init__(self, inode: Inode, size: int) -> None:
        self._inode = inode
        self._size = size

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._inode.data[: self._size])[part]

    def close(self) -> None:
        pass
