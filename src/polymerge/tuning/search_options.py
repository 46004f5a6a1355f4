"""Options of a search, and what of them does not fit together."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polymerge.checkpoints.target import check_target
from polymerge.errors import RecipeError, collecting, did_you_mean, refuse
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import Prompt
from polymerge.methods.own import MethodFiles
from polymerge.paths import given_path
from polymerge.tuning.criterion import CRITERIA, Judging
from polymerge.tuning.knobs import Knob
from polymerge.tuning.objectives import RULES
from polymerge.tuning.space import Space
from polymerge.tuning.trials import OF_ONE, SAMPLERS, Scoring, check_labels

__all__ = ["SearchOptions", "refuse_misfits", "refuse_unfit"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of a search.

    vary                  one parameter, or any number with scoring; by default the second model's weight from 0 to 0.6
    keep_template_weight  keep the template's weight from the recipe; otherwise it is 1 minus all the others'
    judging, scoring      how answers are judged without labels, and with labels
    write                 a folder for the merge with the chosen value
    methods               Python files with methods of the user's own, as for `plan`
    force                 discard an earlier run with other settings; replace an existing `write`
    """

    vary: Sequence[Knob] = ()
    keep_template_weight: bool = False
    judging: Judging = field(default_factory=Judging)
    scoring: Scoring | None = None
    generation: Generation = field(default_factory=Generation)
    write: str | os.PathLike[str] | None = None
    methods: MethodFiles = ()
    force: bool = False

    @property
    def sampled(self) -> bool:
        """Whether a sampler draws the points; otherwise they form a grid."""
        return self.scoring is not None and self.scoring.sampler != "grid"


def refuse_unfit(out: Path, options: SearchOptions) -> None:
    """Refuse at the start what would fail at the end."""
    if options.write is None:
        return
    run, target = out.resolve(), given_path(options.write).resolve()
    if run == target or run in target.parents or target in run.parents:
        refuse(RecipeError(f"write {options.write}: the folder of the search, {out}, is or holds it, or is in it"))
        return
    with collecting():
        check_target(given_path(options.write), (), options.force)


def refuse_misfits(space: Space, options: SearchOptions, drawn: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse parts of a search that do not fit together."""
    scoring, judging = options.scoring, options.judging
    if len(drawn) != 1 or (scoring is not None and (scoring.quick is not None or scoring.population is not None)):
        _refuse_tasks(scoring, drawn)
    if len(drawn) == 1 and (scoring is None or not scoring.choose):
        _refuse_without_labels(space, judging)
    if scoring is None:
        return
    if scoring.sampler == "grid":
        if any(axis.span is not None for axis in space.axes):
            refuse(RecipeError("vary: a grid needs a step in each range, such as 0:0.6:0.1"))
    elif scoring.sampler not in SAMPLERS:
        hint = did_you_mean(scoring.sampler, ("grid", *SAMPLERS))
        refuse(RecipeError(f"sampler: there is no '{scoring.sampler}'.{hint}"))
    elif options.generation.workers > 1:
        refuse(
            RecipeError("workers: a sampler learns from each trial before it draws the next; several are for a grid")
        )
    if scoring.trials < 1:
        refuse(RecipeError(f"trials: {scoring.trials} are none"))
    if not scoring.choose and scoring.sampler != "grid":
        refuse(RecipeError("choose_by criterion: compares neighbours, so it needs a grid for `sampler`"))
    for name, prompts in drawn.items():
        with collecting():
            if prompts and (isinstance(scoring.scorer, str) or name in scoring.scorer):
                check_labels(scoring.of(name), prompts)


def _refuse_tasks(scoring: Scoring | None, drawn: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse what several tasks, or one, cannot be scored with."""
    for name in drawn:
        if len(drawn) > 1 and not re.fullmatch(r"[\w.\-]*\w[\w.\-]*", name):
            refuse(RecipeError(f"prompts: '{name}' is no name for a task, which has letters, digits, `.`, `-` and `_`"))
    if not drawn:
        refuse(RecipeError("prompts: say where prompts are"))
    if scoring is None:
        refuse(RecipeError("prompts: several tasks are scored with labels: say `scorer`. Without labels there is one"))
        return
    if len(drawn) == 1:
        refuse(RecipeError("quick and population are for several tasks"))
        return
    if not isinstance(scoring.scorer, str) and set(scoring.scorer) != set(drawn):
        told = f"{', '.join(scoring.scorer)} for {', '.join(drawn)}"
        refuse(RecipeError(f"scorer: says one for each task, and these are not the tasks: {told}"))
    if scoring.sampler in OF_ONE:
        refuse(RecipeError(f"sampler {scoring.sampler}: seeks one highest score; for several tasks say nsga2 or grid"))
    if scoring.rule not in RULES:
        refuse(RecipeError(f"choose_by: there is no rule '{scoring.rule}'.{did_you_mean(scoring.rule, RULES)}"))
    if not scoring.choose:
        refuse(RecipeError(f"choose_by criterion: is for one task; several are chosen by {', '.join(RULES)}"))
    if scoring.quick is not None and scoring.quick < 1:
        refuse(RecipeError(f"quick: {scoring.quick} is no number of prompts"))
    if scoring.population is not None and (scoring.population < 2 or not scoring.sampler.startswith("nsga")):
        refuse(RecipeError(f"population: {scoring.population} is for nsga2, whose generations have at least 2 trials"))


def _refuse_without_labels(space: Space, judging: Judging) -> None:
    """Refuse a space that comparing neighbours cannot choose in."""
    with collecting() as wrong:
        if len(space.axes) > 1:
            refuse(RecipeError("vary: without labels one parameter is varied; several need `scorer`"))
        if any(axis.span is not None for axis in space.axes):
            refuse(RecipeError("values: a range needs a step, such as 0:0.6:0.1"))
        if not all(axis.numeric for axis in space.axes):
            refuse(RecipeError("vary: without labels a number is varied, for its neighbours are compared"))
        least = CRITERIA[judging.criterion].least if judging.criterion in CRITERIA else 0
        if not wrong and space.axes and len(space.points()) < least:
            refuse(
                RecipeError(
                    f"values: criterion {judging.criterion} compares neighbours and needs {least} values, got "
                    f"{len(space.points())}"
                )
            )
