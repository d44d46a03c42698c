"""The store remembers the command that runs on it, so that two different ones do not share one store by mistake.

It stands in the data of one reserved task, which `add` makes atomically on every kind of store: of two commands that
start at once, one is first, and the other finds it. That task is ignored, so that nobody ever runs it.
"""

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from aiotracker import BaseTracker, Status, Task

from .command import Template

__all__ = ["RESERVED", "OtherCommand", "remember"]

RESERVED: Final = "aiotracker:map"  # never listed, counted or changed, unless it is named
_NEVER: Final = datetime(9999, 1, 1, tzinfo=UTC)  # for the moment before it is ignored


class OtherCommand(Exception):
    """The store belongs to another command."""


async def remember(tracker: BaseTracker[Any, Any], template: Template, *, replace: bool) -> None:
    """Makes sure that this command is the store's.

    Args:
        tracker: The store.
        template: The command.
        replace: Instead of whatever was there.

    Raises:
        OtherCommand: The store remembers another one; the message shows both, and says what to do.
        TrackerError: The store cannot be used.
    """
    record = await tracker.load(RESERVED)
    if record is None:
        await tracker.add(RESERVED, msgspec.to_builtins(template), not_before=_NEVER)
        record = await tracker.load(RESERVED)
    stored = _stored(record)
    if stored != template:
        if not replace:
            raise OtherCommand(
                "this store belongs to another command\n"
                f"  its command: {stored or 'none that can be read'}\n"
                f"  this one:    {template}\n"
                "use another store (--store), or let this command take its place (--new-command): tasks that have "
                "succeeded stay as they are"
            )
        async with tracker.run(RESERVED, force=True) as task:
            task.data = msgspec.to_builtins(template)
        record = await tracker.load(RESERVED)
    if record is not None and record.status is not Status.IGNORED:
        await tracker.ignore(RESERVED)


def _stored(record: Task | None) -> Template | None:
    try:
        return None if record is None else msgspec.convert(record.data, Template)
    except msgspec.ValidationError:
        return None
