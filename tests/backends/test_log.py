"""The log's format and its index, apart from any file."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotracker import MemoryTracker, Query, RecordTooLargeError, Status, StoreCorruptedError, Task
from aiotracker._core.transitions import Add
from aiotracker.backends._log import Entry, Index, Wanted, closed, commits, next_commit, parse, seal

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def put(task: Task | None) -> "Wanted":
    assert task is not None
    return Wanted(task.id, lambda current, now: task.replace(), f"w-{task.id}-{task.attempts}")


def a_task(task_id: str, status: Status = Status.PENDING, **fields: object) -> Task:
    return Task(id=task_id, status=status, create_time=NOW, update_time=NOW).replace(**fields)


def stored(index: Index, *wanted: Wanted) -> bytes:
    batch = index.batch(wanted, NOW)
    index.apply(batch)
    return batch.data


def three_commits() -> tuple[bytes, list[int]]:
    index, data, ends = Index(), b"", [0]
    for number in range(3):
        data += stored(index, *(put(a_task(f"{number}-{n}", attempts=number)) for n in range(number + 1)))
        ends.append(len(data))
    return data, ends


def test_a_log_that_is_cut_anywhere_is_read_up_to_the_last_whole_commit() -> None:
    data, ends = three_commits()
    for cut in range(len(data) + 1):
        index = Index()
        parsed = parse(data[:cut], 0, index)
        assert parsed.damage is None
        assert parsed.end == max(end for end in ends if end <= cut)
        assert len(index.entries) == [0, 1, 3, 6][ends.index(parsed.end)]


def test_a_changed_byte_before_the_last_commit_is_damage_and_is_never_read_as_something_else() -> None:
    data, ends = three_commits()
    for place in range(ends[2]):
        for flip in (0x01, 0x20, 0x80):
            changed = data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
            parsed = parse(changed, 0, Index())
            assert parsed.damage is not None, place
            commit = max(end for end in ends if end <= place)
            assert parsed.end == commit
            assert commit <= parsed.damage.offset <= place
            assert next_commit(changed, parsed.end) == min(end for end in ends if end > place)


def test_a_changed_byte_in_the_last_commit_is_a_torn_tail() -> None:
    data, ends = three_commits()
    for place in range(ends[2], ends[3]):
        changed = data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :]
        parsed = parse(changed, 0, Index())
        assert (parsed.end, parsed.damage) == (ends[2], None)


def test_a_commit_does_not_count_with_a_whole_line_that_is_not_its_own() -> None:
    # Such as one that a power loss kept of a commit that had been taken back there.
    data, ends = three_commits()
    lines = data[ends[2] :].splitlines(keepends=True)
    other = put(a_task("2-0", attempts=7))
    stale = stored(Index(), other).splitlines(keepends=True)[0]
    assert len(stale) == len(lines[0])
    parsed = parse(data[: ends[2]] + b"".join([stale, *lines[1:]]), 0, Index())
    assert (parsed.end, parsed.damage) == (ends[2], None)
    parsed = parse(data[: ends[2]] + b"".join(lines[1:]), 0, Index())
    assert (parsed.end, parsed.damage) == (ends[2], None)


def test_a_seal_says_where_the_log_goes_on() -> None:
    data, _ = three_commits()
    parsed = parse(data + seal("log-00000002.jsonl", 77), 0, Index())
    assert parsed.sealed == ("log-00000002.jsonl", 77)


def a_commit(*bodies: bytes) -> bytes:
    """Lines whose sums are right, whatever they say."""
    return b"".join(commits([Entry(closed(body), Status.PENDING, 0, None) for body in bodies], 1000))


@pytest.mark.parametrize(
    "body", [b'{"id":7', b'{"id":"a","status":"asleep"', b'{"id":"a","not_before":"soon"', b"nothing"]
)
def test_a_line_that_is_whole_but_says_nothing_of_a_task_is_damage(body: bytes) -> None:
    data, _ = three_commits()
    parsed = parse(data + a_commit(body), 0, Index())
    assert parsed.end == len(data)
    assert parsed.damage is not None
    assert parsed.damage.offset == len(data)


def test_a_seal_that_names_no_log_is_damage() -> None:
    data, _ = three_commits()
    parsed = parse(data + closed(b'{"sealed":7'), 0, Index())
    assert parsed.damage is not None
    assert (parsed.end, parsed.damage.offset, parsed.sealed) == (len(data), len(data), None)


def test_a_seal_in_the_middle_of_a_commit_is_not_followed() -> None:
    data, ends = three_commits()
    parsed = parse(data[: ends[2]] + a_commit(b'{"id":"a"').splitlines(keepends=True)[0] + seal("next", 0), 0, Index())
    assert (parsed.end, parsed.sealed) == (ends[2], None)


async def test_a_record_that_cannot_be_read_is_told_and_the_others_can_be() -> None:
    async with MemoryTracker() as tracker:
        await tracker.add_many(["bad", "good"])
        tracker._index.apply_line(closed(b'{"id":"bad","status":"pending","attempts":"many"'))
        with pytest.raises(StoreCorruptedError, match="attempts"):
            await tracker.load("bad")
        with pytest.raises(StoreCorruptedError, match="attempts"):
            await tracker.run("bad").__aenter__()
        async with tracker.run("good") as task:
            assert task.attempts == 1
        assert await tracker.count() == {Status.PENDING: 1, Status.SUCCEEDED: 1}


def test_a_question_that_cannot_be_answered_fails_alone() -> None:
    index = Index()
    stored(index, put(a_task("good")))
    index.apply_line(closed(b'{"id":"bad","status":"pending","attempts":"many"'))
    bad, good = (Wanted(name, look=lambda index, name=name: index.get(name)) for name in ("bad", "good"))  # type: ignore[misc]  # mypy infers no type
    index.look([bad, good])
    assert isinstance(bad.error, StoreCorruptedError)
    assert good.answer.id == "good"


async def test_a_scan_passes_over_what_is_gone_or_is_no_match_any_more() -> None:
    async with MemoryTracker() as tracker:
        await tracker.add_many(["1", "2", "3", "4"])
        seen = []
        async for task in tracker.find(status="pending"):
            seen.append(task.id)
            await tracker.purge("2", force=True)
            await tracker.ignore("3")
        assert seen == ["1", "4"]


def test_one_failing_transition_fails_alone() -> None:
    def broken(task: Task | None, now: datetime) -> Task | None:
        raise RuntimeError("broken")

    index = Index()
    unstorable = a_task("set", data={1, 2})
    wanted = [put(a_task("a")), Wanted("b", broken, "w"), put(unstorable), put(a_task("c", data="x" * 2000))]
    wanted += [put(a_task("d")), put(a_task("e", data=object())), put(a_task("f"))]
    batch = index.batch(wanted, NOW, limit=1000)
    index.apply(batch)
    assert [type(want.error) for want in wanted] == [
        type(None),
        RuntimeError,
        type(None),  # an encoder turns a set into a list; values are checked before they come here
        RecordTooLargeError,
        type(None),
        TypeError,
        type(None),
    ]
    assert set(index.entries) == {"a", "set", "d", "f"}


def test_nothing_is_changed_before_a_batch_is_applied() -> None:
    index = Index()
    first = Wanted("a", Add("a", "c1"), "w1")
    second = Wanted("a", Add("a", "c2"), "w2")
    batch = index.batch([first, second], NOW)
    assert not index.entries
    assert first.answer is second.answer
    index.apply(batch)
    assert index.get("a") == first.answer


def test_a_batch_takes_no_more_than_fits_into_a_commit() -> None:
    index = Index()
    wanted = [put(a_task(str(n), data="x" * 900_000)) for n in range(8)]
    batch = index.batch(wanted, NOW)
    assert batch.taken == 5
    assert [want.answer is not None for want in wanted] == [True] * 5 + [False] * 3


ids = st.sampled_from("abcdefgh")
statuses = st.sampled_from(list(Status))
times = st.none() | st.integers(0, 20).map(lambda n: NOW + timedelta(seconds=n))
Change = tuple[Status, int, datetime | None]
changes = st.tuples(ids, st.none() | st.tuples(statuses, st.integers(-1, 1), times))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(changes, max_size=6), max_size=8), st.integers(0, 20))
def test_the_index_says_what_a_plain_dict_would(batches: list[list[tuple[str, Change | None]]], later: int) -> None:
    index, plain, log = Index(), dict[str, Task](), b""
    serial = 0
    for batch in batches:
        wanted = []
        for task_id, change in batch:
            serial += 1
            if change is None:
                wanted.append(Wanted(task_id, lambda task, now: None, ""))
                plain.pop(task_id, None)
            else:
                status, priority, not_before = change
                task = a_task(task_id, status, priority=priority, not_before=not_before, attempts=serial)
                wanted.append(put(task))
                plain[task_id] = task
        log += stored(index, *wanted)
    again = Index()
    assert parse(log, 0, again).end == len(log)
    compacted = Index()
    for data in commits(index.snapshot(), 3):
        assert parse(data, 0, compacted).end == len(data)
    now = NOW + timedelta(seconds=later)
    for each in (index, again, compacted):
        assert {key: each.get(key).attempts for key in each.entries} == {k: t.attempts for k, t in plain.items()}  # type: ignore[union-attr]  # it is there
        assert each.counts() == Counter(task.status for task in plain.values())
        assert each.live_bytes == sum(len(entry.line) for entry in each.entries.values())
        for status in Status:
            found = each.ids(Query(statuses=frozenset({status})))
            assert sorted(found) == sorted(key for key, task in plain.items() if task.status is status)
        tasks, next_due = each.claimable(100, now)
        waiting = [task for task in plain.values() if task.status in (Status.PENDING, Status.FAILED)]
        due = [t for t in waiting if t.not_before is None or t.not_before <= now]
        due += [task for task in plain.values() if task.status is Status.IN_PROGRESS]  # without a lease
        assert sorted(task.id for task in tasks) == sorted(task.id for task in due)
        ready = [task.priority for task in tasks if task.status is not Status.IN_PROGRESS]
        assert ready == sorted(ready, reverse=True)
        assert next_due == min((t.not_before for t in waiting if t.not_before and t.not_before > now), default=None)


def test_claimable_says_so_when_there_is_more() -> None:
    index = Index()
    stored(index, *(put(a_task(f"{n:03}")) for n in range(10)))
    tasks, next_due = index.claimable(3, NOW)
    assert [task.id for task in tasks] == ["000", "001", "002"]
    assert next_due == NOW


@pytest.mark.parametrize("lines", [1, 2, 1000])
def test_a_compacted_log_has_whole_commits(lines: int) -> None:
    index = Index()
    data, _ = three_commits()
    parse(data, 0, index)
    new = b"".join(commits(index.snapshot(), lines))
    again = Index()
    assert parse(new, 0, again).end == len(new)
    assert {key: entry.line for key, entry in again.entries.items()} == {
        key: entry.line for key, entry in index.entries.items()
    }
    assert isinstance(next(iter(again.entries.values())), Entry)
