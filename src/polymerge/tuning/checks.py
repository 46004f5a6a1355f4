"""Whether the parts of a search fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import Prompt
from polymerge.tuning.candidates import Space
from polymerge.tuning.criterion import CRITERIA
from polymerge.tuning.judging import Judging, check_labels
from polymerge.tuning.trials import SAMPLERS

__all__ = ["Scoring", "misfits"]


@dataclass(frozen=True)
class Scoring:
    """How answers are scored where the right ones are known.

    scorer   a row of the table of scorers
    sampler  grid (every combination of the listed values), or one of Optuna's
    trials   of a sampler
    storage  URL of one of Optuna's storages; by default a journal in the run's folder
    choose   whether the best score chooses; else the criterion does, and the scores are only told
    """

    scorer: str
    sampler: str = "grid"
    trials: int = 20
    storage: str | None = None
    choose: bool = True


def misfits(
    space: Space, generation: Generation, judging: Judging, scoring: Scoring | None, drawn: Sequence[Prompt]
) -> list[PolymergeError]:
    """What of a search's parts does not fit together."""
    problems = generation.problems() + judging.problems()
    if scoring is None:
        return problems + _without_labels(space, judging)
    if scoring.sampler == "grid":
        if any(span is not None for span in space.spans):
            problems.append(RecipeError("--vary: a grid needs a step in each range, such as 0:0.6:0.1"))
    elif scoring.sampler not in SAMPLERS:
        hint = did_you_mean(scoring.sampler, ("grid", *SAMPLERS))
        problems.append(RecipeError(f"--sampler: there is no '{scoring.sampler}'.{hint}"))
    elif generation.workers > 1:
        problems.append(
            RecipeError("--workers: a sampler learns from each trial before it draws the next; several are for a grid")
        )
    if scoring.trials < 1:
        problems.append(RecipeError(f"--trials: {scoring.trials} are none"))
    if not scoring.choose:
        problems += _without_labels(space, judging)
        if scoring.sampler != "grid":
            problems.append(RecipeError("--choose-by criterion: compares neighbours, so it needs --sampler grid"))
    if drawn:
        try:
            check_labels(scoring.scorer, drawn)
        except PolymergeError as error:
            problems.append(error)
    return problems


def _without_labels(space: Space, judging: Judging) -> list[PolymergeError]:
    """What cannot be chosen by comparing neighbours."""
    problems: list[PolymergeError] = []
    if len(space.knobs) > 1:
        problems.append(RecipeError("--vary: without labels one parameter is varied; several need --scorer"))
    if any(span is not None for span in space.spans):
        problems.append(RecipeError("--values: a range needs a step, such as 0:0.6:0.1"))
    if not all(knob.numeric for knob in space.knobs):
        problems.append(RecipeError("--vary: without labels a number is varied, for its neighbours are compared"))
    least = CRITERIA[judging.criterion].least if judging.criterion in CRITERIA else 0
    if not problems and space.knobs and len(space.points()) < least:
        problems.append(
            RecipeError(
                f"--values: criterion {judging.criterion} compares neighbours and needs {least} values, got "
                f"{len(space.points())}"
            )
        )
    return problems
