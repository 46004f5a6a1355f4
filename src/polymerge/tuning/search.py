"""Search for a merge coefficient: plan every candidate, generate its answers, compare them, record the choice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from polymerge.checkpoints.hub import one_commit
from polymerge.durable import make_folder, write_file
from polymerge.engine.merge import merge
from polymerge.errors import collecting, refuse
from polymerge.inference.generation import Batches, generate
from polymerge.inference.prompts import Prompt, PromptSource, draw_prompts
from polymerge.inference.run_folder import Run, alone_in, identity_of_inputs, identity_of_prompts, open_run
from polymerge.methods.own import add_methods
from polymerge.paths import given_path
from polymerge.planning import Plan
from polymerge.recipe.parsing import as_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict, recipe_text
from polymerge.tuning.criterion import judge
from polymerge.tuning.curve_plot import draw_search
from polymerge.tuning.objectives import Objective, Scorekeeper, front_outcome, quick_first
from polymerge.tuning.outcome import SearchResult
from polymerge.tuning.search_options import SearchOptions, refuse_misfits, refuse_unfit
from polymerge.tuning.space import Point, Space, candidate_name, make_space, plan_candidates, refuse_idle
from polymerge.tuning.trials import POPULATION, Trial, run_trials, score

__all__ = ["PlannedSearch", "SearchOptions", "plan_search", "search"]

_OUTCOME = ("search.json", "recipe.yaml", "search.png", "search.svg", "optuna.journal", "optuna.journal.lock")

Progress = Callable[[int, int], None]
Prompts = PromptSource | str | os.PathLike[str]


@one_commit()
def search(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: Prompts | Mapping[str, Prompts],
    out: str | os.PathLike[str],
    options: SearchOptions | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Choose a merge coefficient from the merged models' answers, without writing checkpoints.

    AdaMMS (Du et al. 2025), section 3.2: the answers of neighbouring coefficients are compared, and the one where they
    change least is chosen, without labels. The paper merges to disk for each coefficient; here one loaded model
    gets the weights of each, the same bits as `merge` would write.

    recipe    a file, mapping or `Recipe`; its values of varied parameters are ignored
    prompts   a file or dataset of prompts, of which 100 are drawn, or a `PromptSource` for more control; or several, by
              the name of their task: then `scoring` gives each candidate a score on each, and the outcome is their
              Pareto front
    out       the folder of the run; an interrupted run is resumed, a finished one is judged again
    progress  called with the number of answers done, and the total

    raises Refused with every problem of recipe, prompts and values, before anything is generated;
    CheckpointError if a model does not load or values cannot be merged.
    """
    return plan_search(recipe, prompts, out, options).run(progress)


