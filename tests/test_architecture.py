"""Who may import what, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotracker

ROOT = Path(aiotracker.__file__).parent


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}

# From the bottom up: each imports only from those before it. One line's modules may not import each other.
CORE = ["_core.task", "_core.fingerprint", "_core.retry", "_core.query", "_core.transitions", "_core.codec"]
LAYERS = [
    *CORE,
    "errors",
    "clock",
    "events",
    "names",
    "bulk",
    "contract",
    "leases",
    "_describe",
    "_values",
    "body",
    "running",
    "observed",
    "work",
    "tracker",
    "backends",
    "urls",
    "signals",
    "_metrics",
    "otel",
    "prometheus",
    "causes",
    "analytics._extra",
    "analytics._tables",
    "analytics._summary",
    "analytics._sql",
    "analytics._export",
    "analytics",
    "doctor",
    "copying",
    "testing",
    "cli",
]
# What `_core` may use beside itself: nothing that waits, tells the time, reads, writes or throws dice.
PURE = {
    "collections",
    "collections.abc",
    "dataclasses",
    "datetime",
    "enum",
    "hashlib",
    "math",
    "msgspec",
    "msgspec.structs",
    "pathlib",
    "re",
    "typing",
    "typing_extensions",
}
IMPURE_CALLS = {"now", "utcnow", "today", "open", "input", "print", "exec", "eval"}
STANDS_ALONE = {"", "__main__", "_core", "backends"}  # packages, and what only starts something


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from at_run_time(other)
            continue
        yield child
        yield from at_run_time(child)


def imports(module: str) -> Iterator[str]:
    """Names of what a module imports; of ours without the leading `aiotracker.`."""
    is_package = MODULES[module].name == "__init__.py"
    parts = module.split(".") if module else []
    for node in at_run_time(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                base = node.module or ""
            else:
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join(["aiotracker", *up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("aiotracker.")
                yield inner if inner in MODULES else base


def ours(module: str) -> set[str]:
    names = set()
    for name in imports(module):
        if name == "aiotracker":
            names.add("")
        elif (inner := name.removeprefix("aiotracker.")) in MODULES:
            names.add(inner)
    return names


def layer(module: str) -> int:
    for index, name in enumerate(LAYERS):
        if module == name or module.startswith(f"{name}."):
            return index
    raise AssertionError(f"{module} stands nowhere in the order of the modules: say where")


PLACED = sorted(set(MODULES) - STANDS_ALONE)


@pytest.mark.parametrize("module", PLACED)
def test_a_module_imports_only_from_those_below_it(module: str) -> None:
    mine = layer(module)
    for other in ours(module) - {""}:
        if LAYERS[mine] in ("backends", "testing", "cli") and layer(other) == mine:
            continue  # within a package: see below
        if other in STANDS_ALONE:
            continue
        assert layer(other) < mine, f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in PLACED if layer(name) < LAYERS.index("testing")])
def test_nothing_below_the_public_names_imports_them(module: str) -> None:
    assert "" not in ours(module)


@pytest.mark.parametrize("module", [name for name in PLACED if name.startswith("backends.")])
def test_backends_import_no_other_backend_but_the_engines_that_some_share(module: str) -> None:
    for other in ours(module):
        if other.startswith("backends."):
            assert other.split(".")[1].startswith("_"), f"{module} imports {other}"


def test_the_engines_do_not_import_each_other_in_a_circle() -> None:
    seen: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in seen:
            for other in ours(module):
                if other.startswith("backends."):
                    visit(other, (*path, module))
            seen.add(module)

    for module in PLACED:
        if module.startswith("backends."):
            visit(module, ())


@pytest.mark.parametrize("module", CORE)
def test_the_rules_are_pure(module: str) -> None:
    for name in imports(module):
        assert name in PURE or name.removeprefix("aiotracker.") in CORE, f"{module} imports {name}"
    for node in ast.walk(tree(module)):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith), module
        assert not isinstance(node, ast.Global), module
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in IMPURE_CALLS, f"{module} calls {called}() in line {node.lineno}"


@pytest.mark.parametrize("module", [name for name in PLACED if name.startswith("cli")])
def test_the_command_line_uses_public_names_only(module: str) -> None:
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        is_ours = node.level > 1 or (node.level == 0 and (node.module or "").split(".")[0] == "aiotracker")
        if is_ours and not (node.module or "").removeprefix("aiotracker.").startswith("cli"):
            for alias in node.names:
                assert not alias.name.startswith("_"), f"{module} imports {alias.name}"
            assert "_" not in {part[:1] for part in (node.module or "").split(".")}, f"{module} imports {node.module}"


def test_no_module_is_forgotten() -> None:
    for module in PLACED:
        layer(module)
    assert len(PLACED) > 20
