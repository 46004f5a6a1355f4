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
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec

from polymerge.checkpoints.bounds import HEADER_BYTES, HEADER_VALUES, NAME_LENGTH, PROBLEMS, TENSORS, open_regular
from polymerge.checkpoints.json_objects import parse_json
from polymerge.checkpoints.stores import Stored, read_range, stored_at
from polymerge.checkpoints.tensor_info import TensorInfo, listed
from polymerge.dtypes import BITS, byte_count
from polymerge.errors import CheckpointError, PolymergeError, refuse_if_any, shown

__all__ = ["LENGTH_BYTES", "Head", "read_safetensors"]

LENGTH_BYTES = 8
"""Number of bytes at the start of a file that give the length of its header."""

_FIRST: Final = 1 << 16  # most headers end within so many bytes
_MOST_DIMENSIONS = 64  # as in torch; keeps a forged shape from costing time
_AGAIN = "Download the file again."
_METADATA: Final = "__metadata__"

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # file offsets are signed 64-bit numbers


class _Tensor(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A tensor's entry in a header."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


_KEYS: Final = tuple(f'"{key}"'.encode() for key in _Tensor.__struct_fields__)
_ENTRY: Final = msgspec.json.Decoder(_Tensor)
_ENTRIES: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


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
    if head is None and (stored := stored_at(file)) is not None:
        head = _head_of(stored)
    if head is None:
        with open_regular(file) as stream:
            text, file_size = _read_header(file, stream, size := stream.seek(0, 2)), size
    else:
        text, file_size = _read_header(file, BytesIO(head.text), head.size), head.size
    data_start = LENGTH_BYTES + len(text)
    entries = _entries(f"{file}: header", text)
    problems: list[PolymergeError] = []
    try:
        metadata = bytes(entries.pop(_METADATA, msgspec.Raw(b"{}")))
        parse_json(metadata, f"{file}: {_METADATA}", dict[str, str], most=HEADER_VALUES, then="Save the file again.")
    except PolymergeError as error:
        problems += error.problems
    tensors: list[TensorInfo] = []
    unknown: dict[str, list[str]] = {}
    for name, entry in entries.items():
        try:
            said = _entry(entry, file, name)
            dtype, shape, (begin, end) = said.dtype, tuple(said.shape), said.data_offsets
            if len(name) > NAME_LENGTH:
                raise ValueError(f"its name is {len(name)} characters long, at most {NAME_LENGTH} are read")
            if begin > end:
                raise ValueError(f"data_offsets {[begin, end]} are not in order")
            if dtype not in BITS:
                unknown.setdefault(dtype, []).append(name)
            elif end - begin != (needed := byte_count(dtype, shape)):
                raise ValueError(f"{dtype} {list(shape)} takes {needed} bytes, its data_offsets span {end - begin}")
            tensors.append(TensorInfo(name, dtype, shape, file, data_start + begin, end - begin))
        except ValueError as error:
            problems.append(CheckpointError(f"{file}: '{shown(name)}': {error}. {_AGAIN}"))
        except PolymergeError as error:
            problems += error.problems
        if len(problems) > PROBLEMS:
            break
    for dtype, names in unknown.items():
        problems.append(
            CheckpointError(
                f"{file}: dtype '{shown(dtype)}' of {listed(names)} is not known to this version. Upgrade polymerge, "
                f"or save the tensors in one of {', '.join(BITS)}."
            )
        )
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    if len(tensors) == len(entries):  # a tensor whose place is unknown would look like a hole
        problems += islice(_layout_problems(file, tensors, data_start, file_size), PROBLEMS)
    refuse_if_any(problems)
    return tuple(tensors)


def _head_of(stored: Stored) -> Head:
    """The start of a file in an object store, by one request or two."""
    text = read_range(stored, 0, min(_FIRST, stored.size))
    length = int.from_bytes(text[:LENGTH_BYTES], "little")
    end = min(LENGTH_BYTES + length, stored.size)
    if len(text) < end and length <= HEADER_BYTES:
        text += read_range(stored, len(text), end)
    return Head(text[:end], stored.size)


def _read_header(file: Path, stream: BinaryIO, size: int) -> bytes:
    """Read the header of a file of `size` bytes."""
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
    if length > HEADER_BYTES:
        raise CheckpointError(
            f"{file}: its header is {length} bytes long, more than the {HEADER_BYTES} that safetensors allows. "
            "Download it again."
        )
    text = stream.read(length)
    if not text.startswith(b"{"):  # the format says so, JSON would allow spaces
        raise CheckpointError(f"{file}: its header begins with {text[:1]!r}, not with '{{'. Download it again.")
    return text


def _entries(where: str, text: bytes) -> dict[str, msgspec.Raw]:
    """The entries of a header, which are parsed one by one: whatever else they hold, none of it is built."""
    if text.count(b":") > 4 * TENSORS:  # one after the name, and one after each key
        raise CheckpointError(f"{where}: describes more than {TENSORS} tensors. Save them in several files.")
    try:
        entries = _ENTRIES.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        parse_json(text, where, dict[str, Any], most=HEADER_VALUES)  # which says what is wrong, and where
        raise CheckpointError(f"{where}: cannot be read: {error}. Download it again.") from None
    described = text.replace(bytes(entries.get(_METADATA, b"")) or b"{}", b"", 1)
    count = len(entries) - (_METADATA in entries)
    once = described.count(f'"{_METADATA}"'.encode()) < 2 and all(described.count(key) == count for key in _KEYS)
    if b"\\" in described or not once:  # a key may be there twice, perhaps in two spellings
        parse_json(text, where, dict[str, Any], most=HEADER_VALUES)
    return entries


def _entry(entry: msgspec.Raw, file: Path, name: str) -> _Tensor:
    try:
        return _ENTRY.decode(entry)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return parse_json(bytes(entry), f"{file}: '{shown(name)}'", _Tensor, then=_AGAIN)


def _layout_problems(file: Path, tensors: list[TensorInfo], start: int, size: int) -> Iterator[CheckpointError]:
    """Errors for tensors, in order of offset, that do not exactly fill the data of their file."""
    end = start
    last: TensorInfo | None = None
    for tensor in tensors:
        if tensor.start != end:
            before = f"'{shown(last.name)}'" if last else "the header"
            what = "inside" if tensor.start < end else "after a gap behind"
            yield CheckpointError(
                f"{file}: '{shown(tensor.name)}' begins at byte {tensor.start}, {what} {before}, which ends at byte "
                f"{end}. Save the file again with safetensors."
            )
        if tensor.start + tensor.nbytes >= end:
            end, last = tensor.start + tensor.nbytes, tensor
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
