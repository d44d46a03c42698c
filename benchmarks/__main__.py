"""`python -m benchmarks` lists the commands."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from . import contend, lifecycle, scale
from .machine import folder_of, machine
from .process import ChildFailedError
from .report import say, show


class Comparison(NamedTuple):
    """What `compare KIND` does by default."""

    module: str
    tasks: int
    concurrency: int


COMPARISONS = {
    "file": Comparison(".compare", 20_000, 1000),
    "sqlite": Comparison(".compare_sqlite", 20_000, 1000),
    "postgres": Comparison(".compare_postgres", 5_000, 200),
    "redis": Comparison(".compare_redis", 10_000, 200),
    "dynamodb": Comparison(".compare_dynamodb", 1_000, 64),
    "s3": Comparison(".compare_s3", 1_000, 64),
}
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
    _add_kind(command, *COMPARISONS)
    command.add_argument("--tasks", type=_count, help="new ids of each run (20,000; fewer where a peer is slow)")
    command.add_argument("--concurrency", type=_count, help="coroutines (as the figures to reach say)")
    command.add_argument("--rounds", type=_count, default=3, help="of turns; medians are told (%(default)s)")
    command.add_argument("--peers", help="with commas between them (all)")
    command.set_defaults(measure=_compare, folder=lambda o: o.dir)

    command = commands.add_parser("scale", help="a store with a million tasks")
    _add_kind(command, "file")
    command.add_argument("--tasks", type=_count, default=1_000_000, help="in the store (%(default)s)")
    command.set_defaults(measure=lambda o: scale.measure(o.dir, tasks=o.tasks), folder=lambda o: o.dir)

    command = commands.add_parser("report", help="all of it, as a page of the documentation")
    command.add_argument("--dir", type=Path, default=Path(".bench"), help="on a real disk (%(default)s)")
    command.add_argument("--results", type=Path, help="where each part's figures are kept (report in --dir)")
    command.add_argument("--docs", type=Path, default=Path("docs"), help="where the page is written (%(default)s)")
    command.add_argument("--parts", help="with commas between them, or `none`: only write (all that are missing)")
    command.add_argument("--scale", type=float, default=1.0, help="of the numbers of tasks (%(default)s)")
    command.add_argument("--rounds", type=_count, default=1, help="of each comparison (%(default)s)")
    command.set_defaults(measure=_report, folder=lambda o: o.dir)

    command = commands.add_parser("query", help="what operators ask of a million tasks, and an export of them")
    command.add_argument("--tasks", type=_count, default=1_000_000, help="in each store (%(default)s)")
    command.add_argument("--stores", help="with commas between them (file,sqlite,postgres)")
    _add_folder(command)
    command.set_defaults(measure=_query, folder=lambda o: o.dir)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    comparison = COMPARISONS[options.kind]
    module = import_module(comparison.module, __package__)
    peers = _named(options.peers, module.PEERS, "peers")
    result: dict[str, Any] = module.measure(
        options.dir.absolute(),
        tasks=options.tasks or comparison.tasks,
        concurrency=options.concurrency or comparison.concurrency,
        rounds=options.rounds,
        peers=peers,
    )
    return result


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from . import performance  # whose plots need more than the others do

    parts = _named(options.parts, tuple(performance.PARTS), "parts") if options.parts != "none" else ()
    results = options.results or options.dir / "report"
    performance.measure(results, options.dir, parts, scale=options.scale, rounds=options.rounds)
    return {"page": str(performance.write(results, options.docs))}


def _query(options: argparse.Namespace) -> dict[str, Any]:
    from . import query  # which needs more than the others do

    stores = _named(options.stores, query.STORES, "stores")
    return query.measure(options.dir.absolute(), tasks=options.tasks, stores=stores)


def _add_kind(command: argparse.ArgumentParser, *kinds: str) -> None:
    command.add_argument("kind", choices=kinds, help="kind of store")
    _add_folder(command)


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dir", type=Path, default=Path(".bench"), help="on a real disk; fresh folders are made in it (%(default)s)"
    )
    command.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("takes 1 or more")
    return value


def _named(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = known if text is None else tuple(filter(None, text.split(",")))
    if unknown := set(names) - set(known):
        raise ValueError(f"no such {what}: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
