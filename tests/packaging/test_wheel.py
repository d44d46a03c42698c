"""What is published works without the source beside it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio
import sys
import aiotracker

async def main():
    async with aiotracker.FileTracker("state") as tracker:
        async with tracker.run("order-17") as task:
            task.result = "ok"
        print((await tracker.load("order-17")).result, aiotracker.__file__)

asyncio.run(main())
print(sorted({"typer", "rich", "pytest", "aioboto3", "redis", "asyncpg"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120)
    return next(folder.glob("aiotracker-*.whl"))


def test_a_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aiotracker").rglob("*.py")}
    assert modules <= names
    assert "aiotracker/py.typed" in names
    assert {name.partition("/")[0] for name in names - modules} == {"aiotracker", f"{_stem(wheel)}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_an_sdist_holds_the_project_and_nothing_that_was_installed_beside_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        parts = [Path(name).parts[1:] for name in archive.getnames()]
    assert {("aiotracker", "py.typed"), ("docs", "conf.py"), ("LICENSE",), ("Makefile",), ("README.md",)} <= set(parts)
    assert not {"node_modules", ".npm", ".venv", "__pycache__"} & {part for path in parts for part in path}


def test_an_installed_wheel_runs_and_imports_nothing_of_the_extras(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"ok {target / 'aiotracker' / '__init__.py'}", "[]"]


def _stem(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2])
