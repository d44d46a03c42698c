import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotracker._core.codec import MAX_DEPTH, MAX_ID_BYTES, check_id, copied, find_problem, plain, typed
from aiotracker._core.task import Failure, Lease, Status, Step, Task

NOW = datetime(2026, 1, 1, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@dataclasses.dataclass
class Receipt:
    number: str
    amount: int = 0


@dataclasses.dataclass
class Loose:
    anything: Any


class Page(msgspec.Struct):
    depth: int = 0
    seen: datetime | None = None


class Model(pydantic.BaseModel):
    x: int
    names: list[str] = []


class Secret(pydantic.BaseModel):
    word: pydantic.SecretStr


class Row(TypedDict):
    a: int


class Pair(NamedTuple):
    one: int
    two: str


class Colour(enum.Enum):
    RED = "red"


class Opaque:
    pass


@given(value=values)
def test_what_json_holds_is_stored_as_it_is_and_comes_back(value: Any) -> None:
    assert find_problem(value, "data") is None
    stored = plain(value, Any, "data")
    assert stored == value
    assert repr(copied(stored)) == repr(stored)
    task = Task(id="a", status=Status.PENDING, create_time=NOW, update_time=NOW, data=value)
    assert Task.decode(task.encode()).data == value


def test_a_stored_value_shares_nothing_with_what_was_given() -> None:
    value = {"a": [1, {"b": 2}]}
    stored = plain(value, Any, "data")
    value["a"].append(3)
    assert stored == {"a": [1, {"b": 2}]}
    pages = [Page(1)]
    assert plain(pages, list[Page], "data") is not pages


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "data is nan, which JSON cannot hold"),
        ([1, -math.inf], "data[1] is -inf"),
        ({"a": {"b": b"x"}}, "data['a']['b'] is of type bytes, which JSON cannot hold; decode it"),
        ({"a": bytearray()}, "data['a'] is of type bytearray"),
        ({"a": {1, 2}}, "data['a'] is of type set, which JSON cannot hold; use sorted(...)"),
        ({1: "x"}, "data has the key 1 of type int"),
        ({"\ud800": 1}, "data has the key '\\ud800', which is no Unicode text"),
        (["\ud800"], "data[0] is no Unicode text"),
        (2**64, "data is an int beyond 64 bits; store it as a str"),
        (-(2**63) - 1, "data is an int beyond 64 bits"),
        (NOW, "data is of type datetime, which JSON cannot hold; use .isoformat()"),
        (Receipt("a"), "name the type: data_type="),
        (Page(), "name the type"),
        (Model(x=1), "name the type"),
        (Opaque(), "data is of type Opaque, which JSON cannot hold"),
        (Colour.RED, "data is of type Colour"),
        (Status.PENDING, "data is of type Status"),
        (Path("x"), "data is of type PosixPath"),
        ((1, (2, {3})), "data[1][1] is of type set"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_the_path_to_it(value: Any, says: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        plain(value, Any, "data")
    assert says in str(raised.value)


def test_what_holds_itself_or_is_too_deep_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="holds itself"):
        plain(loop, Any, "data")
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert find_problem(deep, "data") is None
    assert find_problem([deep], "data") is not None


@pytest.mark.parametrize(
    ("value", "kind", "stored"),
    [
        (Receipt("R", 3), Receipt, {"number": "R", "amount": 3}),
        ([Receipt("R")], list[Receipt], [{"number": "R", "amount": 0}]),
        ({"k": Receipt("R")}, dict[str, Receipt], {"k": {"number": "R", "amount": 0}}),
        (Receipt("R"), Receipt | None, {"number": "R", "amount": 0}),
        (None, Receipt | None, None),
        (None, int, None),
        (Page(1, NOW), Page, {"depth": 1, "seen": "2026-01-01T00:00:00Z"}),
        (Model(x=1), Model, {"x": 1, "names": []}),
        ([Model(x=1)], list[Model], [{"x": 1, "names": []}]),
        (Model(x=1), Model | None, {"x": 1, "names": []}),
        ({"a": 1}, Row, {"a": 1}),
        (Pair(1, "x"), Pair, [1, "x"]),
        ((1, 2), tuple[int, int], [1, 2]),
        ({1, 2}, set[int], [1, 2]),
        (b"abc", bytes, "YWJj"),
        ({1: "a"}, dict[int, str], {"1": "a"}),
        (Colour.RED, Colour, "red"),
        (NOW, datetime, "2026-01-01T00:00:00Z"),
        (1, float, 1),
        (1, object, 1),
        ({"a": 1}, Mapping[str, Any], {"a": 1}),
        ([1], Sequence[int], [1]),
        (Loose((1, 2)), Loose, {"anything": [1, 2]}),
    ],
)
def test_a_declared_type_is_stored_as_plain_json_and_comes_back(value: Any, kind: Any, stored: Any) -> None:
    assert plain(value, kind, "result") == stored
    back = typed(stored, kind, "result")
    if isinstance(value, Loose):
        assert back == Loose([1, 2])  # as documented: a tuple is an array
    else:
        assert back == value
        assert type(back) in (type(value), float)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("x", int, "result does not fit int: Expected `int`, got `str`"),
        ({"a": "x"}, Row, "result does not fit Row"),
        ({"x": "y"}, Model, "result does not fit Model"),
        (Receipt("R"), Page, "result is Receipt(number='R', amount=0), and would come back as Page("),
        (1, "int", "result does not fit int"),
        (Loose(b"x"), Loose, "result.anything is b'x', and would come back as 'eA=='"),
        (Loose({1}), Loose, "result.anything is {1}, and would come back as [1]"),
        (Loose({1: True}), Loose, "result.anything is {1: True}, and would come back as {'1': True}"),
        (Loose([NOW]), Loose, "result.anything[0] is datetime.datetime("),
        (Loose({"a": Receipt("R")}), Loose, "result.anything['a'] is Receipt("),
        (Loose(math.nan), Loose, "result['anything'] is nan"),
        (Secret(word=pydantic.SecretStr("hush")), Secret, "would come back as SecretStr"),
        (Opaque(), Receipt, "result cannot be stored: JSON cannot hold a Opaque"),
        (Receipt("R"), object, "would come back as"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused(value: Any, kind: Any, says: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        plain(value, kind, "result")
    assert says in str(raised.value)


class Silent:
    """Says nothing about equality."""

    def __init__(self, x: int) -> None:
        self.x = x

    def model_dump(self, mode: str) -> Any:
        return {"x": self.x}

    @classmethod
    def model_validate(cls, value: Any) -> "Silent":
        return cls(value["x"])


def test_what_cannot_be_compared_is_taken_by_its_type() -> None:
    assert plain(Silent(3), Silent, "result") == {"x": 3}


@pytest.mark.parametrize("task_id", ["a", "\x00", "/", "é" * (MAX_ID_BYTES // 2), "x" * MAX_ID_BYTES])
def test_any_text_of_some_length_is_an_id(task_id: str) -> None:
    assert check_id(task_id) == task_id


@pytest.mark.parametrize("task_id", ["", "x" * (MAX_ID_BYTES + 1), "é" * (MAX_ID_BYTES // 2 + 1), "\ud800"])
def test_other_text_is_none(task_id: str) -> None:
    with pytest.raises(ValueError, match="a task's id"):
        check_id(task_id)


@pytest.mark.parametrize("task_id", [17, None, b"x"])
def test_what_is_no_text_is_none_and_the_error_says_what_to_write(task_id: Any) -> None:
    with pytest.raises(TypeError, match="use str"):
        check_id(task_id)


times = st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 2), max_value=datetime(9999, 1, 1))
failures = st.builds(
    Failure, attempt=st.integers(0, 9), time=times, worker=texts, type=texts, message=texts, traceback=texts
)
tasks = st.builds(
    Task,
    id=texts,
    status=st.sampled_from(list(Status)),
    attempts=st.integers(0, 9),
    fence=st.integers(0, 2**53),
    data=values,
    result=values,
    steps=st.lists(
        st.builds(Step, name=texts, status=st.just(Status.FAILED), start_time=st.none() | times, result=values),
        max_size=2,
    ).map(tuple),
    errors=st.lists(failures, max_size=2).map(tuple),
    create_time=times,
    update_time=times,
    not_before=st.none() | times,
    priority=st.integers(-5, 5),
    progress=st.none() | st.floats(0, 1),
    note=st.none() | texts,
    lease=st.none()
    | st.builds(Lease, token=texts, worker=texts, acquired_at=times, expires_at=times, ttl=st.floats(0.1, 1e6)),
    version=st.none() | st.just("v"),
)


@given(task=tasks)
def test_a_record_comes_back_from_its_stored_form_without_its_version(task: Task) -> None:
    raw = task.encode()
    assert b"\n" not in raw
    assert Task.decode(raw, version="w") == task.replace(version="w")
    assert Task.decode(raw.decode()) == task.replace(version=None)


def test_the_stored_form_has_words_that_a_person_can_grep_and_leaves_out_what_is_not_set() -> None:
    task = Task(id="a", status=Status.IN_PROGRESS, create_time=NOW, update_time=NOW, version="v")
    assert task.encode() == (
        b'{"id":"a","status":"in_progress","create_time":"2026-01-01T00:00:00Z","update_time":"2026-01-01T00:00:00Z"}'
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"id":"a"}',
        b'{"id":"a","status":"done","create_time":"2026-01-01T00:00:00Z","update_time":"2026-01-01T00:00:00Z"}',
        b'{"id":"a","status":"failed","create_time":"2026-01-01T00:00:00","update_time":"2026-01-01T00:00:00Z"}',
        b"\xff",
        b'{"id":"a","data":' + b"[" * 100_000,
    ],
)
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a task's record"):
        Task.decode(raw)


def test_what_cannot_be_encoded_is_refused_with_its_id() -> None:
    task = Task(id="a", status=Status.PENDING, create_time=NOW, update_time=NOW, data=Opaque())
    with pytest.raises(ValueError, match="task 'a' cannot be stored"):
        task.encode()


def test_a_step_tells_how_long_it_took() -> None:
    assert Step("s", Status.IN_PROGRESS, start_time=NOW).seconds is None
    assert Step("s", Status.SUCCEEDED, start_time=NOW, finish_time=NOW).seconds == 0.0


def test_final_is_what_nobody_runs_again_by_himself() -> None:
    assert [status.value for status in Status if status.is_final] == ["exhausted", "succeeded", "ignored"]
