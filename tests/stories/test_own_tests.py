import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_users_own_tests_pass_in_memory_with_time_under_control(
    program: Callable[[str], Path], tmp_path: Path, mode: str
) -> None:
    text = program("own_tests").read_text()
    if mode == "strict":  # what pytest-asyncio asks for there, and nothing of ours
        text = text.replace("@pytest.fixture", "@pytest_asyncio.fixture").replace(
            "async def test_", "@pytest.mark.asyncio\nasync def test_"
        )
        text = text.replace("import pytest\n", "import pytest\nimport pytest_asyncio\n", 1)
    (tmp_path / "test_own.py").write_text(text)
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "."], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
