"""Parts of the reference that are made from the code when the documentation is built.

A page says `<!-- from code: commands -->`, and that line becomes the description of all commands. See `expanded`.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec

import aiotracker
from aiotracker._metrics import METRICS
from aiotracker.urls import _SCHEMES

__all__ = ["expanded"]

_MARK = re.compile(r"^<!-- from code: (\w+)(?: (\S+))? -->$", re.MULTILINE)
_LIST = re.compile(r"^\*\*Commands\*\*:.*?(?=^## )", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. ([\w:]+):: ([\w.]+)(?:\(\))?$", re.MULTILINE)
_OF_MODULE = re.compile(r"^<!-- from code: names ([\w.]+) -->$", re.MULTILINE)
_REFERENCE = Path(__file__).parent / "reference"


def expanded(page: str) -> str:
    """The page with all of its parts that are made from the code.

    - `tree MODULE`: the module's docstring, as it is: it draws a tree of classes.
    - `fields MODULE.CLASS`: a table of the class's fields, with the comments beside them.
    - `names MODULE`: the public names of this module that no page describes by a directive of its own.
    - `others`: those of all other modules, under a heading.
    - `commands`: the command line.
    - `help COMMAND`: what `python -m aiotracker.testing COMMAND --help` says.
    - `metrics`: a table of them.
    - `urls`: a table of the kinds of URLs, and the parameters that each of them takes.

    Raises:
        KeyError: There is no such part.
    """
    return _MARK.sub(lambda found: _PARTS[found[1]](found[2] or ""), page)


def _tree(module: str) -> str:
    return f"```text\n{inspect.getdoc(import_module(module))}\n```"


def _fields(path: str) -> str:
    module, _, name = path.rpartition(".")
    return _table(import_module(module), name)


def _table(module: ModuleType, name: str) -> str:
    source = inspect.getsource(module)
    lines = source.splitlines()
    found = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    rows = []
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind, default = ast.unparse(node.annotation), f"`{ast.unparse(node.value)}`" if node.value is not None else ""
        if kind.startswith("ClassVar"):
            continue
        comment = lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset or 0 :].decode().partition("#")[2]
        for line in lines[node.end_lineno or 0 :]:  # ... and the lines of the comment that follow
            if not line.strip().startswith("#"):
                break
            comment += f" {line.strip()[1:].strip()}"
        rows.append(f"| `{node.target.id}` | `{_cell(kind)}` | {_cell(default)} | {_cell(comment.strip())} |")
    return "\n".join(["| field | type | default | what it is |", "|---|---|---|---|", *rows]) if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _names(module: str) -> str:
    return "\n\n".join(_described(name, value) for name, value in _unnamed().items() if _home(value) == module)


def _others(_: str) -> str:
    modules = set(_OF_MODULE.findall(_pages()))
    left = [_described(name, value) for name, value in _unnamed().items() if _home(value) not in modules]
    return "\n\n".join(["## Everything else", *left]) if left else ""


def _pages() -> str:
    return "\n".join(page.read_text() for page in sorted(_REFERENCE.glob("*.md")))


def _unnamed() -> dict[str, object]:
    named, module = set(), ""
    for directive, path in _DIRECTIVE.findall(_pages()):
        if directive == "py:currentmodule":
            module = path
        else:
            named.add(path if path.startswith("aiotracker.") else f"{module}.{path}")
    return {n: getattr(aiotracker, n) for n in sorted(aiotracker.__all__) if f"aiotracker.{n}" not in named}


def _home(value: object) -> str:
    return str(getattr(value, "__module__", ""))


def _is_mixin(base: type) -> bool:
    """What several trackers have, and `BaseTracker` has not."""
    return _home(base).startswith("aiotracker.backends._") and not issubclass(base, aiotracker.BaseTracker)


def _described(name: str, value: object) -> str:
    if not isinstance(value, type):
        directive = "autofunction" if inspect.isfunction(value) else "autodata"
        return f"```{{eval-rst}}\n.. {directive}:: aiotracker.{name}\n```"
    directive = "autoexception" if issubclass(value, BaseException) else "autoclass"
    homes = [value, *(base for base in value.__mro__[1:] if _is_mixin(base))]
    own = {
        key: member
        for home in homes
        for key, member in vars(home).items()
        if key[0] != "_" and getattr(member, "__doc__", None)
    }
    members = [key for key, member in own.items() if callable(member) or isinstance(member, property)]
    options = f"\n   :members: {', '.join(members)}" if members else ""
    text = f"```{{eval-rst}}\n.. {directive}:: aiotracker.{name}{options}\n```"
    if issubclass(value, msgspec.Struct):
        text += "\n\n" + _table(import_module(_home(value)), name)
    return text


def _commands(_: str) -> str:
    command = [sys.executable, "-m", "typer", "aiotracker.cli.app", "utils", "docs", "--name", "aiotracker"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    # The page has a title of its own, and each command stands below in full.
    return _LIST.sub("", text.partition("\n")[2], count=1)


def _help(name: str) -> str:
    command = [sys.executable, "-m", "aiotracker.testing", name, "--help"]
    environ = os.environ | {"COLUMNS": "100"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environ).stdout
    return f"```text\n{text.strip()}\n```"


def _metrics(_: str) -> str:
    rows = ["| metric | kind | unit | labels | what it is |", "|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | `{metric.unit}` | {labels} | {metric.description} |")
    return "\n".join(rows)


def _urls(_: str) -> str:
    rows = ["| URL | opens | parameters of its own |", "|---|---|---|"]
    for name, scheme in _SCHEMES.items():
        parameters = ", ".join(f"`{parameter}`" for parameter in scheme.parameters)
        if scheme.takes_others:
            parameters += ", and all of the driver's"
        rows.append(f"| `{name}:{scheme.shape}` | `{scheme.tracker}` | {parameters} |")
    return "\n".join(rows)


_PARTS = {
    "tree": _tree,
    "fields": _fields,
    "names": _names,
    "others": _others,
    "commands": _commands,
    "help": _help,
    "metrics": _metrics,
    "urls": _urls,
}
