"""Ids from files and pipes."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiotracker.cli import ids as module
from aiotracker.cli.ids import IdReader, split


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            pass


async def read(path: Path, text: bytes, *, nul: bool = False) -> tuple[list[str], list[str], IdReader]:
    await asyncio.to_thread(path.write_bytes, text)
    fd = os.open(path, os.O_RDONLY)
    refused: list[str] = []
    reader = IdReader(fd, nul=nul, refuse=refused.append)
    found = [task_id async for task_id in reader]
    os.close(fd)
    return found, refused, reader


async def test_each_line_is_an_id_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    found, refused, reader = await read(tmp_path / "ids", b"a\n\n b c \n\t\nlast without newline")
    assert found == ["a", " b c ", "last without newline"]
    assert not refused
    assert reader.taken == reader.total == 3


async def test_nul_separated_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    found, _, _ = await read(tmp_path / "ids", b"a\nb\0\0 \0c\0", nul=True)
    assert found == ["a\nb", " ", "c"]


async def test_a_line_that_cannot_be_an_id_is_told_with_its_number_and_stops_nothing(tmp_path: Path) -> None:
    text = b"good\n\xff\n" + b"x" * 3000 + b"\nwith\0nul\nlast\n"
    found, refused, reader = await read(tmp_path / "ids", text)
    assert found == ["good", "last"]
    assert reader.refused == 3
    assert ["line 2" in refused[0], "line 3" in refused[1], "line 4" in refused[2]] == [True] * 3
    assert ["UTF-8" in refused[0], "2,048 bytes" in refused[1], "NUL" in refused[2]] == [True] * 3


def test_of_a_piece_without_end_only_the_beginning_is_kept() -> None:
    longest = 0

    def blocks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000
        yield b"\nend\n"

    for pieces in split(blocks(), b"\n"):
        longest = max(longest, *map(len, pieces))
        last = pieces[-1]
    assert longest < 20_000
    assert last == b"end"


async def test_an_id_in_a_pipe_is_given_before_the_next_one_is_written(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    reader = aiter(IdReader(reading, nul=False, refuse=pytest.fail))
    async with asyncio.timeout(10):
        for text in ("one", "two"):
            os.write(writing, f"{text}\n".encode())
            assert await anext(reader) == text
        os.close(writing)
        with pytest.raises(StopAsyncIteration):
            await anext(reader)


async def test_an_endless_input_is_read_a_bounded_number_ahead(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCHES", 3)
    reading, writing = pipe
    os.set_blocking(writing, False)
    reader = IdReader(reading, nul=False, refuse=pytest.fail)
    written = 0

    def fill() -> None:
        nonlocal written
        try:
            while written < 10_000_000:
                written += os.write(writing, b"1234567\n" * 1000)
        except BlockingIOError:
            pass

    async with asyncio.timeout(20):
        fill()
        ids = aiter(reader)
        await anext(ids)
        before = -1
        while before != written:  # until the pipe takes no more, although the reader has its turns
            before = written
            for _ in range(20):
                await asyncio.to_thread(fill)
        assert written < 3_000_000
        while reader.taken < 50_000:
            if reader.taken % 1000 == 0:
                await asyncio.to_thread(fill)
            await anext(ids)
        os.close(writing)  # so that the thread ends
        async for _ in ids:
            pass


async def test_the_total_of_a_file_is_known_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCHES", 3)
    path = tmp_path / "ids"
    count = 300_000
    await asyncio.to_thread(path.write_text, "".join(f"{number}\n" for number in range(count)) + "\n\n")
    fd = os.open(path, os.O_RDONLY)
    reader = aiter(IdReader(fd, nul=False, refuse=pytest.fail))
    async with asyncio.timeout(20):
        while reader.total is None:
            await anext(reader)
    assert reader.total == count
    assert reader.taken < count - 10_000, "it was counted, not read to the end"
    async for _ in reader:
        pass
    os.close(fd)


async def test_an_unreadable_input_is_an_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    reader = IdReader(fd, nul=False, refuse=pytest.fail)
    with pytest.raises(IsADirectoryError):
        async for _ in reader:
            pass
    os.close(fd)
