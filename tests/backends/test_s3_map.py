"""`aiotracker map` from several processes on one store on S3."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.s3 import S3Service, moto_s3, prepared

__all__ = ["moto_s3"]  # fixtures

PROCESSES = 3
IDS = [f"file {number}.flac" for number in range(30)]


@pytest.mark.parametrize("layout", ["objects", "log"])
def test_processes_that_share_ids_run_every_command_once_and_all_end_well(
    moto_s3: S3Service, layout: str, tmp_path: Path
) -> None:
    if layout == "objects":
        store = moto_s3.store_url(prepared(moto_s3))
    else:
        store = moto_s3.log_url(prepared(moto_s3, "log", shards=2))
    processes = []
    for number in range(PROCESSES):
        ids = tmp_path / f"ids-{number}"
        ids.write_text("".join(f"{task_id}\n" for task_id in random.sample(IDS, len(IDS))))
        command = ("map", "-j", "4", "--json", "--ids", str(ids), "--", "sh", "-c", 'echo "$1" >> ran', "-", "{}")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "aiotracker", *command],
                cwd=tmp_path,
                env=os.environ | {"AIOTRACKER_STORE": store},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, answers
    summaries = [json.loads(out) for out, _ in answers]
    assert sorted((tmp_path / "ran").read_text().splitlines()) == sorted(IDS)
    assert sum(summary["succeeded"] for summary in summaries) == len(IDS)
    assert all(summary["ok"] for summary in summaries)
