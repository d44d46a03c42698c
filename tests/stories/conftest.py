"""What surrounds the programs: how they are loaded, as files that their users wrote."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

PROGRAMS = Path(__file__).with_name("programs")


@pytest.fixture
def program() -> Callable[[str], Path]:
    """The path of a program."""
    return lambda name: PROGRAMS / f"{name}.py"


@pytest.fixture
def load_program() -> Iterator[Callable[[str], ModuleType]]:
    """A program as a module."""
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"story_{name}", PROGRAMS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)  # two may have one name
