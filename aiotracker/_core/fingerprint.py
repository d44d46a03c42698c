"""What names the cause of a failure: failures of one cause have one fingerprint, whichever task they struck.

A cause is a type of error, the place that raised it, and the message without what differs from task to task.

- The place is file name and function of the innermost frame of the user's own code: not of Python, of an installed
  package, or of this one. Line numbers are left out, since every edit above moves them, and folders, since they differ
  from machine to machine. A package that is installed counts where there is no code beside it.
- Of the message, the first line counts. The task's id, quoted text, URLs, paths, times, hexadecimal names, addresses
  and numbers are left out; exit codes and HTTP status codes stay, since they say why.
"""

import hashlib
import re
from typing import Final

from .task import Failure

__all__ = ["fingerprint", "fingerprint_of", "gist", "place"]

DIGITS: Final = 12  # hexadecimal, of a fingerprint
MAX_LINE: Final = 500  # characters of a message that count

# What stays is first written in characters that no other rule knows, and back at the end.
_KEPT: Final = re.compile(
    r"\b(?:exit|error|status|return|response) code[ =:]{1,2}-?\d{1,3}\b"
    r"|\bstatus[ =:]{1,2}[1-5]\d\d\b"
    r"|\bHTTP(?:/\d(?:\.\d)?)? [1-5]\d\d\b"
    r"|^[45]\d\d(?=, message=|:? [A-Z])"
    r"|'[45]\d\d [A-Z][A-Za-z -]*'"
)
_HIDDEN: Final = {ord(char): 0xE000 + ord(char) for char in "0123456789'/-"}
_SHOWN: Final = {hidden: char for char, hidden in _HIDDEN.items()}

_RULES: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()\[\]{},;]+", "<url>"),
        (r"(?<!\w)'(?:\\.|[^'\\])*'(?!\w)|(?<!\w)\"(?:\\.|[^\"\\])*\"(?!\w)|`[^`]*`", "'…'"),
        (r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b", "<email>"),
        (r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "#"),
        (r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?)?(?:Z\b|[+-]\d\d:?\d\d\b)?", "#"),
        (r"(?<![\w.~/\\])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s'\"<>()\[\]{},;:]+", "<path>"),
        (r"(?<![\w/\\])(?:[\w.-]+[/\\])+[\w.-]*\w\.\w+", "<path>"),
        (r"(?:(?<!\w)[-+])?\b\d+(?:[.,:]\d+)+(?:[eE][-+]?\d+)?", "#"),  # or decimals would look like a name
        (r"\b0x[0-9a-fA-F]+\b|\b(?=[a-fA-F]*\d)[0-9a-fA-F]{8,}\b|\b(?=[A-Za-z]*\d)[0-9A-Za-z]{16,}\b", "#"),
        (r"(?:(?<!\w)[-+])?\d+(?:[.,:]\d+)*(?:[eE][-+]?\d+)?", "#"),
        (r"\s+", " "),
    )
)
_LEASE: Final = re.compile(r"^the lease of .* ran out")  # of whom, differs

_FRAME: Final = re.compile(r'^[ |+]*File "(?P<file>[^"\n]+)", line \d+, in (?P<function>.+)$', re.MULTILINE)
_LAST_ERROR: Final = re.compile(
    r"^(?:Traceback|  \+ Exception Group Traceback) \(most recent call last\):$", re.MULTILINE
)
_SECOND_OF_GROUP: Final = re.compile(r"^[ |]*\+-+ 2 -+$", re.MULTILINE)
_INLINED: Final = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})  # no frames of their own from Python 3.12 on
_PYTHON: Final = re.compile(r"<frozen |[/\\]lib(?:64)?[/\\]python\d[\d.]*t?[/\\]|[/\\]Python\d+[^/\\]*[/\\]Lib[/\\]")
_PACKAGE: Final = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_OURS: Final = re.compile(
    # Where it is installed, or whence it is imported here.
    rf"[/\\](?:site|dist)-packages[/\\]aiotracker[/\\]|^{re.escape(__file__.rpartition('_core')[0])}"
)
_CELL: Final = re.compile(r"^(?:\d+\.py|<ipython-input-.*>)$")  # of a notebook, numbered anew in each process


def fingerprint(kind: str, message: str, traceback: str = "", task_id: str = "") -> str:
    """The name of a cause: the same in every process, on every machine, from Python 3.11 on.

    Args:
        kind: The name of the error's class.
        message: As it was recorded.
        traceback: As text; may be empty, or cut at its beginning.
        task_id: Whose failure it is; left out of the message.

    Returns:
        12 hexadecimal digits.
    """
    cause = "\n".join((kind, place(traceback), gist(message, task_id)))
    return hashlib.sha256(cause.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def fingerprint_of(failure: Failure, task_id: str) -> str:
    """The fingerprint of a stored failure; of one that an older release or another program wrote, made now."""
    return failure.fingerprint or fingerprint(failure.type, failure.message, failure.traceback, task_id)


def gist(message: str, task_id: str = "") -> str:
    """The first line of a message, without what differs from task to task."""
    line = message.strip().partition("\n")[0][:MAX_LINE]
    if len(task_id) >= 3:
        line = line.replace(task_id, "{}")
    line = _LEASE.sub("the lease of # ran out", line)
    line = _KEPT.sub(lambda found: found[0].translate(_HIDDEN), line)
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.translate(_SHOWN)


def place(traceback: str) -> str:
    """Where an error was raised, as `file.py:function`; empty where the traceback does not tell.

    Of a chain of errors the last counts, which is the one that was raised; of a group its first.
    """
    start = max((found.end() for found in _LAST_ERROR.finditer(traceback)), default=0)
    end = _SECOND_OF_GROUP.search(traceback, start)
    installed = ""
    for file, function in reversed(_FRAME.findall(traceback, start, len(traceback) if end is None else end.start())):
        if function in _INLINED or _OURS.search(file):
            continue
        is_package = _PACKAGE.search(file)
        if is_package is None and _PYTHON.search(file):
            continue
        name = re.split(r"[/\\]", file)[-1]
        where = f"{'cell' if _CELL.match(name) else name}:{function}"
        if is_package is None:
            return where
        installed = installed or where
    return installed
