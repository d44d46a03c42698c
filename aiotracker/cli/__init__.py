"""The command line: `aiotracker`, or `python -m aiotracker`. It uses public names of the package only."""

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command that the arguments name, and exits with its status."""
    try:
        import rich  # noqa: F401 - looked for here, so that one place says what to install
        import typer  # noqa: F401 - likewise
    except ImportError as exc:
        # Something else that is missing inside of them is a fault, which must not be hidden.
        if exc.name not in ("rich", "typer"):
            raise
        print('aiotracker: the command line needs typer and rich; pip install "aiotracker[cli]"', file=sys.stderr)  # noqa: T201 - nothing else to print with
        sys.exit(2)
    from .app import app

    app(prog_name="aiotracker")
