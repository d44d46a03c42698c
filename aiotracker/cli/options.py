"""Options that several commands have."""

from typing import Annotated

import typer

from aiotracker import Status, Where

__all__ = [
    "DryRun",
    "ErrorType",
    "Force",
    "Ids",
    "Json",
    "LastOutcome",
    "Null",
    "Prefix",
    "Statuses",
    "Store",
    "Worker",
    "Yes",
    "where",
]

_FILTERS = "Which tasks"

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The store, such as file:PATH or folder:PATH. By default AIOTRACKER_STORE, or else file:.aiotracker",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Null = Annotated[bool, typer.Option("--null", "-0", help="Ids end with a NUL byte instead of a newline.")]
Statuses = Annotated[
    list[Status] | None,
    typer.Option("--status", help="Of this status; may be repeated.", rich_help_panel=_FILTERS),
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", metavar="TEXT", help="The id starts with it.", rich_help_panel=_FILTERS)
]
ErrorType = Annotated[
    str | None,
    typer.Option("--error-type", metavar="NAME", help="The class name of the latest error.", rich_help_panel=_FILTERS),
]
Worker = Annotated[
    str | None,
    typer.Option(
        "--worker",
        metavar="NAME",
        help="Who holds it or, if nobody does, whose attempt failed last.",
        rich_help_panel=_FILTERS,
    ),
]
LastOutcome = Annotated[
    str | None,
    typer.Option(
        "--last-outcome",
        metavar="WORD",
        help="How its latest claim ended: error, cancelled, lease_lost or timeout.",
        rich_help_panel=_FILTERS,
    ),
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Also tasks that somebody holds: their leases are taken away.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be changed, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def where(
    status: list[Status] | None = None,
    prefix: str | None = None,
    error_type: str | None = None,
    worker: str | None = None,
    last_outcome: str | None = None,
) -> Where:
    """The filters that were given."""
    filters = Where()
    if status:
        filters["status"] = status
    if prefix:
        filters["prefix"] = prefix
    if error_type:
        filters["error_type"] = error_type
    if worker:
        filters["worker"] = worker
    if last_outcome:
        filters["last_outcome"] = last_outcome
    return filters
