"""The log engine on simulated machines: power losses, kills, full and failing disks, at every point."""

import random
import subprocess
import sys

import pytest

from .log_on_disk import simulate
from .mutations import MUTATIONS

SEEDS = 250
LONG = 10_000


def test_nothing_acknowledged_is_lost_and_nobody_sees_a_torn_log_whatever_happens_to_the_machine() -> None:
    commits = losses = 0
    for seed in range(SEEDS):
        run = simulate(seed)
        commits += run.commits
        losses += run.machine.lost_power
    assert commits > 10 * SEEDS
    assert losses > SEEDS / 2


def test_a_seed_gives_the_same_run_again() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "3"]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stdout[-2000:]
    assert runs[0].stdout == runs[1].stdout
    assert "has committed" in runs[0].stdout


@pytest.mark.chaos
def test_ten_thousand_seeds_keep_every_promise() -> None:
    first = random.randrange(1_000_000_000)
    for seed in range(first, first + LONG):
        try:
            simulate(seed)
        except Exception as exc:
            pytest.fail(f"python -m tests.simulation --seed {seed}: {exc}")


@pytest.mark.chaos
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_engine_without_one_of_its_remedies_is_found_out_within_a_thousand_seeds(mutation: str) -> None:
    with MUTATIONS[mutation]():
        for seed in range(1000):
            try:
                simulate(seed)
            except Exception:
                return
    pytest.fail(f"nobody noticed that {mutation}")
