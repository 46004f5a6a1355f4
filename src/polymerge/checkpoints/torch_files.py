"""Read files of torch.save without torch: their tensors, and the location of each one's bytes.

Nothing in such a file is executed (`torch_pickle`): the calls that would rebuild the tensors are parsed
here: `_rebuild_tensor_v2(storage, offset, shape, strides, ...)` has all information needed. Since torch 1.6 a file
is a zip archive whose members are stored, not compressed:

    name/data.pkl   the pickle; name/byteorder "little"; name/data/0, name/data/1, ...   one storage each

Before, and still with `_use_new_zipfile_serialization=False`, five pickles follow each other (a magic number, the
protocol, facts about the machine, the object, the storages' keys), then each storage after its 8-byte element count.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO, Final, cast

from polymerge.checkpoints.bounds import NAME_LENGTH, PICKLE_BYTES, PROBLEMS, open_regular
from polymerge.checkpoints.tensor_info import Contents, TensorInfo
from polymerge.checkpoints.torch_pickle import (
    DTYPES,
    REBUILD,
    UNREADABLE,
    Call,
    Dict,
    Global,
    Storage,
    Unpickler,
    kind_of,
    tensor_call,
)
from polymerge.checkpoints.torch_zip import ZIP_MAGIC, Region, members_of
from polymerge.dtypes import BITS, byte_count
from polymerge.errors import CheckpointError, refuse_if_any, shown

__all__ = ["read_torch"]

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_COUNT_BYTES: Final = 8
_NESTS: Final = ("state_dict", "model", "module")
_MOST_DIMENSIONS: Final = 64  # torch's own limit
_AGAIN: Final = "Save the file again."
_NO_STORAGE: Final = "has a storage that is not described as torch describes one. Save it again with torch >= 1.0."


def read_torch(file: Path) -> Contents:
    """Read every tensor's location in a state dict written by torch.save, in either of its two formats.

    Tensors with one offset stay in the order of the dict. Those with the same dtype and shape too are aliases: the
    first is the tensor, the later ones are tied to it. Views of parts of a storage are tensors of their own.

    The state dict may be nested under `state_dict`, `model` or `module` if there is no tensor beside it.

    Raises CheckpointError if the file cannot be read at all (damaged, truncated, compressed, big-endian, of another
    kind, or with code in it), Refused with every problem of its tensors, and OSError if it cannot be
    opened.
    """
    with open_regular(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if size == 0:
            raise CheckpointError(f"{file}: is empty. Download it again.")
        zipped = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        value, storages = (_read_zip if zipped else _read_legacy)(file, stream, size)
    state_dict, skipped = _find_state_dict(file, value)
    entries: dict[str, TensorInfo] = {}
    problems: list[CheckpointError] = []
    for position, (name, value) in enumerate(state_dict):
        call = tensor_call(value)
        if len(problems) > PROBLEMS:
            break
        if call is None:
            skipped[_label(name, position)] = f"is {kind_of(value)}, not a tensor"
        elif not isinstance(name, str):
            problems.append(CheckpointError(f"{file}: a tensor's name is {kind_of(name)}, not a string. {_AGAIN}"))
        elif len(name) > NAME_LENGTH:
            said = f"is {len(name)} characters long, at most {NAME_LENGTH} are read"
            problems.append(CheckpointError(f"{file}: the tensor's name '{shown(name)}' {said}. {_AGAIN}"))
        elif name in entries:
            problems.append(CheckpointError(f"{file}: two tensors have the name '{shown(name)}'. {_AGAIN}"))
        else:
            try:
                entries[name] = _tensor_info(name, call, file, storages)
            except ValueError as error:
                problems.append(CheckpointError(f"{file}: '{shown(name)}' {error}"))
    refuse_if_any(problems)
    return Contents(
        tuple(sorted(entries.values(), key=lambda entry: entry.start)),
        MappingProxyType(_aliases(entries)),
        MappingProxyType(skipped),
    )


def _read_zip(file: Path, stream: BinaryIO, size: int) -> tuple[Any, dict[str, Region]]:
    """The saved object, as stand-ins, and the location of each storage's bytes."""
    regions = members_of(file, stream, size)
    byteorder = _member(file, stream, regions["byteorder"]) if "byteorder" in regions else b"little"
    if byteorder != b"little":
        raise _foreign_byteorder(file, shown(byteorder.decode("ascii", "replace"), 20))
    value = Unpickler(io.BytesIO(_member(file, stream, regions["data.pkl"])), file).value()
    return value, {name[len("data/") :]: region for name, region in regions.items() if name.startswith("data/")}


