"""The package as its users have it, on each Python: `make matrix`.

Builds the wheel and the source distribution, installs one of them into a fresh environment, and runs the tests that
need no server in a folder without the source.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/core",
    "tests/conformance/test_memory.py",
    "tests/conformance/test_file.py",
    "tests/conformance/test_folder.py",
    "tests/conformance/test_sqlite.py",
    "tests/test_leases.py",
    "tests/test_public.py",
    "tests/test_running.py",
    "tests/test_work.py",
    "tests/backends/test_file.py",
    "tests/backends/test_sqlite.py",
    "tests/cli",
)


class Job(NamedTuple):
    """One environment."""

    python: str
    built: str = "whl"  # or tar.gz
    resolution: str = "highest"  # or lowest-direct: the lower bounds of pyproject.toml
    loop: str = "asyncio"  # or uvloop


JOBS = {
    "3.11": Job("3.11"),
    "3.12": Job("3.12"),
    "3.13": Job("3.13"),
    "sdist": Job("3.12", built="tar.gz"),
    "lowest": Job("3.11", resolution="lowest-direct"),
    "uvloop": Job("3.13", loop="uvloop"),
}


def main() -> int:
    """Runs the jobs; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.matrix")
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"{', '.join(JOBS)} (all)")
    parser.add_argument("--workers", default="2", help="of pytest (%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"no such jobs: {', '.join(sorted(unknown))}; there are: {', '.join(JOBS)}")
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="aiotracker-matrix-") as made:
        folder = Path(made)
        _run("uv", "build", "--quiet", "--out-dir", str(folder / "dist"), str(ROOT))
        for name in options.jobs or JOBS:
            print(f"== {name}: {JOBS[name]}", flush=True)
            if not _tested(JOBS[name], folder / name, folder / "dist", options.workers):
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed", flush=True)
    return 1 if failed else 0


def _tested(job: Job, folder: Path, dist: Path, workers: str) -> bool:
    built = next(dist.glob(f"*.{job.built}"))
    python = folder / ".venv" / "bin" / "python"
    _run("uv", "venv", "--quiet", "--python", job.python, str(folder / ".venv"))
    _run(
        *("uv", "pip", "install", "--quiet", "--python", str(python), "--resolution", job.resolution),
        *("--group", f"{ROOT / 'pyproject.toml'}:test", f"aiotracker[all] @ {built.as_uri()}"),
        *("-r", str(ROOT / "pyproject.toml"), "--extra", "all"),  # else what it needs is not direct, and not lowered
    )
    # The tests and their settings alone: what is imported is what was installed.
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", ".npm"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [str(python), "-m", "pytest", "-q", "-n", workers, "--dist", "loadscope", "-m", "not chaos", *TESTS]
    environment = os.environ | {"AIOTRACKER_TEST_LOOP": job.loop}
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode == 0


def _run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    sys.exit(main())
