"""What workers did, as they wrote it down themselves, and whether it was right."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from math import inf
from types import MappingProxyType
from typing import Literal

import msgspec

from .._core.task import Status, Task
from .._core.transitions import FREE_RELEASES

__all__ = ["Event", "Violation", "check_history", "read_history"]


Kind = Literal[
    "added",  # a new record, and its fence
    "claimed",  # the answer is there
    "alive",  # renewed: the lease as its holder sees it
    "effect",  # something outside of the store that cannot be taken back
    "ending",  # the body is over
    "ended",  # the outcome is acknowledged
    "unknown",  # the run is over, and the store did not tell whether its end was recorded
    # Of the worker, not of a task:
    "blocked",  # its event loop is about to be
    "cancelled",  # one of its bodies is about to be
    "shifted",  # its wall clock is off by no more than was agreed on
    "shifted_beyond",  # it is off by more
    "slow",  # the store did not answer it, or too late for the lease that it asked for
]


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line of a worker's history."""

    kind: Kind
    task: str
    fence: int
    time: float  # when it was known, by the one monotonic clock that all workers share
    wall: float = 0.0  # the same by the worker's own wall clock
    asked: float = 0.0  # claimed: when the claim was sent
    lease_left: float = 0.0  # claimed, alive: seconds, as the holder counts them
    boot: str = ""  # claimed: of the worker's machine; empty: it does not tell
    accepted: bool = True  # effect: there had been none of a later fence
    outcome: str = ""  # ending, ended: succeeded, failed, released or lost
    worker: str = ""


class Violation(msgspec.Struct, frozen=True):
    """One broken promise."""

    task: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.task}: {self.rule}: {self.reason}"


class _Claim:
    """All that is known of one claim."""

    def __init__(self, claimed: Event) -> None:
        self.claimed = claimed
        self.events: list[Event] = []

    def sure_until(self, time: float) -> float:
        """Until when the lease was surely live, by what its holder knew at some time."""
        until = self.claimed.time + self.claimed.lease_left
        for event in self.events:
            if event.kind == "alive" and event.time <= time:
                until = max(until, event.time + event.lease_left)
            elif event.kind == "ending":
                until = min(until, event.time)
        return until

    def ended(self, kind: str, outcome: str = "") -> Event | None:
        return next((e for e in self.events if e.kind == kind and (not outcome or e.outcome == outcome)), None)


def read_history(lines: Iterable[bytes]) -> list[Event]:
    """The events of one file; a last line that was cut off by a kill is passed over."""
    decoder = msgspec.json.Decoder(Event)
    return [decoder.decode(line) for line in lines if line.endswith(b"\n")]


def check_history(
    events: Iterable[Event],
    records: Mapping[str, Task | None],
    *,
    max_attempts: int,
    finished: bool = True,
    poison: Mapping[str, int] = MappingProxyType({}),
) -> list[Violation]:
    """Judges what workers did by what they wrote down, and by what the store holds in the end.

    Only what is certain is reported: what a worker could not write down before it was killed counts for it.

    Args:
        events: Of all workers together, in any order.
        records: What the store holds in the end, of every task that was added.
        max_attempts: Of all workers.
        finished: Workers had time to bring every task to its end.
        poison: Tasks that kill whoever runs them, and how many attempts they have.
    """
    by_task: dict[str, list[Event]] = defaultdict(list)
    clocks = _Clocks()
    for event in sorted(events, key=lambda event: event.time):
        if event.task:
            by_task[event.task].append(event)
        else:
            clocks.see(event)
    found: list[Violation] = []
    for task_id in sorted(by_task.keys() | records.keys()):
        record, attempts = records.get(task_id), poison.get(task_id, max_attempts)
        found += [
            Violation(task_id, rule, reason)
            for rule, reason in _check_task(by_task[task_id], record, attempts, finished, clocks)
        ]
        if finished and task_id in poison and record is not None and record.status is not Status.EXHAUSTED:
            reason = f"it kills whoever runs it, and is {record.status} after {record.attempts} attempts"
            found.append(Violation(task_id, "crashes count", reason))
    return found


