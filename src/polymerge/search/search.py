"""Search for a merge coefficient: plan every candidate, let each answer, judge the answers, write down the choice."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, Refused, refuse_if_any
from polymerge.generation.prompts import Prompt
from polymerge.planning import AdapterPlan, Input, Plan
from polymerge.recipe import Recipe, parse_recipe, recipe_dict
from polymerge.search.candidates import Point, Space, candidate_name, plan_candidates, read_space
from polymerge.search.generate import Asked, generate
from polymerge.search.judging import Judging, judge, score
from polymerge.search.options import Generation, PromptSource, Scoring, draw_prompts, misfits
from polymerge.search.plot import draw_search
from polymerge.search.runs import Run, digest_of, open_run
from polymerge.search.trials import run_trials
from polymerge.search.workers import Crew, Job, hire

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
    force: bool = False,
    progress: Progress | None = None,
) -> Searched:
    """Choose a merge coefficient by what the merged models answer, without writing a checkpoint.

    AdaMMS (Du et al. 2025), section 3.2: the answers of neighbouring coefficients are compared, and the one where they
    change least is taken; no label is looked at. The paper merges to disk for each coefficient; here one loaded model
    takes the weights of each, which are the same bits as `merge` would write.

    source   a recipe (file, mapping or `Recipe`); what it says of the varied parameter does not matter
    out      the folder of the run; a run that was stopped goes on, a finished one is judged again
    vary     NAME, or NAME=VALUES any number of times with scoring; by default the second model's weight
    values   FIRST:LAST:STEP or a list, for a vary that says none
    force    drop an earlier run in `out` that had other settings

    raises Refused with everything that is wrong with recipe, prompts and values, before anything is generated;
    CheckpointError where a model does not load or values cannot be merged.
    """
    judging, generation = judging or Judging(), generation or Generation()
    problems: list[PolymergeError] = []
    recipe = source if isinstance(source, Recipe) else parse_recipe(source, problems)
    space = read_space(recipe, vary, values, problems, keep_template=keep_template_weight)
    sampled = scoring is not None and scoring.sampler != "grid"
    drawn = draw_prompts(prompts, problems)
    problems += misfits(space, generation, judging, scoring, drawn)
    points = [tuple(knob.neutral for knob in space.knobs)] if sampled else space.points()
    plans: dict[str, Plan | AdapterPlan] = {}
    if space.knobs:
        try:
            plans = plan_candidates(recipe, space, points)
        except Refused as refused:
            problems += refused.problems
    refuse_if_any(problems)

    folder = Path(out)
    first = next(iter(plans.values()))
    settings = _settings(recipe, space, first, drawn, generation)
    run = open_run(folder, settings, force=force)
    asked = Asked(run.keep_prompts(drawn), generation.batch_size)
    with ExitStack() as stack:
        hired: list[Crew] = []

        def crew() -> Crew:
            if not hired:
                hired.append(stack.enter_context(hire(_job(first, generation), generation.workers, generation.ray)))
            return hired[0]

        if sampled and scoring is not None:
            outcome, chosen = _sampled(run, recipe, space, asked, crew, scoring, prompts.seed, progress)
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
        draw_search(about, folder / "search")
    return Searched(folder, about, space.turned(recipe, chosen))


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

    trials = run_trials(
        space, scoring.sampler, scoring.trials, objective, folder=run.folder, storage=scoring.storage, seed=seed
    )
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


def _job(plan: Plan | AdapterPlan, generation: Generation) -> Job:
    threads = generation.torch_threads
    if threads is None and (generation.workers > 1 or generation.ray is not None):
        threads = max(1, (os.cpu_count() or 1) // generation.workers)
    return Job(
        plan, generation.device, generation.dtype, generation.max_new_tokens, threads, threads,
        generation.trust_remote_code,
    )  # fmt: skip


def _settings(
    recipe: Recipe, space: Space, plan: Plan | AdapterPlan, drawn: Sequence[Prompt], generation: Generation
) -> dict[str, Any]:
    """What the answers of any candidate depend on, besides the values of what is varied."""
    unsaid = space.turned(recipe, tuple(knob.neutral for knob in space.knobs))
    return {
        "recipe": recipe_dict(unsaid),
        "vary": [knob.name for knob in space.knobs],
        "inputs": [{"path": entry.path, "headers": entry.headers, "written": _written(entry)} for entry in plan.inputs],
        "prompts": digest_of(drawn),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "device": generation.device.partition(":")[0],
        "dtype": generation.dtype,
    }


def _written(entry: Input) -> int:
    """When the last of an input's files was written, in nanoseconds: weights change without a change of headers."""
    folders = [Path(place) for place in (entry.path, entry.adapter) if place]
    files = [file for place in folders for file in ([place] if place.is_file() else place.iterdir())]
    # of a model on the hub, which its commit tells apart, what has not been fetched is not there
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def _value(point: Point) -> Any:
    return point[0] if len(point) == 1 else list(point)
