"""Pickles that unfold: a few bytes that build, copy or go through more than any state dict has."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge.checkpoints import torch_pickle
from polymerge.checkpoints.bounds import NAME_LENGTH, PICKLE_STEPS, PROBLEMS
from polymerge.checkpoints.torch_files import read_torch
from polymerge.checkpoints.torch_pickle import Unpickler
from polymerge.errors import CheckpointError, PolymergeError

LIST = b"(" + b"K\x01" * 1000 + b"lq\x00"  # of a thousand numbers, remembered as 0
ORDERED_DICT = b"ccollections\nOrderedDict\nq\x01"
PAIRS = b"(" + b"K\x01K\x02\x86" * 1000 + b"lq\x02"


def value_of(program: bytes) -> Any:
    return Unpickler(io.BytesIO(program), Path("m.bin")).value()


def refused(program: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        value_of(program)
    return str(caught.value)


def test_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle._Metered, "left", 50)
    assert value_of(b"(" + b"]" * 47 + b"l.") == [[]] * 47
    assert f"it has more than {PICKLE_STEPS} steps" in refused(b"(" + b"]" * 48 + b"l.")


@pytest.mark.parametrize("byte", [b"]", b"}", b"(", b")", b"N", b"\x8f", b"0"])
def test_a_pickle_of_one_instruction_over_and_over_ends(byte: bytes) -> None:
    assert "damaged, or none that torch.save writes" in refused(b"(N" + byte * (PICKLE_STEPS // 80) + b"X")


@pytest.mark.parametrize(
    "again",
    [
        ORDERED_DICT + PAIRS + b"0" + b"h\x01h\x02\x85R" * 5000,  # a dict of a thousand items each
        ORDERED_DICT + LIST + b"0" + b"h\x01h\x00\x85R" * 5000,
    ],
)
def test_copies_count_as_many_steps_as_they_have_members(again: bytes) -> None:
    assert f"it has more than {PICKLE_STEPS} steps" in refused(b"(" + again + b"l.")


def test_a_call_has_a_few_arguments() -> None:
    many = b"(" + b"K\x01" * 17 + b"t"
    assert "a call has other arguments than torch gives" in refused(b"ctorch\nSize\n" + many + b"R.")
    assert "a call has other arguments than torch gives" in refused(b"ctorch\nSize\n]R.")


def test_names_are_short_and_few() -> None:
    assert "it imports what has no name" in refused(b"c" + b"m" * 300 + b"\nx\n.")
    said = refused(b"(" + b"".join(b"cm\nf%d\n" % n for n in range(500)) + b"l.")
    assert "holds code: m.f0, m.f1, " in said
    assert "m.f7 and 93 more. Loading" in said
    assert len(said) < 500


def test_a_number_of_elements_is_one_that_a_file_can_have() -> None:
    program = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ."
    assert value_of(program % b"K\x05").elements == 5
    assert value_of(program % (b"\x8a\x09" + bytes(8) + b"\x01")).dtype == ""


def test_long_texts_end_with_the_file() -> None:
    for code in (
        b"B\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x00",
        b"\x8d" + b"\xff" * 7 + b"\x00",
        b"\x8b\xff\xff\xff\x7f",
    ):
        assert "damaged" in refused(code + b"abc.")


@pytest.mark.parametrize(
    ("length", "why"), [(100_000, "it has more than"), (100, "has a shape or strides that are not at most 64 sizes")]
)
def test_one_list_as_the_shape_of_all_tensors_is_not_copied_for_each(tmp_path: Path, length: int, why: str) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    head = b"\x80\x02}q\x030(" + b"K\x01" * length + b"lq\x000ctorch._utils\n_rebuild_tensor_v2\nq\x010h\x03("
    tensor = b"h\x01(" + storage + b"K\x00h\x00h\x00\x89}tR"
    tensors = b"".join(b"X\x05\x00\x00\x00%05d" % number + tensor for number in range(2000))
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [head + tensors + b"u.", pickle.dumps(["0"], 2), (1).to_bytes(8, "little") + bytes(4)]
    file = tmp_path / "m.bin"
    file.write_bytes(b"".join(parts))
    with pytest.raises(PolymergeError, match=why) as caught:
        read_torch(file)
    assert len(caught.value.problems) <= PROBLEMS + 1


def test_a_name_is_as_long_as_stated_and_no_longer(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    torch.save({"x" * NAME_LENGTH: torch.ones(1)}, file)
    assert len(read_torch(file).entries[0].name) == NAME_LENGTH
    torch.save({"x" * (NAME_LENGTH + 1): torch.ones(1)}, file)
    with pytest.raises(PolymergeError, match=f"is {NAME_LENGTH + 1} characters long, at most {NAME_LENGTH} are read"):
        read_torch(file)
