"""Local files are read ahead: the system is told of the next chunks, of each of them once in a pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polymerge.checkpoints import ranges
from polymerge.checkpoints.ranges import opened_ranges


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is told of: chunks of 100 bytes, as (first, number of them)."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(ranges, "_CHUNK", 100)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, offset, length, __: found.append((offset // 100, length // 100)), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return found


def test_each_chunk_once_in_a_pass(tmp_path: Path, told: list[tuple[int, int]]) -> None:
    content = os.urandom(3000)
    (tmp_path / "x").write_bytes(content)
    with opened_ranges(tmp_path / "x") as file:
        assert file.size == 3000
        for _ in range(2):
            buffer, read = bytearray(25), b""
            while count := file.read_into(memoryview(buffer), len(read)):
                read += buffer[:count]
            assert read == content
        assert list(file.pread_all([(5, 4), (2998, 9)])) == [content[5:9], content[2998:]]
    chunks = [chunk for first, count in told for chunk in range(first, first + count)]
    assert chunks == [*range(33), *range(33)]


def test_threads_that_are_behind_ask_for_nothing_again(tmp_path: Path, told: list[tuple[int, int]]) -> None:
    (tmp_path / "x").write_bytes(bytes(5000))
    with opened_ranges(tmp_path / "x") as file:
        for offset in (0, 500, 100, 510, 4000, 3900):
            file.read_into(memoryview(bytearray(10)), offset)
    assert told == [(0, 3), (5, 3), (40, 3)]