class _Clocks:
    """When whose wall clock was off by more than was agreed on."""

    def __init__(self) -> None:
        self._beyond: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def see(self, event: Event) -> None:
        spans = self._beyond[event.worker]
        if spans and spans[-1][1] == inf and event.kind == "shifted":
            spans[-1] = (spans[-1][0], event.time)
        elif event.kind == "shifted_beyond" and not (spans and spans[-1][1] == inf):
            spans.append((event.time, inf))

    def were_beyond(self, workers: Collection[str] | None, since: float, until: float) -> bool:
        """Whether any of these was, at some time in between; `None`: of all."""
        spans = [self._beyond.get(worker, []) for worker in (self._beyond if workers is None else workers)]
        return any(begin <= until and since <= end for some in spans for begin, end in some)


def _check_task(
    events: list[Event], record: Task | None, max_attempts: int, finished: bool, clocks: _Clocks
) -> Iterable[tuple[str, str]]:
    claims: dict[int, _Claim] = {}
    first_fence: int | None = None
    for event in events:
        if event.kind == "added":
            first_fence = event.fence
        elif event.kind == "claimed":
            if event.fence in claims:
                yield "fences grow", f"two claims have the fence {event.fence}"
            claims.setdefault(event.fence, _Claim(event))
    for event in events:
        if event.kind in ("added", "claimed"):
            continue
        if event.fence not in claims:
            yield "histories are whole", f"{event.kind} of the fence {event.fence}, which nobody claimed"
        else:
            claims[event.fence].events.append(event)
    in_order = sorted(claims.values(), key=lambda claim: claim.claimed.time)
    yield from _check_leases(in_order, clocks)
    yield from _check_effects(events)
    yield from _check_outcomes(in_order, record)
    if record is None:
        if events:
            yield "nothing acknowledged is lost", "the record is gone"
        return
    if in_order and record.fence < max(claims):
        yield "nothing acknowledged is lost", f"the record's fence {record.fence} is older than a claim's {max(claims)}"
    if finished and not record.status.is_final:
        holder = f", held by {record.lease.worker}" if record.lease is not None else ""
        yield "nothing is stuck", f"it is {record.status} in the end{holder}"
    yield from _check_attempts(in_order, record, first_fence, max_attempts)


def _check_leases(claims: list[_Claim], clocks: _Clocks) -> Iterable[tuple[str, str]]:
    for index, claim in enumerate(claims):
        for later in claims[index + 1 :]:
            asked, answered = later.claimed.asked, later.claimed.time
            if asked >= claim.claimed.time and later.claimed.fence < claim.claimed.fence:
                yield "fences grow", f"{later.claimed.fence} was given after {claim.claimed.fence}"
            # The later claim landed somewhere between its request and its answer, and the earlier lease was live
            # all that time.
            if claim.claimed.time <= asked and answered < claim.sure_until(answered):
                between = [
                    one.claimed for one in claims if claim.claimed.fence < one.claimed.fence < later.claimed.fence
                ]
                if _is_excused(claim.claimed, [*between, later.claimed], clocks):
                    continue
                yield (
                    "one live lease",
                    f"{later.claimed.worker} got the fence {later.claimed.fence} while {claim.claimed.worker} held "
                    f"{claim.claimed.fence} for another {claim.sure_until(answered) - answered:.3f} s",
                )


def _is_excused(earlier: Event, later: list[Event], clocks: _Clocks) -> bool:
    """Whether the lease may have been taken over too early because a wall clock was off beyond all bounds.

    Where only wall clocks can tell whether a lease is live, the store may then give its task away; fences and outcomes
    hold all the same.

    Args:
        earlier: The claim.
        later: All known claims after it, up to the one that came too early.
        clocks: Who was off.
    """
    for event in later:
        if earlier.boot and earlier.boot == event.boot:
            continue
        if clocks.were_beyond((earlier.worker, event.worker), earlier.asked, event.time):
            return True
    # One that was killed before it could write its claim down.
    is_whole = later[-1].fence - earlier.fence == len({event.fence for event in later})
    return not is_whole and clocks.were_beyond(None, earlier.asked, later[-1].time)


