"""`python -m aiotracker.testing`: checks a store from the command line."""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import TrackerError
from ._stores import another_store, open_store
from ._torture import Rates, torture

__all__ = ["main"]

EPILOG = """
URL is the URL of a store (file:state, folder:state, ...) or module:function; the function is called with a name and
the options of a tracker, and gives a tracker that is not open; the same name is the same store, in every process.
Stores are made beside or inside of what URL names, and left there.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aiotracker.testing", description="Checks whether a store keeps the guarantees.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="run the conformance suite", epilog=EPILOG)
    check.add_argument("url")
    check.add_argument("--no-scan", action="store_true", help="the backend has no scan")
    check.add_argument("--no-delete", action="store_true", help="the backend has no delete")
    check.add_argument("--no-processes", action="store_true", help="the store lives in one process")
    disturb = commands.add_parser(
        "torture", help="kill, stop, block and cut off workers at random, and judge what they did", epilog=EPILOG
    )
    disturb.add_argument("url")
    disturb.add_argument("--workers", type=int, default=8, help="processes at once")
    disturb.add_argument("--tasks", type=int, help="by default 2000, and fewer where the store is slow")
    disturb.add_argument("--seconds", type=float, default=60.0, help="for which they are disturbed")
    disturb.add_argument("--seed", type=int, help="of the disturbances; by default another one each time")
    disturb.add_argument("--lease", type=float, help="seconds; by default 2, and more where the store is slow")
    disturb.add_argument("--kill-every", type=float, default=0.2, metavar="SECONDS", help="0: nobody is killed")
    disturb.add_argument("--restart-command", metavar="COMMAND", help="restarts the store's server, ten seconds apart")
    disturb.add_argument("--folder", type=Path, help="where the histories are written")
    disturb.add_argument("--json", action="store_true", help="end with a line of JSON")
    options, rest = parser.parse_known_args(argv)
    if options.command == "check":
        return _check(options, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return asyncio.run(_torture(options))


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    if find_spec("pytest") is None or find_spec("pytest_asyncio") is None:
        sys.stderr.write("the suite needs pytest and pytest-asyncio: pip install pytest pytest-asyncio\n")
        return 2
    try:
        open_store(options.url)
    except (TrackerError, TypeError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 2

    import pytest

    from ._check import Target

    here = Path(__file__).with_name("_check.py")
    # Away from the settings of whatever project this is called in.
    with tempfile.TemporaryDirectory(prefix="aiotracker-check-") as folder:
        settings = Path(folder, "pytest.ini")
        settings.write_text("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
        target = Target(
            options.url,
            has_scan=not options.no_scan,
            has_delete=not options.no_delete,
            has_processes=not options.no_processes and not options.url.startswith("memory:"),
        )
        args = [str(here), "-c", str(settings), f"--rootdir={here.parent}", "-p", "no:cacheprovider", "-q"]
        args += ["-W", "ignore::pytest.PytestAssertRewriteWarning", *rest]
        return int(pytest.main(args, plugins=[target]))


async def _torture(options: argparse.Namespace) -> int:
    seed = random.randrange(1_000_000_000) if options.seed is None else options.seed
    reference = another_store(options.url, f"torture-{seed}")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    try:
        report = await torture(
            reference,
            workers=options.workers,
            tasks=options.tasks,
            seconds=options.seconds,
            seed=seed,
            folder=options.folder,
            say=lambda line: sys.stdout.write(f"{line}\n"),
            rates=Rates(kills=1 / options.kill_every if options.kill_every > 0 else 0.0),
            restart=options.restart_command,
            lease=options.lease,
        )
    except TrackerError as exc:
        sys.stderr.write(f"{exc}\n")
        return 2
    sys.stdout.write(f"{report}\n")
    if options.json:
        sys.stdout.write(f"{report.line()}\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
