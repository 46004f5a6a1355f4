"""Carry out a plan of several merges: each stage's output is written beside the last one's, and removed with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from polymerge.checkpoints.output import output_folder
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
) -> T:
    """Carry out the stages of a plan and then the plan itself; returns what `carry` returned of that.

    carry   carries out a plan without stages, given its folder, whether it is the last one, and a report of progress
    target  the folder that the output gets; those of the stages lie in its work folder until then

    raises as `merge` does, and OutputError where a stage's output is not what it was planned to be.
    """
    report = _Report((*plan.stages, plan), progress)
    total = sum(one.size for one in (*plan.stages, plan))
    with output_folder(target, force=force) as folder:
        if total > (free := shutil.disk_usage(folder).free):
            raise OutputError(
                f"{target}: needs {human_size(total)}, {human_size(total - plan.size)} of which for outputs of stages "
                f"until it is complete; the disk has {human_size(free)} free. Make room on it, or choose another place"
            )
        place = folder.with_name(_STAGES)
        place.mkdir()
        made: dict[str, Path] = {}
        records: list[Any] = []
        for stage in plan.stages:
            made[stage.name] = place / stage.name
            carry(_made_of(stage, made), made[stage.name], False, report)
            records.append(_record(made[stage.name], place))
            report.next()
        last = folder.with_name("last") / target.name
        last.parent.mkdir()
        result = carry(_made_of(replace(plan, stages=()), made), last, True, report)
        _add(records, last / RECORD, place)
        last.rename(folder)
    return result


class _Report:
    """Tells a progress of all stages what is done of one of them."""

    def __init__(self, plans: Sequence[Plan], progress: Progress | None) -> None:
        self._sizes, self._progress, self._at = [plan.size for plan in plans], progress, 0
        self._counts, self._costs = zip(*map(work_of, plans), strict=True)

    def next(self) -> None:
        """Go on to the next stage."""
        self._at += 1

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