@dataclass(frozen=True)
class PlannedSearch:
    """A validated search, from `plan_search`.

    sources, drawn  the prompts of each task, whose name is empty if there is only one
    points  of a grid; empty if a sampler draws them
    plans   of the candidates, by name; with a sampler those of single values, as a check that they can be planned
    out     the folder of the run
    """

    recipe: Recipe
    space: Space
    sources: Mapping[str, PromptSource]
    drawn: Mapping[str, Sequence[Prompt]]
    points: Sequence[Point]
    plans: Mapping[str, Plan]
    out: Path
    options: SearchOptions

    def run(self, progress: Progress | None = None) -> SearchResult:
        """Generate, judge, write the outcome, and merge with the chosen value on request."""
        options, settings, axes = self.options, self._settings(), self.space.axes
        source = next(iter(self.sources.values()))
        run = open_run(self.out, settings, force=options.force, what="a search", outcome=_OUTCOME)
        with alone_in(run), options.generation.worker_pool(next(iter(self.plans.values()))) as pool:
            objectives = self._objectives(run)
            budget = len(self.points) or (options.scoring.trials if options.scoring else 0)
            keeper = Scorekeeper(run, pool, objectives, budget, progress)
            if self.several:
                outcome, chosen = self._fronted(keeper, settings, run.folder)
            elif self.points:
                answers = generate(run, self.plans, objectives[0].whole, pool, progress)
                outcome, chosen = self._judged(objectives[0].whole.prompts, answers)
            else:
                outcome, chosen = self._sampled(keeper, settings, run.folder)
            about = {
                "polymerge": importlib.metadata.version("polymerge"),
                "vary": [axis.name for axis in axes] if len(axes) > 1 else axes[0].name,
                **outcome,
                "prompts": sum(map(len, self.drawn.values())),
                "samples": source.samples,
                "seed": source.seed,
                "settings": settings,
            }
            run.write_json("search.json", about)
            turned = self.space.turned(self.recipe, chosen)
            write_file(run.folder / "recipe.yaml", recipe_text(turned))
            if self.several or (len(axes) == 1 and axes[0].numeric and self.points):
                draw_search(about, run.folder / "search")
        if options.write is not None:
            # the plan that was asked, where there is one: a branch of the hub may have moved since
            plan = self.plans.get(candidate_name(self.space, chosen), turned)
            merge(plan, options.write, force=options.force, device=options.generation.device)
        return SearchResult(about, run.folder, turned)

    @property
    def several(self) -> bool:
        """Whether candidates are scored on several tasks."""
        return len(self.drawn) > 1

    def _objectives(self, run: Run) -> list[Objective]:
        """The tasks, whose prompts are stored in the run."""
        size, found = self.options.generation.batch_size, []
        for name, prompts in self.drawn.items():
            place = Run(make_folder(run.folder / "tasks" / name)) if name else run
            quick = self._quick if name else None
            kept = place.keep_prompts(quick_first(prompts, quick, self.sources[name].seed))
            first = min(quick or len(kept), len(kept))
            scorer = self.options.scoring.of(name) if self.options.scoring else ""
            found.append(Objective(name, scorer, Batches(kept, size, first=first), Batches(kept[:first], size)))
        return found

    @property
    def _quick(self) -> int | None:
        """Number of prompts of each task that all candidates are asked, None for all of them."""
        quick = self.options.scoring.quick if self.options.scoring else None
        return quick if quick is not None and any(quick < len(one) for one in self.drawn.values()) else None

    def _settings(self) -> dict[str, Any]:
        """The settings that all candidates' answers depend on, other than the varied values."""
        plan = next(iter(self.plans.values()))
        prompts = {name: identity_of_prompts(drawn) for name, drawn in self.drawn.items()}
        unsaid = self.space.turned(self.recipe, tuple(axis.neutral for axis in self.space.axes))
        return {
            "recipe": recipe_dict(unsaid),
            "vary": [axis.name for axis in self.space.axes],
            "keep_template_weight": self.options.keep_template_weight,
            "inputs": identity_of_inputs(plan),
            **({"methods": dict(plan.methods)} if plan.methods else {}),
            "prompts": prompts if self.several else prompts[""],
            **({"quick": self._quick} if self._quick is not None else {}),
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
            scores = [score(scoring.of(""), prompts, one) for one in given]
            best = points[max(range(len(points)), key=lambda place: scores[place])]
            outcome |= {"scorer": scoring.of(""), "scores": scores, "best": _value(best)}
            if scoring.choose:
                chosen, outcome["chosen_by"] = best, scoring.of("")
        assert chosen is not None
        outcome |= {"chosen": _value(chosen), "plans": [plan.hash for plan in self.plans.values()]}
        return outcome, chosen

    def _plans_of(self, points: Iterable[Point]) -> dict[str, Plan]:
        """The plans of some candidates by name, those of a grid as they were planned."""
        named = {candidate_name(self.space, point): point for point in points}
        new = [named[name] for name in named if name not in self.plans]
        like = self.points[0] if self.points else self.space.sweeps()[0][0]
        first = self.plans[candidate_name(self.space, like)], self.space.turned(self.recipe, like)
        made = plan_candidates(self.recipe, self.space, new, first)
        return {name: self.plans.get(name) or made[name] for name in named}

    def _sampled(self, keeper: Scorekeeper, settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Point]:
        """Let a sampler draw points one after another; returns the outcome, and the best point."""
        trials, scorer = self._tried(keeper, settings, folder), keeper.objectives[0].scorer
        best, _ = max(trials, key=lambda trial: trial[1])
        assert self.options.scoring is not None
        return {
            "values": [_value(point) for point, _ in trials],
            "scores": [value for _, (value,) in trials],
            "scorer": scorer,
            "sampler": self.options.scoring.sampler,
            "trials": len(trials),
            "chosen_by": scorer,
            "best": _value(best),
            "chosen": _value(best),
        }, best

    def _fronted(self, keeper: Scorekeeper, settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Point]:
        """Score candidates on every task; returns the outcome with their Pareto front, and the point chosen from it."""
        scoring, names = self.options.scoring, [one.name for one in keeper.objectives]
        assert scoring is not None
        if self.points:
            tried = [*zip(self.points, keeper.scores(self._plans_of(self.points)), strict=True)]
        else:
            tried = self._tried(keeper, settings, folder)

        def again(points: Sequence[Point]) -> list[tuple[float, ...]]:
            return keeper.scores(self._plans_of(points), whole=True)

        front, chosen = front_outcome(dict(tried), names, scoring.rule, None if self._quick is None else again)
        columns = zip(*(scores for _, scores in tried), strict=True)
        return {
            "values": [_value(point) for point, _ in tried],
            "tasks": {
                one.name: {"scorer": one.scorer, "prompts": len(one.whole.prompts), "scores": list(column)}
                for one, column in zip(keeper.objectives, columns, strict=True)
            },
            **({} if self._quick is None else {"quick": self._quick}),
            "front": [{**one, "value": _value(one["value"])} for one in front],
            "sampler": scoring.sampler,
            "trials": len(tried),
            **({"population": self._population} if self._population else {}),
            "chosen_by": scoring.rule,
            "chosen": _value(chosen),
        }, chosen

    @property
    def _population(self) -> int | None:
        """Trials of a generation of NSGA-II; None for Optuna's default, and for other samplers."""
        scoring = self.options.scoring
        if scoring is None or not scoring.sampler.startswith("nsga"):
            return None
        return scoring.population or (POPULATION if self.several else None)

    def _tried(self, keeper: Scorekeeper, settings: Mapping[str, Any], folder: Path) -> list[Trial]:
        """The trials of a sampler, each point with its scores."""
        scoring, seed = self.options.scoring, next(iter(self.sources.values())).seed
        assert scoring is not None
        # scores of another search in the same storage say nothing here
        spans, values = ([getattr(axis, name) for axis in self.space.axes] for name in ("span", "values"))
        scorers = {one.name: one.scorer for one in keeper.objectives}
        told = [settings, scorers if self.several else scorers[""], scoring.sampler, seed, spans, values]
        told += [self._population] if self._population else []
        name = f"polymerge-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
        return run_trials(
            self.space,
            replace(scoring, population=self._population),
            lambda point: keeper.scores(self._plans_of([point]))[0],
            name=name,
            folder=folder,
            seed=seed,
            tasks=len(keeper.objectives),
        )


def plan_search(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: Prompts | Mapping[str, Prompts],
    out: str | os.PathLike[str],
    options: SearchOptions | None = None,
) -> PlannedSearch:
    """Read and check all inputs of `search`, and plan the candidates; same arguments as `search`.

    raises Refused with every problem.
    """
    options = options or SearchOptions()
    add_methods(options.methods)
    said = prompts if isinstance(prompts, Mapping) else {"": prompts}
    said = dict(said) if len(said) != 1 else {"": next(iter(said.values()))}
    sources = {name: one if isinstance(one, PromptSource) else PromptSource(one) for name, one in said.items()}
    drawn: dict[str, list[Prompt]] = {}
    points: list[Point] = []
    plans: dict[str, Plan] = {}
    space, read = Space(), None
    with collecting(needed=True) as wrong:
        refuse_unfit(given_path(out), options)
        with collecting():
            read = as_recipe(recipe)
            space = make_space(read, options.vary, keep_template_weight=options.keep_template_weight)
        for name, source in sources.items():
            drawn[name] = draw_prompts(source)
        refuse(*options.generation.problems(), *options.judging.problems())
        refuse_misfits(space, options, drawn)
        if read is not None and read.models and space.axes:
            if wrong:
                plan_candidates(read, space, [space.sweeps()[0][0]])  # what else is wrong
            else:
                refuse_idle(read, space)
                points = [] if options.sampled else space.points()
                plans = plan_candidates(read, space, points or chain.from_iterable(space.sweeps()))
    assert read is not None
    return PlannedSearch(read, space, sources, drawn, points, plans, given_path(out), options)


def _value(point: Point) -> Any:
    return point[0] if len(point) == 1 else list(point)
