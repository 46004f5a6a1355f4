"""Search for a merge coefficient: plan every candidate, generate its answers, compare them, record the choice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from polymerge.checkpoints.hub import one_commit
from polymerge.checkpoints.target import check_target
from polymerge.engine.merge import merge
from polymerge.errors import RecipeError, collecting, did_you_mean, refuse
from polymerge.inference.generation import Batches, Generation, generate
from polymerge.inference.prompts import Prompt, PromptSource, draw_prompts
from polymerge.inference.run_folder import Run, alone_in, identity_of_inputs, identity_of_prompts, open_run
from polymerge.inference.worker_pool import WorkerPool
from polymerge.methods.own import MethodFiles, add_methods
from polymerge.paths import given_path
from polymerge.planning import Plan
from polymerge.recipe.parsing import as_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict
from polymerge.tuning.criterion import CRITERIA, Judging, judge
from polymerge.tuning.curve_plot import draw_search
from polymerge.tuning.knobs import Knob
from polymerge.tuning.outcome import SearchResult
from polymerge.tuning.space import Point, Space, candidate_name, make_space, plan_candidates, refuse_idle
from polymerge.tuning.trials import SAMPLERS, Scoring, check_labels, run_trials, score

__all__ = ["PlannedSearch", "SearchOptions", "plan_search", "search"]

_OUTCOME = ("search.json", "search.png", "search.svg", "optuna.journal", "optuna.journal.lock")

Progress = Callable[[int, int], None]


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


@one_commit()
def search(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: PromptSource | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: SearchOptions | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Choose a merge coefficient from the merged models' answers, without writing checkpoints.

    AdaMMS (Du et al. 2025), section 3.2: the answers of neighbouring coefficients are compared, and the one where they
    change least is chosen, without labels. The paper merges to disk for each coefficient; here one loaded model
    gets the weights of each, the same bits as `merge` would write.

    recipe    a file, mapping or `Recipe`; its values of varied parameters are ignored
    prompts   a file or dataset of prompts, of which 100 are drawn, or a `PromptSource` for more control
    out       the folder of the run; an interrupted run is resumed, a finished one is judged again
    progress  called with the number of answers done, and the total

    raises Refused with every problem of recipe, prompts and values, before anything is generated;
    CheckpointError if a model does not load or values cannot be merged.
    """
    return plan_search(recipe, prompts, out, options).run(progress)


