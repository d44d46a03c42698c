"""The comparison on S3, with tiny numbers, so that it cannot rot."""

from pathlib import Path

import pytest

pytest.importorskip("aioboto3")

from benchmarks import compare_s3
from tests.services.moto import moto_server, use_credentials
from tests.services.s3 import made_bucket

from .test_commands import check_lifecycles


def test_the_log_is_counted_alone_and_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_s3, "PROCESSES", 2)
    use_credentials()
    with moto_server() as url:
        where = {"url": url, "bucket": made_bucket(url).bucket}
        log = compare_s3._turn("ours_log", "ours_s3_log", where, 100, 20)
        shared = compare_s3._shared(where, 0.5)
    check_lifecycles(log)
    assert sum(log["operations"].values()) == log["requests"] < 100
    assert 0 < log["dollars_a_million"] < 5
    assert shared["double_claims"] == 0
    assert sum(shared["shares"]) == pytest.approx(1, abs=0.01)
    assert shared["p99_in_put_times"] > 0
    assert 0 < shared["first_claims_p50_ms"] <= shared["first_claims_p99_ms"]


@pytest.mark.chaos
def test_compare_s3_measures_all_and_tells_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_s3, "LOG_CONCURRENCY", 20)
    result = compare_s3.measure(tmp_path, tasks=10, concurrency=5, rounds=1, server=moto_server, seconds=0.5)
    ours, log = result["ours"], result["ours_log"]
    for one in (ours, log, *result["peers"].values()):
        check_lifecycles(one)
        assert sum(one["operations"].values()) == one["requests"]
    assert (ours["operations"], ours["dollars_a_million"]) == ({"PutObject": 20}, 10.0)
    assert result["peers"]["abstract_tracker"]["dollars_a_million"] == 15.0
    assert (log["tasks"], result["peers"]["floor"]["requests"]) == (200, 20)
    assert result["sections"]["known_ids"] == {"added_here": 2, "added_elsewhere": 3}
    assert len(result["figures"]) == 11
    assert None not in [line["value"] for line in result["figures"]]


def test_dollars_are_counted_by_the_kind_of_request() -> None:
    assert compare_s3.dollars({"PutObject": 20, "GetObject": 10, "DeleteObject": 5}, 10) == pytest.approx(10.4)
