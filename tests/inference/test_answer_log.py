"""The answers file survives crashes, and says which line is broken."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from polymerge.errors import OutputError, Refused
from polymerge.inference.run_folder import AnswerLog


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert log.read() == {}
    log.append([])
    assert not log.path.exists()
    log.append([(1, "one"), ("1", "een\nand\u2028two"), ("", "")])
    log.append(iter([(-(10**30), '你好 \\ "')]))
    assert log.read() == {1: "one", "1": "een\nand\u2028two", "": "", -(10**30): '你好 \\ "'}
    assert log.path.read_text("utf-8").count("\n") == 4


def test_every_cut_of_the_file_leaves_whole_answers_and_can_be_gone_on_with(tmp_path: Path) -> None:
    whole = AnswerLog(tmp_path / "whole.jsonl")
    pairs = [(1, "one"), (2, "zwei ü"), (3, "three")]
    whole.append(pairs)
    data = whole.path.read_bytes()
    for cut in range(len(data)):
        log = AnswerLog(tmp_path / "cut.jsonl")
        log.path.write_bytes(data[:cut])
        done = data[:cut].count(b"\n")
        assert list(log.read().items()) == pairs[:done]
        log.append(pairs[done:])
        assert log.path.read_bytes() == data


@pytest.mark.parametrize(
    "torn",
    [b"\0" * 50, b'{"id": 4, "ans\0\0\0\0', b'\0\0\0\0": 4, "answer": "x"}\n', b'\0\n{"id": 4, "answer": "x"}\n'],
)
def test_zeros_that_a_power_cut_leaves_are_answered_again(torn: bytes, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.append([(number, "x" * 1000) for number in range(3)])
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + torn)
    assert log.read().keys() == {0, 1, 2}
    log.append([(3, "x" * 1000)])
    assert log.path.read_bytes().startswith(whole)
    assert log.read().keys() == {0, 1, 2, 3}


def test_a_zero_before_what_the_disk_had_is_damage(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.append([(number, "x" * 1000) for number in range(1200)])
    data = log.path.read_bytes()
    log.path.write_bytes(data[:100] + b"\0" + data[101:])
    with pytest.raises(Refused, match="line 1: "):
        log.read()


def test_half_a_surrogate_pair_can_be_written_and_read(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.append([(1, "a\ud800b")])
    assert log.read() == {1: "a?b"}


def test_an_append_reaches_the_disk_and_so_does_the_file_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        seen.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.append((number, "x" * 10_000) for number in range(100))
    assert seen == [log.path.stat().st_size, "folder"]
    log.append([(100, "x")])
    assert seen[2:] == [log.path.stat().st_size]


def test_all_broken_lines_are_told_at_once(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    lines = [
        b'{"id": 1, "answer": "one"}',
        b'{"id": 1, "answer": "one"}',  # the same again is no harm
        b'{"id": 1, "answ',
        b'{"id": true, "answer": "x"}',
        b'{"id": 1.0, "answer": "x"}',
        b'{"id": 2, "answer": null}',
        b'{"id": 2, "text": "a prompt"}',
        b"[1]",
        b'{"id": 1, "answer": "two"}',
        b'{"id": "\xff", "answer": ""}',
        b'{"id": 3, "id": 4, "answer": ""}',
        b'{"id": 5, "answer": "\\ud800"}',
        b'{"id": NaN, "answer": ""}',
        b"[" * 100_000,
        b'{"id": ' + b"1" * 5000 + b', "answer": ""}',
        b'{"id": "1", "answer": "two"}',
        b"",
    ]
    log.path.write_bytes(b"\n".join(lines))
    with pytest.raises(Refused) as refused:
        log.read()
    said = [str(problem) for problem in refused.value.problems]
    assert [problem.split(": ")[1] for problem in said] == [f"line {number}" for number in range(3, 16)]
    expected = [
        "is not JSON: ", "id: True is neither", "id: 1.0 is neither", "answer: None is not a text", "not an answer: ",
        "not an answer: ", "1 is answered 'two', and 'one' in line 1", "is not UTF-8: byte 8 is 0xff",
        "'id' appears twice", "half of a surrogate pair", "holds NaN", "nested too deeply", "line 15: ",
    ]  # fmt: skip
    for problem, words in zip(said, expected, strict=True):
        assert problem.startswith(str(log.path))
        assert words in problem


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere/answers.jsonl: cannot be written: No such.* Make its folder"):
        AnswerLog(tmp_path / "nowhere" / "answers.jsonl").append([(1, "")])
    with pytest.raises(OutputError, match="cannot be read: Is a directory"):
        AnswerLog(tmp_path).read()
