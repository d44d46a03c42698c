"""All comparisons, and how cost grows, as a page of the documentation: `python -m benchmarks report`.

Each part is measured once and kept as a JSON file, so that a long report can be taken in pieces, and one part again.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from . import contend, lifecycle, plots
from .compare import run_peer
from .machine import fresh, machine
from .numbers import significant
from .process import ChildFailedError, MissingPackageError
from .report import say
from .stores import store

__all__ = ["PARTS", "measure", "write"]

Result = dict[str, Any]

COMPARED: Final = {
    "file": "File",
    "sqlite": "SQLite",
    "postgres": "PostgreSQL",
    "redis": "Redis",
    "dynamodb": "DynamoDB",
    "s3": "S3",
}
CONTENDED: Final = ("file", "sqlite", "postgres", "redis", "dynamodb", "s3", "s3_log")
GROWING: Final = {"file": 1_000_000, "sqlite": 100_000, "postgres": 100_000, "redis": 100_000}  # tasks at the most
PEERS: Final = {"abstract_tracker": 10_000, "huey": 10_000}
PROCESSES: Final = (1, 2, 4, 8)
SHARED: Final = 20_000  # tasks that the processes share
CONCURRENCY: Final = 1000
KILLS: Final = 5
LEASE: Final = 2.0  # seconds, of holders that are killed


def _compare(kind: str, folder: Path, scale: float, rounds: int) -> Result:
    from .__main__ import COMPARISONS  # which imports this module

    what = COMPARISONS[kind]
    module = import_module(what.module, __package__)
    tasks = _scaled(what.tasks, scale)
    result: Result = module.measure(
        folder.absolute(), tasks=tasks, concurrency=min(what.concurrency, tasks), rounds=rounds, peers=module.PEERS
    )
    return result


def _contend(kind: str, folder: Path, scale: float, rounds: int) -> Result:
    with store(kind, folder) as url:
        return contend.measure(
            url,
            claimers=_scaled(50, scale),
            tasks=10,
            processes=2,
            seconds=5.0 * scale,
            hold_ms=2.0,
            kills=_scaled(KILLS, scale),
            kill_lease=LEASE,
        )


def _tasks(kind: str, folder: Path, scale: float, rounds: int) -> Result:
    seconds: dict[str, list[tuple[int, float]]] = {kind: []}
    for tasks in _powers(GROWING[kind] * scale):
        with store(kind, folder) as url:
            seen = lifecycle.measure(url, tasks, min(tasks, CONCURRENCY), 1)
        seconds[kind].append((tasks, seen["seconds"]))
        say(f"{kind}, {tasks:,} tasks: {seen['seconds']:g} s")
    for peer, most in PEERS.items() if kind == "file" else ():
        try:
            seconds[peer] = []
            for tasks in _powers(most * scale):
                with fresh(folder) as made:
                    seen = run_peer(peer, tasks, min(tasks, CONCURRENCY), made)
                seconds[peer].append((tasks, seen["seconds"]))
        except MissingPackageError as exc:
            del seconds[peer]
            say(f"{peer}: {exc}")
    return {"seconds": seconds}


def _processes(kind: str, folder: Path, scale: float, rounds: int) -> Result:
    rates: list[tuple[int, float]] = []
    double = 0
    for processes in PROCESSES:
        with store(kind, folder) as url:
            seen = lifecycle.measure(url, _scaled(SHARED, scale), CONCURRENCY, processes)
        rates.append((processes, seen["per_second"]))
        double += seen["double_claims"]
        say(f"{kind}, {processes} processes: {seen['per_second']:,.0f}/s")
    return {"per_second": rates, "double_claims": double}


PARTS: Final[dict[str, tuple[Callable[[str, Path, float, int], Result], str]]] = {
    **{f"compare-{kind}": (_compare, kind) for kind in COMPARED},
    **{f"contend-{kind}": (_contend, kind) for kind in CONTENDED},
    **{f"tasks-{kind}": (_tasks, kind) for kind in GROWING},
    **{f"processes-{kind}": (_processes, kind) for kind in GROWING},
}


def measure(results: Path, folder: Path, parts: Iterable[str], *, scale: float = 1.0, rounds: int = 1) -> None:
    """Measures those parts of which there is no result yet.

    Args:
        results: Folder of the results, a JSON file a part; remove one to have it measured again.
        folder: On a real disk, for the stores.
        parts: Of `PARTS`.
        scale: Of the number of tasks; below 1 it is quicker, and says less.
        rounds: Of each comparison.
    """
    results.mkdir(parents=True, exist_ok=True)
    for part in parts:
        path = results / f"{part}.json"
        if path.exists():
            continue
        say(f"-- {part}")
        of, kind = PARTS[part]
        system = machine(folder)  # before the load is our own
        try:
            result = of(kind, folder, scale, rounds)
        except (ChildFailedError, MissingPackageError, RuntimeError, OSError) as exc:
            say(f"{part} could not be measured: {exc}")
            continue
        result |= {"machine": system, "date": datetime.now(UTC).date().isoformat(), "scale": scale}
        path.write_text(json.dumps(result, indent=1))


def write(results: Path, docs: Path) -> Path:
    """Writes the page and its plots from the results that there are.

    Args:
        results: As `measure` left it.
        docs: The folder of the documentation.

    Returns:
        The page.

    Raises:
        ValueError: There are no results.
    """
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json") if path.stem in PARTS}
    if not found:
        raise ValueError(f"no results in {results}")
    page = docs / "reference" / "performance.md"
    pictures = docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [*_head(found), *_comparisons(found, pictures), *_contention(found), *_growth(found, pictures)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n")
    return page


def _head(found: dict[str, Result]) -> Iterator[str]:
    systems = [result["machine"] for result in found.values()]
    system = systems[0]
    dates = sorted({result["date"] for result in found.values()})
    yield from (
        "# Performance",
        "",
        "Written by `python -m benchmarks report`, which measures all of this on your machine and writes this page.",
        "A lifecycle is: claim a new id, then record its success; two acknowledged writes. All contenders run in turns",
        "in one run, each in a process of its own. Read the ratios: the rates are those of one machine, on one day.",
        "",
        f"- **Date**: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"- **Machine**: {system['cpu']}, {system['cores']} cores, {system['system']}; load before each part"
        f" {min(s['load'] for s in systems):g} to {max(s['load'] for s in systems):g}",
        f"- **Python**: {system['python']}",
        f"- **File system**: {system['file_system']['kind']}; servers run on the same machine, over loopback,"
        " with their files there",
        f"- **Versions**: {', '.join(f'{name} {number}' for name, number in system['packages'].items() if number)}",
    )
    if any(result["scale"] != 1 for result in found.values()):
        yield "- **Scaled down**: some parts ran with fewer tasks than the command takes by default."
    yield ""


def _comparisons(found: dict[str, Result], pictures: Path) -> Iterator[str]:
    yield from ("## Beside others", "")
    for kind, title in COMPARED.items():
        result = found.get(f"compare-{kind}")
        if result is None:
            continue
        rows = {"aiotracker": result["ours"], **result["peers"]}
        if "ours_log" in result:
            rows = {"aiotracker": rows.pop("aiotracker"), "aiotracker (log)": result["ours_log"], **rows}
        picture = pictures / f"performance-{kind}.svg"
        plots.bars(picture, title, {name: row["per_second"] for name, row in rows.items()}, "aiotracker")
        ours = result["ours"]
        yield from (
            f"### {title}",
            "",
            f"`python -m benchmarks compare {kind}`: {ours['tasks']:,} new ids, {ours['concurrency']:,} coroutines.",
            "",
            f"![Lifecycles a second: {title}](../pictures/{picture.name})",
            "",
        )
        yield from _table(
            ("contender", "lifecycles/s", "aiotracker is", "p50 ms", "p99 ms"),
            (
                (
                    name,
                    f"{row['per_second']:,.0f}",
                    "" if name == "aiotracker" else f"{significant(ours['per_second'] / row['per_second']):,g} times",
                    _number(row.get("p50_ms")),
                    _number(row.get("p99_ms")),
                )
                for name, row in rows.items()
            ),
        )
        yield from ("Figures to reach:", "")
        yield from _table(
            ("figure", "target", "measured", ""),
            (
                (line["what"], line["target"], _number(line["value"]), "reached" if line["ok"] else "**missed**")
                for line in result["figures"]
            ),
        )
        yield from ("What each contender does for one lifecycle, and where that is less or more than ours:", "")
        yield from (f"- **{name}**: {row['bias']}" for name, row in rows.items() if row.get("bias"))
        yield ""
        if result["missing"]:
            yield from (f"Not installed here: {', '.join(result['missing'])}.", "")


def _contention(found: dict[str, Result]) -> Iterator[str]:
    results = {kind: found[f"contend-{kind}"] for kind in CONTENDED if f"contend-{kind}" in found}
    if not results:
        return
    one = next(iter(results.values()))
    yield from (
        "## Contended claims and takeovers",
        "",
        f"`python -m benchmarks contend`: {one['processes']} processes of {one['claimers']} coroutines claim"
        f" {one['tasks']} ids again and again, each winner holds its task for {one['hold_ms']:g} ms. A double claim"
        " would be two bodies of one id at once, or a fence that did not grow. Then holders are killed with SIGKILL; a"
        " takeover is counted from the kill to the claim of another process.",
        "",
    )
    rows = []
    for kind, result in results.items():
        over = result["takeover"] or {}
        rows.append(
            (
                kind,
                f"{result['won']['per_second']:,.0f}",
                _number(result["won"]["p50_ms"]),
                _number(result["won"]["p99_ms"]),
                _number(result["refused"]["p50_ms"]),
                _number(result["refused"]["p99_ms"]),
                str(result["double_claims"]),
                _number(over.get("seconds")),
                _number(over.get("seconds_max")),
            )
        )
    yield from _table(
        (
            "store",
            "won/s",
            "won p50 ms",
            "p99 ms",
            "refused p50 ms",
            "p99 ms",
            "double claims",
            f"takeover s (lease {LEASE:g} s)",
            "longest s",
        ),
        rows,
    )


def _growth(found: dict[str, Result], pictures: Path) -> Iterator[str]:
    seconds: dict[str, list[tuple[float, float]]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    for kind in GROWING:
        seconds |= found.get(f"tasks-{kind}", {"seconds": {}})["seconds"]
        if of_kind := found.get(f"processes-{kind}"):
            rates[kind] = of_kind["per_second"]
    if seconds:
        picture = pictures / "performance-tasks.svg"
        plots.lines(picture, "Seconds for that many lifecycles", seconds, across="tasks", up="seconds")
        yield from (
            "## From 1 to 1,000,000 tasks",
            "",
            f"Seconds for that many lifecycles in a new store, with {CONCURRENCY:,} coroutines at the most. A straight",
            "line means that a task costs the same in a large store as in a small one.",
            "",
            f"![Seconds over tasks](../pictures/{picture.name})",
            "",
        )
        counts = sorted({tasks for points in seconds.values() for tasks, _ in points})
        yield from _table(("tasks", *seconds), _across(counts, seconds))
    if rates:
        picture = pictures / "performance-processes.svg"
        plots.lines(picture, "Lifecycles a second", rates, across="processes", up="lifecycles a second")
        double = sum(found[f"processes-{kind}"]["double_claims"] for kind in rates)
        yield from (
            "## From 1 to 8 processes",
            "",
            f"Lifecycles a second of all processes together on one store, {SHARED:,} tasks, every 50th of which each of"
            f" them tries; double claims in all runs together: {double}. More processes than cores share the cores.",
            "",
            f"![Lifecycles a second over processes](../pictures/{picture.name})",
            "",
        )
        yield from _table(("processes", *rates), _across(PROCESSES, rates))


def _across(counts: Iterable[float], series: dict[str, list[tuple[float, float]]]) -> Iterator[tuple[str, ...]]:
    by_count = {name: {count: value for count, value in points} for name, points in series.items()}  # noqa: C416 - JSON made lists of the pairs
    for count in counts:
        yield f"{count:,g}" if count < 1000 else f"{count:,.0f}", *(_number(of.get(count)) for of in by_count.values())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,g}"


def _powers(most: float) -> list[int]:
    powers = [1]
    while powers[-1] * 10 <= most:
        powers.append(powers[-1] * 10)
    return powers


def _scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))
