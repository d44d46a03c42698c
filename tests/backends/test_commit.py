"""Group commit: when answers are delivered, and how what waits is shared out."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from aiotracker.backends._commit import Committer


class Item(msgspec.Struct):
    number: int
    answer: Any = None
    error: Exception | None = None


@asynccontextmanager
async def committer(commit: Callable[[list[Item]], int], *, tells: bool) -> AsyncIterator[Committer[Item]]:
    made = Committer(commit, orphaned=lambda item: None, blame=str, patience=30, name="commits", tells=tells)
    try:
        yield made
    finally:
        await made.aclose(lambda: None)


class Commits:
    """Commits that wait until they are let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.tell: Callable[[], None] = lambda: None
        self.tells = threading.Event()

    async def begun(self, batches: list[list[int]]) -> None:
        async with asyncio.timeout(30):
            while self.batches != batches:  # noqa: ASYNC110 - a thread fills them, which sets no event of the loop
                await asyncio.sleep(0.001)

    def __call__(self, items: list[Item]) -> int:
        self.batches.append([item.number for item in items])
        if self.tells.is_set():
            self.tell()
        assert self.go.acquire(timeout=30)
        for item in items:
            item.answer = item.number
        return len(items)


async def test_answers_wait_until_the_next_commit_leaves_the_interpreter() -> None:
    commits = Commits()
    async with committer(commits, tells=True) as made:
        commits.tell = made.tell
        commits.tells.set()
        one = made.submit(Item(1))
        await commits.begun([[1]])
        two = made.submit(Item(2))
        commits.go.release()
        assert await asyncio.wait_for(one, 10) == 1  # while the second is under way
        assert not two.done()
        commits.go.release()
        assert await two == 2


async def test_answers_wait_no_longer_than_the_next_commit_takes() -> None:
    commits = Commits()
    async with committer(commits, tells=True) as made:
        one = made.submit(Item(1))
        await commits.begun([[1]])
        two = made.submit(Item(2))
        commits.go.release()
        await commits.begun([[1], [2]])
        assert not one.done()
        commits.go.release()
        assert await asyncio.wait_for(one, 10) == 1
        assert await two == 2


async def test_a_lone_answer_is_not_kept_waiting() -> None:
    commits = Commits()
    commits.go.release()
    async with committer(commits, tells=True) as made:
        assert await asyncio.wait_for(made.submit(Item(1)), 10) == 1


async def test_two_crowds_that_take_turns_become_of_one_size() -> None:
    commits = Commits()
    async with committer(commits, tells=True) as made:
        commits.tell = made.tell
        commits.tells.set()
        answers = [made.submit(Item(1))]
        await commits.begun([[1]])
        answers += [made.submit(Item(number)) for number in range(2, 101)]
        for _ in range(4):
            commits.go.release()
        await asyncio.wait_for(answers[0], 10)
        again = made.submit(Item(101))
        for _ in range(10):
            commits.go.release()
        await asyncio.gather(*answers, again)
    assert len(commits.batches[1]) == 50
    assert sorted(number for batch in commits.batches for number in batch) == list(range(1, 102))


async def test_without_telling_answers_are_delivered_at_once() -> None:
    commits = Commits()
    async with committer(commits, tells=False) as made:
        one = made.submit(Item(1))
        await commits.begun([[1]])
        two = made.submit(Item(2))
        commits.go.release()
        assert await asyncio.wait_for(one, 10) == 1
        commits.go.release()
        assert await two == 2
