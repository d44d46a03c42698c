"""Group commit: when answers are delivered, and how what waits is shared out."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from aiotracker import StoreError, StoreUnavailableError
from aiotracker.backends._commit import Committer


class Item(msgspec.Struct):
    number: int
    answer: Any = None
    error: Exception | None = None


@asynccontextmanager
async def committer(
    commit: Callable[[list[Item]], int],
    *,
    tells: bool = False,
    patience: float = 30,
    orphaned: Callable[[Item], Item | None] = lambda item: None,
) -> AsyncIterator[Committer[Item]]:
    made = Committer(commit, orphaned=orphaned, blame=lambda: "stuck", patience=patience, name="commits", tells=tells)
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


async def test_no_commit_takes_more_than_5_000_operations() -> None:
    commits = Commits()
    async with committer(commits, tells=False) as made:
        answers = [made.submit(Item(0))]
        await commits.begun([[0]])
        answers += [made.submit(Item(number)) for number in range(1, 12_001)]
        for _ in range(4):
            commits.go.release()
        await asyncio.gather(*answers)
    assert list(map(len, commits.batches)) == [1, 5_000, 5_000, 2_000]


async def test_what_a_commit_did_not_take_is_the_first_of_the_next() -> None:
    batches: list[list[int]] = []
    go = threading.Semaphore(0)

    def commit(items: list[Item]) -> int:
        batches.append([item.number for item in items])
        assert go.acquire(timeout=30)
        for item in items[:2]:
            item.answer = item.number
        return min(len(items), 2)

    async def under_way(count: int) -> None:
        async with asyncio.timeout(30):
            while len(batches) < count:  # noqa: ASYNC110 - a thread fills them, which sets no event of the loop
                await asyncio.sleep(0.001)

    async with committer(commit) as made:
        answers = [made.submit(Item(0))]
        await under_way(1)
        answers += [made.submit(Item(number)) for number in range(1, 5)]
        go.release()
        await under_way(2)
        answers.append(made.submit(Item(5)))
        for _ in range(3):
            go.release()
        assert await asyncio.wait_for(asyncio.gather(*answers), 10) == [0, 1, 2, 3, 4, 5]
    assert batches == [[0], [1, 2, 3, 4], [3, 4, 5], [5]]


async def test_a_fault_of_ours_fails_its_commit_is_logged_and_does_not_stop_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = [ZeroDivisionError("ours")]

    def commit(items: list[Item]) -> int:
        if faults:
            raise faults.pop()
        for item in items:
            item.answer = item.number
        return len(items)

    async with committer(commit) as made:
        with pytest.raises(ZeroDivisionError):
            await made.submit(Item(1))
        assert await made.submit(Item(2)) == 2
    assert "a commit failed" in caplog.text


async def test_what_nobody_waits_for_any_more_when_it_is_answered_is_undone() -> None:
    commits, undone = Commits(), []
    for _ in range(2):
        commits.go.release()

    def orphaned(item: Item) -> Item | None:
        undone.append(item.number)
        return Item(-item.number) if item.number > 0 else None

    async with committer(commits, orphaned=orphaned) as made:
        future = made.submit(Item(1))
        deliver = made._deliver

        def cancelled_just_before() -> None:
            future.cancel()
            deliver()

        made._deliver = cancelled_just_before  # type: ignore[method-assign]  # between the commit and its answer
        with pytest.raises(asyncio.CancelledError):
            await future
        await commits.begun([[1], [-1]])
    assert undone == [1]


async def test_a_claim_that_cannot_be_given_back_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    commits = Commits()

    def commit(items: list[Item]) -> int:
        if items[0].number < 0:
            raise StoreError("the disk is full")
        return commits(items)

    async with committer(commit, orphaned=lambda item: Item(-item.number)) as made:
        future = made.submit(Item(1))
        await commits.begun([[1]])
        future.cancel()
        commits.go.release()
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "could not be given back: the disk is full" in record.getMessage()


async def test_who_waits_too_long_gives_up_and_those_who_came_later_go_on_waiting() -> None:
    commits = Commits()
    async with committer(commits) as made:
        one = made.submit(Item(1))
        await commits.begun([[1]])
        gone = made.submit(Item(2))
        gone.cancel()
        made._watch()
        assert not one.done(), "its time is not over"
        made._patience = 0.0
        made._watch()
        with pytest.raises(StoreUnavailableError, match="stuck"):
            await one
        made._patience = 30
        three = made.submit(Item(3))
        for _ in range(2):
            commits.go.release()
        assert await three == 3


async def test_in_a_forked_child_closing_waits_for_no_thread_and_nothing_is_taken() -> None:
    closed: list[bool] = []
    async with committer(Commits()) as made:
        made.forget()
        assert await made.aclose(lambda: closed.append(True))
        with pytest.raises(StoreError, match="closed"):
            await made.submit(Item(1))
        made.post(lambda: None)  # the thread, which a child would not have, ends
    assert closed == []


async def test_who_gave_up_waiting_for_a_call_is_not_answered() -> None:
    commits = Commits()
    async with committer(commits) as made:
        one = made.submit(Item(1))
        await commits.begun([[1]])
        ran = threading.Event()
        calling = asyncio.create_task(made.call(ran.set))
        await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        commits.go.release()
        assert await one == 1
        assert await made.call(ran.is_set)
