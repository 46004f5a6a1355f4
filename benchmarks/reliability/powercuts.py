"""Cut the power of a disk at any write of a merge, and look at what is on it when it comes back."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import logged_disk
from children import Child, Prepare
from logged_disk import LoggedDisk, mounted
from scenarios import Known, Place, Scenario, make_inputs
from verdicts import HarnessError, Tally, forced, judge, settle

DISKS: Final = (("ext4", ""), ("ext4", "data=writeback,noauto_da_alloc,commit=1"), ("xfs", ""), ("btrfs", ""))
"""The file systems, with the options that they are mounted with."""

CUTS_A_RUN: Final = 40


def _nothing(fd: object) -> None:
    """Stands for a call that syncs."""


def without_syncing() -> None:
    """What a child does that has to lose its output: nothing is synced."""
    os.fsync = os.fdatasync = _nothing


def power_cuts(folder: Path, scenarios: Sequence[Scenario], count: int, seed: int) -> Iterator[Tally]:
    """Cuts shared out over the scenarios, for each file system; the last row is without syncing, and has to lose."""
    for kind, options in DISKS:
        name = f"{kind} {options}".strip()
        if why := logged_disk.why_not(logged_disk.MAKE[kind][0]):
            yield Tally("cuts", name, note=f"not run: {why}")
            continue
        logged_disk.own_mounts()
        image, mount = folder / "image", folder / "mount"
        mount.mkdir(exist_ok=True)
        for number, scenario in enumerate(scenarios):
            logged_disk.format_image(image, kind)
            with mounted(image, mount):
                place, known = settle(make_inputs(mount / "inputs"), mount / "run", scenario)
                place.reset()
            tally = Tally("cuts", name, scenario.name)
            share = -(-count // len(scenarios) // len(DISKS))
            while tally.runs < share:
                drawn = random.Random(f"{seed} {number} {tally.runs}")
                _cut(place, known, image, options, min(CUTS_A_RUN, share - tally.runs), drawn, tally)
            yield tally
            if scenario.name == "merge, forced":
                yield _losses(place, known, image, options, name, drawn)


def _losses(place: Place, known: Known, image: Path, options: str, name: str, drawn: random.Random) -> Tally:
    """Cuts of a merge that syncs nothing: where they lose nothing, the harness is blind."""
    found = Tally("cuts", f"{name}, nothing synced", place.scenario.name)
    _cut(place, known, image, options, CUTS_A_RUN, drawn, found, without_syncing)
    losses = found.wrong.total()
    found.note = f"{losses} losses found, as there have to be: {', '.join(found.wrong)[:200]}"
    found.wrong = Counter() if losses else Counter({"the harness sees no loss without syncing": 1})
    return found


def _cut(
    place: Place,
    known: Known,
    image: Path,
    options: str,
    count: int,
    drawn: random.Random,
    tally: Tally,
    prepare: Prepare | None = None,
) -> None:
    """Merge once on a disk with a log, then cut at moments of it, half of them losing writes that were not flushed."""
    folder = image.with_name(f"disk {tally.what} {tally.scenario} {tally.runs}")
    mount = place.beside.parents[1]
    with LoggedDisk(image, folder) as disk:
        with mounted(disk.file, mount, options):
            child = Child(place.words(*forced(place.scenario)), prepare or place.scenario.prepare)
            others = _sync_now_and_then(mount, drawn)
            child.go()
            ended = child.wait()
            done = disk.now()
            os.waitpid(others, 0)
            if ended.status:
                raise HarnessError(f"{tally.scenario}: ended with {ended.status}: {ended.said}")
            time.sleep(1.5 if "commit=1" in options else 0)
        ends = disk.ends()
    before = [end for end in ends if end <= done]
    for number in range(count):
        end = done if number < 2 else drawn.choice(before if number % 4 else ends)
        disk.cut(end, image.with_name("cut"), drawn if number % 2 else None)
        when = "after success" if end >= done else f"after {end / done:.0%} of its writes"
        with mounted(image.with_name("cut"), mount, options):
            judge(place, known, None, tally, f"cut {when}", ("new",) if end >= done else ())
    disk.forget()


def _sync_now_and_then(mount: Path, drawn: random.Random) -> int:
    """What other programs do at the same time: a process that syncs the file system up to three times."""
    pauses = [drawn.uniform(0, 0.05) for _ in range(drawn.randrange(4))]
    if (pid := os.fork()) == 0:
        for pause in pauses:
            time.sleep(pause)
            logged_disk.sync(mount)
        os._exit(0)
    return pid
