"""Guarantee 2: how runs end, and that each outcome is recorded once."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from ..._core.retry import GiveUp, Postpone, Retry
from ..._core.task import Status
from ...errors import (
    InvalidValueError,
    RecordTooLargeError,
    TaskExhaustedError,
    TaskIgnoredError,
    TaskNotDueError,
    TaskSucceededError,
    TaskUnavailableError,
    TrackerError,
)
from .._clock import FakeClock
from ._base import LEASE, Base, Holder, MakeTracker, abandon, check_sound, held, loaded, settle

UNSTORABLE: dict[str, tuple[Any, str]] = {
    "nan": ({"a": [1, {"b": math.nan}]}, r"\['a'\]\[1\]\['b'\] is nan"),
    "inf": ([math.inf], r"\[0\] is inf"),
    "bytes": ({"raw": b"x"}, r"\['raw'\] is of type bytes"),
    "set": ({"tags": {1}}, r"\['tags'\] is of type set"),
    "int key": ({"rows": {1: "x"}}, r"\['rows'\]"),
    "object": ({"x": object()}, r"\['x'\] is of type object"),
    "surrogate": ({"x": "\ud800"}, r"\['x'\]"),
    "huge int": ({"x": 2**70}, r"\['x'\]"),
}

STORABLE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    2**53 + 1,
    0.1,
    1e300,
    -0.0,
    "",
    "null",
    "é\x00\n\u2028😀",
    [],
    {},
    [1, [2, [None, {"k": []}]]],
    {"": 1, "a.b": {"$c": "\x00"}, "id": "not the id", "1": 1},
]


@dataclass
class Receipt:
    number: str
    amount: int


class Outcomes(Base):
    async def test_a_body_that_is_left_normally_has_succeeded(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(worker="w1") as tracker:
            async with tracker.run("job", data={"n": 1}) as task:
                assert (task.id, task.attempts, task.data) == ("job", 1, {"n": 1})
                during = await loaded(tracker, "job")
                assert during.status is Status.IN_PROGRESS
                assert during.lease is not None
                assert during.lease.worker == "w1"
                task.result = {"rows": 3}
            stored = await loaded(tracker, "job")
            check_sound(stored)
            assert (stored.status, stored.result, stored.attempts) == (Status.SUCCEEDED, {"rows": 3}, 1)
            assert stored.data == {"n": 1}
            assert stored.errors == ()
            assert stored.finish_time is not None
            assert [end.outcome for end in stored.ends] == ["succeeded"]

    async def test_a_task_that_succeeded_is_not_run_again(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as one, make_tracker() as two:
            async with one.run("job") as task:
                task.result = 1
            before = await loaded(one, "job")
            for tracker in (one, two):
                with pytest.raises(TaskSucceededError) as refused:
                    async with tracker.run("job"):
                        pytest.fail("it ran again")
                assert (refused.value.retry_after, refused.value.task.result) == (None, 1)
            assert await loaded(two, "job") == before

    @pytest.mark.parametrize("ask", ["force", "reset"])
    async def test_a_task_that_succeeded_is_run_again_when_somebody_asks(
        self, make_tracker: MakeTracker, ask: str
    ) -> None:
        async with make_tracker() as tracker:
            async with tracker.run("job") as task:
                task.result = 1
            if ask == "reset":
                assert await tracker.reset("job") == 1
            async with tracker.run("job", force=ask == "force") as task:
                assert (await loaded(tracker, "job")).result is None
                task.result = 2
            assert (await loaded(tracker, "job")).result == 2

    async def test_force_does_not_override_a_live_lease(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker, held(tracker, "job"):
            with pytest.raises(TaskUnavailableError):
                async with tracker.run("job", force=True):
                    pass

    async def test_an_exception_is_raised_on_and_recorded_with_its_traceback(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(worker="w1") as tracker:
            with pytest.raises(KeyError, match="missing"):
                async with tracker.run("job"):
                    raise KeyError("missing")
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.status, task.attempts, task.last_outcome) == (Status.FAILED, 1, "error")
            (failure,) = task.errors
            assert (failure.type, failure.attempt, failure.worker) == ("KeyError", 1, "w1")
            assert "missing" in failure.message
            assert 'raise KeyError("missing")' in failure.traceback

    async def test_after_the_last_attempt_it_is_exhausted_and_refused(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(retry=Retry(3)) as tracker:
            for attempt in (1, 2, 3):
                with pytest.raises(ValueError, match=f"no. {attempt}"):
                    async with tracker.run("job") as task:
                        assert task.attempts == attempt
                        raise ValueError(f"no. {attempt}")
            task_now = await loaded(tracker, "job")
            assert (task_now.status, task_now.attempts) == (Status.EXHAUSTED, 3)
            assert [failure.attempt for failure in task_now.errors] == [1, 2, 3]
            with pytest.raises(TaskExhaustedError, match=r"no\. 3") as refused:
                async with tracker.run("job"):
                    pytest.fail("it ran again")
            assert refused.value.retry_after is None
            assert await loaded(tracker, "job") == task_now

    async def test_give_up_exhausts_at_once(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(GiveUp):
                async with tracker.run("job"):
                    raise GiveUp("not found")
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts, task.errors[-1].message) == (Status.EXHAUSTED, 1, "not found")

    async def test_postpone_gives_the_attempt_back_and_binds_everybody(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        async with make_tracker(clock=clock) as tracker:
            for _ in range(5):
                with pytest.raises(Postpone):
                    async with tracker.run("job") as running:
                        assert running.attempts == 1
                        raise Postpone(8)
                task = await loaded(tracker, "job")
                check_sound(task)
                assert (task.status, task.attempts, task.errors) == (Status.PENDING, 0, ())
                with pytest.raises(TaskNotDueError) as refused:
                    async with tracker.run("job"):
                        pass
                assert refused.value.retry_after == 8
                clock.jump(8)

    async def test_classes_match_inside_exception_groups(self, make_tracker: MakeTracker) -> None:
        async with make_tracker(retry=Retry(5, on=OSError, never=PermissionError)) as tracker:
            cases: list[tuple[str, Exception, Status]] = [
                ("retried", OSError("x"), Status.FAILED),
                ("another class", ValueError("x"), Status.EXHAUSTED),
                ("never", PermissionError("x"), Status.EXHAUSTED),
                ("retried in a group", ExceptionGroup("g", [ValueError("x"), OSError("x")]), Status.FAILED),
                ("never in a group", ExceptionGroup("g", [OSError("x"), PermissionError("x")]), Status.EXHAUSTED),
                ("deep", ExceptionGroup("g", [ExceptionGroup("h", [OSError("x")])]), Status.FAILED),
                ("give up in a group", ExceptionGroup("g", [OSError("x"), GiveUp("x")]), Status.EXHAUSTED),
                ("postpone in a group", ExceptionGroup("g", [Postpone(1), Postpone(2)]), Status.PENDING),
            ]
            for task_id, error, status in cases:
                with pytest.raises(type(error)):
                    async with tracker.run(task_id):
                        raise error
                assert (await loaded(tracker, task_id)).status is status, task_id

    async def test_our_timeout_is_a_failure(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async with (
            make_tracker(clock=clock, retry=Retry(2)) as tracker,
            held(tracker, "job", timeout=20) as holder,
        ):
            await settle()
            clock.jump(20)
            with pytest.raises(TimeoutError, match="20 s"):
                await holder.run
            task = await loaded(tracker, "job")
            check_sound(task)
            assert (task.status, task.attempts, task.last_outcome) == (Status.FAILED, 1, "timeout")
            assert task.errors[-1].type == "TimeoutError"

    async def test_a_timeout_around_is_a_cancellation(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), tracker.run("job"):
                    await asyncio.Event().wait()
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts, task.last_outcome) == (Status.PENDING, 0, "cancelled")

    async def test_a_timeout_inside_the_body_is_a_failure(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(TimeoutError):
                async with tracker.run("job"), asyncio.timeout(0.01):
                    await asyncio.Event().wait()
            task = await loaded(tracker, "job")
            assert (task.status, task.attempts, task.errors[-1].type) == (Status.FAILED, 1, "TimeoutError")
            assert task.last_outcome == "timeout"

    async def test_the_last_outcome_tells_faults_of_the_work(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            for task_id, error, outcome in (
                ("succeeded", None, None),
                ("failed", OSError(), "error"),
                ("gave up", GiveUp(), "error"),
                ("timed out", TimeoutError(), "timeout"),
                ("postponed", Postpone(1), None),
            ):
                with suppress(OSError, GiveUp, Postpone):
                    async with tracker.run(task_id):
                        if error is not None:
                            raise error
                assert (await loaded(tracker, task_id)).last_outcome == outcome, task_id

    async def test_the_last_outcome_of_a_lease_that_was_lost_is_not_the_works_fault(
        self, make_tracker: MakeTracker, clock: FakeClock
    ) -> None:
        await abandon(make_tracker(clock=clock, lease=LEASE), "died", "taken")
        async with make_tracker(clock=clock) as tracker:
            await tracker.reset("taken", force=True)
            assert (await loaded(tracker, "taken")).last_outcome == "lease_lost"
            clock.jump(LEASE)
            async with tracker.run("died") as task:
                assert task.record.last_outcome == "lease_lost"
                (failure,) = task.record.errors
                assert (failure.type, len(failure.fingerprint)) == ("LeaseLostError", 12)
            assert (await loaded(tracker, "died")).last_outcome is None

    async def test_an_ignored_task_is_refused_until_it_is_reset(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await tracker.add("job")
            await tracker.ignore("job")
            with pytest.raises(TaskIgnoredError) as refused:
                async with tracker.run("job"):
                    pass
            assert refused.value.retry_after is None
            await tracker.reset("job")
            async with tracker.run("job"):
                pass

    async def test_data_is_for_a_new_record_only(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            await tracker.add("job", {"from": "add"})
            async with tracker.run("job", data={"from": "run"}) as task:
                assert task.data == {"from": "add"}

    async def test_what_the_body_changes_is_recorded_by_save_and_at_every_end(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            async with tracker.run("saved", data={"page": 1}) as task:
                task.data["page"] = 2
                task.progress = 0.5
                task.note = "half"
                await task.save()
                stored = await loaded(tracker, "saved")
                assert (stored.data, stored.progress, stored.note) == ({"page": 2}, 0.5, "half")
                assert stored.status is Status.IN_PROGRESS
            ends: dict[str, Callable[[Holder], Awaitable[None]]] = {
                "ok": Holder.end,
                "error": lambda holder: holder.fail(ValueError()),
                "postponed": lambda holder: holder.fail(Postpone(1)),
                "cancelled": Holder.cancel,
            }
            for task_id, end in ends.items():
                async with held(tracker, task_id, data={"page": 1}) as holder:
                    task = await holder.task()
                    task.data["page"] = 3
                    task.note = task_id
                    with suppress(ValueError, Postpone):
                        await end(holder)
                stored = await loaded(tracker, task_id)
                assert (stored.data, stored.note) == ({"page": 3}, task_id)

    async def test_a_new_attempt_begins_without_progress(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(ValueError, match="x"):
                async with tracker.run("job") as task:
                    task.progress = 0.9
                    raise ValueError("x")
            assert (await loaded(tracker, "job")).progress == 0.9
            async with tracker.run("job") as task:
                assert task.progress is None

    async def test_progress_and_note_ride_on_renewals(self, make_tracker: MakeTracker, clock: FakeClock) -> None:
        async with make_tracker(clock=clock) as tracker, tracker.run("job") as task:
            task.progress = 0.25
            task.note = "fetching"
            await task.renew()
            stored = await loaded(tracker, "job")
            assert (stored.progress, stored.note) == (0.25, "fetching")


class Values(Base):
    @pytest.mark.parametrize("value", STORABLE, ids=repr)
    async def test_what_json_holds_comes_back_as_it_was(self, make_tracker: MakeTracker, value: Any) -> None:
        async with make_tracker() as tracker:
            await tracker.add("job", {"value": value})
            async with tracker.run("job") as task:
                _same(task.data["value"], value)
                task.result = value
            stored = await loaded(tracker, "job")
            _same(stored.data["value"], value)
            _same(stored.result, value)

    @pytest.mark.parametrize("name", UNSTORABLE)
    async def test_what_json_cannot_hold_is_refused_where_it_would_be_saved_with_the_path_to_it(
        self, make_tracker: MakeTracker, name: str
    ) -> None:
        value, path = UNSTORABLE[name]
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match=f"^data{path}"):
                await tracker.add("job", value)
            with pytest.raises(InvalidValueError, match=f"^data{path}"):
                async with tracker.run("job", data=value):
                    pass
            assert await tracker.load("job") is None
            async with tracker.run("job") as task:
                task.data = value
                with pytest.raises(InvalidValueError, match=f"^data{path}"):
                    await task.save()
                assert (await loaded(tracker, "job")).data is None
                task.data = None

    @pytest.mark.parametrize("name", UNSTORABLE)
    @pytest.mark.parametrize("field", ["data", "result"])
    async def test_at_the_end_of_a_body_it_is_recorded_as_a_failure(
        self, make_tracker: MakeTracker, name: str, field: str
    ) -> None:
        value, path = UNSTORABLE[name]
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError, match=f"{field}{path}"):
                async with tracker.run("job", data={"kept": True}) as task:
                    setattr(task, field, value)
            stored = await loaded(tracker, "job")
            assert (stored.status, stored.data, stored.result) == (Status.FAILED, {"kept": True}, None)
            assert stored.errors[-1].type == "InvalidValueError"

    async def test_an_outcome_too_large_for_the_store_is_recorded_as_a_failure_without_the_result(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(RecordTooLargeError) as refused:
                async with tracker.run("job", data={"kept": True}) as task:
                    task.result = "x" * tracker.max_record_bytes
            assert refused.value.task_id == "job"
            assert refused.value.size > refused.value.limit
            stored = await loaded(tracker, "job")
            check_sound(stored)
            assert (stored.status, stored.result, stored.data) == (Status.FAILED, None, {"kept": True})
            assert stored.errors[-1].type == "RecordTooLargeError"

    async def test_save_refuses_what_is_too_large_and_leaves_room_for_the_outcome(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(ValueError, match="y"):
                async with tracker.run("job") as task:
                    task.data = "x" * tracker.max_record_bytes
                    with pytest.raises(RecordTooLargeError):
                        await task.save()
                    task.data = "x" * (tracker.max_record_bytes - 40_000)
                    await task.save()
                    raise ValueError("y" * 10_000)
            stored = await loaded(tracker, "job")
            assert stored.status is Status.FAILED
            assert stored.errors[-1].traceback
            assert len(stored.data) == tracker.max_record_bytes - 40_000

    async def test_a_body_that_fails_with_data_too_large_is_still_recorded(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(ValueError, match="failed"):
                async with tracker.run("job") as task:
                    task.data = "x" * tracker.max_record_bytes
                    raise ValueError("failed")
            stored = await loaded(tracker, "job")
            assert (stored.status, stored.errors[-1].message) == (Status.FAILED, "failed")

    async def test_an_add_that_is_too_large_is_refused_and_changes_nothing(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(RecordTooLargeError):
                await tracker.add("job", "x" * tracker.max_record_bytes)
            assert await tracker.load("job") is None

    async def test_an_id_that_is_no_str_is_a_type_error_that_says_what_to_write(
        self, make_tracker: MakeTracker
    ) -> None:
        async with make_tracker() as tracker:
            verbs: list[Callable[[Any], Awaitable[Any]]] = [tracker.add, tracker.wait, tracker.reset]
            for verb in verbs:
                with pytest.raises(TypeError, match=r"str\(id\)"):
                    await verb(17)
            with pytest.raises(TypeError, match=r"str\(id\)"):
                tracker.run(17)  # type: ignore[arg-type]  # what is tested

    @pytest.mark.parametrize("task_id", ["", "x" * 2049, "é" * 1025, "\ud800"])
    async def test_an_id_that_cannot_be_one_is_refused(self, make_tracker: MakeTracker, task_id: str) -> None:
        async with make_tracker() as tracker:
            with pytest.raises(InvalidValueError):
                await tracker.add(task_id)
            with pytest.raises(InvalidValueError):
                tracker.run(task_id)


class Calls(Base):
    async def test_a_call_runs_once_and_gives_the_same_value_every_time(self, make_tracker: MakeTracker) -> None:
        calls: list[str] = []

        async def charge(order: str, *, amount: int) -> Receipt:
            calls.append(order)
            return Receipt(f"R-{order}", amount)

        async with make_tracker() as one, make_tracker() as two:
            first = await one.call("order-1", charge, "1", amount=5)
            again = await two.call("order-1", charge, "1", amount=5)
            assert first == again == Receipt("R-1", 5)
            assert calls == ["1"]

    async def test_a_value_takes_its_stored_form_the_first_time_too(self, make_tracker: MakeTracker) -> None:
        async def pair() -> Any:
            return (1, 2)

        async with make_tracker() as tracker:
            assert await tracker.call("job", pair) == [1, 2]
            assert await tracker.call("job", pair) == [1, 2]

    async def test_a_call_that_fails_is_recorded_and_tried_again_by_the_next(self, make_tracker: MakeTracker) -> None:
        errors = [ValueError("first")]

        async def flaky() -> int:
            if errors:
                raise errors.pop()
            return 1

        async with make_tracker() as tracker:
            with pytest.raises(ValueError, match="first"):
                await tracker.call("job", flaky)
            assert (await loaded(tracker, "job")).status is Status.FAILED
            assert await tracker.call("job", flaky) == 1

    async def test_a_call_whose_task_is_held_elsewhere_is_refused(self, make_tracker: MakeTracker) -> None:
        async def charge() -> int:
            return 1

        async with make_tracker() as one, make_tracker() as two, held(one, "job"):
            with pytest.raises(TaskUnavailableError) as refused:
                await two.call("job", charge)
            assert refused.value.retry_after is not None

    async def test_a_plain_function_is_a_type_error_that_shows_to_thread(self, make_tracker: MakeTracker) -> None:
        def plain() -> int:
            return 1

        async with make_tracker() as tracker:
            with pytest.raises(TypeError, match=r"asyncio\.to_thread"):
                await tracker.call("job", plain)  # type: ignore[arg-type]  # what is tested
            with pytest.raises(TypeError, match=r"asyncio\.to_thread"):
                await tracker.work(plain)  # type: ignore[arg-type]  # what is tested
            assert await tracker.load("job") is None

    async def test_all_refusals_are_tracker_errors_with_the_record(self, make_tracker: MakeTracker) -> None:
        async with make_tracker() as tracker, held(tracker, "job"):
            with pytest.raises(TrackerError) as refused:
                async with tracker.run("job"):
                    pass
            assert isinstance(refused.value, TaskUnavailableError)
            assert refused.value.task.id == "job"


def _same(stored: Any, value: Any) -> None:
    assert repr(stored) == repr(value)
