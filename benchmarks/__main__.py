"""`python -m benchmarks` lists the commands."""

import argparse
import sys
from pathlib import Path
from typing import Any

from . import compare, contend, lifecycle, scale
from .contenders import PEERS
from .machine import folder_of, machine
from .process import ChildFailedError
from .report import say, show

BUSY = 4  # a load of a quarter of the cores


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 1 where it could not be, or where `--check` finds a figure missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    system = machine(options.folder(options))  # before the load is our own
    if system["load"] > system["cores"] / BUSY:
        say(f"this machine is busy (load {system['load']:g}): that slows those most that wait for each sync")
    try:
        result: dict[str, Any] = options.measure(options)
    except (ValueError, OSError, ChildFailedError) as exc:
        say(str(exc))
        return 1
    disk = system["file_system"]
    if disk is not None and not disk["syncs_count"]:
        say(f"{disk['folder']} is on {disk['kind']}, where a sync costs nothing: these figures say little; use --dir")
    show(result | {"machine": system}, as_json=options.json)
    if not getattr(options, "check", False):
        return 0
    missed = [line["what"] for line in result["figures"] if not line["ok"]]
    if missed:
        say(f"missed: {'; '.join(missed)}")
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What aiotracker does in a second.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("lifecycle", help="claim a new id, succeed; for N ids")
    command.add_argument("--store", required=True, help="URL, such as file:PATH")
    command.add_argument("--tasks", type=_count, default=20_000, help="ids in all (%(default)s)")
    command.add_argument("--concurrency", type=_count, default=1000, help="coroutines a process (%(default)s)")
    command.add_argument("--processes", type=_count, default=1, help="on one store (%(default)s)")
    command.set_defaults(
        measure=lambda o: lifecycle.measure(o.store, o.tasks, o.concurrency, o.processes),
        folder=lambda o: folder_of(o.store),
    )

    command = commands.add_parser("contend", help="many claimers on few tasks; a holder is killed")
    command.add_argument("--store", required=True, help="URL, such as file:PATH")
    command.add_argument("--claimers", type=_count, default=50, help="coroutines a process (%(default)s)")
    command.add_argument("--tasks", type=_count, default=10, help="that they fight for (%(default)s)")
    command.add_argument("--processes", type=_count, default=2, help="on one store (%(default)s)")
    command.add_argument("--seconds", type=float, default=5.0, help="how long (%(default)s)")
    command.add_argument("--hold-ms", type=float, default=2.0, help="that a winner holds its task (%(default)s)")
    command.add_argument("--kills", type=int, default=3, help="holders that are killed (%(default)s)")
    command.add_argument("--kill-lease", type=float, default=2.0, help="seconds, of these holders (%(default)s)")
    command.set_defaults(
        measure=lambda o: contend.measure(
            o.store,
            claimers=o.claimers,
            tasks=o.tasks,
            processes=o.processes,
            seconds=o.seconds,
            hold_ms=o.hold_ms,
            kills=o.kills,
            kill_lease=o.kill_lease,
        ),
        folder=lambda o: folder_of(o.store),
    )

    command = commands.add_parser("compare", help="aiotracker and its peers in turns")
    _add_kind(command)
    command.add_argument("--tasks", type=_count, default=20_000, help="new ids of each run (%(default)s)")
    command.add_argument("--concurrency", type=_count, default=1000, help="coroutines (%(default)s)")
    command.add_argument("--rounds", type=_count, default=3, help="of turns; medians are told (%(default)s)")
    command.add_argument("--peers", default=",".join(PEERS), help="with commas between them (%(default)s)")
    command.set_defaults(
        measure=lambda o: compare.measure(
            o.dir, tasks=o.tasks, concurrency=o.concurrency, rounds=o.rounds, peers=_peers(o.peers)
        ),
        folder=lambda o: o.dir,
    )

    command = commands.add_parser("scale", help="a store with a million tasks")
    _add_kind(command)
    command.add_argument("--tasks", type=_count, default=1_000_000, help="in the store (%(default)s)")
    command.set_defaults(measure=lambda o: scale.measure(o.dir, tasks=o.tasks), folder=lambda o: o.dir)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _add_kind(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", choices=["file"], help="kind of store")
    command.add_argument(
        "--dir", type=Path, default=Path(".bench"), help="on a real disk; fresh folders are made in it (%(default)s)"
    )
    command.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("takes 1 or more")
    return value


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := set(names) - set(PEERS):
        raise ValueError(f"no such peers: {', '.join(sorted(unknown))}; there are: {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
