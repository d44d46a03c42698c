"""`python -m tests.simulation`: the log on simulated machines, or on a simulated object store, once for each seed."""

import argparse
import sys
import time
from collections.abc import Sequence

from . import log_on_disk, log_on_s3

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--log", choices=("file", "s3"), default="file", help="the one on disk, or the one on S3")
    parser.add_argument("--seed", type=int, help="replay this one, and say what happens")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="at the first that is broken")
    options = parser.parse_args(argv)
    simulate = log_on_disk.simulate if options.log == "file" else log_on_s3.simulate
    if options.seed is not None:
        try:
            run = simulate(options.seed)
        except Exception as exc:
            print("\n".join(getattr(exc, "trace", [])))
            print(f"seed {options.seed}: {type(exc).__name__}: {exc}")
            return 1
        print("\n".join(run.trace))
        return 0
    begun, bad, commits, losses = time.monotonic(), 0, 0, 0
    for seed in range(options.first, options.first + options.seeds):
        try:
            run = simulate(seed)
        except Exception as exc:
            bad += 1
            print(f"seed {seed}: {type(exc).__name__}: {str(exc)[:300]}", flush=True)
            if options.stop or bad == 20:
                break
        else:
            commits += run.commits
            losses += run.losses
    what = "power losses" if options.log == "file" else "kills"
    seconds = time.monotonic() - begun
    print(f"{options.seeds:,} seeds, {commits:,} commits, {losses:,} {what}, {seconds:.0f} s: {bad} broken")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
