"""Archives that contradict themselves: refused, as by torch, or because torch takes other bytes than other readers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.checkpoints import torch_zip
from polymerge.checkpoints.torch_files import read_torch
from polymerge.errors import CheckpointError, PolymergeError

ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
OFFSET = 42
"""Where a directory's entry says where its member lies."""


def saved(file: Path, first: float = 0.0) -> bytes:
    torch.save({"a": torch.arange(4.0) + first, "b": torch.arange(4.0) + first + 10}, file)
    return file.read_bytes()


def entry_of(content: bytes, name: bytes) -> int:
    """Where the directory's entry of a member lies."""
    place = content.rindex(name)
    return content.rindex(ENTRY, 0, place)


def patched(content: bytes, place: int, raw: bytes) -> bytes:
    return content[:place] + raw + content[place + len(raw) :]


def said(file: Path) -> str:
    with pytest.raises(PolymergeError) as caught:
        read_torch(file)
    (problem,) = caught.value.problems
    assert isinstance(problem, CheckpointError)
    assert str(problem).startswith(str(file))
    return str(problem)


def refused_by_torch(file: Path) -> bool:
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return True
    return False


def before_the_file(content: bytes) -> bytes:
    """The directory is said to lie further on than it does, so that members lie before byte 0 by a reader's count."""
    begin = int.from_bytes(content[-6:-2], "little") + 5000
    large = patched(content, len(content) - 50, struct.pack("<Q", begin))
    return patched(large, len(content) - 6, struct.pack("<I", begin))


def on_the_same_bytes(content: bytes) -> bytes:
    first = content[entry_of(content, b"data/0") + OFFSET :][:4]
    renamed = content.replace(b"data/1", b"data/0", 1)  # in the local header alone
    return patched(renamed, entry_of(renamed, b"data/1") + OFFSET, first)


def beyond_the_file(content: bytes) -> bytes:
    return patched(content, entry_of(content, b"data/0") + OFFSET, struct.pack("<I", len(content) + 10))


def of_another_name(content: bytes) -> bytes:
    """Two entries of the directory exchange their members."""
    one, other = (content[entry_of(content, name) + OFFSET :][:4] for name in (b"data/0", b"data/1"))
    changed = patched(content, entry_of(content, b"data/0") + OFFSET, other)
    return patched(changed, entry_of(changed, b"data/1") + OFFSET, one)


ATTRIBUTES = 38
"""Offset in an entry of the directory."""


def marked_as_a_folder(content: bytes) -> bytes:
    """Torch then leaves the memory of the tensor as it was."""
    return patched(content, entry_of(content, b"data/0") + ATTRIBUTES, struct.pack("<I", 0x10))


@pytest.mark.parametrize(
    ("change", "why", "torch_too"),
    [
        (marked_as_a_folder, "'data/0' of the archive are marked as folders, which hold no bytes", False),
        (before_the_file, "whose directory, at its end, cannot be read", True),
        (on_the_same_bytes, "'data/1' of the archive do not lie where its directory says", False),
        (beyond_the_file, "'data/0' of the archive do not lie where its directory says", True),
        (of_another_name, "'data/1', 'data/0' of the archive do not lie where its directory says", False),
        (lambda content: LOCAL + b" and so on" + content, "it begins at byte", True),
        (lambda content: content + b"more", "something follows its end", False),
        (lambda content: content[:-22], "whose directory, at its end, cannot be read", True),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], why: str, torch_too: bool
) -> None:
    """Where torch accepts it, it reads other bytes than the names or the directory say."""
    file = tmp_path / "m.bin"
    file.write_bytes(change(saved(file)))
    assert why in said(file)
    assert refused_by_torch(file) == torch_too


def test_of_two_archives_in_one_file_torch_reads_the_other(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    first, second = saved(file), saved(file, 100.0)
    assert len(first) == len(second)
    file.write_bytes(first + second)
    assert torch.load(file, weights_only=True)["a"][0] == 0  # and zipfile the second
    assert "it begins at byte" in said(file)


def test_names_that_differ_in_case_are_one_to_torch(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    content = saved(file)
    assert content.count(b"byteorder") == 2
    file.write_bytes(content.replace(b".format_version", b"DATA/1".rjust(15, b"/")).replace(b"byteorder", b"DATA/0000"))
    assert read_torch(file).entries
    file.write_bytes(content.replace(b"byteorder", b"VERSION\0\0"))
    assert "two members of the archive have one name" in said(file)


def test_the_directory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.bin"
    saved(file)
    size = int.from_bytes(file.read_bytes()[-10:-6], "little")
    monkeypatch.setattr(torch_zip, "DIRECTORY_BYTES", size)
    assert len(read_torch(file).entries) == 2
    monkeypatch.setattr(torch_zip, "DIRECTORY_BYTES", size - 1)
    assert f"it takes {size} bytes, more than the {size - 1} that are read" in said(file)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_both_accept_has_torchs_values(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("m") / "m.bin"
    content = bytearray(saved(file))
    begin = content.index(ENTRY)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(begin, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        ours = {one.name: bytes(content[one.start : one.start + one.nbytes]) for one in read_torch(file).entries}
    except PolymergeError:
        return
    try:
        theirs = torch.load(file, weights_only=True)
    except Exception:
        return
    assert ours == {name: tensor.numpy().tobytes() for name, tensor in theirs.items()}
