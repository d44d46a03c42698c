"""What the benchmarks count, they must be able to find."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aiotracker import MemoryTracker
from benchmarks import contend, lifecycle
from benchmarks.contenders import ours
from benchmarks.machine import file_system, folder_of, fresh
from benchmarks.numbers import percentile
from benchmarks.process import ChildFailedError, MissingPackageError, run
from benchmarks.report import figure

ROOT = Path(__file__).parents[2]


class Answered:
    """A process that has seen something."""

    def __init__(self, ran: list[tuple[str, int]], disagreeing: list[str]) -> None:
        self._seen = {"start": 1.0, "end": 2.0, "refused": 0, "ran": ran, "disagreeing": disagreeing, "bias": ""}

    def answer(self) -> dict[str, Any]:
        return self._seen | {"latencies": [0.001] * 2}


def test_an_id_that_ran_twice_or_disagrees_with_its_record_is_a_double_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def together(targets: object) -> Iterator[list[Answered]]:
        yield [Answered([("a", 1), ("b", 1)], []), Answered([("c", 1), ("b", 2)], ["c", "b"])]

    monkeypatch.setattr(lifecycle, "together", together)
    result = lifecycle.measure("file:x", 3, 1, 2)
    assert result["double_claims"] == 2
    assert result["per_second"] == 4


async def test_a_record_that_is_not_what_its_process_did_is_found() -> None:
    async with MemoryTracker() as tracker:
        ran: list[tuple[str, int]] = []
        await ours.lifecycles(tracker, ["a", "b", "c"], 2, ran)
        assert await ours._disagreeing(tracker, ran) == []
        async with tracker.run("b", force=True):
            pass
        await tracker.ignore("c")
        assert sorted(await ours._disagreeing(tracker, ran)) == ["b", "c"]


@pytest.mark.parametrize(
    ("spans", "double"),
    [
        ([("a", 1, 0.0, 1.0), ("a", 2, 1.0, 2.0), ("b", 1, 0.5, 1.5)], 0),
        ([("a", 1, 0.0, 1.0), ("a", 2, 0.9, 2.0)], 1),  # overlap
        ([("a", 2, 0.0, 1.0), ("a", 2, 1.5, 2.0)], 1),  # the same fence
        ([("a", 2, 0.0, 9.0), ("a", 3, 1.0, 2.0), ("a", 4, 3.0, 4.0)], 2),  # within the first
    ],
)
def test_bodies_that_overlap_or_share_a_fence_are_double_claims(spans: list[list[Any]], double: int) -> None:
    assert contend._double_claims(spans) == double


def test_processes_share_all_ids_and_meet_at_some() -> None:
    shares = [set(ours.ids_of("x", 101, index, 4)) for index in range(4)]
    assert set.union(*shares) == {f"x/{number}" for number in range(101)}
    assert set.intersection(*shares) == {"x/0", "x/50", "x/100"}


@pytest.mark.parametrize(("percent", "value"), [(50, 2.0), (75, 3.0), (99, 4.0), (100, 4.0), (1, 1.0)])
def test_a_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile([3.0, 1.0, 4.0, 2.0], percent) == value
    assert percentile([], percent) is None


def test_a_figure_is_reached_at_its_bound_and_missed_where_it_was_not_measured() -> None:
    assert figure("x", 15.0, "at least", 15)["ok"]
    assert not figure("x", 14.9, "at least", 15)["ok"]
    assert figure("x", 3.0, "at most", 3)["ok"]
    assert not figure("x", 3.1, "at most", 3)["ok"]
    assert not figure("x", None, "at most", 3)["ok"]


def test_a_missing_peer_is_told_from_a_failing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingPackageError, match="no_such_package_here is not installed"):
        run("no_such_package_here:run")
    with pytest.raises(ChildFailedError, match="unknown kind of store"):
        run("benchmarks.contenders.ours:run", store="nowhere:", prefix="x", tasks=1, concurrency=1)


def test_a_folder_is_fresh_and_gone_afterwards(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    with fresh(scratch) as one, fresh(scratch) as two:
        (one / "file").touch()
        assert one != two
        assert list(two.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_removed_is_not_blamed_on_the_contender(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="removed by somebody"), fresh(tmp_path) as made:
        made.rmdir()
        raise ChildFailedError("no such file")


def test_a_disk_is_told_from_memory(tmp_path: Path) -> None:
    assert folder_of(f"file:{tmp_path}?fsync=false") == tmp_path
    assert folder_of("memory:") is None
    shared = Path("/dev/shm")
    if shared.is_dir() and file_system(shared)["kind"] == "tmpfs":
        assert not file_system(shared / "missing" / "folder")["syncs_count"]
    assert file_system(tmp_path)["kind"] != "unknown"
