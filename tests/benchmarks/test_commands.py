"""Each command of `python -m benchmarks` with tiny numbers, so that it cannot rot."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aiotracker import FileTracker, Status
from benchmarks.contenders import PEERS
from tests.conftest import require

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "abstract_tracker": "abstract_tracker",
    "crawlee": "crawlee",
    "huey": "huey",
    "persist_queue": "persistqueue",
}


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def result_of(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["machine"].keys() == {"cpu", "cores", "load", "system", "python", "packages", "file_system"}
    return result


def check_lifecycles(result: dict[str, Any]) -> None:
    assert result["seconds"] > 0
    assert result["per_second"] > 0
    assert 0 < result["p50_ms"] <= result["p99_ms"]


def test_without_a_command_they_are_listed() -> None:
    done = bench()
    assert done.returncode == 0
    for name in ("lifecycle", "contend", "compare", "scale"):
        assert name in done.stdout


async def test_lifecycle_runs_every_id_once_from_two_processes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    result = result_of(
        *("lifecycle", "--store", f"file:{store}", "--tasks", "60", "--concurrency", "5", "--processes", "2")
    )
    assert (result["contender"], result["tasks"]) == ("aiotracker file", 60)
    assert (result["concurrency"], result["processes"]) == (5, 2)
    assert (result["double_claims"], result["refused"]) == (0, 2)  # both processes try the ids 0 and 50
    check_lifecycles(result)
    assert result["per_second"] * result["seconds"] == pytest.approx(60, rel=0.01)
    async with FileTracker(store, read_only=True) as tracker:
        assert (await tracker.count())[Status.SUCCEEDED] == 60


def test_lifecycle_takes_any_store_and_shows_a_table() -> None:
    done = bench("lifecycle", "--store", "memory:", "--tasks", "20", "--concurrency", "5")
    assert done.returncode == 0, done.stderr
    assert "double_claims        0" in done.stdout


def test_a_store_in_memory_is_not_shared_by_processes() -> None:
    done = bench("lifecycle", "--store", "memory:", "--tasks", "20", "--processes", "2")
    assert done.returncode == 1
    assert "--processes 1" in done.stderr


def test_contend_measures_winners_losers_and_a_takeover(tmp_path: Path) -> None:
    result = result_of(
        *("contend", "--store", f"file:{tmp_path / 'store'}", "--claimers", "5", "--tasks", "2"),
        *("--seconds", "0.5", "--kills", "1", "--kill-lease", "0.5"),
    )
    assert result["double_claims"] == 0
    for kind in ("won", "refused"):
        assert result[kind]["claims"] > 0
        assert 0 < result[kind]["p50_ms"] <= result[kind]["p99_ms"] <= result[kind]["max_ms"]
    assert result["takeover"]["kills"] == 1
    assert 0 < result["takeover"]["seconds"] < 10
    assert result["takeover"]["after_expiry_ms"] >= 0


def test_compare_tells_ratios_sections_and_figures(tmp_path: Path) -> None:
    for package in PACKAGES.values():
        require(find_spec(package), f"{package} is not installed; pip install --group bench")
    result = result_of(
        *("compare", "file", "--tasks", "20", "--concurrency", "10", "--rounds", "1", "--dir", str(tmp_path))
    )
    assert result["peers"].keys() == result["ratios"].keys() == set(PEERS)
    assert result["missing"] == []
    for name, contender in [("ours", result["ours"]), *result["peers"].items()]:
        assert contender["tasks"] == 20, name
        assert "sync" in contender["bias"], name
        check_lifecycles(contender)
    for name, ratio in result["ratios"].items():
        expected = result["ours"]["per_second"] / result["peers"][name]["per_second"]
        assert ratio == pytest.approx(expected, rel=0.01)
    sections = result["sections"]
    for name in ("fewer_coroutines", "processes_2", "processes_4"):
        check_lifecycles(sections[name])
        assert sections[name]["double_claims"] == 0
    assert sections["one_at_a_time"]["ratio"] > 0
    assert sections["step"]["commits_of_a_task"] == 2
    assert sections["step"]["commits_more"] == 1
    assert sections["import"]["drivers"] == []
    assert len(result["figures"]) == 12
    for line in result["figures"]:
        assert line.keys() == {"what", "target", "value", "ok"}
        assert line["value"] is not None
    assert list(tmp_path.iterdir()) == []


def test_check_fails_where_a_figure_could_not_be_measured(tmp_path: Path) -> None:
    done = bench(
        *("compare", "file", "--tasks", "20", "--concurrency", "10", "--rounds", "1", "--dir", str(tmp_path)),
        *("--peers", "floor", "--check"),
    )
    assert done.returncode == 1
    assert "missed: times abstract-tracker (20 new ids, 10 coroutines)" in done.stderr
    assert "MISSED" in done.stdout


def test_scale_measures_a_store(tmp_path: Path) -> None:
    result = result_of("scale", "file", "--tasks", "300", "--dir", str(tmp_path))
    assert (result["fill"]["added"], result["fill"]["ran"]) == (300, 30)
    assert (result["open"]["counted"], result["open"]["found"]) == (300, 3)
    assert result["open"]["seconds"] > 0
    assert result["disk"]["bytes"] > 300 * 100
    assert 100 < result["disk"]["bytes_a_task_after_compaction"] < 1000
    for where in ("same_process", "other_process"):
        assert result["compaction"][where]["longest_without_ms"] > 0
    assert len(result["figures"]) == 5
    assert list(tmp_path.iterdir()) == []
