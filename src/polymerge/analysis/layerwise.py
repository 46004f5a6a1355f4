"""Merge only some layers at a time, and score: which part of the tower is responsible for a merge's effect."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymerge.analysis.baseline import (
    BASELINE,
    THIRDS,
    Baseline,
    layer_words,
    layers_in,
    open_baseline,
    plan_or_refuse,
)
from polymerge.analysis.knockout_plots import draw_gains, gain_charts
from polymerge.analysis.task_scores import (
    RESAMPLES,
    Interval,
    Score,
    TaskPrompts,
    Tasks,
    ask,
    begin,
    draw_tasks,
    installed_version,
    interval,
    resampled,
)
from polymerge.charts import stacked
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.hub import one_commit
from polymerge.errors import RecipeError, collecting, did_you_mean, refuse, refuse_if_gathered
from polymerge.families.rules import text_layer
from polymerge.inference.generation import Generation
from polymerge.inference.run_folder import identity_of_inputs
from polymerge.paths import given_path
from polymerge.planning import Plan
from polymerge.planning.adapter_places import base_named
from polymerge.planning.plan import IGNORED
from polymerge.recipe.parsing import as_recipe
from polymerge.recipe.recipe import Override, Recipe, recipe_dict
from polymerge.tables import Table

if TYPE_CHECKING:
    import altair as alt

__all__ = ["FULL", "RANGES", "LayerRange", "Layerwise", "RangeScore", "in_layers", "layer_ranges", "layerwise",
           "plan_and_baseline"]  # fmt: skip

FULL = "full"
"""Everything that the recipe merges, inside and outside layers."""

RANGES = (*THIRDS, FULL)


@dataclass(frozen=True)
class RangeScore:
    """The score of a merged range on a task.

    score     in percent
    gain      over the template, in points, with an interval that holds 95 % of the resamples; None if there is none
    samples   the score of each answer, in [0, 1]; None if the score is not their mean
    """

    score: float
    gain: float
    interval: Interval | None
    samples: tuple[float, ...] | None


@dataclass(frozen=True)
class LayerRange:
    """A range of layers that were merged together.

    name    `early`, `full`, `0-3` and so on
    plan    hash of its plan
    recipe  the recipe of the same merge
    tasks   task -> score
    """

    name: str
    layers: tuple[int, ...]
    plan: str
    recipe: Mapping[str, Any]
    tasks: Mapping[str, RangeScore]


@dataclass(frozen=True, kw_only=True)
class Layerwise(Table):
    """The outcome of layer-wise merging.

    folder    of the run
    baseline  task -> score of the template
    settings  the settings that answers depend on besides prompts and layers
    """

    folder: Path
    polymerge: str = field(default_factory=installed_version)
    template: str
    scorer: str
    depth: int
    resamples: int = RESAMPLES
    seed: int
    tasks: Mapping[str, TaskPrompts]
    baseline: Mapping[str, Score]
    ranges: tuple[LayerRange, ...]
    samples: int
    sample_seed: int
    settings: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and merged range of layers."""
        return [
            {"task": task, "layers": one.name, "score": found.score, "gain": found.gain, "interval": found.interval}
            for task in self.tasks
            for one in self.ranges
            for found in (one.tasks[task],)
        ]

    def plot(self) -> alt.VConcatChart:
        """Draw the gain from merging each range of layers, with its interval, as a chart of altair's.

        raises MissingExtraError without altair or vl-convert.
        """
        return stacked(gain_charts(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """The content of ablation.json: everything but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


@one_commit()
def layerwise(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    tasks: Tasks,
    out: str | os.PathLike[str],
    *,
    scorer: str,
    ranges: Sequence[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    layers: Sequence[Sequence[int]] = (),
    seed: int = 42,
    samples: int = 100,
    sample_seed: int = 2,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Layerwise:
    """Merge only some layers of the text tower in memory, range by range, and score each range against the template.

    The layers of a range are merged as in the recipe; everything else is the template's: other layers, and tensors
    outside layers, such as embedding, final norm and head, projector and towers. Only `full` is the entire recipe.

    With a recipe of adapters only the modules in a range are adapted; the rest of the model is their unchanged base.

    recipe   a file, a mapping of the same form or a `Recipe`
    tasks    a file of prompts, each with an answer, by the name of the task; or one such file
    out      the folder of the run; an interrupted run resumes from it
    scorer   a row of the table of scorers
    ranges   out of early, middle, late (thirds) and full; all four if no layers are given otherwise
    window   merge this many layers at a time, in a window that moves by `stride`, 1 by default
    layers   further ranges
    seed     of the resamples for confidence intervals
    samples  prompts to draw for each task; 0 for all
    force    discard an earlier run in `out` that had other settings

    raises Refused with every problem, before anything is generated.
    """
    generation = generation or Generation()
    recipes: dict[str, Recipe] = {}
    plans: dict[str, Plan] = {}
    with collecting():
        recipe = replace(as_recipe(recipe), names="template")  # in memory tensors have the names of the folder loaded
        drawn = draw_tasks(tasks, scorer, samples, sample_seed, generation)
        full, baseline = plan_and_baseline(recipe)
        if full is not None and not _layers_of(full):
            refuse(RecipeError("recipe: it merges no layer of a text tower, so there is no range of them to merge"))
        chosen = layer_ranges(ranges, window, stride, layers, None if baseline is None else baseline.depth)
        if full is not None and baseline is not None:
            for name, own in chosen.items():
                made = (recipe, full) if name == FULL else _restricted(recipe, full, own, baseline.depth, name)
                if made is not None:
                    recipes[name], plans[name] = made
    refuse_if_gathered()
    assert full is not None
    assert baseline is not None

    settings = {
        "command": "ablate",
        "recipe": recipe_dict(recipe),
        "inputs": identity_of_inputs(full),
        **generation.settings,
    }
    run, asked = begin(given_path(out), "an ablation", settings, drawn, generation.batch_size, force)
    scores = ask(run, asked, {BASELINE: baseline.plan, **plans}, generation, scorer, progress)
    measured: dict[str, dict[str, RangeScore]] = {name: {} for name in chosen}
    for task, own_scores in scores.items():
        for name, score in zip(chosen, _paired(own_scores, list(chosen), task, seed), strict=True):
            measured[name][task] = score
    outcome = Layerwise(
        folder=run.folder,
        template=baseline.plan.inputs[0].source,
        scorer=scorer,
        depth=baseline.depth,
        seed=seed,
        tasks={task.name: task.prompts for task in asked},
        baseline={task: own[BASELINE] for task, own in scores.items()},
        ranges=tuple(
            LayerRange(name, own, plans[name].hash, recipe_dict(recipes[name]), measured[name])
            for name, own in chosen.items()
        ),
        samples=samples,
        sample_seed=sample_seed,
        settings=settings,
    )
    data = outcome.to_json()
    run.write_json("ablation.json", data)
    draw_gains(data, run.folder / "ablation")
    return outcome


def layer_ranges(
    ranges: Sequence[str] | None,
    window: int | None,
    stride: int | None,
    layers: Sequence[Sequence[int]],
    depth: int | None,
) -> dict[str, tuple[int, ...]]:
    """The layers of each range, by its name; refuses invalid ranges.

    ranges  out of `RANGES`; all of them if nothing else is given
    window  the number of layers in a window, which moves by `stride`
    layers  further ranges
    depth   number of layers of the text tower; None if the template could not be opened
    """
    found: dict[str, tuple[int, ...]] = {}
    if ranges is None:
        ranges = RANGES if window is None and not layers else ()
    for name in ranges:
        if name not in RANGES:
            refuse(RecipeError(f"ranges: there is no range '{name}'.{did_you_mean(name, RANGES)}"))
        elif depth:
            own = tuple(range(depth)) if name == FULL else layers_in(name, depth)
            if own:
                found[name] = own
            else:
                refuse(RecipeError(f"ranges: a tower of {depth} layers has none in the {name} third"))
    if stride is not None and window is None:
        refuse(RecipeError("stride: says how far a window slides; say `window`"))
    for word, number in (("window", window), ("stride", stride)):
        if number is not None and number < 1:
            refuse(RecipeError(f"{word}: {number} is not at least 1"))
            window = None
    runs = [tuple(run) for run in layers]
    for run in runs:
        if depth and run[-1] >= depth:
            refuse(RecipeError(f"layers: there is no layer {run[-1]}, the model has 0-{depth - 1}"))
    if window is not None and depth:
        if window > depth:
            refuse(RecipeError(f"window: {window} layers of {depth} that there are"))
        runs += [tuple(range(start, start + window)) for start in range(0, depth - window + 1, stride or 1)]
    return found | {layer_words(run): run for run in runs if not depth or run[-1] < depth}


def plan_and_baseline(recipe: Recipe) -> tuple[Plan | None, Baseline | None]:
    """The plan of a recipe, and its unchanged template, or the base of its adapters; None if refused."""
    full = plan_or_refuse(recipe)
    if full is None:
        return None, None
    if full.config is not None:
        base = recipe.base_model or base_named(full.config)
        if not base:
            refuse(RecipeError("recipe: its adapters name no base. Say base_model"))
            return full, None
        return full, open_baseline(base, "recipe: base_model")
    template = full.inputs[full.template].source
    left = [one.name for one in full.left_out if one.input == full.template and one.reason == IGNORED]
    ignore = [escape(name.removeprefix(ADAPTER)) for name in left]
    family = next((one.family for one in recipe.models if one.model == template), None)
    return full, open_baseline(template, "recipe: template", family, ignore)


def in_layers(recipe: Recipe, full: Plan, layers: Sequence[int], depth: int) -> Recipe:
    """The recipe that merges some layers like `recipe`, and leaves everything else as in the template.

    full    the plan of `recipe`
    layers  a range without gaps
    depth   of the template's text tower
    """
    outside = [(0, layers[0] - 1), (layers[-1] + 1, depth - 1)]
    copies = tuple(Override(layers=run, merge_method="copy") for run in outside if run[0] <= run[1])
    merged = [piece.canonical for _, piece, _ in full.merged_pieces()]
    apart = sorted({name for name in merged if name.startswith("text.") and text_layer(name) is None})
    return replace(
        recipe,
        parts=("text",),
        exclude=(*recipe.exclude, *(name for name in apart if name not in recipe.exclude)),
        overrides=(*copies, *recipe.overrides),
    )


def _restricted(recipe: Recipe, full: Plan, layers: Sequence[int], depth: int, name: str) -> tuple[Recipe, Plan] | None:
    """Recipe and plan that merge only some layers; None, with the error refused, if nothing in them is merged.

    With adapters the recipe is unchanged; modules of other layers, and non-LoRA weights, are dropped from the plan.
    """
    where = f"merging {name} ({layer_words(layers)}): "
    if full.of_adapters:
        modules = tuple(step for step in full.steps if step.lora and text_layer(step.canonical) in layers)
        if not modules:
            refuse(RecipeError(f"{where}no adapter has a module in these layers"))
        return recipe, replace(full, steps=modules, inputs=full.inputs[: len(full.models)], base=None)
    own = in_layers(recipe, full, layers, depth)
    plan = plan_or_refuse(own, where)
    return None if plan is None else (own, plan)


def _layers_of(plan: Plan) -> set[int]:
    """The layers of the text tower in which a plan merges something."""
    names = (
        [step.canonical for step in plan.steps if step.lora]
        if plan.of_adapters
        else [piece.canonical for _, piece, _ in plan.merged_pieces()]
    )
    return {layer for name in names if (layer := text_layer(name)) is not None}


def _paired(scores: Mapping[str, Score], names: Sequence[str], task: str, seed: int) -> list[RangeScore]:
    """Each range's score on a task, and its gain over the template, paired by prompt."""
    before, *merged = (scores[name] for name in (BASELINE, *names))
    drawn = resampled([before, *merged], task, seed)
    ends = [None if drawn is None else interval(drawn[:, place] - drawn[:, 0]) for place in range(1, len(scores))]
    return [
        RangeScore(one.score, one.score - before.score, end, one.samples) for one, end in zip(merged, ends, strict=True)
    ]
