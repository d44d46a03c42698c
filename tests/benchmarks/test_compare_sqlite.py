"""The comparison on SQLite, with tiny numbers, so that it cannot rot."""

from importlib.util import find_spec

from tests.conftest import require

from .test_commands import check_lifecycles, result_of


def test_compare_sqlite_takes_ours_and_the_peers_in_turns() -> None:
    for package in ("huey", "persistqueue", "crawlee", "aiosqlite"):
        require(find_spec(package), f"{package} is not installed")
    result = result_of("compare", "sqlite", "--tasks", "20", "--concurrency", "5", "--rounds", "1")
    assert result["missing"] == []
    assert result["peers"].keys() == result["ratios"].keys() == {"huey", "persist_queue", "crawlee_sqlite"}
    for one in (result["ours"], *result["peers"].values()):
        check_lifecycles(one)
    assert result["ours"]["double_claims"] == 0
    assert result["sections"]["processes_4"]["double_claims"] == 0
    assert len(result["figures"]) == 4
