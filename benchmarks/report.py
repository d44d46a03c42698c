"""How results are shown: as one JSON object, or as tables for people."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from .numbers import significant

__all__ = ["Figure", "figure", "say", "show", "table"]

MACHINE = "machine"


class Figure(TypedDict):
    """One figure to reach, and whether it was."""

    what: str
    target: str
    value: float | None  # None: could not be measured
    ok: bool


def figure(
    what: str, value: float | None, kind: Literal["at least", "at most"], bound: float, unit: str = ""
) -> Figure:
    """Compares a value with its target; what could not be measured does not reach it."""
    reached = value is not None and (value >= bound if kind == "at least" else value <= bound)
    return {
        "what": what,
        "target": f"{kind} {bound:,g}{' ' if unit else ''}{unit}",
        "value": significant(value),
        "ok": reached,
    }


def say(text: str) -> None:
    """A line on how far it is; not a part of the result."""
    print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints a result: what was measured, the figures to reach, and the machine."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    _show_fields({key: value for key, value in result.items() if key not in ("figures", MACHINE)}, "")
    if result.get("figures"):
        print()
        rows = [
            (line["what"], line["target"], _text(line["value"]), "reached" if line["ok"] else "MISSED")
            for line in result["figures"]
        ]
        print(table(("figure", "target", "measured", ""), rows))
    print()
    _show_fields(result[MACHINE], "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _show_fields(fields: dict[str, Any], indent: str) -> None:
    for key, value in fields.items():
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            print(f"{indent}{key}")
            for name, inner in value.items():
                print(f"{indent}  {name}")
                _show_fields(inner, indent + "    ")
        elif isinstance(value, dict):
            print(f"{indent}{key}")
            _show_fields(value, indent + "  ")
        else:
            print(f"{indent}{key:<20} {_text(value)}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_text(inner) for inner in value) or "-"
    return str(value)
