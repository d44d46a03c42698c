"""What makes two failures one cause."""

import asyncio
import fractions
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotracker
from aiotracker._core.fingerprint import fingerprint, fingerprint_of, gist, place
from aiotracker._core.task import Failure

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("row 17 of 2,000 is bad", "row # of # is bad"),
        ("no key 'tom' in \"users\"", "no key '…' in '…'"),
        (r"no key 'it\'s' here", "no key '…' here"),
        ("can't do it, won't do it", "can't do it, won't do it"),
        ("<Thing at 0x7f00aa12bc>", "<Thing at #>"),
        ("blob 5f3c9a0b11 not found", "blob # not found"),
        ("user 123e4567-e89b-12d3-a456-426614174000 is gone", "user # is gone"),
        ("session 01ARZ3NDEKTSV4RRFFQ69G5FAV is over", "session # is over"),
        ("no answer since 2026-01-01T10:00:00.123Z", "no answer since #"),
        ("took 1.5e-05 s, not -3", "took # s, not #"),
        ("GET https://a.example/b?c=1: refused", "GET <url> refused"),
        ("no file /srv/in/a.csv, gave up", "no file <path>, gave up"),
        (r"no file C:\in\a.csv, gave up", "no file <path>, gave up"),
        ("no file data/in/a.csv", "no file <path>"),
        ("read/write error", "read/write error"),
        ("no mailbox anna@mail.example here", "no mailbox <email> here"),
        ("connect to 10.0.0.7:5432 failed", "connect to # failed"),
        ("exit code 3: line 12", "exit code 3: line #"),
        ("status code 503 for url 'x'", "status code 503 for url '…'"),
        ("404, message='Not Found', url='http://x/1'", "404, message='…', url='…'"),
        ("404 Client Error: Not Found for url: http://x/1", "404 Client Error: Not Found for url: <url>"),
        ("Client error '404 Not Found' for url 'http://x'", "Client error '404 Not Found' for url '…'"),
        ("HTTP/1.1 502 from 10.0.0.7", "HTTP/1.1 502 from #"),
        ("cannot read the-id, sorry", "cannot read {}, sorry"),
        ("the lease of host:17:ab3f ran out: killed", "the lease of # ran out: killed"),
        ("first line\nsecond line", "first line"),
        ("  too   many\tspaces ", "too many spaces"),
        ("defaced facade", "defaced facade"),
        ("", ""),
    ],
)
def test_what_differs_from_task_to_task_is_left_out(message: str, left: str) -> None:
    assert gist(message, "the-id") == left


TEMPLATES = (
    "row {number} of {id} is bad: {text!r}",
    "{path}: no such file",
    "cannot reach {url} since {time}",
    "object {uuid} at {address} is gone after {seconds} s",
)
values = st.fixed_dictionaries(
    {
        "number": st.integers(0, 10**9),
        "id": st.sampled_from(["order-17", "kunde/äöü", "x y z", "a.b.c"]),
        "text": st.text(st.characters(categories=["L", "N", "Zs"]), max_size=12),
        "path": st.lists(st.sampled_from(["srv", "in", "a.csv", "b-2"]), min_size=1, max_size=4).map(
            lambda parts: "/" + "/".join(parts)
        ),
        "url": st.sampled_from(["http://a.example/1", "s3://bucket/key", "https://b.example:8443/x?y=z#q"]),
        "time": st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda time: time.isoformat()),
        "uuid": st.uuids().map(str),
        "address": st.integers(2**32, 2**48).map(hex),
        "seconds": st.floats(0, 1e9),
    }
)


@given(template=st.sampled_from(TEMPLATES), one=values, two=values)
def test_one_cause_with_other_values_has_one_fingerprint(
    template: str, one: dict[str, str], two: dict[str, str]
) -> None:
    fingerprints = {fingerprint("E", template.format(**given), "", given["id"]) for given in (one, two)}
    assert len(fingerprints) == 1


causes = st.tuples(
    st.sampled_from(["ValueError", "KeyError", "OSError"]),
    st.sampled_from(["parse", "load", "fetch"]),
    st.sampled_from(["bad row", "no row", "exit code 1", "exit code 2", "status code 404", "status code 500"]),
)


@given(one=causes, two=causes)
def test_another_type_place_or_message_has_another_fingerprint(one: tuple[str, ...], two: tuple[str, ...]) -> None:
    prints = [
        fingerprint(kind, message, f'  File "/app/jobs.py", line 3, in {function}\n')
        for kind, function, message in (one, two)
    ]
    assert (prints[0] == prints[1]) == (one == two)


@given(kind=st.text(), message=st.text(), text=st.text(), task_id=st.text())
def test_any_text_has_a_fingerprint(kind: str, message: str, text: str, task_id: str) -> None:
    found = fingerprint(kind, message, text, task_id)
    assert len(found) == 12
    assert set(found) <= set("0123456789abcdef")


def test_a_long_message_does_not_take_long() -> None:
    for piece in ("a/", "'", "1.", "a@", "- ", "\\", "a-1", "/.."):
        fingerprint("E", piece * 100_000, piece * 100_000)


def _text_of(raises: Callable[[], object]) -> str:
    try:
        raises()
    except BaseException as exc:
        return "".join(traceback.format_exception(exc))
    raise AssertionError("it did not raise")


def _bad() -> int:
    return int("x")


