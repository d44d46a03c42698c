"""Says whether a log has kept its promises, from what its processes were told."""

from aiotracker import Task

__all__ = ["Broken", "Oracle", "Seen", "seen_of"]

Seen = tuple[str, ...]  # what a record went through, in order


class Broken(AssertionError):
    """A promise was broken."""


def seen_of(task: Task | None) -> Seen:
    return () if task is None else tuple(task.data["seen"])


class Oracle:
    """Knows what was promised to whom.

    A record's life is the list of names that it went through. Transitions are pure, so every answer is a prefix of the
    one life that the record has in the end: one that is not was read or written on another history, as a claim that
    was granted twice.
    """

    def __init__(self) -> None:
        self.told: dict[str, Seen] = {}  # by id: the longest life that anybody was told of
        self.together: list[set[tuple[str, str]]] = []  # writes that are there all or not at all
        self.never: set[str] = set()  # writes that were refused for sure

    def promised(self) -> dict[str, Seen]:
        """What whoever asks now must see."""
        return dict(self.told)

    def answer(self, who: str, task_id: str, seen: Seen, promised: dict[str, Seen]) -> None:
        before = promised.get(task_id, ())
        if seen[: len(before)] != before:
            raise Broken(f"{who} was told {seen} of {task_id}, and before that somebody was told {before}")
        told = self.told.get(task_id, ())
        short, long = sorted((told, seen), key=len)
        if long[: len(short)] != short:
            raise Broken(f"{task_id} has two histories: {told} and {seen}")
        self.told[task_id] = long
        self._check_never({task_id: seen})

    def snapshot(self, who: str, state: dict[str, Seen], promised: dict[str, Seen]) -> None:
        """All records at one moment."""
        for task_id in sorted(promised.keys() | state.keys()):
            self.answer(who, task_id, state.get(task_id, ()), promised)
        for writes in self.together:
            there = [name in state.get(task_id, ()) for task_id, name in writes]
            if any(there) and not all(there):
                raise Broken(f"{who} sees a part of a commit: {sorted(writes)}")

    def _check_never(self, state: dict[str, Seen]) -> None:
        for task_id, seen in state.items():
            if found := self.never.intersection(seen):
                raise Broken(f"{task_id} has {sorted(found)}, which failed")
