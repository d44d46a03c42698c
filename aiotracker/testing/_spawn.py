"""Starts this package's own programs in other processes."""

import sys

__all__ = ["command"]


def command(module: str, *args: str) -> list[str]:
    """What runs a module as a program that can import whatever this process can.

    Args:
        module: Its full name.
        *args: What it finds behind `sys.argv[0]`.
    """
    # Appended, not in PYTHONPATH, where a folder of tests would hide modules of the standard library.
    paths = [path or "." for path in sys.path]
    code = f"import sys; sys.path += {paths!r}; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", code, *args]
