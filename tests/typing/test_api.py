"""The types that users see, by the checkers that they use."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

API = Path(__file__).with_name("api.py")
PROGRAMS = Path(__file__).parents[1] / "stories" / "programs"  # as users wrote them


def test_mypy_infers_what_the_api_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--config-file=", str(API)]
    done = subprocess.run([*command, f"--cache-dir={tmp_path}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_infers_what_the_api_promises(tmp_path: Path) -> None:
    for path in (API, *PROGRAMS.glob("*.py")):
        (tmp_path / path.name).write_text(path.read_text())
    settings = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "include": ["."]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "errors," not in done.stdout:
        pytest.skip(f"pyright could not start: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout
