"""Judge what a fault has left: the three outcomes, the inputs, and the run that comes next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import TRACEBACK, Ended, run, warm_up
from scenarios import Known, Place, Scenario, contents


class HarnessError(Exception):
    """The harness could not do its work, which says nothing about polymerge."""


@dataclass
class Tally:
    """The counts of one row of the table: how many runs, what stood under the name after them, what was wrong."""

    part: str
    what: str
    scenario: str = ""
    runs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def outcome(self, stands: str) -> None:
        self.runs += 1
        self.outcomes[stands if stands in ("nothing", "earlier", "new") else "broken"] += 1

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "outcomes": dict(self.outcomes), "wrong": dict(self.wrong.most_common(20))}


def settle(inputs: Path, folder: Path, scenario: Scenario) -> tuple[Place, Known]:
    """Run a scenario undisturbed, twice: its place, and what it makes; the second run has to make the same."""
    folder.mkdir()
    place = Place(inputs, folder / "beside", folder / "stash", scenario)
    before = contents(inputs)
    earlier = None
    if scenario.earlier:
        place.beside.mkdir()
        _good(run(place.words(earlier=True)), place)
        place.out.rename(place.stash)
        earlier = contents(place.stash)
    place.reset()
    warm_up(place.words(*forced(scenario)))
    made = []
    for _ in range(2):
        place.reset()
        _good(run(place.words(*forced(scenario))), place)
        made.append(contents(place.out))
        if left := place.leftovers():
            raise HarnessError(f"{scenario.name}: an undisturbed run left {', '.join(left)}")
    if made[0] != made[1] or made[0] == earlier:
        raise HarnessError(f"{scenario.name}: two runs made different outputs, or the earlier one is no other")
    return place, Known(before, made[0], earlier)


def forced(scenario: Scenario) -> tuple[str, ...]:
    """What is said more so that the earlier output is replaced."""
    return ("--force",) if scenario.earlier else ()


def _good(ended: Ended, place: Place) -> None:
    if ended.status:
        raise HarnessError(f"{place.scenario.name}: an undisturbed run ended with {ended.status}: {ended.said}")


def judge(place: Place, known: Known, ended: Ended | None, tally: Tally, at: str, only: tuple[str, ...] = ()) -> None:
    """Count what a fault has left; then run the next command, which has to put everything right.

    ended  how the disturbed command ended, None where that is not known
    at     where the fault was, for the list of what is wrong
    only   the outcomes that are allowed where fewer are than the three
    """
    stands = known.stands(place.out)
    tally.outcome(stands)
    wrong: list[str] = []
    if ended is not None and ended.status > 0:
        tally.outcomes["kept elsewhere"] += place.keeps(ended.said, known)
    # with an earlier output only between two renames, where names cannot be exchanged
    between = ("nothing",) if known.earlier is None or place.scenario.prepare else ()
    allowed = only or (*between, "new", *(("earlier",) if known.earlier is not None else ()))
    if stands not in allowed:
        wrong.append(f"under the name: {stands}")
    if ended is not None and ended.status == 0 and stands != "new":
        wrong.append(f"status 0, and under the name: {stands}")
    if ended is not None and TRACEBACK in ended.said:
        wrong.append(f"traceback: {ended.said.strip().splitlines()[-1]}")
    if ended is not None and ended.status > 0 and (left := place.leftovers()) and _denies(ended.said):
        wrong.append(f"says that nothing is left, and there are {', '.join(left)}")
    wrong += next_run(place, known)
    if contents(place.inputs) != known.inputs:
        wrong.append("the inputs have changed")
    tally.wrong.update(f"{place.scenario.name}, {at}: {one}" for one in wrong)


def _denies(said: str) -> bool:
    return "othing was left" in said or "othing half written" in said or "othing is left" in said


def next_run(place: Place, known: Known) -> list[str]:
    """Run the command as if nothing had happened, and with force where an output is in the way; what was wrong."""
    wrong, prepare = [], place.scenario.prepare
    before = known.stands(place.out)
    ended = run(place.words(), prepare)
    if before != "nothing" or known.earlier is not None:
        # an earlier output that had been moved aside is put back, and then is in the way like any other
        due = "earlier" if before == "nothing" else before
        if (stands := known.stands(place.out)) != due or ended.status == 0:
            wrong.append(f"next run without force: status {ended.status}, {stands} after {before}")
        ended = run(place.words("--force"), prepare)
    if ended.status:
        wrong.append(f"next run: status {ended.status}: {ended.said.strip()[-300:]}")
    if (after := known.stands(place.out)) != "new":
        wrong.append(f"after the next run: {after}")
    if left := place.leftovers():
        wrong.append(f"after the next run there are left: {', '.join(left)}")
    return wrong
