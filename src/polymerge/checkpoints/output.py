"""The folder of an output: written beside its name, on the disk before it gets it, and never in place of anything else.

All that a run makes until then lies in one folder, `.NAME.polymerge-partial`, which a later run recognises and removes:

    lock  held by the run that writes, and what shows that the folder is one of these
    new   the output; once the two have been exchanged, the earlier one that it replaces
    old   the earlier output between two renames, where the system cannot exchange names
    run   of a run that may take hours: what its result follows from, by which a later run knows that it may go on
    finished   a journal that such a run keeps of what it has finished
    stages, last   outputs of the stages of a recipe, in folders made as this one is
    factors    of an adapter that is extracted, until all of their ranks are known

Whenever a run is killed, an earlier output or the new one is whole under the name, or nothing is and the earlier one is
whole in `old`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from polymerge.durable import exchange, reason_of, rename_new, sync, sync_tree, write_file, writing
from polymerge.errors import OutputError, StoppedError

__all__ = ["Place", "exists", "journal_of", "output_folder", "written"]

_RUN, _FINISHED = "run", "finished"
_BESIDE: Final = ("stages", "last", "factors")
"""What a run may make beside the output, and keeps as long as it may be gone on with."""
_KEPT_IN: Final = "what is finished is kept in "
_LISTED: Final = 3
"""How many of the files that are left a message names."""


@contextmanager
def output_folder(out: Path, *, force: bool = False, run: str = "") -> Iterator[Path]:
    """A folder to write an output to; it gets its name if the block succeeds, and is removed otherwise.

    What a killed run left is removed first, and an output that it had moved aside gets its name back. An earlier
    output, which only `force` allows to replace, keeps its name until the new one is on the disk.

    run  what the result follows from, for one that may go on where it was killed or interrupted: the folder then has
         in it what that run wrote, and beside it the journal (`journal_of`), if that run said the same

    raises OutputError if there is an output already, another run is writing it, or the system refuses something, such
    as a full disk. If only the name cannot be given, the finished output is kept under another, which the message says.
    """
    with writing(out):
        place = Place.of(out)
        try:
            lock = place.lock()
        except OSError:
            with suppress(OSError):
                place.work.rmdir()
            raise
    try:
        with writing(out):
            place.put_back()
            kept = () if not run or place.said() != run else place.kept
            if left := place.emptied(kept):
                raise OutputError(f"{out}: a killed run left what cannot be removed: {left}. Remove it by hand")
            pinned = place.pinned()
        try:
            if pinned is not None and not force:
                raise exists(out)
            with writing(out):
                place.new.mkdir(exist_ok=bool(kept))
                if run and not kept:
                    write_file(place.work / _RUN, run)
            yield place.new
            place.forget()
            sync_tree(place.new)
            place.give_name(pinned)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | StoppedError) and place.goes_on():
                why = str(error).partition(_KEPT_IN)[0]  # which a stage in the folder has said of its own
                told = f"{_KEPT_IN}{place.work}: the same merge goes on"
                raise type(error)(f"{why.removesuffix('; ')}; {told}" if why else told) from error
            if failed := place.failure(error, pinned):
                raise failed from error
            raise
        finally:
            if pinned is not None:
                with suppress(OSError):  # nothing was written by it
                    os.close(pinned)
        if left := place.emptied():
            raise OutputError(f"{out}: is complete, but the earlier one cannot be removed: {left}. Remove it by hand")
    finally:
        place.unlock(lock)


@dataclass(frozen=True)
class Place:
    """Where an output is made.

    out     the path as it was given, for messages
    target  the real path
    work    the folder beside it that holds all else
    """

    out: Path
    target: Path
    work: Path

    @classmethod
    def of(cls, out: Path) -> Place:
        """The place of an output; raises OSError or ValueError if its path cannot be one."""
        with suppress(FileNotFoundError):
            out.stat()  # which refuses links in a circle, and names that no file can have
        target = Path(os.path.realpath(out))
        return cls(out, target, target.with_name(f".{target.name}.polymerge-partial"))

    @property
    def new(self) -> Path:
        """Where the output is written."""
        return self.work / "new"

    @property
    def _old(self) -> Path:
        return self.work / "old"

    @property
    def _lock(self) -> Path:
        return self.work / "lock"

    def refuse_foreign(self) -> None:
        """Raise OutputError if there is something under the name of the work folder that no run of this user made."""
        with suppress(FileNotFoundError):
            found = self.work.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid():
                raise OutputError(
                    f"{self.out}: {self.work} belongs to another user, whose run writes the same output or was killed. "
                    "Wait for it, or choose another name"
                )
            if not stat.S_ISDIR(found.st_mode) or not self._is_ours():
                raise OutputError(
                    f"{self.out}: {self.work} is in the way, and no run of polymerge made it. Move it, or choose "
                    "another name"
                )

    def _is_ours(self) -> bool:
        """Whether the work folder is empty or has a lock; raises FileNotFoundError if it is taken away.

        A run makes its lock first and removes it last, so that of another run there can be files without a lock at one
        look, but not at two.
        """
        for _ in range(2):
            others = any(path != self._lock for path in self.work.iterdir())
            try:
                return stat.S_ISREG(self._lock.lstat().st_mode)
            except FileNotFoundError:
                if not others:
                    return True
        return False

    def lock(self) -> int:
        """Make the work folder, or take that of a killed run, and lock it; returns the lock's descriptor."""
        while True:
            self.refuse_foreign()
            with suppress(FileExistsError):
                self.work.mkdir()
            try:
                descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue  # a run that has just ended took the folder away
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), self._lock.lstat()):
                        sync(self.work)
                        return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise OutputError(
                    f"{self.out}: another run of polymerge is writing it. Wait for it, or choose another name"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # a run that has just ended took the file away: what is locked is no longer the name

    def unlock(self, descriptor: int) -> None:
        """Remove the work folder, unless something is left in it."""
        with suppress(OSError):
            if [path.name for path in self.work.iterdir()] == [self._lock.name]:
                self._lock.unlink()
        with suppress(OSError):
            os.close(descriptor)  # before the folder is removed: a network filesystem keeps an open file's name in it
        with suppress(OSError):
            self.work.rmdir()

    def pinned(self) -> int | None:
        """A descriptor of what is under the name, None if nothing is.

        While it is open, nothing else can get the same inode.
        """
        try:
            return os.open(self.target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None

    def give_name(self, earlier: int | None) -> None:
        """Put the new output under the name, on the disk; the `earlier` one then lies in the work folder.

        If it fails, all is as before. raises OutputError if the name could not be given: then the output has another.
        """
        made = self.new.lstat()
        try:
            if earlier is None or not os.path.lexists(self.target):
                rename_new(self.new, self.target)
            else:
                _check_same(self.target, earlier)
                if exchange(self.new, self.target):
                    _check_same(self.new, earlier)
                else:
                    rename_new(self.target, self._old)
                    _check_same(self._old, earlier)
                    rename_new(self.new, self.target)
            sync(self.target.parent)
            sync(self.work)
        except BaseException as error:
            named = os.path.lexists(self.target) and os.path.samestat(self.target.lstat(), made)
            if named and not (os.path.lexists(self.new) and exchange(self.new, self.target)):
                rename_new(self.target, self.new)
            self.put_back()
            if isinstance(error, OSError):
                self._keep(error)
            raise

    def _keep(self, error: OSError) -> None:
        """Put the finished output under a name that is free, and raise OutputError; return if that fails, too."""
        with suppress(OSError):
            for number in count(1):
                kept = self.target.with_name(f"{self.target.name}-{number}")
                with suppress(FileExistsError):
                    rename_new(self.new, kept)
                    break
            with suppress(OSError):
                sync(kept.parent)
            if isinstance(error, FileExistsError):
                raise OutputError(
                    f"{self.out}: something else came under this name during the merge, and was left alone. The "
                    f"finished output is in {kept}: rename or remove one of the two"
                )
            raise OutputError(
                f"{self.out}: the finished output could not get this name: {error.strerror or error}. It is in {kept}"
            )

    @property
    def kept(self) -> tuple[Path, ...]:
        """What a run that goes on needs of the one before it."""
        return self.new, self.work / _RUN, self.work / _FINISHED, *(self.work / name for name in _BESIDE)

    def said(self) -> str | None:
        """What the result of a killed run follows from, if that run can be gone on with."""
        new, run, finished, *_ = self.kept
        if not (_is_plain(run) and _is_plain(finished) and new.is_dir() and not new.is_symlink()):
            return None
        return run.read_text(encoding="utf-8", errors="replace")

    def goes_on(self) -> bool:
        """Return whether a later run can go on from here, with something that this one has finished."""
        with suppress(OSError):
            return self.said() is not None and any(path.stat().st_size for path in self.work.rglob(_FINISHED))
        return False

    def forget(self) -> None:
        """Let no later run go on from here: what is in `new` is about to be an output, or an earlier one."""
        if os.path.lexists(self.work / _RUN):
            (self.work / _RUN).unlink()
            sync(self.work)

    def put_back(self) -> None:
        """Give an output that was moved aside its name back, if there is nothing under it."""
        if os.path.lexists(self._old) and not os.path.lexists(self.target):
            rename_new(self._old, self.target)
            sync(self.target.parent)

    def failure(self, error: BaseException, earlier: int | None) -> OutputError | None:
        """Remove what was written of an output that failed; returns the error to raise instead, if any."""
        for path in (self.new, self._old):
            if earlier is not None and os.path.lexists(path) and os.path.samestat(path.lstat(), os.fstat(earlier)):
                return OutputError(f"{self.out}: {_words(error)}. The earlier output is in {path}: rename it")
        if left := self.emptied():
            return OutputError(f"{self.out}: {_words(error)}. What was written of it cannot be removed: {left}")
        if isinstance(error, OSError):
            return OutputError(f"{self.out}: not completed, and nothing of it was left: {_words(error)}")
        return None

    def emptied(self, kept: Collection[Path] = ()) -> str:
        """Remove all in the work folder but the lock, and what is kept; returns which files are left, and why."""
        gone, reasons, staying = self.work / "gone", [], {self._lock, self._old, *kept}
        for path in (*(path for path in self.work.iterdir() if path not in staying), self._old):
            try:
                if path == self._old:
                    if not os.path.lexists(path):
                        continue
                    path = path.rename(gone)  # so that one of which a part is removed is not put back
                    sync(self.work)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                reasons.append(error.strerror or str(error))
                if path != self._old:
                    shutil.rmtree(path, ignore_errors=True)
        if kept:
            return reasons[0] if reasons else ""
        files, folders = [], []
        for inside, deeper, names in os.walk(self.work):
            files += [Path(inside, name) for name in names]
            folders += [Path(inside, name) for name in deeper]
        left = sorted(path for path in files or folders if path != self._lock) or sorted(folders)
        listed = ", ".join(map(str, left[:_LISTED])) + (
            f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        )
        return f"{listed} ({reasons[0]})" if left and reasons else listed


def journal_of(folder: Path) -> Path:
    """The journal of what is finished in a folder that `output_folder` has given."""
    return folder.with_name(_FINISHED)


def written(folder: Path) -> int:
    """Bytes that lie in a folder that `output_folder` has given and beside it, if a killed run has left some."""
    places = (folder, *(folder.with_name(name) for name in _BESIDE))
    files = (path for place in places for path in (place, *place.rglob("*")) if path.is_file())
    return sum(512 * path.stat().st_blocks for path in files)


def exists(out: Path) -> OutputError:
    """The error for an output that may not be replaced."""
    return OutputError(f"{out}: exists already. Choose another folder, or say `force=True` to replace it")


def _words(error: BaseException) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error) or "interrupted"


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _check_same(path: Path, earlier: int) -> None:
    """Raise FileExistsError if what is at a path is another output than the earlier one."""
    if not os.path.samestat(path.lstat(), os.fstat(earlier)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