def _member(file: Path, stream: BinaryIO, region: Region) -> bytes:
    if region.nbytes > PICKLE_BYTES:
        raise CheckpointError(
            f"{file}: its pickle is {region.nbytes} bytes long, more than the {PICKLE_BYTES} that a state dict may "
            "take. Save the state dict alone."
        )
    stream.seek(region.start)
    return stream.read(region.nbytes)


def _read_legacy(file: Path, stream: BinaryIO, size: int) -> tuple[Any, dict[str, Region]]:
    """The saved object, as stand-ins, and the location of each storage's bytes."""
    # mapped, not read: the pickles are small, but how small only their ends tell
    with mmap.mmap(stream.fileno(), min(size, PICKLE_BYTES), access=mmap.ACCESS_READ) as mapped:
        head = cast("IO[bytes]", mapped)
        magic, protocol = (Unpickler(head, file).value() for _ in range(2))
        if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise CheckpointError(f"{file}: is a pickle that torch.save did not write. Save it with torch.save.")
        machine = Unpickler(head, file).value()
        if not (isinstance(machine, Dict) and ("little_endian", True) in machine.items):
            raise _foreign_byteorder(file, "big")
        unpickler = Unpickler(head, file)
        value = unpickler.value()
        keys = Unpickler(head, file).value()
        start = head.tell()

    widths = {storage.key: BITS.get(storage.dtype, 0) // 8 for storage in reversed(unpickler.storages)}
    if 0 in widths.values():
        raise CheckpointError(f"{file}: {_NO_STORAGE}")
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and sorted(keys) == sorted(widths)):
        raise CheckpointError(f"{file}: its list of storages is not that of its tensors. Download it again.")
    regions: dict[str, Region] = {}
    for key in keys:
        stream.seek(start)
        count = int.from_bytes(stream.read(_COUNT_BYTES), "little", signed=True)
        regions[key] = Region(start + _COUNT_BYTES, max(count, 0) * widths[key])
        start = sum(regions[key])
        if start > size:
            raise CheckpointError(
                f"{file}: is truncated: {start} bytes expected up to storage {len(regions)} of {len(widths)}, {size} "
                "there. Download it again."
            )
    if start < size:
        raise CheckpointError(
            f"{file}: {size - start} bytes follow the last storage, which ends at byte {start}: it holds more than one "
            "object. Save one state dict a file."
        )
    return value, regions


def _foreign_byteorder(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: its byte order is {found}, only little is read. Save it again on a little-endian machine."
    )


def _find_state_dict(file: Path, value: Any) -> tuple[list[tuple[Any, Any]], dict[str, str]]:
    """The items of the state dict, and the names beside it."""
    if not isinstance(value, Dict):
        raise CheckpointError(f"{file}: holds {kind_of(value)}, not a dict of tensors. Save the model's state_dict().")
    top = value.items
    if any(tensor_call(inner) for _, inner in top):
        return top, {}
    nests = {name: inner.items for name, inner in top if name in _NESTS and isinstance(inner, Dict)}
    if len(nests) > 1:
        raise CheckpointError(
            f"{file}: holds dicts under {' and '.join(nests)}, only one can be the model. Save that one alone."
        )
    for nest, pairs in nests.items():
        return pairs, {
            _label(name, position): f"lies beside '{nest}', which is the model"
            for position, (name, _) in enumerate(top)
            if name != nest
        }
    return top, {}


