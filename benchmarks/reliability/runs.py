"""Stop searches and evaluations, and continue them: they have to end as undisturbed ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import kills
from children import TRACEBACK, Ended, run, warm_up
from scenarios import Known, Place, Scenario, contents
from verdicts import HarnessError, Tally

_SYNCS: Final = ("rename", "renameat", "renameat2", "fsync", "fdatasync", "mkdir")
"""The calls that searches are stopped at; evaluations, which take less time, are stopped at all."""


def stopped(folder: Path, count: int, seed: int) -> Iterator[Tally]:
    """Kills at random, and kills and errors at calls, of a search and of an evaluation of the demo's models."""
    search_made: Any = importlib.import_module("search_made")
    running: Any = importlib.import_module("running")
    inputs = folder / "inputs"
    prompts = search_made.prompts_file(inputs / "prompts", 6)
    recipe = running.recipe_file(search_made.recipe(), inputs / "recipe.yaml")
    few = ("--max-new-tokens", "2")
    search = Scenario("search", ("search", str(recipe), "--prompts", str(prompts), "--keep-template-weight",
                                 "--values", "0:0.4:0.2", "--samples", "0", *few))  # fmt: skip
    evaluation = Scenario("evaluation", ("evaluate", search_made.VLM, "--tasks", f"{prompts}:exact", "--batch-size",
                                         "2", *few))  # fmt: skip
    # A model that has run here would not run in forks, so what is compiled for a search is compiled by a merge.
    warm_up(["polymerge", "merge", str(recipe), "-o", str(folder / "merged")])
    importlib.import_module("vl_convert")
    importlib.import_module("altair")
    for number, scenario in enumerate((evaluation, search)):
        place = Place(inputs, folder / f"{number}" / "beside", folder, scenario)
        place.beside.parent.mkdir()
        known = _undisturbed(place)
        only = kills.ERRORS if scenario is evaluation else _SYNCS
        yield kills.at_random(place, known, count, seed, _judge)
        if not kills.why_not():
            yield kills.at_every_call(place, known, False, _judge, only)
            yield kills.at_every_call(place, known, True, _judge, only)


def _undisturbed(place: Place) -> Known:
    made = []
    for _ in range(2):
        place.reset()
        ended = run(place.words())
        if ended.status:
            raise HarnessError(f"{place.scenario.name}: an undisturbed run ended with {ended.status}: {ended.said}")
        made.append(contents(place.out))
    if made[0] != made[1]:
        raise HarnessError(f"{place.scenario.name}: two runs made different files")
    return Known(contents(place.inputs), made[0], None)


def _judge(place: Place, known: Known, ended: Ended, tally: Tally, at: str) -> None:
    """Continue a run, and compare all of its files with those of an undisturbed one."""
    tally.runs += 1
    tally.outcomes["new" if place.out.is_dir() and contents(place.out) == known.new else "nothing"] += 1
    wrong = [f"traceback: {ended.said.strip().splitlines()[-1]}"] if TRACEBACK in ended.said else []
    again = run(place.words())
    if again.status:
        wrong.append(f"continued: status {again.status}: {again.said.strip()[-300:]}")
    elif (found := contents(place.out)) != known.new:
        differs = sorted(name for name in {**found, **known.new} if found.get(name) != known.new.get(name))
        wrong.append(f"continued, and other than an undisturbed one in {', '.join(differs[:4])}")
    if left := place.leftovers():
        wrong.append(f"leaves {', '.join(left)}")
    if contents(place.inputs) != known.inputs:
        wrong.append("the inputs have changed")
    tally.wrong.update(f"{place.scenario.name}, {at}: {one}" for one in wrong)
