"""Write so that a kill, a full disk or a power cut leaves what was there before or what is new, never a part.

Files get the modes that the umask gives to any other program's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from mmap import PAGESIZE
from pathlib import Path
from typing import Final

from polymerge.errors import OutputError

__all__ = [
    "UNFINISHED",
    "begin_flush",
    "exchange",
    "flush",
    "make_folder",
    "reason_of",
    "rename_new",
    "sync",
    "sync_tree",
    "write_file",
    "writing",
]

UNFINISHED: Final = ".polymerge-new"
"""Ending of a file's name while it is written; a killed process can leave one behind."""

_FRESH: Final = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}")
_ABANDONED: Final = 60.0
"""Seconds after which nobody writes to an unfinished file any more that nobody has locked."""

_NEXT_STEP: Final = {
    errno.ENOSPC: "Make room on the disk, or choose another place",
    errno.EDQUOT: "Make room in your quota, or choose another place",
    errno.EACCES: "Choose a folder that you may write to",
    errno.EPERM: "Choose a folder that you may write to",
    errno.EROFS: "Choose a folder on a disk that can be written",
    errno.ENOENT: "Make its folder first",
    errno.ENOTDIR: "Its parent is no folder: choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Its links lead in a circle: choose another place",
}
_AT_FDCWD: Final = -100
_WITHOUT_WAITING: Final = 2
_LINUX_NO_REPLACE, _LINUX_EXCHANGE = 1, 2
_MAC_EXCHANGE, _MAC_NO_REPLACE = 2, 4
_NOT_SUPPORTED: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses in the block into an OutputError: the path, the reason and the next step."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {reason_of(error, path)}") from error
    except ValueError as error:  # a NUL in a name
        raise OutputError(f"{path}: cannot be written: {error}. Choose another name") from error


def reason_of(error: OSError, known: Path | None = None) -> str:
    """Why the system refused something, the file unless it is the `known` one, and the next step."""
    file = str(error.filename or "")
    where = "" if not file or file == str(known) or file.endswith(UNFINISHED) else f": {file}"
    return f"{error.strerror or error}{where}. {_NEXT_STEP.get(error.errno or 0, 'Choose another place')}"


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a file that appears whole or not at all, and survives a power cut once this returns; return its path.

    An earlier file is replaced. A pipe, a device or a link is not: it is written through.
    Text is written as UTF-8; half a surrogate pair, which has no bytes in it, as its escape.

    raises OutputError if the system refuses it; an earlier file is untouched then.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with writing(path):
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            path.write_bytes(data)
            return path
        fresh = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
        try:
            with fresh.open("xb", buffering=0) as file:
                with suppress(OSError):  # a filesystem without locks, where nobody removes it
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                flush(file.fileno())
            fresh.replace(path)
        except BaseException:
            with suppress(OSError):  # what is told is why it was not written
                fresh.unlink()
            raise
        sync(path.parent)
        _sweep(path.parent.absolute())
    return path


@cache
def _sweep(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing in a folder; each process does so once.

    That is a file with the name that only `write_file` gives, of this user, with no lock of its writer, and old enough
    that one who writes on another machine, whose locks may not be seen here, would have written to it again.
    """
    with suppress(OSError):  # a folder that may be written to, but not listed
        for path in [path for path in folder.iterdir() if _FRESH.fullmatch(path.name)]:
            with suppress(OSError), _opened(path) as descriptor:  # locked, or gone meanwhile
                found = os.fstat(descriptor)
                ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
                if ours and time.time() - found.st_mtime > _ABANDONED:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create a folder, and those above it, such that they survive a power cut; return its path.

    raises OutputError if the system refuses it.
    """
    with writing(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync(path.parent)
    return path


def flush(descriptor: int) -> None:
    """Return once a file's or folder's content is on the disk; raises OSError if it cannot be stored."""
    if sys.platform == "darwin":  # where fsync leaves it in the disk's own cache
        with suppress(OSError):  # a filesystem without it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems store names at once and have no such call for folders.
        if error.errno not in _NOT_SUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise


def begin_flush(descriptor: int, start: int, stop: int) -> None:
    """Have the system write bytes `start` to `stop` of a file to the disk from now on; a hint, which nothing relies on.

    Full pages only: the next bytes go into the last one, which could not be written to while it is on its way.
    """
    first, last = -(-start // PAGESIZE) * PAGESIZE, stop // PAGESIZE * PAGESIZE
    if first < last and (call := _sync_file_range()) is not None:
        call(descriptor, first, last - first, _WITHOUT_WAITING)  # what cannot be stored is told by `flush`


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call of this name, None elsewhere."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


def sync(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk; raises OSError if they cannot be stored."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except PermissionError:  # a folder that may be written to, but not listed
        os.sync()
        return
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Return once a folder is on the disk with all that is in it; raises OSError if it cannot be stored."""
    for inside, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            path = Path(inside, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(inside))


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder, replacing nothing; raises FileExistsError if there is something under the new name.

    Where the system has no such call, an empty folder that appears at the same moment is replaced, and nothing else.
    """
    if not _renamed(source, target, _LINUX_NO_REPLACE, _MAC_NO_REPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns False, having done nothing, where the system or filesystem cannot.

    raises OSError if it refuses, such as FileNotFoundError if one of them is gone.
    """
    return _renamed(one, other, _LINUX_EXCHANGE, _MAC_EXCHANGE)


def _renamed(source: Path, target: Path, linux: int, mac: int) -> bool:
    """Rename with one of the system's flags; False where there is no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(source), os.fsencode(target)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(linux))
    elif hasattr(libc, "renamex_np"):  # macOS
        failed = libc.renamex_np(*names, ctypes.c_uint(mac))
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in _NOT_SUPPORTED:
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    return not failed


def _raise(error: OSError) -> None:
    raise error
