"""Whether a folder may be made or replaced, and whether there is room for it, asked before anything is written."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from polymerge.checkpoints.output import Place, exists, output_folder, written
from polymerge.checkpoints.prefetch import fetches_to
from polymerge.durable import writing
from polymerge.errors import OutputError, human_size

__all__ = ["check_target", "roomy_folder"]

_LINKS: Final = 40
"""How many links the system follows on the way to a file."""


def check_target(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise OutputError unless `out` can be created without harming existing files or any input; writes nothing.

    inputs  the folders and files that are read
    force   whether an existing `out` is to be replaced
    """
    with writing(out):
        place = Place.of(out)
        target = place.target
        sources = {path: Path(os.path.realpath(path)) for path in inputs}
        for path, source in sources.items():
            if target == source or target in source.parents:
                raise OutputError(
                    f"{out}: is or holds the input {path}, which would be replaced. Choose another folder"
                )
            if source.is_dir() and any(parent.exists() and parent.samefile(source) for parent in target.parents):
                raise OutputError(f"{out}: lies inside of the input {path}. Choose another folder")
        if target in (Path.cwd(), *Path.cwd().parents, Path.home().resolve()):
            raise OutputError(f"{out}: is or contains the current folder. Choose another folder")
        if os.path.lexists(out) and not force:
            raise exists(out)
        if not target.parent.is_dir():
            raise OutputError(f"{out}: its parent folder {target.parent} does not exist. Make it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{out}: its parent folder {target.parent} cannot be written to. Choose another folder")
        place.refuse_foreign()
        if os.path.lexists(target):
            _check_replaceable(out, target)
            _check_held(out, target, sources)


def _check_replaceable(out: Path, target: Path) -> None:
    """Raise OutputError if an earlier output cannot be moved aside or removed."""
    mount = _mount_of(target.parent)
    for inside, _, _ in os.walk(target):
        if _mount_of(Path(inside)) != mount:
            where = "is" if Path(inside) == target else f"holds {inside},"
            raise OutputError(f"{out}: {where} a mount point, which cannot be replaced. Choose another folder")
        if not os.access(inside, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"{out}: you may not change {inside}, so it cannot be replaced. Choose another folder")


def _mount_of(path: Path) -> object:
    """What tells the mount that a path lies on from all others; a bind mount only where Linux shows it."""
    descriptor = os.open(path, getattr(os, "O_PATH", os.O_NONBLOCK))
    try:
        with suppress(OSError):
            found = re.search(r"mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii"))
            if found is not None:
                return found[1]
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def _check_held(out: Path, target: Path, sources: Mapping[Path, Path]) -> None:
    """Raise OutputError if a file of an input lies in `target`, by whatever path or link."""
    held = {(found.st_dev, found.st_ino) for found in (path.lstat() for path in _all_in(target)) if found.st_ino}
    for named, source in sources.items():
        for path in _all_in(source):
            if held & set(_led_over(path)):
                raise OutputError(
                    f"{out}: holds {path.name} of the input {named}, which would be replaced. Choose another folder"
                )


def _all_in(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        yield from path.rglob("*")


def _led_over(path: Path) -> Iterator[tuple[int, int]]:
    """The identities of a file, and of each link that leads to it."""
    with suppress(OSError):  # a link to nothing
        for _ in range(_LINKS):
            found = path.lstat()
            yield found.st_dev, found.st_ino
            if not stat.S_ISLNK(found.st_mode):
                return
            path = Path(os.path.realpath(path.parent)) / path.readlink()


@contextmanager
def roomy_folder(out: Path, force: bool, size: int, to_come: int, run: str = "") -> Iterator[Path]:
    """The folder to write an output to, which gets its name if the block succeeds.

    size     of the output, in bytes
    to_come  bytes of downloads
    run      as for `output_folder`

    raises OutputError if the disk lacks room for it, including downloads that go to the same disk.
    """
    with output_folder(out, force=force, run=run) as folder:
        size -= min(size, written(folder))
        free, beside = shutil.disk_usage(folder).free, to_come if to_come and fetches_to(folder) else 0
        if size + beside > free:
            more = f" and {human_size(beside)} for what is fetched to the same disk" if beside else ""
            raise OutputError(
                f"{out}: needs {human_size(size)}{more}, the disk has {human_size(free)} free. Make room on it, or "
                "choose another place"
            )
        yield folder
