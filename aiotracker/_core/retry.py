"""When a failed task is run again."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Final

import msgspec

__all__ = ["GiveUp", "Postpone", "Retry"]

MOST: Final = 1e300  # seconds: an int may be larger than any float

ExceptionTypes = type[BaseException] | tuple[type[BaseException], ...]


class GiveUp(Exception):
    """Raised by a body: the task is exhausted now, whatever attempts are left.

    Args:
        reason: Kept as the error's message.
    """


class Postpone(Exception):
    """Raised by a body: not now. The task is pending again, and the attempt is given back.

    Args:
        seconds: How long nobody may run it.
    """

    def __init__(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MOST:
            raise ValueError(f"Postpone takes a number of seconds, 0 or more, not {seconds!r}")
        super().__init__(seconds)
        self.seconds = float(seconds)


class Retry(msgspec.Struct, frozen=True):
    """How often a task is tried, on which errors, and how long `work` waits in between.

    Args:
        max_attempts: Claims that count before the task is exhausted; 1 or more.
        on: Exception classes that are tried again; others exhaust at once.
        never: Exception classes that exhaust at once, even if `on` has them.
            The classes of both also match inside an `ExceptionGroup`.
        delay: Seconds before the second attempt; doubles with each further one. The wait is drawn evenly between
            0 and that ("full jitter"). Or a callable that takes the number of attempts made and returns the exact
            seconds.
        max_delay: Upper bound of the wait, in seconds.

    Raises:
        ValueError: A number is out of range.
        TypeError: `on` or `never` is not made of exception classes.
    """

    max_attempts: int = 3
    on: ExceptionTypes = Exception
    never: ExceptionTypes = ()
    delay: float | Callable[[int], float] = 1.0
    max_delay: float = 300.0

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int):
            raise TypeError(f"max_attempts must be an int, not {self.max_attempts!r}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be 1 or more, not {self.max_attempts}")
        for name, value in (("delay", self.delay), ("max_delay", self.max_delay)):
            if name == "delay" and callable(value):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number of seconds, not {value!r}")
            if not 0 <= value <= MOST:
                raise ValueError(f"{name} must be 0 or more seconds, and finite, not {value!r}")
        for name, classes in (("on", self.on), ("never", self.never)):
            for cls in classes if isinstance(classes, tuple) else (classes,):
                if not (isinstance(cls, type) and issubclass(cls, BaseException)):
                    raise TypeError(f"{name} must be an exception class or a tuple of them, not {cls!r}")

    def allows(self, exc: BaseException) -> bool:
        """Whether this error is worth another attempt; the number of attempts is not looked at."""
        causes = list(leaves(exc))
        if any(isinstance(cause, (GiveUp, self.never)) for cause in causes):
            return False
        return any(isinstance(cause, self.on) for cause in causes)

    def wait(self, attempts: int, chance: float) -> float:
        """Seconds before the next attempt.

        Args:
            attempts: How many were made, 1 or more.
            chance: A random number in [0, 1).
        """
        if callable(self.delay):
            return max(0.0, min(float(self.delay(attempts)), self.max_delay))
        # The exponent is bounded since 2.0 ** 1024 is an OverflowError.
        return chance * min(self.max_delay, self.delay * 2.0 ** min(attempts - 1, 64))


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The error itself and, of a group, all that it holds."""
    waiting = [exc]  # instead of a recursion, which may be deeper than Python allows
    while waiting:
        exc = waiting.pop()
        yield exc
        if isinstance(exc, BaseExceptionGroup):
            waiting.extend(reversed(exc.exceptions))


def postponed(exc: BaseException) -> float | None:
    """The seconds that a body asked to wait, if that is all that it raised."""
    waits: list[float] = []
    for cause in leaves(exc):
        if isinstance(cause, Postpone):
            waits.append(cause.seconds)
        elif not isinstance(cause, BaseExceptionGroup):
            return None
    return max(waits)


def later(now: datetime, seconds: float) -> datetime:
    """`now` plus some seconds, or the end of time where the calendar ends before."""
    try:
        return now + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=now.tzinfo)