@dataclass(frozen=True)
class PlannedSearch:
    """A validated search, from `plan_search`.

    drawn   the prompts
    points  of a grid; empty if a sampler draws them
    plans   of the candidates, by name; with a sampler those of single values, as a check that they can be planned
    out     the folder of the run
    """

    recipe: Recipe
    space: Space
    source: PromptSource
    drawn: Sequence[Prompt]
    points: Sequence[Point]
    plans: Mapping[str, Plan]
    out: Path
    options: SearchOptions

    def run(self, progress: Progress | None = None) -> SearchResult:
        """Generate, judge, write the outcome, and merge with the chosen value on request."""
        options, settings, axes = self.options, self._settings(), self.space.axes
        run = open_run(self.out, settings, force=options.force, what="a search", outcome=_OUTCOME)
        with alone_in(run), options.generation.worker_pool(next(iter(self.plans.values()))) as pool:
            asked = Batches(run.keep_prompts(self.drawn), options.generation.batch_size)
            if self.points:
                answers = generate(run, self.plans, asked, pool, progress)
                outcome, chosen = self._judged(asked.prompts, answers)
            else:
                outcome, chosen = self._sampled(run, asked, pool, settings, progress)
            about = {
                "polymerge": importlib.metadata.version("polymerge"),
                "vary": [axis.name for axis in axes] if len(axes) > 1 else axes[0].name,
                **outcome,
                "prompts": len(self.drawn),
                "samples": self.source.samples,
                "seed": self.source.seed,
                "settings": settings,
            }
            run.write_json("search.json", about)
            if len(axes) == 1 and axes[0].numeric and self.points:
                draw_search(about, run.folder / "search")
        turned = self.space.turned(self.recipe, chosen)
        if options.write is not None:
            # the plan that was asked, where there is one: a branch of the hub may have moved since
            plan = self.plans.get(candidate_name(self.space, chosen), turned)
            merge(plan, options.write, force=options.force, device=options.generation.device)
        return SearchResult(about, run.folder, turned)

    def _settings(self) -> dict[str, Any]:
        """The settings that all candidates' answers depend on, other than the varied values."""
        plan = next(iter(self.plans.values()))
        unsaid = self.space.turned(self.recipe, tuple(axis.neutral for axis in self.space.axes))
        return {
            "recipe": recipe_dict(unsaid),
            "vary": [axis.name for axis in self.space.axes],
            "keep_template_weight": self.options.keep_template_weight,
            "inputs": identity_of_inputs(plan),
            **({"methods": dict(plan.methods)} if plan.methods else {}),
            "prompts": identity_of_prompts(self.drawn),
            **self.options.generation.settings,
        }

    def _judged(
        self, prompts: Sequence[Prompt], answers: Mapping[str, Mapping[int | str, str]]
    ) -> tuple[dict[str, Any], Point]:
        """Judge every point of a grid; returns the outcome, and the chosen point."""
        points, scoring, judging = self.points, self.options.scoring, self.options.judging
        given = [answers[candidate_name(self.space, point)] for point in points]
        outcome: dict[str, Any] = {"values": [_value(point) for point in points]}
        chosen: Point | None = None
        ordered = len(self.space.axes) == 1 and self.space.axes[0].numeric
        if ordered and (scoring is None or not scoring.choose or len(points) > 2):
            values = [float(point[0]) for point in points]
            choice = judge(values, given, [prompt.id for prompt in prompts], judging)
            outcome |= {**judging.settings, **choice.to_json()}
            chosen = (choice.chosen,)
        outcome["chosen_by"] = judging.criterion
        if scoring is not None:
            scores = [score(scoring.scorer, prompts, one) for one in given]
            best = points[max(range(len(points)), key=lambda place: scores[place])]
            outcome |= {"scorer": scoring.scorer, "scores": scores, "best": _value(best)}
            if scoring.choose:
                chosen, outcome["chosen_by"] = best, scoring.scorer
        assert chosen is not None
        outcome |= {"chosen": _value(chosen), "plans": [plan.hash for plan in self.plans.values()]}
        return outcome, chosen

    def _sampled(
        self,
        run: Run,
        asked: Batches,
        pool: WorkerPool,
        settings: Mapping[str, Any],
        progress: Progress | None,
    ) -> tuple[dict[str, Any], Point]:
        """Let a sampler draw points one after another; returns the outcome, and the best point."""
        scoring, size, finished = self.options.scoring, len(asked.prompts), 0
        assert scoring is not None

        def objective(point: Point) -> float:
            nonlocal finished
            before = finished * size

            def tell(done: int, _: int) -> None:
                if progress is not None:
                    progress(before + done, scoring.trials * size)

            answers = generate(run, plan_candidates(self.recipe, self.space, [point]), asked, pool, tell)
            finished += 1
            return score(scoring.scorer, asked.prompts, next(iter(answers.values())))

        # scores of another search in the same storage say nothing here
        spans, values = ([getattr(axis, name) for axis in self.space.axes] for name in ("span", "values"))
        told = [settings, scoring.scorer, scoring.sampler, self.source.seed, spans, values]
        name = f"polymerge-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
        trials = run_trials(self.space, scoring, objective, name=name, folder=run.folder, seed=self.source.seed)
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


def plan_search(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: PromptSource | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: SearchOptions | None = None,
) -> PlannedSearch:
    """Read and check all inputs of `search`, and plan the candidates; same arguments as `search`.

    raises Refused with every problem.
    """
    options = options or SearchOptions()
    add_methods(options.methods)
    source = prompts if isinstance(prompts, PromptSource) else PromptSource(prompts)
    drawn: list[Prompt] = []
    points: list[Point] = []
    plans: dict[str, Plan] = {}
    space, read = Space(), None
    with collecting(needed=True) as wrong:
        _refuse_unfit(given_path(out), options)
        with collecting():
            read = as_recipe(recipe)
            space = make_space(read, options.vary, keep_template_weight=options.keep_template_weight)
        drawn = draw_prompts(source)
        refuse(*options.generation.problems(), *options.judging.problems())
        _refuse_misfits(space, options, drawn)
        if read is not None and read.models and space.axes:
            if wrong:
                plan_candidates(read, space, [space.sweeps()[0][0]])  # what else is wrong
            else:
                refuse_idle(read, space)
                points = [] if options.sampled else space.points()
                plans = plan_candidates(read, space, points or chain.from_iterable(space.sweeps()))
    assert read is not None
    return PlannedSearch(read, space, source, drawn, points, plans, given_path(out), options)


def _refuse_unfit(out: Path, options: SearchOptions) -> None:
    """Refuse at the start what would fail at the end."""
    if options.write is None:
        return
    run, target = out.resolve(), given_path(options.write).resolve()
    if run == target or run in target.parents or target in run.parents:
        refuse(RecipeError(f"write {options.write}: the folder of the search, {out}, is or holds it, or is in it"))
        return
    with collecting():
        check_target(given_path(options.write), (), options.force)


def _refuse_misfits(space: Space, options: SearchOptions, drawn: Sequence[Prompt]) -> None:
    """Refuse parts of a search that do not fit together."""
    scoring, judging = options.scoring, options.judging
    if scoring is None or not scoring.choose:
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
    if drawn:
        with collecting():
            check_labels(scoring.scorer, drawn)


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


def _value(point: Point) -> Any:
    return point[0] if len(point) == 1 else list(point)
