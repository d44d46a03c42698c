from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotracker._core.retry import GiveUp, Postpone, Retry, later, leaves, postponed

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def group(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("several", errors)


@pytest.mark.parametrize(
    ("retry", "exc", "allowed"),
    [
        (Retry(), ValueError(), True),
        (Retry(), GiveUp("enough"), False),
        (Retry(), group(ValueError(), GiveUp("enough")), False),
        (Retry(), KeyboardInterrupt(), False),
        (Retry(on=OSError), ValueError(), False),
        (Retry(on=OSError), ConnectionError(), True),
        (Retry(on=OSError), group(ValueError(), OSError()), True),
        (Retry(on=OSError), group(ValueError(), group(OSError())), True),
        (Retry(on=(OSError, KeyError)), KeyError(), True),
        (Retry(on=()), ValueError(), False),
        (Retry(never=ValueError), ValueError(), False),
        (Retry(never=ValueError), KeyError(), True),
        (Retry(never=ValueError), group(KeyError(), group(ValueError())), False),
        (Retry(on=OSError, never=ConnectionError), ConnectionResetError(), False),
        (Retry(on=BaseException), SystemExit(), True),
    ],
)
def test_which_errors_are_worth_another_attempt(retry: Retry, exc: BaseException, allowed: bool) -> None:
    assert retry.allows(exc) == allowed


@given(attempts=st.integers(1, 10**9), chance=st.floats(0, 0.999), delay=st.floats(0, 1e6), most=st.floats(0, 1e6))
def test_the_wait_doubles_within_its_bound_and_is_drawn_evenly_below(
    attempts: int, chance: float, delay: float, most: float
) -> None:
    wait = Retry(delay=delay, max_delay=most).wait(attempts, chance)
    assert 0 <= wait <= most
    if attempts < 10 and delay * 2 ** (attempts - 1) <= most:
        assert wait == pytest.approx(chance * delay * 2 ** (attempts - 1))


@pytest.mark.parametrize(("given", "expected"), [(7.0, 7.0), (-1.0, 0.0), (1e9, 300.0), (float("nan"), 0.0)])
def test_a_callable_says_the_exact_wait_within_the_bound(given: float, expected: float) -> None:
    asked: list[int] = []

    def delay(attempts: int) -> float:
        asked.append(attempts)
        return given

    assert Retry(delay=delay).wait(2, 0.1) == expected
    assert asked == [2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_attempts": 0}, ValueError),
        ({"max_attempts": True}, TypeError),
        ({"max_attempts": 1.5}, TypeError),
        ({"delay": -1}, ValueError),
        ({"delay": float("inf")}, ValueError),
        ({"delay": "1"}, TypeError),
        ({"max_delay": float("nan")}, ValueError),
        ({"max_delay": True}, TypeError),
        ({"max_delay": int}, TypeError),
        ({"on": ValueError()}, TypeError),
        ({"on": int}, TypeError),
        ({"never": (ValueError, "KeyError")}, TypeError),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Retry(**arguments)


@pytest.mark.parametrize(
    ("exc", "seconds"),
    [
        (Postpone(5), 5.0),
        (ValueError(), None),
        (group(Postpone(1), group(Postpone(9))), 9.0),
        (group(Postpone(1), ValueError()), None),
    ],
)
def test_a_body_postpones_where_it_raises_nothing_else(exc: BaseException, seconds: float | None) -> None:
    assert postponed(exc) == seconds


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), True, "5"])
def test_postpone_takes_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ValueError, match="Postpone takes a number of seconds"):
        Postpone(seconds)


def test_leaves_are_the_group_and_all_in_it() -> None:
    inner = ValueError()
    middle = ExceptionGroup("m", [inner])
    outer = ExceptionGroup("o", [middle])
    assert list(leaves(outer)) == [outer, middle, inner]


def test_time_ends_where_the_calendar_does() -> None:
    assert later(NOW, 1.5) == NOW + timedelta(seconds=1.5)
    assert later(NOW, 1e300) == later(NOW, 1e12) == datetime.max.replace(tzinfo=UTC)
