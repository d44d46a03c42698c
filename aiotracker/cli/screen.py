"""What `status` shows: a summary as text that fits a terminal."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from aiotracker import Status
from aiotracker.analytics import Cause, Failed, Minute, Running, Summary

from .render import STYLES, safe, span

__all__ = ["Look", "lines"]

BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS: Final = "_.-:=+*#"
NARROW: Final = 60  # columns, below which a task's line has less on it
HEAD: Final = 2  # lines over a block: an empty one, and what it is


class Look:
    """How wide and high the terminal is, and what it can draw."""

    def __init__(self, width: int, height: int | None, encoding: str) -> None:
        self.width = width
        self.height = height  # None: as many lines as there are
        try:
            (BLOCKS + "…·").encode(encoding)
        except (UnicodeEncodeError, LookupError):
            self.blocks, self.dots, self.dot = ASCII_BLOCKS, "...", "-"
        else:
            self.blocks, self.dots, self.dot = BLOCKS, "…", "·"

    def cut(self, text: str, width: int) -> str:
        """At most so wide; one line."""
        if cell_len(text) <= width:
            return text
        room = max(0, width - len(self.dots))
        return set_cell_size(text, room) + self.dots[: width - room] if width > 0 else ""

    def plot(self, values: Sequence[float | None]) -> str:
        """A bar a value, from nothing to the largest; a space where there is none."""
        top = max((value for value in values if value is not None), default=0)
        bars = len(self.blocks) - 1
        return "".join(
            " " if value is None else self.blocks[0 if top <= 0 else round(value / top * bars)] for value in values
        )


def lines(summary: Summary, store: str, look: Look, *, footer: str = "") -> list[Text]:
    """The screen, line by line."""

    def line(*parts: str | tuple[str, str]) -> Text:
        made = Text(no_wrap=True)
        for part in parts:
            text, style = part if isinstance(part, tuple) else (part, "")
            room = look.width - made.cell_len
            if room > 0:
                made.append(look.cut(text, room), style=style)
        return made

    def heading(text: str) -> Text:
        return line((text, "bold"))

    now = summary.time.astimezone()
    top = [line((safe(store), "bold"), f"  {now:%H:%M:%S}"), *(line(*row) for row in _counts(summary, look))]
    top.append(Text())
    top += [line(*row) for row in _pace(summary, look)]
    if (oldest := summary.oldest) is not None:
        top.append(line("oldest pending  ", f"{span(oldest.seconds)}  ", (safe(oldest.id), "")))
    if summary.late:
        ids = " ".join(safe(run.id) for run in summary.late)
        top.append(line((f"late leases     {len(summary.late)}  ", "yellow"), (ids, "yellow")))

    running = [line(*_running(run, summary.time, look)) for run in summary.running]
    wrong = [line(*_cause(cause)) for cause in summary.causes]
    failures = [line(*_failure(failed, summary.time, look)) for failed in summary.failures]
    bottom = [line((footer, "dim"))] if footer else []
    if look.height is not None:
        room = look.height - len(top) - len(bottom)
        running, failures, wrong = _shared(room, running, failures, wrong)
    of = summary.counts[Status.IN_PROGRESS]
    shown = list(top)
    for title, block in ((f"running ({of:,})", running), ("causes of failures", wrong), ("latest failures", failures)):
        if block:
            shown += [Text(), heading(title), *block]
    if look.height is not None:
        shown = shown[: look.height - len(bottom)]
    return shown + bottom


def _shared(room: int, *blocks: list[Text]) -> list[list[Text]]:
    """As many lines of each block as fit: turn by turn, so that a long one leaves room for the others."""
    shares = [0] * len(blocks)
    there = [index for index, block in enumerate(blocks) if block]
    while len(there) * (HEAD + 1) > room and there:
        there.pop()
    room -= HEAD * len(there)
    while room > 0 and (open_blocks := [index for index in there if shares[index] < len(blocks[index])]):
        for index in open_blocks[:room]:
            shares[index] += 1
            room -= 1
    return [block[:share] for block, share in zip(blocks, shares, strict=True)]


Row = list[str | tuple[str, str]]


def _counts(summary: Summary, look: Look) -> Iterable[Row]:
    """As many a line as fit."""
    row: Row = []
    width = 0
    for status, tasks in [*summary.counts.items(), ("total", summary.total)]:
        text = f"{tasks:,} {status}"
        if row and width + len(text) + 2 > look.width:
            yield row
            row, width = [], 0
        row += [(text, STYLES.get(status, "") if tasks else "dim"), "  "]
        width += len(text) + 2
    yield row


def _pace(summary: Summary, look: Look) -> Iterable[Row]:
    minutes: Sequence[Minute] = summary.minutes
    ended: list[float | None] = [minute.succeeded + minute.failed for minute in minutes]
    rates = " ".join(_rate(rate.succeeded + rate.failed) for rate in summary.rates)
    row: Row = ["ended a minute  ", (look.plot(ended), "green"), f"  {rates}"]
    if failed := summary.rates[0].failed:
        row.append((f"  {_rate(failed)} failed", "red"))
    yield row
    durations = summary.durations
    if durations is not None:
        took = f"  p50 {_took(durations.p50)}  p90 {_took(durations.p90)}  p99 {_took(durations.p99)}"
        yield ["duration        ", (look.plot([minute.p50 for minute in minutes]), "cyan"), took]


def _took(seconds: float) -> str:
    return f"{seconds * 1000:,.3g} ms" if seconds < 1 else span(seconds)


def _rate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:,.0f}"


def _running(run: Running, now: datetime, look: Look) -> Row:
    left = f"{span(run.lease_left)} left" if run.lease_left > 0 else f"over {span(-run.lease_left)}"
    since = span((now - run.start_time).total_seconds())
    progress = "" if run.progress is None else f"{run.progress:.0%}" if 0 <= run.progress <= 1 else f"{run.progress:g}"
    what = run.note or run.step or ""
    if look.width < NARROW:
        return [(f"{since:>7} ", "cyan"), safe(run.id), f" {safe(what)}", f" {progress}"]
    width = look.width
    return [
        (f"{since:>8}  ", "cyan"),
        _wide(safe(run.id), width // 4, look),
        f"  {progress:>5}",
        (f"  {left:>11}", "yellow" if run.is_late else ""),
        f"  {_wide(safe(run.worker), width // 6, look)}",
        f"  {safe(what)}",
    ]


def _wide(text: str, width: int, look: Look) -> str:
    return set_cell_size(look.cut(text, width), width)


def _cause(cause: Cause) -> Row:
    return [
        f"{cause.tasks:>8,}  ",
        (f"{cause.fingerprint}  ", "dim"),
        (safe(cause.type), STYLES[Status.FAILED]),
        f": {safe(cause.message)}",
    ]


def _failure(failed: Failed, now: datetime, look: Look) -> Row:
    ago = span(max(0.0, (now - failed.time).total_seconds()))
    message = failed.message.strip().partition("\n")[0]
    style = STYLES.get(failed.status, "")
    if look.width < NARROW:
        return [(f"{ago:>7} ", style), f"{safe(failed.id)} ", safe(failed.type)]
    return [
        (f"{ago:>8}  ", style),
        f"{_wide(safe(failed.id), look.width // 4, look)}  ",
        (safe(failed.type), style),
        f": {safe(message)}",
    ]
