"""How much memory this process has, and had."""

import os
import resource
import sys

__all__ = ["peak", "peak_from_now", "resident"]


def resident() -> int:
    """Bytes that this process has in memory."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak()  # not Linux


def peak_from_now() -> None:
    """Forgets what was before, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak() -> int:
    """The most bytes that this process had in memory; ever, or since `peak_from_now`."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
