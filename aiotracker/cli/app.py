"""The commands and their names."""

from importlib.metadata import version
from typing import Annotated

import typer

from . import analysing, changing, copying, looking, map, status
from .session import Settings

__all__ = ["app"]

app = typer.Typer(
    name="aiotracker",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("aiotracker"))  # noqa: T201 - this is its output
        raise typer.Exit


@app.callback()
def settings(
    ctx: typer.Context,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="URL", envvar="AIOTRACKER_STORE", help="The store; may also stand behind the command."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the tracebacks of errors.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Tracks tasks: which are pending, running, failed, done; who holds which; what to run again."""
    ctx.obj = Settings(store, debug)


# What follows the first word of the command line of `map` belongs to that.
app.command("map", context_settings={"allow_interspersed_args": False})(map.map_ids)
app.command("ls")(looking.ls)
app.command("show")(looking.show)
app.command("count")(looking.count)
app.command("errors")(looking.errors)
app.command("status")(status.status)
app.command("sql")(analysing.sql)
app.command("export")(analysing.export)
app.command("add")(changing.add)
app.command("reset")(changing.reset)
app.command("ignore")(changing.ignore)
app.command("purge")(changing.purge)
app.command("doctor")(changing.doctor)
app.command("copy")(copying.copy)
app.command("init")(copying.init)
