from pathlib import Path

import pytest

from tests.conftest import require, require_module
from tests.services.postgres import has_postgres

require_module("asyncpg")

from benchmarks import compare_postgres  # noqa: E402 - it cannot be imported without the driver


def test_compare_postgres_measures_ours_and_the_peers_that_are_installed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require(has_postgres(), "no PostgreSQL")
    folder = Path("/tmp") if Path("/tmp").is_dir() else tmp_path_factory.getbasetemp()  # the server's user must get in
    result = compare_postgres.measure(folder, tasks=40, concurrency=8, rounds=1)
    assert result["ours"]["per_second"] > 0
    assert result["sections"]["processes_4"]["double_claims"] == 0
    assert result["peers"].keys() | set(result["missing"]) == set(compare_postgres.PEERS)
    assert result["ratios"].keys() == result["peers"].keys()
