"""The command status: a store at work, on one screen."""

import io
import sys
from typing import Annotated

import typer

from aiotracker import Where, open_tracker
from aiotracker.urls import shown

from . import options, render
from .session import run, store_url

__all__ = ["status"]


@options.filtered
def status(
    ctx: typer.Context,
    filters: Where,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on, until q or Ctrl-C.")] = False,
    interval: Annotated[
        float,
        typer.Option("--interval", min=0.1, metavar="SECONDS", help="Between looks; longer where a look is slow."),
    ] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, an object a line.")] = False,
    store: options.Store = None,
) -> None:
    """Shows a store at work: counts, rates, durations, who is on what, and what fails.

    Tasks that ended a minute are those of the last 1, 5 and 15 minutes; the bars are the last 15 minutes, oldest first.
    A lease is late, and yellow, when less than a third of it is left: two renewals have not come.
    """
    from .watching import Watch  # here, since what it draws with takes longer to import than all other commands

    url = store_url(ctx, store)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter of an id shows the rest

    async def work() -> None:
        async with open_tracker(url, read_only=True) as tracker:
            watching = Watch(tracker, filters, shown(url), interval)
            if json:
                await watching.print_json(for_ever=watch)
            elif watch and render.is_terminal():
                await watching.on_screen()
            else:
                await watching.print_text(for_ever=watch)

    run(ctx, work())
