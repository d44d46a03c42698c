"""`python -m tests.simulation`: the log engine on simulated machines, one for each seed."""

import argparse
import sys
import time
from collections.abc import Sequence

from .log_on_disk import simulate

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one, and say what happens")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(argv)
    if options.seed is not None:
        try:
            run = simulate(options.seed)
        except Exception as exc:
            print("\n".join(getattr(exc, "trace", [])))
            print(f"seed {options.seed}: {type(exc).__name__}: {exc}")
            return 1
        print("\n".join(run.machine.trace))
        return 0
    begun, bad, commits, losses = time.monotonic(), 0, 0, 0
    for seed in range(options.first, options.first + options.seeds):
        try:
            run = simulate(seed)
        except Exception as exc:
            bad += 1
            print(f"seed {seed}: {type(exc).__name__}: {str(exc)[:300]}", flush=True)
            if bad == 20:
                break
        else:
            commits += run.commits
            losses += run.machine.lost_power
    seconds = time.monotonic() - begun
    print(f"{options.seeds:,} seeds, {commits:,} commits, {losses:,} power losses, {seconds:.0f} s: {bad} broken")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
