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
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO, Final, NamedTuple, cast

from polymerge.checkpoints.bounds import DIRECTORY_BYTES, NAME_LENGTH, PICKLE_BYTES, PROBLEMS, open_regular
from polymerge.checkpoints.tensor_info import Contents, TensorInfo, listed
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
from polymerge.dtypes import BITS, byte_count
from polymerge.errors import CheckpointError, refuse_if_any, shown

__all__ = ["read_torch"]

_ZIP_MAGIC: Final = b"PK\x03\x04"
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # magic, ..., length of the name, length of the extra field
_END: Final = struct.Struct("<4s12xIH")  # of the directory: magic, ..., where it begins, length of the comment
_END_64: Final = struct.Struct("<4s44xQ")  # magic, ..., where it begins
_LOCATOR: Final = struct.Struct("<4s4xQ4x")  # magic, where the end for large archives lies
_UTF8: Final = 0x800
_ENCRYPTED: Final = 0x1
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_COUNT_BYTES: Final = 8
_NESTS: Final = ("state_dict", "model", "module")
_MOST_DIMENSIONS: Final = 64  # torch's own limit
_END_BYTES: Final = _LOCATOR.size + _END.size + 2**16  # with the longest comment
_AGAIN: Final = "Save the file again."
_NO_STORAGE: Final = "has a storage that is not described as torch describes one. Save it again with torch >= 1.0."


class _Region(NamedTuple):
    """A range of bytes of the file."""

    start: int
    nbytes: int


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
        zipped = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
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


class _Directory(io.BufferedIOBase):
    """A stream for zipfile, which would read a directory of any length, and make objects of 20 times its size."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read  # type: ignore[method-assign]

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_BYTES:
            raise ValueError(f"it takes {size} bytes, more than the {DIRECTORY_BYTES} that are read")
        return self._read(-1 if size is None else size)


def _read_zip(file: Path, stream: BinaryIO, size: int) -> tuple[Any, dict[str, _Region]]:
    """The saved object, as stand-ins, and the location of each storage's bytes."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Directory(stream))) as archive:
            members, begins = archive.infolist(), archive.start_dir
        if begins != (stated := _stated_begin(stream, size)):
            raise ValueError(f"it begins at byte {begins}, its end says {stated}")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file}: is a zip archive whose directory, at its end, cannot be read ({error}): it is truncated or "
            "damaged. Download it again."
        ) from None
    roots = [member.filename.removesuffix("data.pkl") for member in members if member.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"{file}: is a zip archive with {len(roots)} members named 'data.pkl', torch.save writes one. Name a file "
            "that torch.save wrote."
        )
    named = {member.filename.removeprefix(roots[0]): member for member in members}
    if len({name.lower() for name in named}) != len(members):  # torch finds them in either case
        raise CheckpointError(f"{file}: two members of the archive have one name. Save it again with torch.save.")
    if "constants.pkl" in named:
        raise CheckpointError(f"{file}: is a TorchScript program, not a state dict. Save the model's state_dict().")

    regions = _member_regions(file, stream, begins, named)
    byteorder = _member(file, stream, regions["byteorder"]) if "byteorder" in regions else b"little"
    if byteorder != b"little":
        raise _foreign_byteorder(file, shown(byteorder.decode("ascii", "replace"), 20))
    value = Unpickler(io.BytesIO(_member(file, stream, regions["data.pkl"])), file).value()
    return value, {name[len("data/") :]: region for name, region in regions.items() if name.startswith("data/")}


def _stated_begin(stream: BinaryIO, size: int) -> int:
    """Where the directory begins by the archive's own word, which torch goes by.

    zipfile goes by the directory's end instead, so that bytes before the archive, or another archive, are no error.
    """
    stream.seek(max(size - _END_BYTES, 0))
    tail = stream.read(_END_BYTES)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + _END.size:
        raise ValueError("its end is missing")
    _, begin, comment = _END.unpack_from(tail, end)
    if end + _END.size + comment != len(tail):
        raise ValueError("something follows its end")
    if end >= _LOCATOR.size and tail.startswith(b"PK\x06\x07", end - _LOCATOR.size):
        _, place = _LOCATOR.unpack_from(tail, end - _LOCATOR.size)
        stream.seek(min(place, size))
        large = stream.read(_END_64.size)
        if len(large) == _END_64.size and large.startswith(b"PK\x06\x06"):
            _, begin = _END_64.unpack(large)
    return int(begin)


def _member_regions(
    file: Path, stream: BinaryIO, end: int, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, _Region]:
    """The location of each member's bytes: after its local header, whose length is only given in that header.

    end  where the members end, and the directory begins
    """
    regions: dict[str, _Region] = {}
    packed: list[str] = []
    damaged: list[str] = []
    before = 0
    for name, member in sorted(members.items(), key=lambda one: one[1].header_offset):
        coding = "utf-8" if member.flag_bits & _UTF8 else "cp437"
        expected = member.orig_filename.encode(coding)
        stream.seek(max(member.header_offset, 0))
        local = stream.read(_LOCAL_HEADER.size + len(expected))
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            packed.append(name)
        elif not local.startswith(_ZIP_MAGIC) or local[_LOCAL_HEADER.size :] != expected:
            damaged.append(name)
        else:
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(local)
            start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            regions[name] = _Region(start, member.file_size)
            # the bytes of a member belong to no other one
            fits = before <= member.header_offset and start + member.file_size <= end
            if name_bytes != len(expected) or not fits or member.file_size != member.compress_size:
                damaged.append(name)
            before = start + member.file_size
    refuse_if_any(
        CheckpointError(f"{file}: {listed(names)} of the archive {why}.")
        for names, why in (
            (packed, "are compressed or encrypted, torch.save stores them plain. Save it again with torch.save"),
            (damaged, "do not lie where its directory says. Download it again"),
        )
        if names
    )
    return regions


def _member(file: Path, stream: BinaryIO, region: _Region) -> bytes:
    if region.nbytes > PICKLE_BYTES:
        raise CheckpointError(
            f"{file}: its pickle is {region.nbytes} bytes long, more than the {PICKLE_BYTES} that a state dict may "
            "take. Save the state dict alone."
        )
    stream.seek(region.start)
    return stream.read(region.nbytes)


def _read_legacy(file: Path, stream: BinaryIO, size: int) -> tuple[Any, dict[str, _Region]]:
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
    regions: dict[str, _Region] = {}
    for key in keys:
        stream.seek(start)
        count = int.from_bytes(stream.read(_COUNT_BYTES), "little", signed=True)
        regions[key] = _Region(start + _COUNT_BYTES, max(count, 0) * widths[key])
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


def _tensor_info(name: str, call: Call, file: Path, storages: Mapping[str, _Region]) -> TensorInfo:
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
