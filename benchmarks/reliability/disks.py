"""Merge onto disks with too little room, by every twentieth of an output's size."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import logged_disk
from children import TRACEBACK, Ended, Prepare, run
from logged_disk import command, format_image, mounted
from scenarios import Known, Place, Scenario, contents, make_inputs
from verdicts import Tally, forced, next_run, settle

_BLOCK: Final = 4096
LIMIT: Final = "limit of a file's size"
_PLENTY: Final = shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)


def _much_room(path: object) -> shutil._ntuple_diskusage:  # noqa: ARG001 (called as disk_usage is)
    return _PLENTY


def _told_otherwise() -> None:
    """The room is taken after it was looked at: reserving it fails."""
    shutil.disk_usage = _much_room


def _no_reserving() -> None:
    """Nor can room be reserved, as on some network disks: writing fails half way."""
    _told_otherwise()
    del os.posix_fallocate


WORDS: Final = ("free", "room", os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))
"""One of these is in a message that tells of a full disk."""

STEPS: Final[dict[str, Prepare | None]] = {
    "known before": None,
    "found when reserving": _told_otherwise,
    "found when writing": _no_reserving,
}


def too_small(folder: Path, scenarios: Sequence[Scenario]) -> Iterator[Tally]:
    """Each scenario on a full tmpfs and ext4; where nothing can be mounted, with a limit on the size of files."""
    if why := logged_disk.why_not(logged_disk.MAKE["ext4"][0]):
        yield Tally("disks", "tmpfs and ext4", note=f"not run: {why}")
        yield from _on(folder, scenarios, LIMIT, {"found when writing": _no_reserving})
        return
    logged_disk.own_mounts()
    for kind in ("tmpfs", "ext4"):
        with _disk(folder, kind) as mount:
            yield from _on(mount, scenarios, kind, STEPS)


def _disk(folder: Path, kind: str) -> AbstractContextManager[Path]:
    mount = folder / kind
    mount.mkdir()
    return mounted(format_image(folder / "image", kind), mount) if kind == "ext4" else _tmpfs(mount)


@contextmanager
def _tmpfs(mount: Path) -> Iterator[Path]:
    command("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", mount)
    try:
        yield mount
    finally:
        command("umount", mount)


def _on(folder: Path, scenarios: Sequence[Scenario], kind: str, steps: dict[str, Prepare | None]) -> Iterator[Tally]:
    inputs = make_inputs(folder / "inputs")
    for number, scenario in enumerate(scenarios):
        place, known = settle(inputs, folder / f"{number}", scenario)
        size = sum(file.stat().st_blocks * 512 for file in place.out.rglob("*") if file.is_file())
        for step, prepare in steps.items() if scenario.prepare is None else ():
            tally = Tally("disks", f"{kind}, {step}", scenario.name, note=f"output of {size / 1e6:.2f} MB")
            for percent in range(0, 200 if _converted(scenario) else 100, 5):
                place.reset()
                if kind == LIMIT:
                    ended = run(place.words(*forced(scenario)), partial(_limited, max(_BLOCK, size * percent // 400)))
                else:
                    ended = _filled(place, folder, size * percent // 100 // _BLOCK * _BLOCK, prepare)
                _judge(place, known, ended, tally, percent)
            yield tally
        shutil.rmtree(folder / f"{number}")


def _converted(scenario: Scenario) -> bool:
    """Whether files of another format are made of the first ones, which takes more room than the output."""
    return "torch" in scenario.words or "llava" in scenario.words


def _filled(place: Place, folder: Path, room: int, prepare: Prepare | None) -> Ended:
    """Run a scenario while a file takes all but `room` bytes of the disk."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        logged_disk.sync(folder)  # what is not yet allocated would take room later
        taken = shutil.disk_usage(folder).free - room
        while taken > 0:
            try:
                os.posix_fallocate(file.fileno(), 0, taken)
                break
            except OSError as error:  # where the file's blocks are listed takes room, too
                if error.errno != errno.ENOSPC:
                    raise
                taken -= _BLOCK
    ended = run(place.words(*forced(place.scenario)), prepare)
    filler.unlink()
    return ended


def _limited(largest: int) -> None:
    _no_reserving()
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def _judge(place: Place, known: Known, ended: Ended, tally: Tally, percent: int) -> None:
    """A full disk is told in a sentence and leaves everything as it was; then there is room again."""
    stands, wrong = known.stands(place.out), []
    tally.outcome(stands)
    if percent >= 100 and ended.status == 0:
        before = "new"
    else:
        before = "nothing" if known.earlier is None else "earlier"
        if ended.status not in (1, 2) or TRACEBACK in ended.said:
            wrong.append(f"status {ended.status}: {ended.said.strip()[-200:]}")
        elif not any(word in ended.said for word in WORDS):
            wrong.append(f"does not say that the disk is full: {ended.said.strip()[-200:]}")
    if stands != before:
        wrong.append(f"under the name: {stands}")
    if left := place.leftovers():
        wrong.append(f"leaves {', '.join(left)}")
    wrong += next_run(place, known)
    if contents(place.inputs) != known.inputs:
        wrong.append("the inputs have changed")
    tally.wrong.update(f"{place.scenario.name}, room for {percent}%: {one}" for one in wrong)
