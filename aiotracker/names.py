"""Names that no other process gives: of claims and of writes."""

import functools
import itertools
import os
import secrets
import weakref

__all__ = ["Names"]


class Names:
    """Names that no other process gives."""

    def __init__(self) -> None:
        self.prefix = secrets.token_hex(6)
        self._count = itertools.count(1)
        if hasattr(os, "register_at_fork"):
            # Not asked at each name: a system call costs as much as all the rest of a claim's rules.
            _names.add(self)
            _watch_forks()

    def new(self) -> str:
        return f"{self.prefix}-{next(self._count):x}"

    def start_again(self) -> None:
        """In a forked child, which must not give its parent's names."""
        self.prefix = secrets.token_hex(6)


_names: "weakref.WeakSet[Names]" = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_start_again)


def _start_again() -> None:
    for names in _names:
        names.start_again()
