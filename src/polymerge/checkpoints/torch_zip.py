"""Find the members of a zip archive that torch.save wrote, where torch finds them.

The directory at the archive's end says where each member's own header lies, after which its bytes follow. Readers
differ in what they make of an archive that contradicts itself; such a one is refused.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO, Final, NamedTuple, cast

from polymerge.checkpoints.bounds import DIRECTORY_BYTES
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["ZIP_MAGIC", "Region", "members_of"]

ZIP_MAGIC: Final = b"PK\x03\x04"
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # magic, ..., length of the name, length of the extra field
_END: Final = struct.Struct("<4s12xIH")  # of the directory: magic, ..., where it begins, length of the comment
_END_64: Final = struct.Struct("<4s44xQ")  # magic, ..., where it begins
_LOCATOR: Final = struct.Struct("<4s4xQ4x")  # magic, where the end for large archives lies
_UTF8: Final = 0x800
_ENCRYPTED: Final = 0x1
_FOLDER: Final = 0x10  # in DOS's attributes; torch leaves the memory of such a member as it was
_END_BYTES: Final = _LOCATOR.size + _END.size + 2**16  # with the longest comment


class Region(NamedTuple):
    """A range of bytes of the file."""

    start: int
    nbytes: int


def members_of(file: Path, stream: BinaryIO, size: int) -> dict[str, Region]:
    """The location of the bytes of each member of an archive, by its name below the folder of the pickle.

    Raises CheckpointError if it is no archive that torch.save wrote, is damaged, or says two things of its bytes: other
    readers may then take other bytes for the same tensor.
    """
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

    return _member_regions(file, stream, begins, named)


class _Directory(io.BufferedIOBase):
    """A stream for zipfile, which would read a directory of any length, and make objects of 20 times its size."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read  # type: ignore[method-assign]

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_BYTES:
            raise ValueError(f"it takes {size} bytes, more than the {DIRECTORY_BYTES} that are read")
        return self._read(-1 if size is None else size)


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
) -> dict[str, Region]:
    """The location of each member's bytes: after its local header, whose length is only given in that header.

    end  where the members end, and the directory begins
    """
    regions: dict[str, Region] = {}
    packed: list[str] = []
    folders: list[str] = []
    damaged: list[str] = []
    before = 0
    for name, member in sorted(members.items(), key=lambda one: one[1].header_offset):
        coding = "utf-8" if member.flag_bits & _UTF8 else "cp437"
        expected = member.orig_filename.encode(coding)
        stream.seek(max(member.header_offset, 0))
        local = stream.read(_LOCAL_HEADER.size + len(expected))
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            packed.append(name)
        elif member.external_attr & _FOLDER:
            folders.append(name)
        elif not local.startswith(ZIP_MAGIC) or local[_LOCAL_HEADER.size :] != expected:
            damaged.append(name)
        else:
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(local)
            start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            regions[name] = Region(start, member.file_size)
            # the bytes of a member belong to no other one
            fits = before <= member.header_offset and start + member.file_size <= end
            if name_bytes != len(expected) or not fits or member.file_size != member.compress_size:
                damaged.append(name)
            before = start + member.file_size
    refuse_if_any(
        CheckpointError(f"{file}: {listed(names)} of the archive {why}.")
        for names, why in (
            (packed, "are compressed or encrypted, torch.save stores them plain. Save it again with torch.save"),
            (folders, "are marked as folders, which hold no bytes. Save it again with torch.save"),
            (damaged, "do not lie where its directory says. Download it again"),
        )
        if names
    )
    return regions
