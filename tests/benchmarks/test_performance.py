"""`python -m benchmarks report`."""

import json
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.__main__ import main

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "load": 0.1,
    "system": "Linux",
    "python": "CPython 3.11",
    "packages": {"aiotracker": "0.1.0", "huey": None},
    "file_system": {"kind": "ext4"},
}
RUN = {"tasks": 20_000, "concurrency": 1000, "per_second": 30_000, "p50_ms": 1.5, "p99_ms": 4.0, "bias": "two writes"}
COMPARED = {
    "ours": RUN,
    "peers": {"huey": RUN | {"per_second": 1_500, "bias": "none"}},
    "missing": ["crawlee"],
    "figures": [{"what": "times huey", "target": "at least 30", "value": 20.0, "ok": False}],
}


def kept(folder: Path, part: str, result: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(result | {"machine": MACHINE, "date": "2026-01-02", "scale": 1}))


def test_the_page_tells_ratios_missed_figures_bias_and_what_is_not_installed(tmp_path: Path) -> None:
    kept(tmp_path / "results", "compare-file", COMPARED)
    page = performance.write(tmp_path / "results", tmp_path / "docs").read_text()
    for told in (
        "| huey | 1,500 | 20 times |",
        "| **missed** |",
        "**aiotracker**: two writes",
        "Not installed here: crawlee",
    ):
        assert told in page
    assert "a processor, 2 cores" in page
    assert "2026-01-02" in page
    assert "<svg" in (tmp_path / "docs/pictures/performance-file.svg").read_text()


def test_a_part_that_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept(tmp_path / "b/report", "processes-file", {"per_second": [[1, 123_456.0]], "double_claims": 0})
    assert main(["report", "--dir", str(tmp_path / "b"), "--docs", str(tmp_path), "--parts", "processes-file"]) == 0
    assert "| 1 | 123,456 |" in (tmp_path / "reference/performance.md").read_text()


def test_growth_is_measured_and_told(tmp_path: Path) -> None:
    command = ["report", "--dir", str(tmp_path / "b"), "--docs", str(tmp_path), "--parts", "tasks-sqlite"]
    assert main([*command, "--scale", "0.00001"]) == 0
    page = (tmp_path / "reference/performance.md").read_text()
    assert "## From 1 to 1,000,000 tasks" in page
    assert "**Scaled down**" in page


def test_contended_claims_and_takeovers_are_told(tmp_path: Path) -> None:
    claims = {"per_second": 1_234.0, "p50_ms": 0.5, "p99_ms": 7.0}
    contended = {"processes": 2, "claimers": 50, "tasks": 10, "hold_ms": 2.0, "won": claims, "refused": claims}
    takeover = {"seconds": 2.01, "seconds_max": 2.4}
    kept(tmp_path, "contend-redis", contended | {"double_claims": 0, "takeover": takeover})
    page = performance.write(tmp_path, tmp_path).read_text()
    assert "| redis | 1,234 | 0.5 | 7 | 0.5 | 7 | 0 | 2.01 | 2.4 |" in page


def test_without_results_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--dir", str(tmp_path), "--docs", str(tmp_path), "--parts", "none"]) == 1
    assert "no results" in capsys.readouterr().err
