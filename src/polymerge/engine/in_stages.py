"""Carry out a plan of several merges: each stage's output is written beside the last one's, and removed with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from polymerge.checkpoints.hub import remote_of
from polymerge.checkpoints.identity import stamp_of
from polymerge.checkpoints.output import journal_of, output_folder, written
from polymerge.engine.finished import Journal, said_with, state_of
from polymerge.engine.opening import beside_output, opened_inputs
from polymerge.engine.pool import Progress, tell_matrices
from polymerge.engine.provenance import RECORD
from polymerge.errors import OutputError, human_size
from polymerge.planning import Plan, make_plan
from polymerge.planning.matrix_costs import work_of
from polymerge.planning.stage_plans import with_paths
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe

__all__ = ["in_stages"]

_STAGES: Final = "stages"

T = TypeVar("T")


def in_stages(
    plan: Plan,
    target: Path,
    carry: Callable[[Plan, Path, bool, Progress], T],
    *,
    force: bool,
    progress: Progress | None,
    device: str,
    how: Sequence[str],
) -> tuple[T, int]:
    """Carry out the stages of a plan and then the plan itself; returns what `carry` returned of that, and how many
    stages a killed run had finished.

    carry   carries out a plan without stages, given its folder, whether it is the last one, and a report of progress
    target  the folder that the output gets; those of the stages lie in its work folder until then
    how     settings beside the plan that the outputs follow from

    raises as `merge` does, and OutputError where a stage's output is not what it was planned to be.
    """
    plans = (*plan.stages, plan)
    report = _Report(plans, progress)
    digest = hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()
    run = said_with(device, (setting for one in plans for setting in one.settings), stages=digest, how=list(how))
    with output_folder(target, force=force, run=run) as folder:
        _check_room(target, plans, folder)
        journal_of(folder).touch()
        journal, made, records = Journal(journal_of(folder)), dict[str, Path](), list[Any]()
        place = folder.with_name(_STAGES)
        place.mkdir(exist_ok=True)
        for planned in plan.stages:
            stage, made[planned.name] = _made_of(planned, made), place / planned.name
            before = _inputs_of(stage)
            if before and journal.said(planned.name) == [_stamped(made[planned.name]), before]:
                journal.take()
                report.take()
            else:
                carry(stage, _cleared(made[planned.name]), False, report)
                if before == _inputs_of(stage):
                    journal.note((planned.name,), _stamped(made[planned.name]), before)
            records.append(_record(made[planned.name], place))
            report.next()
        last = folder.with_name("last") / target.name
        last.parent.mkdir(exist_ok=True)
        result = carry(_made_of(replace(plan, stages=()), made), _cleared(last), True, report)
        _add(records, last / RECORD, place)
        _cleared(folder)
        last.rename(folder)
    return result, journal.taken


def _check_room(target: Path, plans: Sequence[Plan], folder: Path) -> None:
    """Raise OutputError if the disk lacks room for what the stages and the output have not written yet."""
    total = sum(one.size for one in plans)
    if total - min(written(folder), total) > (free := shutil.disk_usage(folder).free):
        raise OutputError(
            f"{target}: needs {human_size(total)}, {human_size(total - plans[-1].size)} of which for outputs of stages "
            f"until it is complete; the disk has {human_size(free)} free. Make room on it, or choose another place"
        )


def _inputs_of(stage: Plan) -> str:
    """What tells the state of the files that a stage's output is made of; a commit tells those of the hub."""
    opened = opened_inputs(stage)
    files = [file for checkpoint in opened for file in checkpoint.stamps]
    files += beside_output(stage, opened[stage.template]).values()
    return state_of(file for file in files if remote_of(file) is None)


def _stamped(folder: Path) -> list[list[Any]]:
    """Every file of a stage's output, with its stamp: it has its name only since all of it is on the disk, so that they
    tell whether it is what was made.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[file.relative_to(folder).as_posix(), *(stamp_of(file) or ())] for file in files]


def _cleared(folder: Path) -> Path:
    """A folder that is to be made, without what a killed run has made under its name."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


class _Report:
    """Tells a progress of all stages what is done of one of them."""

    def __init__(self, plans: Sequence[Plan], progress: Progress | None) -> None:
        self._sizes, self._progress, self._at = [plan.size for plan in plans], progress, 0
        self._counts = [work_of(plan)[0] for plan in plans]
        self._costs = [work_of(plan)[1] for plan in plans]

    def next(self) -> None:
        """Go on to the next stage."""
        self._at += 1

    def take(self) -> None:
        """Count the stage as one that a killed run had finished, which tells nothing of the time left."""
        self._costs[self._at] = 0.0
        self(self._sizes[self._at], self._sizes[self._at])
        if self._counts[self._at]:
            self.matrices(self._counts[self._at], 0, 0.0)

    def __call__(self, done: int, total: int) -> None:
        """What is done of the stage, and its total, which has downloads in it."""
        if self._progress is not None:
            before = sum(self._sizes[: self._at])
            self._progress(before + done, sum(self._sizes) + total - self._sizes[self._at])

    def matrices(self, done: int, _: int, share: float) -> None:
        """How many of the stage's matrices are done, and the share of their cost."""
        paid = sum(self._costs[: self._at]) + share * self._costs[self._at]
        before, whole = sum(self._counts[: self._at]), sum(self._costs)
        tell_matrices(self._progress, before + done, sum(self._counts), paid / whole if whole else 0.0)


def _made_of(plan: Plan, made: Mapping[str, Path]) -> Plan:
    """A plan with the outputs of stages in place of what was planned of them."""
    named = {name: path for name, path in made.items() if name in {one.source for one in plan.inputs}}
    if not named:
        return plan
    recipe = read_recipe({name: value for name, value in plan.recipe.items() if name != _STAGES})
    found = make_plan(_renamed(recipe, named))
    if found.hash != plan.hash:
        raise OutputError(
            f"stage '{plan.name}' would be merged otherwise than was planned before {', '.join(named)} was written. "
            "Merge the stages one by one, each with a recipe of its own"
        )
    return with_paths(plan, found)


def _renamed(recipe: Recipe, made: Mapping[str, Path]) -> Recipe:
    """A recipe with paths in place of the names of stages."""

    def moved(source: str) -> str:
        return str(made.get(source, source))

    return replace(
        recipe,
        models=tuple(replace(entry, model=moved(entry.model)) for entry in recipe.models),
        template=None if recipe.template is None else moved(recipe.template),
        base_model=None if recipe.base_model is None else moved(recipe.base_model),
        tokenizer_source=None if recipe.tokenizer_source is None else moved(recipe.tokenizer_source),
        stages=(),
    )


def _record(folder: Path, place: Path) -> Any:
    """What a stage's polymerge.json says of it, without its table of tensors; paths of stages by their names."""
    text = (folder / RECORD).read_text(encoding="utf-8").replace(f"{place}/", f"{_STAGES}/")
    return {name: value for name, value in json.loads(text).items() if name != "plan"}


def _add(records: list[Any], file: Path, place: Path) -> None:
    """Put the records of the stages at the beginning of the last one's."""
    text = file.read_text(encoding="utf-8").replace(f"{place}/", f"{_STAGES}/")
    own = json.dumps(records, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    file.write_text(text.replace("{", f'{{\n  "{_STAGES}": {own},', 1), encoding="utf-8")
