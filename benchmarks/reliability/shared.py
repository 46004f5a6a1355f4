"""Merge in folders that others use, too: umasks, groups, files in the way, two runs at once, and a reader."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from children import TRACEBACK, Child, run
from scenarios import Known, Place, Scenario, contents, make_inputs
from verdicts import Tally, forced, next_run, settle

_UMASKS: Final = (0o000, 0o002, 0o007, 0o022, 0o027, 0o077)
_GROUP: Final = 54321
_TIMES: Final = 50


def in_company(folder: Path, scenarios: Sequence[Scenario]) -> Iterator[Tally]:
    """Each kind of company, for each scenario."""
    inputs = make_inputs(folder / "inputs")
    for number, scenario in enumerate(scenarios):
        place, known = settle(inputs, folder / f"{number}", scenario)
        yield _modes(place, known)
        yield _strangers(place, known)
        yield _together(place, known)
        if place.scenario.earlier:
            yield _read_meanwhile(place, known)


def _modes(place: Place, known: Known) -> Tally:
    """Files get what the umask leaves, and the group of a folder that hands its own down."""
    tally = Tally("shared", "modes by umask", place.scenario.name)
    for umask in _UMASKS:
        for handed_down in (False, True) if os.geteuid() == 0 else (False,):
            place.reset()
            if handed_down:
                os.chown(place.beside, -1, _GROUP)
                place.beside.chmod(0o2775)
            ended = run(place.words(*forced(place.scenario)), partial(_set_umask, umask))
            tally.outcome(known.stands(place.out))
            at = f"umask {umask:03o}{', a group handed down' if handed_down else ''}"
            for path in (place.out, *place.out.rglob("*")):
                found = path.stat()
                mode = (0o777 if path.is_dir() else 0o666) & ~umask | (0o2000 if handed_down and path.is_dir() else 0)
                if stat.S_IMODE(found.st_mode) != mode or (handed_down and found.st_gid != _GROUP):
                    tally.wrong[f"{at}: {path.name} is {found.st_mode:o} of group {found.st_gid}"] += 1
            if ended.status:
                tally.wrong[f"{at}: status {ended.status}: {ended.said.strip()[-200:]}"] += 1
    return tally


def _set_umask(umask: int) -> None:
    os.umask(umask)


def _link(path: Path, to: Path) -> None:
    path.symlink_to(to)


def _folder(path: Path, to: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("not to be lost")
    (path / "link").symlink_to(to)


STRANGERS: Final[dict[str, Callable[[Path, Path], object]]] = {
    "a file": lambda path, _: path.write_text("not to be lost"),
    "a folder": _folder,
    "a link to a file": lambda path, to: _link(path, to / "precious"),
    "a link to a folder": _link,
    "a link to nothing": lambda path, to: _link(path, to / "not there"),
}


def _strangers(place: Place, known: Known) -> Tally:
    """What others have under the names that polymerge uses beside an output stays there, and is not followed."""
    tally = Tally("shared", "names taken by others", place.scenario.name)
    for kind in ("lock", "old", "partial"):
        for what, make in STRANGERS.items():
            place.reset()
            others = place.beside.parent / "others"
            others.mkdir(exist_ok=True)
            (others / "precious").write_text("not to be lost")
            stranger = place.beside / f".out.polymerge-{kind}"
            make(stranger, others)
            before = contents(others), _what(stranger)
            ended = run(place.words(*forced(place.scenario)))
            stands = known.stands(place.out)
            tally.outcome(stands)
            wrong = []
            if (contents(others), _what(stranger)) != before:
                wrong.append("it was changed")
            if ended.status == 0 and stands != "new":
                wrong.append(f"status 0, and under the name: {stands}")
            if ended.status and stands != ("earlier" if known.earlier else "nothing"):
                wrong.append(f"status {ended.status}, and under the name: {stands}")
            if ended.status and (str(stranger) not in ended.said or TRACEBACK in ended.said):
                wrong.append(f"refused without its name: {ended.said.strip()[-200:]}")
            tally.wrong.update(f"{what} as {stranger.name}: {one}" for one in wrong)
    return tally


def _what(path: Path) -> object:
    if not os.path.lexists(path):
        return None
    return path.lstat().st_ino, contents(path) if path.exists() else path.readlink()


def _together(place: Place, known: Known) -> Tally:
    """Of two runs that begin at once one writes the output, or one after the other does."""
    tally = Tally("shared", "two runs at once", place.scenario.name)
    for number in range(_TIMES):
        place.reset()
        children = [Child(place.words("--force")) for _ in range(2)]
        for child in children:
            child.go()
            time.sleep(0.001 * (number % 10))
        ended = [child.wait() for child in children]
        tally.outcome(stands := known.stands(place.out))
        wrong = [] if stands == "new" else [f"under the name: {stands}"]
        if all(one.status for one in ended):
            wrong.append("none succeeded")
        wrong += [one.said.strip()[-200:] for one in ended if one.status and "another run" not in one.said]
        wrong += next_run(place, known)
        tally.wrong.update(f"{place.scenario.name}: {one}" for one in wrong)
    return tally


def _read_meanwhile(place: Place, known: Known) -> Tally:
    """There is no moment at which a reader of the name finds nothing while an output replaces another."""
    tally = Tally("shared", "read meanwhile", place.scenario.name)
    looks = 0
    for _ in range(_TIMES):
        place.reset()
        child = Child(place.words(*forced(place.scenario)))
        child.go()
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            looks += 1
            try:
                (place.out / "README.md").stat()
            except OSError as error:
                tally.wrong[f"{place.scenario.name}: a reader finds nothing: {error.strerror}"] += 1
        ended = child.wait()
        tally.outcome(known.stands(place.out))
        if ended.status:
            tally.wrong[f"status {ended.status}: {ended.said.strip()[-200:]}"] += 1
    tally.note = f"{looks} looks at the name" + ("" if sys.platform == "linux" else ", which is no exchange here")
    return tally