def _check_effects(events: list[Event]) -> Iterable[tuple[str, str]]:
    """Whoever compares fences, as an effect outside of the store should, is never misled by them."""
    latest = 0
    for event in events:
        if event.kind == "effect":
            if event.accepted and event.fence < latest:
                yield "effects are in order", f"an effect of the fence {event.fence} came after one of {latest}"
            elif not event.accepted and event.fence >= latest:
                yield "effects are in order", f"an effect of the fence {event.fence} was refused, and {latest} is older"
            latest = max(latest, event.fence)


def _check_outcomes(claims: list[_Claim], record: Task | None) -> Iterable[tuple[str, str]]:
    successes = [(claim, end) for claim in claims if (end := claim.ended("ended", "succeeded")) is not None]
    if len(successes) > 1:
        fences = ", ".join(str(claim.claimed.fence) for claim, _ in successes)
        yield "one outcome", f"{len(successes)} successes were acknowledged, of the fences {fences}"
    for success, end in successes:
        fence = success.claimed.fence
        if success.ended("effect") is None:
            yield "one outcome", f"the success of {fence} was acknowledged, and its body did nothing"
        for claim in claims:
            if claim.claimed.fence > fence:
                yield "one outcome", f"the success of {fence} was acknowledged, and {claim.claimed.fence} is later"
        for claim in claims:
            if claim.claimed.asked > end.time:
                yield "one outcome", f"{claim.claimed.fence} was claimed after the success of {fence} was acknowledged"
        if record is None:
            continue
        if record.status is not Status.SUCCEEDED:
            yield "nothing acknowledged is lost", f"the success of {fence} was acknowledged; it is {record.status}"
        elif record.fence != fence:
            yield "nothing acknowledged is lost", f"the success is that of {record.fence}, not of {fence}"
    if record is None:
        return
    recorded = [end for end in record.ends if end.outcome == "succeeded"]
    if len(recorded) > 1:
        yield "one outcome", f"{len(recorded)} successes are recorded"
    kept = {end.fence: end.outcome for end in record.ends}
    for claim in claims:
        for end in claim.events:
            told = kept.get(claim.claimed.fence)
            if end.kind == "ended" and told is not None and not _same(told, end.outcome):
                yield "fenced", f"{claim.claimed.fence} was told {end.outcome}, and {told} is recorded"


def _same(recorded: str, told: str) -> bool:
    if told == "lost":
        return recorded != "succeeded"
    if told == "released":  # a cancellation that is on its way out is not replaced by the loss of the lease
        return recorded in ("released", "lease_lost")
    return recorded == told or (told == "failed" and recorded == "exhausted")


def _check_attempts(
    claims: list[_Claim], record: Task, first_fence: int | None, max_attempts: int
) -> Iterable[tuple[str, str]]:
    if record.attempts > max_attempts:
        yield "crashes count", f"{record.attempts} attempts, and {max_attempts} are the most"
    if first_fence is not None:
        # Each claim took the next fence; ten releases in a row give theirs back.
        back = sum(end.outcome == "released" for end in record.ends) if record.releases <= FREE_RELEASES else 0
        if record.attempts > record.fence - first_fence - back:
            yield (
                "crashes count",
                f"{record.attempts} attempts, and {record.fence - first_fence} claims, {back} released",
            )
    # A run that was released, or may have been, gave its attempt back.
    certain = [claim for claim in claims if not _may_be_given_back(claim)]
    if record.attempts < len(certain):
        yield "crashes count", f"{record.attempts} attempts, and {len(certain)} claims that count"
    if record.status is Status.EXHAUSTED and not record.errors:
        yield "crashes count", "it is exhausted, and nobody knows why"
    if record.status is Status.EXHAUSTED and record.attempts < max_attempts:
        yield "crashes count", f"it is exhausted after {record.attempts} attempts of {max_attempts}"


def _may_be_given_back(claim: _Claim) -> bool:
    outcomes = {event.outcome for event in claim.events if event.kind in ("ending", "ended")}
    return bool(outcomes & {"released", "lost"})
