"""The two containers that torch.save writes: where the pickle lies in them, and where each storage does.

Since torch 1.6 it is a zip archive whose members are stored, not compressed, so each is a plain range of the file:

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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

from polymerge.checkpoints.pickled import DICT, PICKLE_LIMIT, Call, Pickle, read_pickle
from polymerge.checkpoints.tensor_info import listed
from polymerge.checkpoints.torch_names import KNOWN, storage_id
from polymerge.dtypes import BITS
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["Container", "Region", "read_container"]

_ZIP_MAGIC: Final = b"PK\x03\x04"
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # magic, ..., length of the name, length of the extra field
_ENCRYPTED: Final = 0x1

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_COUNT_BYTES: Final = 8


class Region(NamedTuple):
    """A range of bytes of the file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Container:
    """The object that was saved, and where the bytes of each storage lie, by key."""

    pickle: Pickle
    storages: Mapping[str, Region]


def read_container(file: Path) -> Container:
    """Find the pickle and the storages of a file that torch.save wrote.

    Raises CheckpointError or Refused where it is damaged, truncated, compressed, not little-endian, of another kind,
    or holds code; OSError where it cannot be opened.
    """
    with file.open("rb", buffering=0) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if size == 0:
            raise CheckpointError(f"{file}: is empty. Download it again.")
        if stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
            return _read_zip(file, stream, size)
        return _read_legacy(file, stream, size)


def _read_zip(file: Path, stream: io.FileIO, size: int) -> Container:
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
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
    if len(named) != len(members):
        raise CheckpointError(f"{file}: two members of the archive have one name. Save it again with torch.save.")
    if "constants.pkl" in named:
        raise CheckpointError(f"{file}: is a TorchScript program, not a state dict. Save the model's state_dict().")

    regions = _member_regions(file, stream, size, named)
    byteorder = _contents(file, stream, regions["byteorder"]) if "byteorder" in regions else b"little"
    if byteorder != b"little":
        _refuse_byteorder(file, byteorder.decode("ascii", "replace"))
    pickle = read_pickle(io.BytesIO(_contents(file, stream, regions["data.pkl"])), file, KNOWN)
    return Container(
        pickle, {name[len("data/") :]: region for name, region in regions.items() if name.startswith("data/")}
    )


def _member_regions(
    file: Path, stream: io.FileIO, size: int, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, Region]:
    """Where each member's bytes lie: behind its local header, whose length only that header itself tells."""
    regions: dict[str, Region] = {}
    packed: list[str] = []
    damaged: list[str] = []
    for name, member in members.items():
        stream.seek(max(member.header_offset, 0))
        local = stream.read(_LOCAL_HEADER.size)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            packed.append(name)
        elif len(local) < _LOCAL_HEADER.size or not local.startswith(_ZIP_MAGIC):
            damaged.append(name)
        else:
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(local)
            start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            regions[name] = Region(start, member.file_size)
            if start + member.file_size > size or member.file_size != member.compress_size:
                damaged.append(name)
    problems: list[CheckpointError] = []
    if packed:
        problems.append(
            CheckpointError(
                f"{file}: {listed(packed)} of the archive are compressed or encrypted, torch.save stores them plain. "
                "Save it again with torch.save."
            )
        )
    if damaged:
        problems.append(
            CheckpointError(
                f"{file}: {listed(damaged)} of the archive do not lie where its directory says. Download it again."
            )
        )
    refuse_if_any(problems)
    return regions


def _contents(file: Path, stream: io.FileIO, region: Region) -> bytes:
    if region.nbytes > PICKLE_LIMIT:
        raise CheckpointError(
            f"{file}: its pickle is {region.nbytes} bytes long, more than the {PICKLE_LIMIT} that a state dict may "
            "take. Save the state dict alone."
        )
    stream.seek(region.start)
    return stream.read(region.nbytes)


def _read_legacy(file: Path, stream: io.FileIO, size: int) -> Container:
    # mapped, not read: the pickles are small, but how small only their ends tell
    with mmap.mmap(stream.fileno(), min(size, PICKLE_LIMIT), access=mmap.ACCESS_READ) as mapped:
        head = cast("IO[bytes]", mapped)
        magic, protocol = (read_pickle(head, file, KNOWN).value for _ in range(2))
        if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise CheckpointError(f"{file}: is a pickle, but none that torch.save writes. Save it with torch.save.")
        machine = read_pickle(head, file, KNOWN).value
        if not (isinstance(machine, Call) and machine.function == DICT and ("little_endian", True) in machine.items):
            _refuse_byteorder(file, "big")
        pickle = read_pickle(head, file, KNOWN)
        keys = read_pickle(head, file, KNOWN).value
        data_start = head.tell()
    return Container(pickle, _legacy_regions(file, stream, size, data_start, _widths(file, pickle, keys)))


def _widths(file: Path, pickle: Pickle, keys: Any) -> dict[str, int]:
    """Bytes of one element of each storage, in the order in which the storages lie in the file."""
    widths: dict[str, int] = {}
    try:
        for persistent_id in pickle.persistent_ids:
            storage = storage_id(persistent_id)
            widths.setdefault(storage.key, BITS[storage.dtype] // 8)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and sorted(keys) == sorted(widths)):
        raise CheckpointError(f"{file}: its list of storages is not that of its tensors. Download it again.")
    return {key: widths[key] for key in keys}


def _legacy_regions(
    file: Path, stream: io.FileIO, size: int, start: int, widths: Mapping[str, int]
) -> dict[str, Region]:
    regions: dict[str, Region] = {}
    for key, width in widths.items():
        stream.seek(start)
        count = int.from_bytes(stream.read(_COUNT_BYTES), "little", signed=True)
        regions[key] = Region(start + _COUNT_BYTES, max(count, 0) * width)
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
    return regions


def _refuse_byteorder(file: Path, found: str) -> None:
    raise CheckpointError(
        f"{file}: its byte order is {found}, only little is read. Save it again on a little-endian machine."
    )
