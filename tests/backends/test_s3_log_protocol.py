"""The protocol of the log on S3, in simulated time: what its writers rely on, and what must not happen."""

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiotracker import OutcomeUnknownError, Status, StoreCorruptedError, StoreError, StoreUnavailableError, Task
from aiotracker.backends import _segments as segments
from aiotracker.backends import _shard as module
from aiotracker.backends._log import Wanted
from aiotracker.backends._order import Order
from aiotracker.backends._segments import Floor, Request, Segment, floor_key, raised, segment_key
from tests.services import simulated_s3
from tests.services.simulated_s3 import BEGIN, SimulatedClient, SimulatedStore, simulated_time

HOUR = 3600.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with simulated_time() as runner:
        runner.run(main())


class Process(simulated_s3.Process):
    """A process that adds words to tasks."""

    def __init__(self, store: SimulatedStore, **options: Any) -> None:
        super().__init__(store, **options)
        self._writes = itertools.count()

    async def add(self, word: str, task_id: str = "job") -> list[str]:
        """Adds a word to a task's data, once; all words that are there then."""

        def rule(task: Task | None, now: datetime) -> Task | None:
            if task is None:
                return Task(id=task_id, status=Status.PENDING, create_time=now, update_time=now, data=[word])
            return task if word in task.data else task.replace(data=[*task.data, word], update_time=now)

        task = await self.submit(Wanted(task_id, rule, f"{word}-{next(self._writes)}"))
        return list(task.data)

    async def append(self, word: str, task_id: str = "job") -> list[str]:
        """Adds a word as often as this is run."""

        def rule(task: Task | None, now: datetime) -> Task | None:
            assert task is not None
            return task.replace(data=[*task.data, word], update_time=now)

        task = await self.submit(Wanted(task_id, rule, f"{word}-{next(self._writes)}"))
        return list(task.data)

    async def read(self, task_id: str = "job") -> list[str]:
        task = await self.submit(Wanted(task_id, look=lambda index: index.get(task_id)))
        return [] if task is None else list(task.data)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every ten segments or so."""
    monkeypatch.setattr(module, "WORTH", 2)


def test_what_waits_while_a_put_is_under_way_goes_into_the_next() -> None:
    async def main() -> None:
        process = Process(SimulatedStore())
        await process.add("first")
        before = process.client.requests["put"]
        await asyncio.gather(*(process.add(f"{number}", f"job-{number}") for number in range(1000)))
        assert process.client.requests["put"] - before == 1

    run(main)


def test_a_refusal_is_decided_on_what_was_read_after_the_question() -> None:
    async def main() -> None:
        store = SimulatedStore()
        one, two = Process(store), Process(store)
        await one.add("a")
        assert await two.add("a") == ["a"]
        await one.add("b")
        with_look = two.client.requests["get"]
        assert await two.add("a") == ["a", "b"]  # writes nothing, and is not answered from what is known
        assert two.client.requests["get"] == with_look + 3  # what is new, and whether more is behind it
        assert await asyncio.gather(*(two.read() for _ in range(100))) == [["a", "b"]] * 100
        assert two.client.requests["get"] == with_look + 4  # one look for all

    run(main)


async def checkpoint(process: Process, task_id: str = "other") -> None:
    """Writes until there is another checkpoint."""
    store, before = process.client.store, process.client.store.objects.get(floor_key(0))
    for number in itertools.count():
        await process.add(f"{number}", task_id)
        await asyncio.sleep(1.0)
        if store.objects.get(floor_key(0)) != before:
            return


def floor_of(store: SimulatedStore) -> int:
    return json.loads(store.objects[floor_key(0)].body)["floor"]  # type: ignore[no-any-return]  # an int


class TestGhosts:
    """A segment that is put where there was one, which everybody has forgotten."""

    def test_a_stalled_write_that_lands_on_a_deleted_number_does_not_count(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            stalled, busy = Process(store, patience=10 * HOUR), Process(store)
            await stalled.add("mine")
            number = stalled.shard._state.number + 1  # type: ignore[union-attr]  # it was read
            stalled.client.stall = 4 * HOUR
            late = asyncio.create_task(stalled.add("late"))
            await asyncio.sleep(1.0)
            await busy.add("theirs")
            for _ in range(3):
                await checkpoint(busy)
                await asyncio.sleep(HOUR + 1)
            assert segment_key(0, number) not in store.objects
            assert await late == ["mine", "theirs", "late"]  # it was run again, on what is so
            ghost = store.objects[segment_key(0, number)].body
            assert b'"late"' in ghost
            assert b'"theirs"' not in ghost
            assert await busy.read() == ["mine", "theirs", "late"]
            for _ in range(2):
                await checkpoint(busy)
                await asyncio.sleep(HOUR + 1)
            assert segment_key(0, number) not in store.objects  # and the ghost is deleted like others

        run(main)

    def test_nobody_who_slept_reads_one(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            sleeper, busy = Process(store), Process(store)
            assert await sleeper.add("mine") == ["mine"]
            number = sleeper.shard._state.number + 1  # type: ignore[union-attr]  # it was read
            await busy.add("theirs")
            next_one = store.objects[segment_key(0, number)]
            for _ in range(3):
                await checkpoint(busy)
                await asyncio.sleep(HOUR + 1)
            ghost = next_one.body.replace(b'"theirs"', b'"ghosts"')
            store.objects[segment_key(0, number)] = next_one._replace(body=ghost)
            assert await sleeper.read() == ["mine", "theirs"]

        run(main)

    def test_that_there_is_none_after_a_sleep_is_no_answer(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            sleeper, busy = Process(store), Process(store)
            await sleeper.add("mine")
            await busy.add("theirs")
            for _ in range(3):
                await checkpoint(busy)
                await asyncio.sleep(HOUR + 1)
            assert await sleeper.read() == ["mine", "theirs"]

        run(main)

    def test_for_ten_minutes_no_floor_is_read_and_what_is_stalled_for_so_long_meets_what_is_there(
        self, often: None
    ) -> None:
        async def main() -> None:
            store = SimulatedStore()
            stalled, busy = Process(store, patience=HOUR), Process(store)
            await stalled.add("mine")
            stalled.client.stall = 590.0
            late = asyncio.create_task(stalled.add("late"))
            await asyncio.sleep(1.0)
            await busy.add("theirs")
            await checkpoint(busy)
            await checkpoint(busy)
            floors = stalled.client.requests["get"]
            assert await late == ["mine", "theirs", "late"]
            assert b'"ghosts"' not in b"".join(stored.body for stored in store.objects.values())
            assert stalled.client.requests["get"] > floors  # segments, one after another: the checkpoint was not needed

        run(main)

    def test_a_store_whose_clock_was_set_back_or_that_does_not_tell_the_time_is_asked_for_the_floor(self) -> None:
        async def main() -> None:
            store = SimulatedStore()
            trace: list[str] = []
            store.trace = trace
            process = Process(store)

            async def floors_of(word: str) -> int:
                trace.clear()
                await process.add(word)
                return sum("get floor/" in line for line in trace)

            assert await floors_of("a") == 1
            assert await floors_of("b") == 0
            store.shift = -HOUR
            assert await floors_of("c") == 1
            assert await floors_of("d") == 0

        run(main)


class TestDeleting:
    def test_a_segment_is_deleted_when_the_floor_has_stood_above_it_for_an_hour(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            process = Process(store)
            floors: list[tuple[float, int]] = []  # and when they were seen first
            while (now := store.now().timestamp()) < BEGIN + 2 * HOUR:
                await checkpoint(process)
                floors.append((store.now().timestamp(), floor_of(store)))
                await asyncio.sleep(300)
                left = store.keys("log/")
                stood = [floor for since, floor in floors if since <= floors[-1][0] + 5 - HOUR]
                assert left[0] <= segment_key(0, max(stood, default=0) + 1), "deleted within the hour"
                if now > BEGIN + HOUR + 1000:
                    assert left[0] > segment_key(0, stood[0])
            await process.aclose()
            assert left[-1] == segment_key(0, process.shard._state.number)  # type: ignore[union-attr]  # it was read

        run(main)

    def test_the_floor_never_goes_down_and_is_raised_by_one_of_many(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore(3, late=0.1, late_by=900.0)
            processes = [Process(store, patience=HOUR) for _ in range(4)]
            seen = [0]

            async def live(process: Process) -> None:
                for number in range(60):
                    await process.add(f"{process.shard._writer}-{number}")
                    await asyncio.sleep(random.uniform(0, 100))
                    if floor_key(0) in store.objects:
                        seen.append(floor_of(store))

            await asyncio.gather(*map(live, processes))
            assert seen == sorted(seen)
            assert len(set(seen)) > 5

        run(main)

    def test_a_floor_remembers_since_when_earlier_ones_have_stood(self) -> None:
        at = [datetime.fromtimestamp(BEGIN + 1000 * number, UTC) for number in range(6)]
        floor, modified = Floor(1, "n", at[0], "c", 1), at[0]
        for number in range(1, 6):
            floor = raised(floor, modified, Floor(number + 1, "n", at[number], "c", 1), at[number].timestamp(), HOUR)
            modified = at[number]
        now = at[5].timestamp()
        assert floor.stood(now, HOUR, modified) == 2  # raised 4,000 s ago, the next one 3,000 s ago
        assert [number for number, _ in floor.earlier] == [2, 3, 4, 5]
        assert floor.stood(now + HOUR + 1, HOUR, modified) == 6
        assert floor.stood(now, HOUR, None) == 2
        again = raised(floor, modified, Floor(9, "n", at[5], "c", 1), now, HOUR)
        assert [number for number, _ in again.earlier] == [2, 3, 4, 5, 6]
        soon = raised(again, at[5] + timedelta(seconds=9), Floor(10, "n", at[5], "c", 1), now, HOUR)
        assert soon.earlier == again.earlier  # not each of many within a moment

    def test_without_the_permission_to_delete_all_goes_on(self, often: None, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            store = SimulatedStore()
            process = Process(store)

            async def denied(key: str) -> None:
                raise StoreError("no permission for DeleteObject")

            process.client.delete = denied  # type: ignore[method-assign]  # a store that refuses
            for _ in range(5):
                await checkpoint(process)
                await asyncio.sleep(HOUR + 1)
            assert len(store.keys("log/")) == process.shard._state.number  # type: ignore[union-attr]  # it was read

        run(main)
        assert caplog.text.count("old segments are not deleted") == 1


class TestLostAnswers:
    @pytest.mark.parametrize("fate", ["lost", "late"])
    def test_the_same_put_is_sent_again_as_it_is_before_any_other(self, fate: str) -> None:
        async def main() -> None:
            store = SimulatedStore()
            process = Process(store, patience=2.0)
            await process.add("a")
            bodies = []

            async def recorded(key: str, body: bytes, *, absent: bool = False, match: str | None = None) -> str:
                bodies.append(body)
                return await SimulatedClient.put(process.client, key, body, absent=absent, match=match)

            process.client.put = recorded  # type: ignore[method-assign]  # to look at what is sent
            setattr(store, fate, 1.0)
            with pytest.raises((StoreUnavailableError, OutcomeUnknownError)):
                await process.add("b")
            await asyncio.sleep(10.0)
            setattr(store, fate, 0.0)
            assert await process.add("c") == ["a", "b", "c"]
            assert len(set(bodies)) == 2
            assert bodies == sorted(bodies, key=[bodies[0], bodies[-1]].index)

        run(main)

    def test_that_an_answer_was_lost_is_no_lost_race(self) -> None:
        async def main() -> None:
            store = SimulatedStore(1, lost=0.3)
            process = Process(store)
            for number in range(50):
                assert len(await process.add(f"{number}")) == number + 1
            assert len(store.keys("log/")) == 50  # each was recognised, and none written twice

        run(main)


class TestStandingStill:
    """A writer that goes on when its segment is in a checkpoint already."""

    @pytest.mark.parametrize("is_lost", [False, True])
    @pytest.mark.parametrize("hours", [0.25, 4.0])
    def test_what_has_counted_is_not_done_again(self, hours: float, is_lost: bool, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            stands, busy = Process(store, patience=10 * HOUR), Process(store)
            put = stands.client.put
            await stands.add("mine")
            await asyncio.sleep(700.0)  # so that what it is answered does not count without the floor

            async def stand_still(*args: Any, **options: Any) -> str:
                stands.client.put = put  # type: ignore[method-assign]  # once
                etag = await put(*args, **options)
                stands.client.frozen_until = asyncio.get_running_loop().time() + hours * HOUR
                if is_lost:
                    raise StoreUnavailableError("the answer was lost")
                return etag

            stands.client.put = stand_still  # type: ignore[method-assign]  # at the worst moment
            writing = asyncio.create_task(stands.append("once"))
            await asyncio.sleep(1.0)
            for _ in range(3):
                await checkpoint(busy)
                await asyncio.sleep(hours * HOUR / 4)
            assert floor_of(store) > 2
            if hours < 1:
                assert await writing == ["mine", "once"]
            else:  # nothing that tells is left
                with pytest.raises(OutcomeUnknownError, match=r"000000000002\.jsonl counted cannot be told"):
                    await writing
            assert await stands.add("next") == ["mine", "once", "next"]
            assert await busy.read() == ["mine", "once", "next"]

        run(main)

    def test_one_put_that_took_hours_is_not_taken_for_the_time_that_puts_take(self) -> None:
        async def main() -> None:
            loop, store = asyncio.get_running_loop(), SimulatedStore()
            stands, other = Process(store, patience=10 * HOUR), Process(store, patience=10 * HOUR)
            await stands.add("a")
            stands.client.stall = 2 * HOUR
            await stands.add("b")
            for number in range(10):
                await other.add(f"other-{number}")
                began = loop.time()
                await stands.add(f"{number}")
                assert loop.time() - began < 60

        run(main)


class TestReading:
    def test_a_shard_that_is_read_for_the_first_time_takes_its_checkpoint_and_what_follows(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            busy = Process(store)
            for _ in range(3):
                await checkpoint(busy, "job")
            await busy.aclose()
            new = Process(store)
            assert await new.read() == await busy_words(store)
            tail = new.shard._state.number - floor_of(store)  # type: ignore[union-attr]  # it was read
            assert new.client.requests.keys() == {"get"}
            assert new.client.requests["get"] <= 2 + max(4, 2 * tail + 2)

        async def busy_words(store: SimulatedStore) -> list[str]:
            return await Process(store).read()

        run(main)

    def test_a_checkpoint_of_many_parts_holds_all(self, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(segments, "PART_BYTES", 2000)
        monkeypatch.setattr(segments, "CHUNK_BYTES", 500)
        monkeypatch.setattr(segments, "LINES", 3)

        async def main() -> None:
            store = SimulatedStore()
            process = Process(store)
            await asyncio.gather(*(process.add("word", f"job-{number}") for number in range(300)))
            await checkpoint(process)
            await process.aclose()
            parts = json.loads(store.objects[floor_key(0)].body)["parts"]
            assert parts == len(store.keys("checkpoints/")) > 8
            for key in store.keys("log/"):
                if key <= segment_key(0, floor_of(store)):
                    del store.objects[key]
            new = Process(store)
            words = await asyncio.gather(*(new.read(f"job-{number}") for number in range(300)))
            assert words == [["word"]] * 300

        run(main)

    def test_segments_that_do_not_follow_each_other_are_damage(self) -> None:
        async def main() -> None:
            store = SimulatedStore()
            one = Process(store)
            for word in "abc":
                await one.add(word)
            other = SimulatedStore()
            stranger = Process(other)
            for word in "xyz":
                await stranger.add(word)
            store.objects[segment_key(0, 3)] = other.objects[segment_key(0, 3)]
            with pytest.raises(StoreCorruptedError, match=r"000000000003\.jsonl does not follow") as caught:
                await Process(store).read()
            assert caught.value.path == f"s3://simulated/{segment_key(0, 3)}"

        run(main)

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
    def test_a_damaged_object_is_named(self, damage: str, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            process = Process(store)
            await checkpoint(process)
            await process.add("a")
            await process.aclose()
            newest = store.keys("log/")[-1]
            checkpoints = store.keys("checkpoints/")
            for key in (newest, checkpoints[0], floor_key(0)):
                whole = store.objects[key]
                body = {
                    "cut": whole.body[:-5],
                    "flipped": whole.body[:40] + bytes([whole.body[40] ^ 4]) + whole.body[41:],
                    "empty": b"",
                    "other": store.objects[store.keys("log/")[0]].body,
                }[damage]
                store.objects[key] = whole._replace(body=body)
                if key == floor_key(0) and damage == "flipped":
                    continue  # a person may have changed it: it has no checksum
                with pytest.raises(StoreCorruptedError) as caught:
                    await Process(store).read()
                assert caught.value.path == f"s3://simulated/{key}"
                assert key in str(caught.value)
                store.objects[key] = whole
                assert await Process(store).read()

        run(main)

    def test_a_checkpoint_that_was_removed_is_named(self, often: None) -> None:
        async def main() -> None:
            store = SimulatedStore()
            process = Process(store)
            await checkpoint(process)
            await process.aclose()
            for key in store.keys("checkpoints/"):
                del store.objects[key]
            with pytest.raises(StoreCorruptedError, match=r"checkpoints/00/.* is missing"):
                await Process(store).read()

        run(main)


class TestTurns:
    """Of several processes that all write as fast as they can."""

    @pytest.mark.parametrize(("count", "bound"), [(2, 10.0), (4, 20.0)])
    def test_each_has_its_share_and_none_waits_for_long(self, count: int, bound: float) -> None:
        async def main() -> None:
            random.seed(1)
            store = SimulatedStore(1, latency=(0.02, 0.04))
            waits: list[list[float]] = [[] for _ in range(count)]
            loop = asyncio.get_running_loop()

            async def write(number: int) -> None:
                process = Process(store)
                while (began := loop.time()) < 20.0:
                    await process.add("word", f"job-{number}-{len(waits[number])}")
                    waits[number].append(loop.time() - began)

            await asyncio.gather(*map(write, range(count)))
            done = [len(some) for some in waits]
            assert min(done) > sum(done) / count / 2, done
            every = sorted(itertools.chain(*waits))
            assert every[len(every) * 99 // 100] < bound * 0.03

        run(main)

    @pytest.mark.parametrize("slow", [(0,), (0, 2), (0, 1, 2, 3)])
    def test_those_who_are_slow_have_their_share_too(self, slow: tuple[int, ...]) -> None:
        async def main() -> None:
            random.seed(1)
            chance = random.Random(1)
            store = SimulatedStore(1, latency=(0.02, 0.04))
            done = [0] * 4
            loop = asyncio.get_running_loop()

            async def write(number: int) -> None:
                process = Process(store)
                while loop.time() < 30.0:
                    if number in slow:  # as one that has a busy processor
                        process.client.frozen_until = loop.time() + chance.uniform(0.05, 0.15)
                    await process.add("word", f"job-{number}-{done[number]}")
                    done[number] += 1

            await asyncio.gather(*map(write, range(4)))
            assert min(done) > sum(done) / 4 / 3, done

        run(main)

    @pytest.mark.parametrize("latency", [0.03, 0.3])
    def test_one_that_comes_later_is_let_in_however_slow_it_is(self, latency: float) -> None:
        async def main() -> None:
            random.seed(1)
            store = SimulatedStore(1, latency=(0.02, 0.04))
            slow = SimulatedStore(2, latency=(latency, latency))
            slow.objects = store.objects
            writers = [Process(store) for _ in range(3)]
            late = Process(slow)

            async def write(process: Process, name: str) -> None:
                for number in itertools.count():
                    await process.add("word", f"{name}-{number}")

            for busy in (writers[:1], writers):
                writing = [asyncio.create_task(write(process, f"job-{n}")) for n, process in enumerate(busy)]
                await asyncio.sleep(20.0)
                began = asyncio.get_running_loop().time()
                await late.add(f"word for {len(busy)}")
                assert asyncio.get_running_loop().time() - began < 30 * (0.03 + latency)
                for task in writing:
                    task.cancel()
                await asyncio.wait(writing)
            for process in (*writers, late):
                await process.aclose()

        run(main)

    @pytest.mark.parametrize(("have_written", "bound"), [(False, 24.0), (True, 15.0)])
    def test_of_those_who_come_at_the_same_time_none_waits_for_long(self, have_written: bool, bound: float) -> None:
        async def main() -> None:
            store = SimulatedStore(chance.randrange(100), latency=(0.02, 0.04))
            loop = asyncio.get_running_loop()
            start = 0.5

            async def write(number: int) -> None:
                process = Process(store)
                if have_written:
                    await process.add("word", f"first-{number}")
                await asyncio.sleep(start - loop.time())
                if number:  # what has just begun is slow
                    process.client.frozen_until = start + chance.uniform(0.0, 0.05)
                await process.add("word", f"job-{number}")
                waits.append(loop.time() - start)
                while loop.time() < start + 2.0:
                    await process.add("word", f"job-{number}-{loop.time()}")

            await asyncio.gather(*map(write, range(4)))

        random.seed(1)
        chance = random.Random(1)
        waits: list[float] = []
        for _ in range(20):
            run(main)
        assert max(waits) < bound * 0.03

    def test_those_who_have_little_to_write_are_not_held_up(self) -> None:
        async def main() -> None:
            random.seed(1)
            store = SimulatedStore(1, latency=(0.02, 0.04))
            waits: list[float] = []
            loop = asyncio.get_running_loop()

            async def write(number: int) -> None:
                process = Process(store)
                for turn in range(60):
                    await asyncio.sleep(random.expovariate(1.0))
                    began = loop.time()
                    await process.add("word", f"job-{number}-{turn}")
                    waits.append(loop.time() - began)

            await asyncio.gather(*map(write, range(4)))
            assert sorted(waits)[len(waits) // 2] < 10 * 0.03

        run(main)

    def test_who_writes_all_the_time_is_not_held_up_by_who_writes_now_and_then(self) -> None:
        async def main() -> None:
            random.seed(1)
            store = SimulatedStore(1, latency=(0.02, 0.04))
            loop = asyncio.get_running_loop()
            done = 0

            async def write_now_and_then() -> None:
                process = Process(store)
                while loop.time() < 20.0:
                    await process.add("word", f"rare-{loop.time()}")
                    await asyncio.sleep(random.expovariate(1.0))

            async def write() -> None:
                nonlocal done
                process = Process(store)
                while loop.time() < 20.0:
                    await process.add("word", f"job-{done}")
                    done += 1

            await asyncio.gather(write(), write_now_and_then())
            assert done > 0.4 * 20.0 / 0.03

        run(main)

    def test_who_says_that_it_needs_absurdly_long_is_left_a_turn_of_two_seconds(self) -> None:
        async def main() -> None:
            now = datetime.fromtimestamp(BEGIN, UTC)
            order = Order("b")
            order.saw([Segment(1, 0, "a-1", "", now, 1e9), Segment(2, 0, "b-1", "a-1", now, 0.1)])
            assert order.ahead() == 1
            assert 0.0 < order.wait(1) <= 2.0
            order.let_in(Request("c-1", 2, 1e9, now))
            assert 0.0 < order.wait(0) <= 2.0
            await asyncio.sleep(2.0)
            assert order.wait(1) == 0.0

        run(main)

    def test_those_who_died_after_a_write_are_waited_for_once(self) -> None:
        async def main() -> None:
            random.seed(1)
            store = SimulatedStore(1, latency=(0.03, 0.03))
            writers = [Process(store) for _ in range(20)]
            survivors = writers[:2]
            for number, writer in enumerate(writers):
                await writer.add("word", f"first-{number}")
            began = asyncio.get_running_loop().time()

            async def write(process: Process, name: str) -> None:
                for number in range(20):
                    await process.add("word", f"{name}-{number}")

            await asyncio.gather(*(write(process, str(n)) for n, process in enumerate(survivors)))
            took = asyncio.get_running_loop().time() - began
            assert took < 40 * 0.03 * 5, took

        run(main)

    def test_one_alone_is_hardly_slower_for_it(self) -> None:
        async def main() -> None:
            store = SimulatedStore(1, latency=(0.03, 0.03))
            process = Process(store)
            for number in range(600):
                await process.add("word", f"job-{number}")
            assert asyncio.get_running_loop().time() < 600 * 0.03 * 1.2

        run(main)
