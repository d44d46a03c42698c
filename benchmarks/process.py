"""Runs functions in processes of their own, which start together and answer in JSON.

    parent                                  child: python -m benchmarks.process MODULE:FUNCTION JSON
    Child(...)                    ->        imports, opens what it needs
    child.wait_ready()            <-        gate.ready()
    child.go()                    ->        works
    child.answer()                <-        returns a dict

What a contender prints goes to standard error, which is shown when its process fails.
"""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["Child", "ChildFailedError", "Gate", "MissingPackageError", "run", "together"]


class ChildFailedError(Exception):
    """A contender's process ended without an answer."""


class MissingPackageError(Exception):
    """A contender is not installed.

    Attributes:
        name: Of the module that is missing.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not installed; pip install --group bench")
        self.name = name


class Gate:
    """The child's side: says when it is ready, and waits for the others."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers

    def ready(self) -> None:
        """Says that all is set up, and waits for the start. May be used again, for the parent's next word."""
        self.say({"ready": True})
        if not sys.stdin.readline():
            raise SystemExit("the parent has gone")

    def say(self, answer: dict[str, Any]) -> None:
        """Sends one line."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


class Child:
    """The parent's side of one process; killed at the end of `with` if it still runs.

    Args:
        target: `module:function`; that is called with the gate and the arguments, and may be async.
        **arguments: For the function; JSON.
    """

    def __init__(self, target: str, **arguments: Any) -> None:
        self.target = target
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.process", target, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # it ended without reading its last word

    def wait_ready(self) -> None:
        """Waits until it has set up everything.

        Raises:
            MissingPackageError: It could not import its package.
            ChildFailedError: It ended.
        """
        self._read()

    def go(self) -> None:
        """Lets it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the function returned.

        Raises:
            ChildFailedError: It ended without an answer.
        """
        answer: dict[str, Any] = self._read()["answer"]
        self._process.wait()
        return answer

    def kill(self) -> None:
        """Kills it as `kill -9` does, and waits for its end."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise ChildFailedError(f"{self.target} ended with status {status}:\n{self._errors.read()[-4000:]}")
        said: dict[str, Any] = json.loads(line)
        if "missing" in said:
            raise MissingPackageError(said["missing"])
        return said


def run(target: str, **arguments: Any) -> dict[str, Any]:
    """One process, from start to answer."""
    with together([(target, arguments)]) as children:
        return children[0].answer()


@contextmanager
def together(targets: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[Child]]:
    """Several processes that begin to work at the same time; all of them have ended afterwards."""
    children: list[Child] = []
    try:
        for target, arguments in targets:
            children.append(Child(target, **arguments))
        for child in children:
            child.wait_ready()
        for child in children:
            child.go()
        yield children
    finally:
        for child in children:
            child.__exit__(None, None, None)


def _main(target: str, arguments: str) -> None:
    # The answers keep the real standard output; what others print there must not be among them.
    gate = Gate(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    module_name, _, function_name = target.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] in ("benchmarks", "aiotracker"):
            raise
        gate.say({"missing": exc.name})
        return
    answer = function(gate, **json.loads(arguments))
    if inspect.iscoroutine(answer):
        answer = asyncio.run(answer)
    gate.say({"answer": answer})


if __name__ == "__main__":
    _main(*sys.argv[1:])
