"""Output: tables on a terminal, tab-separated lines elsewhere, JSON where it is asked for."""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

__all__ = [
    "STYLES",
    "Page",
    "ids",
    "is_terminal",
    "json_document",
    "json_line",
    "moment",
    "safe",
    "say",
    "span",
    "table",
]


def is_terminal() -> bool:
    """Whether a person reads the output."""
    return sys.stdout.isatty()


def say(message: str) -> None:
    """A line for the person, on standard error."""
    sys.stderr.write(f"aiotracker: {message}\n")
    sys.stderr.flush()


def safe(text: str, *, lines: bool = False) -> str:
    """Text without control characters, which could move a terminal's cursor or break a line of output."""
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def span(seconds: float) -> str:
    """A length of time, in the unit that fits: `7 ms`, `40 s`, `3 min`, `5 h`, `2 d`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit, limit in ((1, "s", 90), (60, "min", 5400), (3600, "h", 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} d"


def moment(time: datetime | None) -> str:
    """For a person how long ago, or in how long; elsewhere the local time in ISO format."""
    if time is None:
        return ""
    if not is_terminal():
        return time.astimezone().isoformat(timespec="seconds")
    seconds = (datetime.now(UTC) - time).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere one line a row, columns separated by tabs, nothing cut, no head."""
    if not is_terminal():
        for row in rows:
            sys.stdout.write("\t".join(map(safe, row)) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(safe(cell), style=STYLES.get(cell, "")) for cell in row))
    Console().print(drawn)


STYLES = {
    "succeeded": "green",
    "in_progress": "cyan",
    "failed": "yellow",
    "exhausted": "red",
    "ignored": "dim",
}


def ids(found: Iterable[str], *, nul: bool) -> None:
    """Ids as they are, one a line or each ended by a NUL byte."""
    sys.stdout.writelines(f"{task_id}\0" if nul else f"{task_id}\n" for task_id in found)


def json_document(value: Any) -> None:
    """One JSON document, indented."""
    raw = value if isinstance(value, bytes) else msgspec.json.encode(value)
    sys.stdout.write(msgspec.json.format(raw, indent=2).decode() + "\n")


def json_line(raw: bytes) -> None:
    """One line of JSON Lines."""
    sys.stdout.write(raw.decode() + "\n")


class Page:
    """Labelled lines and blocks of text, coloured on a terminal."""

    def __init__(self) -> None:
        self._coloured = is_terminal()
        if self._coloured:
            from rich.console import Console

            self._console = Console(soft_wrap=True)

    def head(self, text: str, *, blank: bool = True) -> None:
        """A line over what follows, and before it an empty one."""
        if not self._coloured:
            sys.stdout.write(f"{text}:\n")
            return
        from rich.text import Text

        self._console.print(Text.assemble("\n" if blank else "", (f"{text}:", "bold")), highlight=False)

    def line(self, label: str, value: str, *, indent: int = 0, style: str = "") -> None:
        """`label: value`; nothing where there is no value. Coloured for a status, which may be given beside it."""
        if not value:
            return
        pad = " " * indent
        if not self._coloured:
            sys.stdout.write(f"{pad}{label}: {safe(value)}\n")
            return
        from rich.text import Text

        shown = Text.assemble(pad, (f"{label}: ", "bold"), (safe(value), STYLES.get(style or value, "")))
        self._console.print(shown, highlight=False)

    def block(self, label: str, text: str, *, indent: int = 0) -> None:
        """A label, and under it text of several lines."""
        if not text.strip():
            return
        pad = " " * indent
        body = "\n".join(f"{pad}  {line}" for line in safe(text, lines=True).rstrip("\n").split("\n"))
        if not self._coloured:
            sys.stdout.write(f"{pad}{label}:\n{body}\n")
            return
        from rich.text import Text

        self._console.print(Text.assemble(pad, (f"{label}:", "bold"), "\n", body), highlight=False)
