"""Options that several commands have."""

import functools
import inspect
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec
import typer

from aiotracker import Status, Where

__all__ = ["By", "DryRun", "Force", "Ids", "Json", "Null", "Reason", "Store", "Yes", "filtered"]

_UNITS: Final = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}
_AGO: Final = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The store, such as file:PATH, sqlite:PATH or postgresql://HOST/DATABASE. By default AIOTRACKER_STORE, or "
        "else file:.aiotracker",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Null = Annotated[bool, typer.Option("--null", "-0", help="Ids end with a NUL byte instead of a newline.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Also tasks that somebody holds: their leases are taken away.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be changed, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; kept in each record, with who and when. See `show`.")
]
By = Annotated[
    str,
    typer.Option("--by", metavar="WORD", help="status, error_type, fingerprint, last_outcome, worker or step."),
]


def _time(text: str) -> datetime:
    """`2 h`, `30min`: so long ago; else a time in ISO format, local if it has no zone."""
    if ago := _AGO.fullmatch(text.strip()):
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as exc:
        raise typer.BadParameter(
            f"{text!r} is no time: give one such as '2 h' (ago), '3 d' or 2026-01-31T08:00"
        ) from exc


def _pair(text: str) -> tuple[str, Any]:
    """`key=value`; what is no JSON is text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is no KEY=VALUE")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value


def _option(name: str, kind: Any, help: str, metavar: str | None = None, **more: Any) -> inspect.Parameter:
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=help, metavar=metavar, rich_help_panel="Which tasks", **more
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


_FILTERS: Final = [
    _option("status", list[Status], "Of this status; may be repeated."),
    _option("prefix", str, "The id starts with it.", "TEXT"),
    _option("error_type", str, "The class name of the latest error.", "NAME"),
    _option("fingerprint", str, "The cause of the latest error, as `errors` names it.", "HEX"),
    _option("last_outcome", str, "How its latest claim ended: error, cancelled, lease_lost or timeout.", "WORD"),
    _option("worker", str, "Who holds it or, if nobody does, whose attempt failed last.", "NAME"),
    _option("step", str, "It has a step of this name.", "NAME"),
    _option("step_status", str, "... (or any step, without --step) that is in_progress, failed or succeeded.", "WORD"),
    _option("min_attempts", int, "So many attempts or more.", "N"),
    _option("data", list[str], "Its data is an object that has this; may be repeated.", "KEY=VALUE"),
    *(
        _option(
            f"{what}_{side}",
            datetime,
            f"{done} {'before' if side == 'before' else 'at or after'} this time, or this long ago.",
            "TIME",
            parser=_time,
        )
        for what, done in (("created", "Made"), ("updated", "Last changed"), ("finished", "Its latest claim ended"))
        for side in ("after", "before")
    ),
]


def filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that say which tasks; it gets those that were given as its second argument."""

    @functools.wraps(command)
    def wrapper(ctx: typer.Context, **options: Any) -> None:
        given: dict[str, Any] = {name: options.pop(name) for name in names}
        filters = {name: value for name, value in given.items() if value not in (None, [])}
        if empty := [name for name, value in filters.items() if value == ""]:
            # Of a variable that is not set, perhaps: it would match all.
            raise typer.BadParameter(f"--{empty[0].replace('_', '-')} is empty")
        if "data" in filters:
            filters["data"] = dict(map(_pair, filters["data"]))
        command(ctx, Where(**filters), **options)  # type: ignore[typeddict-item]  # names are those of Where

    names = [option.name for option in _FILTERS]
    signature = inspect.signature(command)
    context, _, *own = signature.parameters.values()
    # Behind the command's own arguments, and before its options in --help.
    parameters = [context, *_FILTERS, *(parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own)]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect reads it
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
