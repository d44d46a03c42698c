"""How a service of AWS is asked: when, how often, what its answers mean, and what they tell of its clock."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from typing_extensions import TypeVar

from ..clock import Clock, SystemClock
from ..errors import StoreError, StoreUnavailableError
from ._aws import NO_ANSWER, ClientError, ClientOptions, no_answer

__all__ = [
    "BusyError",
    "Refusal",
    "Sender",
    "ServiceTime",
    "TaskTurns",
    "Turns",
    "meaning",
    "patiently",
    "together",
]

T = TypeVar("T")

MAX_PAUSE: Final = 5.0  # seconds between two requests to a service that says to slow down
DRIFT: Final = 2e-4  # seconds by which two clocks may part in a second

SLOW_DOWN: Final = frozenset(
    {
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "429",
    }
)
UNANSWERED: Final = frozenset(
    {
        "IncompleteBody",
        "InternalError",
        "InternalServerError",
        "InternalFailure",
        "ServiceUnavailable",
        "RequestTimeout",
        "408",
    }
)
CREDENTIALS_REFUSED: Final = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotSignedUp",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)


class BusyError(StoreUnavailableError):
    """The service refused for now, and changed nothing."""


class Refusal(NamedTuple):
    """An answer that is an error."""

    code: str
    message: str
    status: int
    headers: Mapping[str, str]
    response: Mapping[str, Any]  # all of it, as the client has read it

    def __str__(self) -> str:
        return f"{self.code or self.status}{': ' if self.message else ''}{self.message}"


def meaning(said: str, refusal: Refusal) -> StoreError:
    """What a refusal means that all services have.

    Args:
        said: What was asked of whom, for the message.
        refusal: What was answered.
    """
    code = refusal.code
    said = f"{said}: {refusal}"
    if code in SLOW_DOWN:
        return BusyError(said)
    if code in CREDENTIALS_REFUSED:
        clock = "; or this machine's clock is wrong" if code == "InvalidSignatureException" else ""
        return StoreError(f"the credentials were refused{clock}: {said}")
    if code in UNANSWERED or refusal.status >= 500 or refusal.status == 0:
        return StoreUnavailableError(said)
    return StoreError(said)


class Pace:
    """How fast the service wants to be asked: all requests of a tracker slow down together, as it counts them
    together.
    """

    def __init__(self) -> None:
        self._pause = 0.0  # seconds
        self._resume_at = 0.0

    async def wait(self) -> None:
        """Before a request."""
        if self._pause and (wait := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))

    def slower(self) -> None:
        """After a request that was refused because there are too many."""
        now = asyncio.get_running_loop().time()
        if self._resume_at <= now:  # else it was said to all that were under way
            self._pause = min(MAX_PAUSE, self._pause * 2 or 0.05)
            self._resume_at = now + self._pause

    def well(self) -> None:
        """After a request that was not refused."""
        self._pause = 0.0


class Turns:
    """How many requests may be under way at once: fewer while they are not answered in time.

    A service that is sent more than it can answer within our time-outs would else answer nothing in time, for good:
    each request is given up while it waits there, and sent again behind the others. Of those under way, half are too
    many then; each answer lets a part of one more through, as TCP has it.

    Args:
        most: Of them, at any time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lowered_at = -float("inf")

    async def __aenter__(self) -> None:
        if self._under_way < int(self._limit) and not self._waiting:
            self._under_way += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._leave()  # it came, and nobody was there any more
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._under_way -= 1
        while self._waiting and self._under_way < int(self._limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._under_way += 1
                turn.set_result(None)

    def answered(self) -> None:
        """After a request that was answered, whatever the answer."""
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def unanswered(self, began: float) -> None:
        """After a request that was not answered in time.

        Args:
            began: When it was sent, by the event loop's clock. One that was under way when this last happened tells
                nothing new.
        """
        if began > self._lowered_at:
            self._lowered_at = asyncio.get_running_loop().time()
            self._limit = max(1.0, min(self._limit, self._under_way) / 2)


class TaskTurns:
    """Coroutines that want the same record take turns, instead of racing each other over the network.

    Args:
        patience: Seconds for which one waits at the most.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # while somebody has it or waits

    @asynccontextmanager
    async def turn(self, task_id: str) -> AsyncIterator[None]:
        """Raises `StoreUnavailableError` where it does not come in time: the store does not answer the others."""
        lock = self._locks.get(task_id)
        if lock is None:
            lock = self._locks[task_id] = asyncio.Lock()
        try:
            async with asyncio.timeout(self._patience):
                await lock.acquire()
        except TimeoutError as exc:
            raise StoreUnavailableError(f"the store did not answer others that write {task_id!r}") from exc
        try:
            yield
        finally:
            lock.release()


class ServiceTime:
    """The service's clock, as its answers tell it.

    An answer says the second in which it was made, and was made while we waited for it. What several answers leave
    possible together is narrower than what one of them does.

    Args:
        clock: Ours. One that is not the system's stands for the service's too.

    Attributes:
        date: Of the latest answer that told it: whole seconds since 1970.
        answered: Of the very latest answer; `None` where it did not tell, or a cache has told.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_system = isinstance(clock, SystemClock)
        self._low = -float("inf")  # the service's time minus our own lies between these
        self._high = float("inf")
        self._seen_at = 0.0
        self._round_trip = 0.0  # seconds, of the quickest answer
        self.date: float | None = None
        self.answered: float | None = None

    def local(self) -> float:
        """Our own time, which nobody sets."""
        boot = self._clock.boot()
        return boot.seconds if boot.boot_id else self._clock.monotonic()

    def saw(self, headers: Mapping[str, str], asked: float) -> None:
        """Takes the time from an answer.

        Args:
            headers: Of the answer, in lower case.
            asked: When it was asked, by `local`.
        """
        self.answered = None
        text = headers.get("date")
        if text is None or "age" in headers:  # a cache tells when it got the answer, not when we did
            return
        try:
            date = parsedate_to_datetime(text).timestamp()
        except ValueError:
            return
        self.answered = date
        now = self.local()
        low, high = date - now, date + 1 - asked
        widened = DRIFT * (now - self._seen_at)
        self._low, self._high = max(low, self._low - widened), min(high, self._high + widened)
        is_first = self.date is None
        if self._low >= self._high:  # one of the clocks was set, or a machine with another clock has answered
            self._low, self._high = low, high
        self._seen_at = now
        self._round_trip = now - asked if is_first else min(self._round_trip, now - asked)
        self.date = date

    def now(self) -> datetime:
        """The service's time, as best known: our own wall clock's, as far as the answers leave that possible.

        So the workers of one machine agree to the microsecond, and a clock that is wrong does no harm.
        """
        now = self._clock.now()
        if not self._is_system or self.date is None:
            return now
        local = self.local()
        wall, low, high = now.timestamp(), local + self._low, local + self._high
        return now if low <= wall <= high else datetime.fromtimestamp(low if wall < low else high, UTC)

    @property
    def uncertainty(self) -> float:
        """Seconds by which two workers' views of it may differ: a second and a round trip on each side."""
        return 2 * (1 + self._round_trip) if self._is_system and self.date is not None else 0.0


class Sender:
    """Sends requests: no more at once than the service answers in time, no faster than it wants, and each of them once.

    Args:
        options: How many at once at the most, and how long one may take.
        time: The service's clock, which all answers tell.
    """

    def __init__(self, options: ClientOptions, time: ServiceTime) -> None:
        self._request_time = options.request_time
        self._time = time
        self._turns = Turns(options.connections)
        self._pace = Pace()

    async def send(
        self,
        said: str,
        request: Callable[[], Coroutine[Any, Any, tuple[Mapping[str, Any], T]]],
        means: Callable[[Refusal], Exception],
    ) -> T:
        """What is made of the answer.

        Args:
            said: What is asked of whom, for messages.
            request: Sends it; gives the answer, and what is made of it.
            means: What to raise where the answer is an error; see `meaning`.

        Raises:
            StoreUnavailableError: There is no answer; it may have been done.
            StoreError: It was not sent, and it would not help to ask again.
        """
        async with self._turns:
            await self._pace.wait()
            began, asked = asyncio.get_running_loop().time(), self._time.local()
            try:
                async with asyncio.timeout(self._request_time):
                    answer, value = await request()
            except ClientError as exc:
                raise self._refused(exc, asked, means) from exc
            except TimeoutError as exc:
                self._turns.unanswered(began)
                raise StoreUnavailableError(f"{said} was not answered within {self._request_time:g} s") from exc
            except NO_ANSWER as exc:
                raise no_answer(said, exc) from exc
            self._time.saw(answer["ResponseMetadata"].get("HTTPHeaders", {}), asked)
            self._turns.answered()
            self._pace.well()
            return value

    def _refused(self, exc: Any, asked: float, means: Callable[[Refusal], Exception]) -> Exception:
        response = exc.response
        error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
        headers = meta.get("HTTPHeaders", {})
        self._time.saw(headers, asked)
        refusal = Refusal(
            str(error.get("Code", "")),
            str(error.get("Message", "")),
            int(meta.get("HTTPStatusCode", 0)),
            headers,
            response,
        )
        if refusal.code in SLOW_DOWN:
            self._pace.slower()
        found = means(refusal)
        if not isinstance(found, StoreUnavailableError):
            self._turns.answered()
            self._pace.well()
        return found


async def patiently(request: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T:
    """Asks again while there is no answer, for so long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    pause = 0.02
    while True:
        try:
            return await request()
        except StoreUnavailableError:
            if loop.time() > until:
                raise
            pause = min(1.0, 2 * pause)
            await asyncio.sleep(random.uniform(0, pause))


async def together(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All answers; where one request fails, the others have ended too when this raises."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
