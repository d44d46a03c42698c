"""What went wrong, by cause: errors that differ in numbers, names and addresses alone are one."""

import re
from datetime import datetime
from typing import Final

import msgspec

from aiotracker import Task

__all__ = ["Cause", "Causes", "cause_of"]

SAMPLES: Final = 3  # ids kept of each cause

_RULES: Final = (
    (re.compile(r"'[^'\n]*'|\"[^\"\n]*\""), "'…'"),
    (re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"), "#"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b|\b(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}\b"), "#"),
    (re.compile(r"(?<!exit code )(?<!\d)\d+(?:[.,:]\d+)*"), "#"),
)


class Cause(msgspec.Struct):
    """Errors of one kind; of each task, the latest counts."""

    type: str
    message: str  # the first line, with what differs left out
    example: str  # the latest message as it is
    count: int
    exhausted: int  # of them; the others are tried again
    ids: list[str]  # some
    first: datetime
    last: datetime


class Causes:
    """Sorts tasks by what went wrong."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Cause] = {}

    def add(self, task: Task) -> None:
        """Counts the latest error of a task, if it has one."""
        if not task.errors:
            return
        error = task.errors[-1]
        key = (error.type, cause_of(error.message, task.id))
        cause = self._found.get(key)
        if cause is None:
            cause = self._found[key] = Cause(*key, error.message, 0, 0, [], error.time, error.time)
        cause.count += 1
        cause.exhausted += task.status == "exhausted"
        if len(cause.ids) < SAMPLES:
            cause.ids.append(task.id)
        cause.first = min(cause.first, error.time)
        if error.time > cause.last:
            cause.last, cause.example = error.time, error.message

    def sorted(self) -> list[Cause]:
        """The most frequent first."""
        return sorted(self._found.values(), key=lambda cause: (-cause.count, cause.type, cause.message))


def cause_of(message: str, task_id: str) -> str:
    """The first line of a message, without what differs from task to task; an exit code is a cause, and stays."""
    line = message.strip().partition("\n")[0]
    if len(task_id) >= 3:
        line = line.replace(task_id, "{}")
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line
