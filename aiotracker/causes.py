"""What went wrong, by cause: errors that differ in numbers, names and addresses alone are one. See `Causes`."""

from datetime import datetime
from typing import Final

import msgspec

from ._core.fingerprint import fingerprint_of, gist, place
from ._core.task import LastOutcome, Status, Task

__all__ = ["Cause", "Causes"]

SAMPLES: Final = 3  # ids kept of each cause
DETAILED: Final = 1000  # causes with a traceback, so that messages that nothing groups do not fill the memory


class Cause(msgspec.Struct):
    """Tasks whose latest error has one cause."""

    fingerprint: str  # for `find(fingerprint=...)`, `reset(fingerprint=...)`
    outcome: LastOutcome | None  # how their latest claims ended
    type: str  # of the error
    message: str  # the first line, with what differs left out
    place: str  # file and function that raised it; empty: it was raised nowhere
    example: str  # the latest message as it is
    traceback: str  # of the latest; empty: there is none, or there are over a thousand causes
    count: int  # tasks
    exhausted: int  # of them; the others are tried again
    ids: list[str]  # some
    first: datetime  # when a task first had this error, as far as records remember
    last: datetime

    @property
    def is_fault(self) -> bool:
        """Whether the work is at fault, and not what it ran on: a worker that died, a time limit, an order to stop."""
        return self.outcome in ("error", None)


class Causes:
    """Sorts tasks by what went wrong.

    Holds one `Cause` for each, however many tasks there are::

        causes = Causes()
        async for task in tracker.find(status={"failed", "exhausted"}):
            causes.add(task)
        for cause in causes.sorted():
            ...
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, LastOutcome | None], Cause] = {}

    def add(self, task: Task) -> None:
        """Counts a task by its latest error, if it has one."""
        if not task.errors:
            return
        error = task.errors[-1]
        key = (fingerprint_of(error, task.id), task.last_outcome)
        cause = self._found.get(key)
        if cause is None:
            cause = self._found[key] = Cause(
                *key,
                error.type,
                gist(error.message, task.id),
                place(error.traceback),
                error.message,
                "",
                0,
                0,
                [],
                error.time,
                error.time,
            )
            cause.traceback = error.traceback if len(self._found) <= DETAILED else ""
        cause.count += 1
        cause.exhausted += task.status is Status.EXHAUSTED
        if len(cause.ids) < SAMPLES:
            cause.ids.append(task.id)
        for earlier in task.errors:
            if earlier.time < cause.first and fingerprint_of(earlier, task.id) == key[0]:
                cause.first = earlier.time
        if error.time > cause.last:
            cause.last, cause.example = error.time, error.message
            if cause.traceback:
                cause.traceback = error.traceback

    def sorted(self) -> list[Cause]:
        """Faults of the work first; of these, and of the others, the most frequent first."""
        return sorted(
            self._found.values(),
            key=lambda cause: (not cause.is_fault, -cause.count, cause.type, cause.message, cause.fingerprint),
        )
