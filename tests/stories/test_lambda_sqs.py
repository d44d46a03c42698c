import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from aiotracker import Status, Task
from tests.services.s3 import S3Service, moto_s3

__all__ = ["moto_s3"]  # a fixture

Start = Callable[[], ModuleType]


class Context:
    """What the service says about an invocation."""

    def __init__(self, seconds: float = 60) -> None:
        self._seconds = seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(self._seconds * 1000)


def event(*ids: str) -> dict[str, Any]:
    """One delivery; the queue's own ids differ from one to the next."""
    return {
        "Records": [
            {"messageId": f"sqs-{task_id}", "body": json.dumps({"id": task_id, "body": "x" * 7})} for task_id in ids
        ]
    }


def failed(answer: dict[str, Any]) -> set[str]:
    return {item["itemIdentifier"] for item in answer["batchItemFailures"]}


@pytest.fixture
def cold_start(
    load_program: Callable[[str], ModuleType], moto_s3: S3Service, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """A new instance of the function, on the same store."""
    monkeypatch.setenv("STORE", f"s3://{moto_s3.bucket}/{moto_s3.prefix()}?endpoint_url={moto_s3.url}")
    started: list[ModuleType] = []

    def start() -> ModuleType:
        module = load_program("lambda_sqs")
        started.append(module)
        return module

    yield start
    for module in started:
        module.runner.run(module.tracker.aclose())
        module.runner.close()


def count_calls(module: ModuleType, calls: Counter[str], meanwhile: Callable[[str], None] = lambda _: None) -> None:
    handle = module.handle

    async def counted(message: dict[str, Any]) -> int:
        calls[message["id"]] += 1
        meanwhile(message["id"])
        if message["id"].startswith("bad"):
            raise ValueError("no such customer")
        length: int = await handle(message)
        return length

    module.handle = counted  # type: ignore[attr-defined]  # of the program


def stored(module: ModuleType, task_id: str) -> Task:
    task: Task | None = module.runner.run(module.tracker.load(task_id))
    assert task is not None
    return task


def test_messages_that_are_delivered_again_are_handled_once_cold_and_warm(cold_start: Start) -> None:
    calls: Counter[str] = Counter()
    first = cold_start()
    count_calls(first, calls)
    assert failed(first.handler(event("a", "b", "c"), Context())) == set()
    assert failed(first.handler(event("b", "c", "d"), Context())) == set(), "warm"
    second = cold_start()
    count_calls(second, calls)
    assert failed(second.handler(event("a", "d"), Context())) == set(), "another instance"
    assert calls == Counter("abcd")
    task = stored(second, "a")
    assert (task.status, task.result, task.data) == (Status.SUCCEEDED, 7, {"id": "a", "body": "x" * 7})


def test_a_message_that_fails_is_kept_in_the_queue_until_its_last_attempt(cold_start: Start) -> None:
    calls: Counter[str] = Counter()
    module = cold_start()
    count_calls(module, calls)
    answers = [failed(module.handler(event("bad", "good"), Context())) for _ in range(5)]
    assert answers == [{"sqs-bad"}, {"sqs-bad"}, {"sqs-bad"}, set(), set()]
    assert calls == Counter(bad=3, good=1)
    assert stored(module, "bad").status is Status.EXHAUSTED


def test_a_message_that_another_instance_is_at_stays_in_the_queue(cold_start: Start) -> None:
    calls: Counter[str] = Counter()
    one, two = cold_start(), cold_start()
    begun, goes_on = threading.Event(), threading.Event()

    def wait(task_id: str) -> None:
        begun.set()
        assert goes_on.wait(60)

    count_calls(one, calls, wait)
    count_calls(two, calls)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.handler, event("slow"), Context())
        try:
            assert begun.wait(60)
            assert failed(two.handler(event("slow"), Context())) == {"sqs-slow"}
        finally:
            goes_on.set()
        assert failed(answer.result(60)) == set()
    assert failed(two.handler(event("slow"), Context())) == set()
    assert calls == Counter(slow=1)


def test_what_takes_longer_than_the_invocation_may_is_tried_again(cold_start: Start) -> None:
    module = cold_start()

    async def endless(message: dict[str, Any]) -> int:
        await module.asyncio.sleep(3600)
        return 0

    module.handle = endless  # type: ignore[attr-defined]  # of the program
    assert failed(module.handler(event("long"), Context(seconds=6))) == {"sqs-long"}
    task = stored(module, "long")
    assert (task.status, task.last_outcome, task.attempts) == (Status.FAILED, "timeout", 1)