def test_the_place_is_the_innermost_frame_of_the_users_own_code() -> None:
    import json

    assert place(_text_of(_bad)) == "test_fingerprint.py:_bad"
    assert place(_text_of(lambda: json.loads("{"))) == "test_fingerprint.py:<lambda>", "not the library's"
    assert place("") == ""


def test_of_a_chain_the_place_is_that_of_the_error_that_was_raised() -> None:
    def outer() -> None:
        try:
            _bad()
        except ValueError as exc:
            raise KeyError("y") from exc

    assert place(_text_of(outer)) == "test_fingerprint.py:outer"


def test_of_a_group_the_place_is_that_of_its_first_error() -> None:
    def first() -> None:
        raise ValueError("x")

    def second() -> None:
        raise KeyError("y")

    def gather() -> None:
        errors = []
        for fn in (first, second):
            try:
                fn()
            except Exception as exc:
                errors.append(exc)
        raise ExceptionGroup("both", [ExceptionGroup("inner", errors), OSError()])

    assert place(_text_of(gather)) == "test_fingerprint.py:first"


def test_a_comprehension_is_no_place_since_newer_pythons_have_no_frame_for_it() -> None:
    def rows() -> list[int]:
        return [int(text) for text in ("1", "x")]

    assert place(_text_of(rows)) == "test_fingerprint.py:rows"
    as_in_3_11 = _text_of(rows) + f'  File "{__file__}", line 9, in <listcomp>\n'
    assert place(as_in_3_11) == "test_fingerprint.py:rows"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/srv/app/jobs.py", "jobs.py:run"),
        (r"C:\app\jobs.py", "jobs.py:run"),
        ("/usr/lib/python3.11/json/decoder.py", ""),
        ("/root/.pyenv/versions/3.13.0t/lib/python3.13t/asyncio/tasks.py", ""),
        (r"C:\Users\a\AppData\Local\Programs\Python\Python312\Lib\asyncio\tasks.py", ""),
        ("<frozen importlib._bootstrap>", ""),
        ("/srv/venv/lib/python3.12/site-packages/aiotracker/running.py", ""),
        (str(Path(aiotracker.__file__).with_name("body.py")), ""),
        (str(Path(aiotracker.__file__).parent / "cli" / "map.py"), ""),
        ("/home/me/aiotracker/jobs.py", "jobs.py:run"),
        ("/srv/venv/lib/python3.12/site-packages/httpx/_client.py", "_client.py:run"),
        ("/tmp/ipykernel_123/4567890.py", "cell:run"),
        ("<ipython-input-3-0a1b>", "cell:run"),
        ("<stdin>", "<stdin>:run"),
    ],
)
def test_what_is_pythons_or_ours_is_no_place(path: str, found: str) -> None:
    assert place(f'Traceback (most recent call last):\n  File "{path}", line 1, in run\n    x()\nE: x\n') == found


def test_an_installed_package_is_a_place_where_there_is_no_other() -> None:
    frames = [
        ("/srv/lib/python3.12/site-packages/shop/jobs.py", "run"),
        ("/srv/lib/python3.12/site-packages/httpx/_client.py", "send"),
        ("/usr/lib/python3.12/ssl.py", "read"),
    ]
    text = "".join(f'  File "{path}", line 1, in {name}\n    x()\n' for path, name in frames)
    assert place(text) == "_client.py:send"
    assert place('  File "/srv/main.py", line 1, in main\n' + text) == "main.py:main"


def test_lines_and_folders_do_not_count() -> None:
    def text(folder: str, line: int) -> str:
        return f'Traceback (most recent call last):\n  File "{folder}/jobs.py", line {line}, in run\nE: x\n'

    assert fingerprint("E", "x", text("/srv/one", 3)) == fingerprint("E", "x", text("/home/two", 99))


def test_a_stored_fingerprint_counts_and_where_there_is_none_it_is_made() -> None:
    failure = Failure(1, NOW, "w", "E", "row 7", "")
    assert fingerprint_of(failure, "t") == fingerprint("E", "row 9", "", "t")
    assert fingerprint_of(Failure(1, NOW, "w", "E", "row 7", "", "0123456789ab"), "t") == "0123456789ab"


def in_a_comprehension() -> object:
    return [int(text) for text in ("1", "x")]


def in_a_thread() -> object:
    with ThreadPoolExecutor() as pool:
        return pool.submit(_bad).result()


def in_a_library() -> object:
    return fractions.Fraction("x")


def in_a_chain() -> object:
    try:
        return _bad()
    except ValueError as exc:
        raise KeyError("y") from exc


def in_a_group() -> object:
    async def gather() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(_bad))

    return asyncio.run(gather())


def in_a_generator() -> object:
    return sum(int(text) for text in ("1", "x"))


@pytest.mark.parametrize(
    ("raises", "expected"),
    [
        (in_a_comprehension, "cc353572e2d5"),
        (in_a_thread, "da30ab09c8c7"),
        (in_a_library, "738233e81841"),
        (in_a_chain, "ffc016989221"),
        (in_a_group, "e8d831ee459d"),
        (in_a_generator, "bf3eba525954"),
    ],
)
def test_every_python_and_every_process_makes_the_same_fingerprint(raises: Callable[[], object], expected: str) -> None:
    """They are stored and typed: these must never change."""
    try:
        raises()
    except Exception as exc:
        found = fingerprint(type(exc).__name__, str(exc), "".join(traceback.format_exception(exc)))
    assert found == expected
