"""The names that users type."""

import ast
import copy
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import aiotracker
from aiotracker import errors
from aiotracker.errors import TrackerError

TASK = aiotracker.Task(
    id="job",
    status=aiotracker.Status.FAILED,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
    update_time=datetime(2026, 1, 1, tzinfo=UTC),
    data={"a": [1]},
)
EXAMPLES: dict[str, TrackerError] = {
    "TrackerError": errors.TrackerError("m"),
    "TaskUnavailableError": errors.TaskUnavailableError("m", TASK, 1.5),
    "TaskLockedError": errors.TaskLockedError("m", TASK, 1.5),
    "TaskNotDueError": errors.TaskNotDueError("m", TASK, 1.5),
    "TaskSucceededError": errors.TaskSucceededError("m", TASK, None),
    "TaskExhaustedError": errors.TaskExhaustedError("m", TASK, None),
    "TaskIgnoredError": errors.TaskIgnoredError("m", TASK, None),
    "LeaseLostError": errors.LeaseLostError("m", "job", 7),
    "OutcomeUnknownError": errors.OutcomeUnknownError("m", "job"),
    "StoreError": errors.StoreError("m"),
    "StoreUnavailableError": errors.StoreUnavailableError("m"),
    "StoreCorruptedError": errors.StoreCorruptedError("m", "/x", 3),
    "StoreUnsafeError": errors.StoreUnsafeError("m"),
    "ConflictError": errors.ConflictError("m", TASK),
    "RecordTooLargeError": errors.RecordTooLargeError("m", "job", 2, 1),
    "InvalidValueError": errors.InvalidValueError("m"),
    "UnsupportedError": errors.UnsupportedError("m", "scan"),
}
ERRORS = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TrackerError)
}


def modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(aiotracker.__path__, "aiotracker.")]
    return [name for name in names if not name.endswith("__main__")]


def test_every_public_name_is_in_all_and_there() -> None:
    names = {name for name in vars(aiotracker) if not name.startswith("_")}
    names -= {name for name in names if isinstance(vars(aiotracker)[name], types.ModuleType)}
    names |= aiotracker._LAZY.keys()
    assert set(aiotracker.__all__) == names
    assert len(aiotracker.__all__) == len(set(aiotracker.__all__))


@pytest.mark.parametrize("name", aiotracker.__all__)
def test_every_public_class_and_function_says_what_it_is(name: str) -> None:
    thing = getattr(aiotracker, name)
    if isinstance(thing, type) or inspect.isfunction(thing):
        assert (thing.__doc__ or "").strip(), name
        assert not (thing.__doc__ or "").startswith(f"{name}("), f"{name} has only the docstring that was made for it"


LOOK = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except ImportError as exc:
        assert "pip install" in str(exc), f"{name}: {exc}"
        continue
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.{public}"
"""


def test_what_a_module_says_is_public_is_there() -> None:
    # In a process of its own: parts of the conformance suite must not be imported before pytest rewrites them.
    done = subprocess.run([sys.executable, "-c", LOOK, *modules()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_error_is_public_and_has_an_example_here() -> None:
    assert set(ERRORS) == set(EXAMPLES) == set(errors.__all__)
    assert set(errors.__all__) <= set(aiotracker.__all__)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_error_can_be_pickled_and_copied_with_all_that_it_knows(name: str) -> None:
    error = EXAMPLES[name]
    error.add_note("a note")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == "m"
        assert other.args == error.args
        assert vars(other) == vars(error)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_attribute_of_an_error_is_documented(name: str) -> None:
    documented = "".join(
        cls.__doc__ or "" for cls in type(EXAMPLES[name]).__mro__ if cls.__module__ == "aiotracker.errors"
    )
    for attribute in vars(EXAMPLES[name]):
        if not attribute.startswith("__"):
            assert f"{attribute}: " in documented


def test_the_tree_of_errors_is_as_it_is_drawn() -> None:
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for indent, name in re.findall(r"^( *)[*+-] (\w+)", errors.__doc__ or "", re.MULTILINE):
        above = [(depth, other) for depth, other in above if depth < len(indent)]
        drawn[name] = above[-1][1] if above else None
        above.append((len(indent), name))
    actual = {
        name: next((base.__name__ for base in cls.__bases__ if issubclass(base, TrackerError)), None)
        for name, cls in ERRORS.items()
    }
    assert drawn == actual


def test_an_error_that_was_given_what_is_stored_knows_it() -> None:
    assert errors.ConflictError("m").known is False
    assert errors.ConflictError("m", known=True).known is True
    assert errors.ConflictError("m", TASK).known is True
    assert isinstance(errors.InvalidValueError("m"), ValueError)


DRIVERS = {
    "aioboto3",
    "aiobotocore",
    "aiosqlite",
    "asyncpg",
    "boto3",
    "botocore",
    "duckdb",
    "fastapi",
    "numpy",
    "opentelemetry",
    "prometheus_client",
    "psycopg",
    "pyarrow",
    "pydantic",
    "pytest",
    "redis",
    "rich",
    "sqlite3",
    "typer",
}


def test_importing_the_library_imports_no_driver() -> None:
    code = "import sys, aiotracker; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not DRIVERS & set(loaded.split())


def test_importing_the_library_starts_nothing() -> None:
    code = "import threading, aiotracker; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_is_typed() -> None:
    assert (Path(aiotracker.__file__).parent / "py.typed").exists()


NAMES: dict[str, tuple[Any, list[str]]] = {
    "run": (aiotracker.BaseTracker.run, ["task_id", "data", "lease", "timeout", "retry", "force"]),
    "call": (aiotracker.BaseTracker.call, ["task_id", "fn", "args", "kwargs"]),
    "work": (
        aiotracker.BaseTracker.work,
        ["fn", "ids", "concurrency", "limit", "forever", "retry", "stop", "grace", "on_done"],
    ),
    "wait": (aiotracker.BaseTracker.wait, ["task_id", "timeout"]),
    "add": (aiotracker.BaseTracker.add, ["task_id", "data", "not_before", "priority"]),
    "add_many": (aiotracker.BaseTracker.add_many, ["items"]),
    "find": (aiotracker.BaseTracker.find, ["order_by", "limit", "where"]),
    "count": (aiotracker.BaseTracker.count, ["by", "where"]),
    "reset": (aiotracker.BaseTracker.reset, ["ids", "from_step", "force", "reason", "by", "where"]),
    "ignore": (aiotracker.BaseTracker.ignore, ["ids", "force", "reason", "by", "where"]),
    "purge": (aiotracker.BaseTracker.purge, ["ids", "force", "reason", "by", "where"]),
    "step": (aiotracker.RunningTask.step, ["name", "fn", "args", "kwargs"]),
    "renew": (aiotracker.RunningTask.renew, ["seconds"]),
    "Retry": (aiotracker.Retry, ["max_attempts", "on", "never", "delay", "max_delay"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_have_their_names(name: str) -> None:
    function, expected = NAMES[name]
    assert [parameter for parameter in inspect.signature(function).parameters if parameter != "self"] == expected


def test_no_private_name_is_explained_to_users() -> None:
    for module_name in ("tracker", "running", "contract", "errors"):
        tree = ast.parse((Path(aiotracker.__file__).parent / f"{module_name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not node.name.startswith("_") and (text := ast.get_docstring(node)):
                    assert "`_" not in text, f"{module_name}.{node.name}"
