"""Safetensors files, read from their headers alone.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data:

    {"__metadata__": {"format": "pt"}, "lm_head.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}}

Offsets count from the end of the header. The tensors fill the data without a gap or an overlap, so a header and the
size of its file are enough to know that no tensor is cut short, and that no byte belongs to none or to two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from polymerge.checkpoints.json_objects import parse_json
from polymerge.checkpoints.tensor_info import Entry, listed
from polymerge.dtypes import BITS, byte_count
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["HEADER_LIMIT", "LENGTH_BYTES", "Head", "read_safetensors"]

HEADER_LIMIT = 100_000_000
"""No header may be longer, in bytes; the same limit as in the safetensors library."""

LENGTH_BYTES = 8
"""A file begins with that many, which say how long its header is."""

_FIELDS = ("dtype", "shape", "data_offsets")
_MOST_DIMENSIONS = 64  # as in torch; keeps a forged shape from costing time
_MOST_BYTES = 2**63 - 1  # file offsets are signed 64-bit numbers


@dataclass(frozen=True, slots=True)
class Head:
    """How a file that is not here begins, as far as its header goes, and how long all of it is."""

    text: bytes
    size: int


def read_safetensors(file: Path, head: Head | None = None) -> tuple[Entry, ...]:
    """Every tensor of a safetensors file, in order of offset.

    head   of a file that is not here: how it begins, which is then read in its place

    Raises CheckpointError where the header cannot be read at all, Refused with everything that is wrong with what it
    says, and OSError where the file cannot be opened.
    """
    if head is None:
        with file.open("rb") as stream:
            header, data_start, file_size = _read_header(file, stream, stream.seek(0, 2))
    else:
        header, data_start, file_size = _read_header(file, BytesIO(head.text), head.size)
    problems: list[CheckpointError] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(
            CheckpointError(f"{file}: __metadata__ is not a map from strings to strings. Save the file again.")
        )

    entries: list[Entry] = []
    unknown: dict[str, list[str]] = {}
    for name, fields in header.items():
        try:
            dtype, shape, (begin, end) = _fields(fields)
            if dtype not in BITS:
                unknown.setdefault(dtype, []).append(name)
            elif end - begin != (needed := byte_count(dtype, shape)):
                raise ValueError(f"{dtype} {list(shape)} takes {needed} bytes, its data_offsets span {end - begin}")
            entries.append(Entry(name, dtype, shape, file, data_start + begin, end - begin))
        except ValueError as error:
            problems.append(CheckpointError(f"{file}: '{name}': {error}. Download the file again."))
    for dtype, names in unknown.items():
        problems.append(
            CheckpointError(
                f"{file}: dtype '{dtype}' of {listed(names)} is not known to this version. Upgrade polymerge, or save "
                f"the tensors in one of {', '.join(BITS)}."
            )
        )
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    if len(entries) == len(header):  # a tensor whose place is unknown would look like a hole
        problems += _layout_problems(file, entries, data_start, file_size)
    refuse_if_any(problems)
    return tuple(entries)


def _read_header(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset at which the data starts, and the file's size."""
    stream.seek(0)
    if size < LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: is {size} bytes long, a safetensors file begins with 8 bytes that give the length of its "
            "header. Download it again."
        )
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: its header should be {length} bytes long, only {size - LENGTH_BYTES} follow: the file is "
            "truncated, or no safetensors file. Download it again."
        )
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{file}: its header is {length} bytes long, more than the {HEADER_LIMIT} that safetensors allows. "
            "Download it again."
        )
    text = stream.read(length)
    if not text.startswith(b"{"):  # the format says so, JSON would allow spaces
        raise CheckpointError(f"{file}: its header begins with {text[:1]!r}, not with '{{'. Download it again.")
    return parse_json(text, f"{file}: its header", dict[str, Any]), LENGTH_BYTES + length, size


def _fields(fields: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and data offsets of one tensor, each of the right type; raises ValueError where one is not."""
    if not isinstance(fields, dict):
        raise ValueError("its entry in the header is not an object")
    if missing := [field for field in _FIELDS if field not in fields]:
        raise ValueError(f"its entry in the header lacks {listed(missing)}")
    if more := [field for field in fields if field not in _FIELDS]:
        raise ValueError(f"its entry in the header has {listed(more)}, which the format does not know")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if not isinstance(dtype, str):
        raise ValueError("its dtype is not a string")
    if not _all_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"its shape is not a list of at most {_MOST_DIMENSIONS} sizes")
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are not two offsets in order")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _all_sizes(value: object) -> bool:
    # `type` and not `isinstance`: True is an int for Python, but no size
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MOST_BYTES for size in value)


def _layout_problems(file: Path, entries: list[Entry], start: int, size: int) -> Iterator[CheckpointError]:
    """What keeps the tensors, in order of offset, from filling the data of their file exactly."""
    end, last = start, "the header"
    for entry in entries:
        if entry.start != end:
            what = "inside" if entry.start < end else "after a gap behind"
            yield CheckpointError(
                f"{file}: '{entry.name}' begins at byte {entry.start}, {what} {last}, which ends at byte {end}. Save "
                "the file again with safetensors."
            )
        if entry.start + entry.nbytes >= end:
            end, last = entry.start + entry.nbytes, f"'{entry.name}'"
    if end > size:
        cut = [entry.name for entry in entries if entry.start + entry.nbytes > size]
        yield CheckpointError(
            f"{file}: is truncated: {end} bytes expected, {size} there; cut off {listed(cut)}. Download it again."
        )
    elif end < size:
        yield CheckpointError(
            f"{file}: {size} bytes long, its tensors end at byte {end}: the last {size - end} bytes belong to none. "
            "Download it again."
        )
