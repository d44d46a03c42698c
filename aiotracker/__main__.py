"""`python -m aiotracker` is the command line."""

from .cli import main

if __name__ == "__main__":
    main()
