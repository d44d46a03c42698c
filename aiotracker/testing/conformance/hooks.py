"""Hooks: what a tracker tells of its tasks, whatever its store."""

import pytest

from ...events import Claimed, Committed, Conflicted, Event, LoopLagged, RunEvent
from ._base import Base, MakeTracker, loaded


async def nothing() -> None:
    pass


class Hooks(Base):
    async def test_hooks_are_told_of_a_run_and_of_what_is_written_for_it(self, make_tracker: MakeTracker) -> None:
        seen: list[Event] = []
        async with make_tracker(hooks=[seen.append], worker="me") as tracker:
            async with tracker.run("job") as task:
                await task.step("one", nothing)
            with pytest.raises(ValueError, match="broken"):
                async with tracker.run("other"):
                    raise ValueError("broken")
        told = [type(event).__name__ for event in seen if isinstance(event, RunEvent)]
        assert told == ["Claimed", "StepStarted", "StepSucceeded", "Succeeded", "Claimed", "Failed"]
        assert {(event.store, event.worker) for event in seen} == {(tracker.kind, "me")}
        commits = [event for event in seen if isinstance(event, Committed)]
        if commits:
            first = next(event for event in seen if not isinstance(event, Conflicted | LoopLagged))
            assert first is commits[0]  # before the claim that it stored
            assert len(commits) >= 5  # two claims, a step, two ends
            assert all(event.bytes > 100 and event.operations >= 1 and event.seconds >= 0 for event in commits)

    async def test_what_a_hook_keeps_in_the_record_is_there_for_the_next_attempt(
        self, make_tracker: MakeTracker
    ) -> None:
        found: list[str | None] = []

        def hook(event: Event) -> None:
            if isinstance(event, Claimed):
                found.append(event.task.trace)
                event.set_trace(f"attempt {event.attempt}")

        for _ in range(2):
            async with make_tracker(hooks=[hook]) as tracker:
                with pytest.raises(ValueError, match="broken"):
                    async with tracker.run("job"):
                        raise ValueError("broken")
                assert (await loaded(tracker, "job")).trace == f"attempt {len(found)}"
        assert found == [None, "attempt 1"]
