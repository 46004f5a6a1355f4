"""A disk that remembers every write and every flush in order, so that a power cut can be had at each of them.

A file system in user space, with one file, written against the kernel's own protocol (linux/fuse.h); a loop device on
that file is the disk. What a cut leaves is what had been flushed, and any of the writes since.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from verdicts import HarnessError

_INIT: Final = 26
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _INTERRUPT, _DESTROY = (
    1, 2, 3, 4, 14, 15, 16, 18, 20, 25, 36, 38,
)  # fmt: skip
_HEADER: Final = struct.Struct("<IIQQIIIHH")
_PLACE: Final = struct.Struct("<QQI")  # file handle, offset, size: how reads and writes begin
_LARGEST: Final = 1 << 17
_RECORD: Final = struct.Struct("<qq")
_FLUSHED: Final = -1
_CLONE_NEWNS: Final = 0x20000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

MAKE: Final = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZES: Final[Mapping[str, int]] = {"ext4": 48 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}


def own_mounts() -> None:
    """Give this process its own table of mounts, which vanishes with it; raises OSError without the right to."""
    if _LIBC.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    command("mount", "--make-rprivate", "/")


def command(*words: str | Path) -> None:
    """Run a command of the system."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def sync(folder: Path) -> None:
    """Sync the one file system that a folder is on."""
    descriptor = os.open(folder, os.O_RDONLY)
    _LIBC.syncfs(descriptor)
    os.close(descriptor)


def why_not(*more: str) -> str:
    """Why no file system can be mounted here, or none of a kind for want of a program; nothing if it can."""
    if os.geteuid() != 0:
        return "only root can mount"
    needed = [path for path in ("/dev/fuse", "/dev/loop-control") if not Path(path).exists()]
    needed += [program for program in ("mount", *more) if not shutil.which(program)]
    return f"not here: {', '.join(needed)}" if needed else ""


def format_image(image: Path, kind: str) -> Path:
    """Make an empty file system in a file."""
    image.unlink(missing_ok=True)
    with image.open("wb") as disk:
        disk.truncate(SIZES[kind])
    command(*MAKE[kind], image)
    return image


@contextmanager
def mounted(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """Mount an image as a disk of its own."""
    command("mount", "-o", f"loop{options and ','}{options}", image, folder)
    try:
        yield folder
    finally:
        command("umount", folder)


class LoggedDisk:
    """An image under a log: the file `file` is the disk as long as the block runs."""

    def __init__(self, image: Path, folder: Path) -> None:
        folder.mkdir()
        self.file, self._log = folder / "disk", folder / "log"
        self.file.touch()
        self._log.touch()
        self._size = image.stat().st_size
        self._before = [(start, block) for start, block in _blocks(image) if block.strip(b"\0")]

    def __enter__(self) -> LoggedDisk:
        channel = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={channel},rootmode=100600,user_id=0,group_id=0".encode()
        if _LIBC.mount(b"disk", os.fsencode(self.file), b"fuse", 0, options):
            raise HarnessError(f"{self.file}: {os.strerror(ctypes.get_errno())}")
        self._server = os.fork()
        if self._server == 0:
            status = 1
            try:
                data = bytearray(self._size)
                for start, block in self._before:
                    data[start : start + len(block)] = block
                _serve(channel, data, self._log)
                status = 0
            finally:
                os._exit(status)
        os.close(channel)
        return self

    def __exit__(self, *_: object) -> None:
        command("umount", self.file)
        os.waitpid(self._server, 0)

    def now(self) -> int:
        """The present end of the log: all that the disk has been told so far."""
        return self._log.stat().st_size

    def ends(self) -> list[int]:
        """Where each write and flush ends in the log: the moments at which the power can be cut."""
        found = [0]
        with self._log.open("rb") as log:
            while head := log.read(_RECORD.size):
                offset, size = _RECORD.unpack(head)
                found.append(log.tell() if offset == _FLUSHED else log.seek(size, os.SEEK_CUR))
        return found

    def forget(self) -> None:
        """Remove the log."""
        shutil.rmtree(self._log.parent)

    def cut(self, end: int, image: Path, drawn: random.Random | None = None) -> None:
        """Write the disk as a cut leaves it after `end` bytes of the log; `drawn` loses some that were not flushed."""
        image.unlink(missing_ok=True)
        with image.open("wb") as disk, self._log.open("rb") as log:
            disk.truncate(self._size)
            _apply(disk, self._before)
            waiting: list[tuple[int, bytes]] = []
            while log.tell() < end:
                offset, size = _RECORD.unpack(log.read(_RECORD.size))
                if offset == _FLUSHED:
                    _apply(disk, waiting)
                    waiting = []
                else:
                    waiting.append((offset, log.read(size)))
            share = 1.0 if drawn is None else drawn.random()
            _apply(disk, [write for write in waiting if drawn is None or drawn.random() < share])


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as content:
        while block := content.read(_LARGEST):
            yield content.tell() - len(block), block


def _apply(disk: BinaryIO, writes: Iterable[tuple[int, bytes]]) -> None:
    for offset, content in writes:
        disk.seek(offset)
        disk.write(content)


def _serve(channel: int, data: bytearray, log: Path) -> None:
    """Answer the kernel until the file is unmounted."""
    attributes = struct.pack("<QII6Q10I", 3600, 0, 0, 1, len(data), len(data) >> 9, 0, 0, 0,
                             0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)  # fmt: skip
    with log.open("ab", buffering=0) as record:
        while True:
            try:
                request = os.read(channel, _LARGEST + 4096)
            except OSError:
                return  # unmounted
            _, what, unique, *_ = _HEADER.unpack_from(request)
            body = memoryview(request)[_HEADER.size :]
            answer, error = b"", 0
            if what == _INIT:
                answer = struct.pack("<IIIIHHIIHHII24x", 7, 31, _LARGEST, 0, 12, 9, _LARGEST, 1, 0, 0, 0, 0)
            elif what in (_GETATTR, _SETATTR):
                answer = attributes
            elif what == _OPEN:
                answer = bytes(16)
            elif what == _READ:
                _, offset, size = _PLACE.unpack_from(body)
                answer = bytes(data[offset : offset + size])
            elif what == _WRITE:
                _, offset, size = _PLACE.unpack_from(body)
                content = bytes(body[40 : 40 + size])
                data[offset : offset + size] = content
                record.write(_RECORD.pack(offset, size) + content)
                answer = struct.pack("<II", size, 0)
            elif what == _FSYNC:
                record.write(_RECORD.pack(_FLUSHED, 0))
            elif what in (_FORGET, _INTERRUPT):
                continue
            elif what not in (_RELEASE, _FLUSH, _DESTROY):
                error = -38  # ENOSYS: the kernel does without
            os.write(channel, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)
