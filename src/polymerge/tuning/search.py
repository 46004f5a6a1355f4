"""Search for a merge coefficient: plan every candidate, let each answer, judge the answers, write down the choice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polymerge.checkpoints.hub import one_commit
from polymerge.checkpoints.writer import check_target
from polymerge.engine.merge import merge
from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, refuse_if_any
from polymerge.inference.fingerprints import of_inputs, of_prompts
from polymerge.inference.generate import Asked, generate
from polymerge.inference.options import Generation, PromptSource, draw_prompts
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run, alone_in, open_run
from polymerge.inference.workers import Crew
from polymerge.planning import AdapterPlan, Plan
from polymerge.recipe.recipe import Recipe, parse_recipe, recipe_dict
from polymerge.tuning.candidates import (
    DEFAULT_VALUES,
    Point,
    Space,
    candidate_name,
    plan_candidates,
    read_space,
    without_effect,
)
from polymerge.tuning.checks import Scoring, misfits
from polymerge.tuning.curve_plot import draw_search
from polymerge.tuning.judging import Judging, judge, score
from polymerge.tuning.trials import run_trials
from polymerge.tuning.values import parse_values

__all__ = ["Searched", "search"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Searched:
    """The outcome of a search.

    folder   of the run
    outcome  what search.json holds
    recipe   the recipe with the chosen values, to be merged
    """

    folder: Path
    outcome: Mapping[str, Any]
    recipe: Recipe


@one_commit()
def search(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: PromptSource,
    out: str | os.PathLike[str],
    *,
    vary: Sequence[str] = (),
    values: str | None = None,
    keep_template_weight: bool = False,
    judging: Judging | None = None,
    scoring: Scoring | None = None,
    generation: Generation | None = None,
    write: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    problems: Sequence[PolymergeError] = (),
) -> Searched:
    """Choose a merge coefficient by what the merged models answer, without writing a checkpoint.

    AdaMMS (Du et al. 2025), section 3.2: the answers of neighbouring coefficients are compared, and the one where they
    change least is taken; no label is looked at. The paper merges to disk for each coefficient; here one loaded model
    takes the weights of each, which are the same bits as `merge` would write.

    source   a recipe (file, mapping or `Recipe`); what it says of the varied parameter does not matter
    out      the folder of the run; a run that was stopped goes on, a finished one is judged again
    vary     NAME, or NAME=VALUES any number of times with scoring; by default the second model's weight
    values   FIRST:LAST:STEP or a list, for a vary that says none
    write    a folder to merge to with the chosen value
    force    drop an earlier run in `out` that had other settings; replace what is at `write`
    problems what the caller has found wrong, to be told with the rest

    raises Refused with everything that is wrong with recipe, prompts and values, before anything is generated;
    CheckpointError where a model does not load or values cannot be merged.
    """
    judging, generation = judging or Judging(), generation or Generation()
    found = [*problems, *_unfit(Path(out), None if write is None else Path(write), force)]
    recipe, space = _understood(source, vary, values, keep_template_weight, found)
    sampled = scoring is not None and scoring.sampler != "grid"
    drawn = draw_prompts(prompts, found)
    found += misfits(space, generation, judging, scoring, drawn)
    points = [] if sampled or found else space.points()
    plans: dict[str, Plan | AdapterPlan] = {}
    if space.knobs:
        try:
            if found:
                plan_candidates(recipe, space, [space.sweeps()[0][0]])  # what else is wrong
            else:
                found += without_effect(recipe, space)
                plans = plan_candidates(recipe, space, points or [one for sweep in space.sweeps() for one in sweep])
        except PolymergeError as error:
            found += error.problems
    refuse_if_any(found)

    first = next(iter(plans.values()))
    settings = _settings(recipe, space, first, drawn, generation, keep_template_weight)
    run = open_run(Path(out), settings, force=force)
    with alone_in(run), generation.crew(first) as crew:
        asked = Asked(run.keep_prompts(drawn), generation.batch_size)
        if sampled and scoring is not None:
            outcome, chosen = _sampled(run, recipe, space, asked, crew, scoring, prompts.seed, settings, progress)
        else:
            answers = generate(run, plans, asked, crew, progress)
            outcome, chosen = _grid(space, points, plans, asked, answers, judging, scoring)
        about = {
            "polymerge": importlib.metadata.version("polymerge"),
            "vary": [knob.name for knob in space.knobs] if len(space.knobs) > 1 else space.knobs[0].name,
            **outcome,
            "prompts": len(drawn),
            "samples": prompts.samples,
            "seed": prompts.seed,
            "settings": settings,
        }
        run.write_json("search.json", about)
        if len(space.knobs) == 1 and space.knobs[0].numeric and not sampled:
            draw_search(about, run.folder / "search")
    turned = space.turned(recipe, chosen)
    if write is not None:
        # the plan that was asked, where there is one: a branch of the hub may have moved since
        merge(plans.get(candidate_name(space, chosen), turned), write, force=force, device=generation.device)
    return Searched(run.folder, about, turned)


def _understood(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    vary: Sequence[str],
    values: str | None,
    keep_template: bool,
    problems: list[PolymergeError],
) -> tuple[Recipe, Space]:
    """The recipe and what is varied in it; where there is no recipe, at least the values are looked at."""
    try:
        recipe = source if isinstance(source, Recipe) else parse_recipe(source, problems)
    except PolymergeError as error:
        problems.append(error)
        try:
            parse_values(values or DEFAULT_VALUES)
        except RecipeError as wrong:
            problems.append(wrong)
        return Recipe("copy", ()), Space((), (), ())
    return recipe, read_space(recipe, vary, values, problems, keep_template=keep_template)


def _unfit(out: Path, write: Path | None, force: bool) -> list[PolymergeError]:
    """What would go wrong at the end, said at the start."""
    problems: list[PolymergeError] = []
    if find_spec("matplotlib") is None:
        problems.append(MissingExtraError("the plot of a search needs matplotlib: pip install 'polymerge[search]'"))
    if write is not None:
        run, target = out.resolve(), write.resolve()
        if run == target or run in target.parents or target in run.parents:
            problems.append(
                RecipeError(f"--write {write}: the folder of the search, {out}, is or holds it, or is in it")
            )
        else:
            try:
                check_target(write, (), force)
            except PolymergeError as error:
                problems.append(error)
    return problems


def _grid(
    space: Space,
    points: Sequence[Point],
    plans: Mapping[str, Plan | AdapterPlan],
    asked: Asked,
    answers: Mapping[str, Mapping[int | str, str]],
    judging: Judging,
    scoring: Scoring | None,
) -> tuple[dict[str, Any], Point]:
    """Judge every point of a grid; the outcome, and the point that is chosen."""
    given = [answers[candidate_name(space, point)] for point in points]
    outcome: dict[str, Any] = {"values": [_value(point) for point in points]}
    chosen: Point | None = None
    if len(space.knobs) == 1 and space.knobs[0].numeric and (scoring is None or not scoring.choose or len(points) > 2):
        values = [float(point[0]) for point in points]
        choice = judge(values, given, [prompt.id for prompt in asked.prompts], judging)
        outcome |= {**judging.settings, **choice.to_json()}
        chosen = (choice.chosen,)
    outcome["chosen_by"] = judging.criterion
    if scoring is not None:
        scores = [score(scoring.scorer, asked.prompts, one) for one in given]
        best = points[max(range(len(points)), key=lambda place: scores[place])]
        outcome |= {"scorer": scoring.scorer, "scores": scores, "best": _value(best)}
        if scoring.choose:
            chosen, outcome["chosen_by"] = best, scoring.scorer
    assert chosen is not None
    outcome |= {"chosen": _value(chosen), "plans": [plan.hash for plan in plans.values()]}
    return outcome, chosen


def _sampled(
    run: Run,
    recipe: Recipe,
    space: Space,
    asked: Asked,
    crew: Callable[[], Crew],
    scoring: Scoring,
    seed: int,
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[dict[str, Any], Point]:
    """Let a sampler draw points one after the other; the outcome, and the best of them."""
    finished = 0

    def objective(point: Point) -> float:
        nonlocal finished
        plans = plan_candidates(recipe, space, [point])
        size, before = len(asked.prompts), finished * len(asked.prompts)

        def tell(done: int, _: int) -> None:
            if progress is not None:
                progress(before + done, scoring.trials * size)

        answers = generate(run, plans, asked, crew, tell)
        finished += 1
        return score(scoring.scorer, asked.prompts, next(iter(answers.values())))

    # scores of another search in the same storage say nothing here
    told = [settings, scoring.scorer, scoring.sampler, seed, space.spans, space.values]
    name = f"polymerge-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
    trials = run_trials(
        space, scoring.sampler, scoring.trials, objective, name=name, folder=run.folder, storage=scoring.storage,
        seed=seed,
    )  # fmt: skip
    best = max(trials, key=lambda trial: trial[1])
    return {
        "values": [_value(point) for point, _ in trials],
        "scores": [value for _, value in trials],
        "scorer": scoring.scorer,
        "sampler": scoring.sampler,
        "trials": len(trials),
        "chosen_by": scoring.scorer,
        "best": _value(best[0]),
        "chosen": _value(best[0]),
    }, best[0]


def _settings(
    recipe: Recipe,
    space: Space,
    plan: Plan | AdapterPlan,
    drawn: Sequence[Prompt],
    generation: Generation,
    keep_template_weight: bool,
) -> dict[str, Any]:
    """What the answers of any candidate depend on, besides the values of what is varied."""
    unsaid = space.turned(recipe, tuple(knob.neutral for knob in space.knobs))
    return {
        "recipe": recipe_dict(unsaid),
        "vary": [knob.name for knob in space.knobs],
        "keep_template_weight": keep_template_weight,
        "inputs": of_inputs(plan),
        "prompts": of_prompts(drawn),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "device": generation.device.partition(":")[0],
        "dtype": generation.dtype,
    }


def _value(point: Point) -> Any:
    return point[0] if len(point) == 1 else list(point)