def _tensor_info(name: str, call: Call, file: Path, storages: Mapping[str, Region]) -> TensorInfo:
    """The location of one tensor's bytes; raises ValueError with the problem and the next step."""
    storage, offset, shape, dtype = _plain_tensor(call)
    region = storages.get(storage.key)
    if region is None:
        raise ValueError(f"has its bytes in storage '{storage.key}', which the file lacks. Download it again.")
    nbytes = byte_count(dtype, shape)
    skip = byte_count(dtype, (offset,)) if nbytes else 0
    there = min(region.nbytes, byte_count(storage.dtype, (storage.elements,)))
    if skip + nbytes > there:
        raise ValueError(
            f"needs {skip + nbytes} bytes of storage '{storage.key}', which has {there}. Download the file again."
        )
    return TensorInfo(name, dtype, shape, file, region.start + skip, nbytes)


def _plain_tensor(call: Call) -> tuple[Storage, int, tuple[int, ...], str]:
    """The arguments of the call: storage, offset into it in elements, shape and dtype.

    Raises ValueError if the tensor is not a contiguous range of a storage.
    """
    if call.name in UNREADABLE:
        raise ValueError(f"{UNREADABLE[call.name]}, which cannot be merged. Save it as a plain tensor.")
    count = REBUILD.get(call.name, 0)
    match call.arguments[:count]:
        case (Storage() as storage, int(offset), sizes, steps, *others) if (
            len(others) == count - 4 and 0 <= offset < 2**63
        ):
            shape, strides = _sizes(sizes), _sizes(steps)
        case _:
            raise ValueError(f"is not described as torch describes a tensor. {_AGAIN}")
    if any(isinstance(marks, Dict) and marks.items for marks in call.arguments[count:]):
        raise ValueError("is a conjugate or negative view. Save it after .resolve_conj().resolve_neg().")
    expected = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    # a stride counts only where there is a second element to step to
    if len(strides) != len(shape) or (
        0 not in shape and any(size > 1 and s != e for size, s, e in zip(shape, strides, expected, strict=True))
    ):
        raise ValueError(
            f"is not contiguous: strides {list(strides)} for shape {list(shape)}, {list(expected)} expected. Save it "
            "after .contiguous()."
        )
    if not storage.dtype:
        raise ValueError(_NO_STORAGE)
    if call.name != "torch._utils._rebuild_tensor_v3":  # which has an untyped storage and says the dtype itself
        return storage, offset, shape, storage.dtype
    dtype = others[-1].name if isinstance(others[-1], Global) else kind_of(others[-1])
    if dtype not in DTYPES:
        raise ValueError(f"is of dtype {dtype}, which safetensors does not have. Save it as another.")
    return storage, offset, shape, DTYPES[dtype]


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape or strides, as a tuple or a torch.Size."""
    match value:
        case Call(name="torch.Size", arguments=(list() | tuple() as sizes,)) | (list() | tuple() as sizes):
            if len(sizes) <= _MOST_DIMENSIONS and all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                return tuple(sizes)
    raise ValueError(f"has a shape or strides that are not at most {_MOST_DIMENSIONS} sizes. {_AGAIN}")


def _aliases(entries: Mapping[str, TensorInfo]) -> dict[str, str]:
    first: dict[tuple[int, int, str, tuple[int, ...]], str] = {}
    found: dict[str, str] = {}
    for name, entry in entries.items():
        # tensors without elements have no bytes to share
        earlier = first.setdefault((entry.start, entry.nbytes, entry.dtype, entry.shape), name)
        if entry.nbytes and earlier != name:
            found[name] = earlier
    return found


def _label(name: Any, position: int) -> str:
    return name if isinstance(name, str) else f"entry {position}"
