"""Read safetensors files from their headers alone.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data:

    {"__metadata__": {"format": "pt"}, "lm_head.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}}

Offsets count from the end of the header. The tensors fill the data without gaps or overlaps, so a header and the
file size suffice to verify that no tensor is truncated and every byte belongs to exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from polymerge.checkpoints.json_objects import checked, parse_json
from polymerge.checkpoints.tensor_info import TensorInfo, listed
from polymerge.dtypes import BITS, byte_count
from polymerge.errors import CheckpointError, PolymergeError, refuse_if_any

__all__ = ["HEADER_LIMIT", "LENGTH_BYTES", "Head", "read_safetensors"]

HEADER_LIMIT = 100_000_000
"""Maximum header length in bytes; the same limit as in the safetensors library."""

LENGTH_BYTES = 8
"""Number of bytes at the start of a file that give the length of its header."""

_MOST_DIMENSIONS = 64  # as in torch; keeps a forged shape from costing time
_AGAIN = "Download the file again."

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # file offsets are signed 64-bit numbers


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor's entry in a header."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True, slots=True)
class Head:
    """The start of a remote file, up to the end of its header, and the file's size."""

    text: bytes
    size: int


def read_safetensors(file: Path, head: Head | None = None) -> tuple[TensorInfo, ...]:
    """Read every tensor's location in a safetensors file, in order of offset.

    head   the start of a remote file, which is read instead

    Raises CheckpointError if the header cannot be read at all, Refused with every problem in
    says, and OSError where the file cannot be opened.
    """
    if head is None:
        with file.open("rb") as stream:
            header, data_start, file_size = _read_header(file, stream, stream.seek(0, 2))
    else:
        header, data_start, file_size = _read_header(file, BytesIO(head.text), head.size)
    problems: list[PolymergeError] = []
    try:
        checked(header.pop("__metadata__", {}), dict[str, str], f"{file}: __metadata__", then="Save the file again.")
    except PolymergeError as error:
        problems += error.problems
    tensors: list[TensorInfo] = []
    unknown: dict[str, list[str]] = {}
    for name, fields in header.items():
        where = f"{file}: '{name}'"
        try:
            said = checked(fields, _Tensor, where, then=_AGAIN)
            dtype, shape, (begin, end) = said.dtype, tuple(said.shape), said.data_offsets
            if begin > end:
                raise ValueError(f"data_offsets {[begin, end]} are not in order")
            if dtype not in BITS:
                unknown.setdefault(dtype, []).append(name)
            elif end - begin != (needed := byte_count(dtype, shape)):
                raise ValueError(f"{dtype} {list(shape)} takes {needed} bytes, its data_offsets span {end - begin}")
            tensors.append(TensorInfo(name, dtype, shape, file, data_start + begin, end - begin))
        except ValueError as error:
            problems.append(CheckpointError(f"{where}: {error}. {_AGAIN}"))
        except PolymergeError as error:
            problems += error.problems
    for dtype, names in unknown.items():
        problems.append(
            CheckpointError(
                f"{file}: dtype '{dtype}' of {listed(names)} is not known to this version. Upgrade polymerge, or save "
                f"the tensors in one of {', '.join(BITS)}."
            )
        )
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    if len(tensors) == len(header):  # a tensor whose place is unknown would look like a hole
        problems += _layout_problems(file, tensors, data_start, file_size)
    refuse_if_any(problems)
    return tuple(tensors)


def _read_header(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int, int]:
    """Parse the header; return it with the offset at which the data starts and the file's size."""
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
    return parse_json(text, f"{file}: header", dict[str, Any]), LENGTH_BYTES + length, size


def _layout_problems(file: Path, tensors: list[TensorInfo], start: int, size: int) -> Iterator[CheckpointError]:
    """Errors for tensors, in order of offset, that do not exactly fill the data of their file."""
    end, last = start, "the header"
    for tensor in tensors:
        if tensor.start != end:
            what = "inside" if tensor.start < end else "after a gap behind"
            yield CheckpointError(
                f"{file}: '{tensor.name}' begins at byte {tensor.start}, {what} {last}, which ends at byte {end}. Save "
                "the file again with safetensors."
            )
        if tensor.start + tensor.nbytes >= end:
            end, last = tensor.start + tensor.nbytes, f"'{tensor.name}'"
    if end > size:
        cut = [tensor.name for tensor in tensors if tensor.start + tensor.nbytes > size]
        yield CheckpointError(
            f"{file}: is truncated: {end} bytes expected, {size} there; cut off {listed(cut)}. Download it again."
        )
    elif end < size:
        yield CheckpointError(
            f"{file}: {size} bytes long, its tensors end at byte {end}: the last {size - end} bytes belong to none. "
            "Download it again."
        )
