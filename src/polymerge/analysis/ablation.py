"""Merge a range of layers only, and score: where in the tower a merge does what it does."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from polymerge.analysis.knockout_plots import draw_gains, where
from polymerge.analysis.knockout_summary import RESAMPLES, interval, resampled
from polymerge.analysis.layer_ranges import FULL, read_ranges
from polymerge.analysis.scoring_prompts import Marks, Task, ask, begin, read_tasks
from polymerge.analysis.unchanged import Intact, open_intact
from polymerge.checkpoints.hub import one_commit
from polymerge.checkpoints.joined import ADAPTER
from polymerge.errors import PolymergeError, RecipeError, collecting_into, refuse_if_any
from polymerge.families.rules import text_layer
from polymerge.inference.fingerprints import of_inputs
from polymerge.inference.generation import Generation
from polymerge.planning import Plan, make_plan
from polymerge.planning.adapter_places import base_named
from polymerge.planning.plan import IGNORED
from polymerge.recipe.parsing import parse_recipe
from polymerge.recipe.recipe import Override, Recipe, recipe_dict

__all__ = ["Ablated", "ablate", "in_layers"]

_NOTHING = "nothing"


@dataclass(frozen=True)
class Ablated:
    """The outcome of an ablation.

    folder   of the run
    outcome  what ablation.json holds
    recipes  the recipe of each range, by its name, to be merged
    """

    folder: Path
    outcome: Mapping[str, Any]
    recipes: Mapping[str, Recipe]


@one_commit()
def ablate(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    *,
    scorer: str,
    ranges: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    layers: str | None = None,
    seed: int = 42,
    samples: int = 100,
    sample_seed: int = 2,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Ablated:
    """Merge only some layers of the text tower in memory, range by range, and score each against the template.

    Of a range only its layers are merged, as the recipe says; other layers are the template's, and so is all that is
    in no layer: embedding, final norm and head, projector and towers. Only `full` is the recipe as it stands.

    Of a recipe of adapters only the modules in a range are adapted; the rest of the model is their base as it is.

    source   a recipe (file, mapping or `Recipe`)
    prompts  of each task FILE or NAME=FILE; each prompt has an answer
    out      the folder of the run; a run that was stopped goes on
    scorer   a row of the table of scorers
    ranges   a list out of early, middle, late (thirds) and full; all four where nothing else is said
    window   slide over the layers: so many at a time, beginning at every `stride`-th
    layers   further ranges, such as 0-3,4-7
    seed     of the resamples that intervals are made of
    samples  prompts to draw for each task; 0 for all
    force    drop an earlier run in `out` that had other settings

    raises Refused with everything that is wrong, before anything is generated.
    """
    generation = generation or Generation()
    problems: list[PolymergeError] = []
    with collecting_into(problems):
        recipe = source if isinstance(source, Recipe) else parse_recipe(source)
    drawn = read_tasks(prompts, scorer, samples, sample_seed, generation, problems)
    full, intact = _open(recipe, problems)
    if full is not None and not _layers_of(full):
        problems.append(
            RecipeError("recipe: it merges no layer of a text tower, so there is no range of them to merge")
        )
    depth = None if intact is None else intact.depth
    chosen = read_ranges(ranges, window, stride, layers, depth, problems)
    recipes: dict[str, Recipe] = {}
    plans: dict[str, Plan] = {}
    if full is not None and full.of_adapters and intact is not None:
        for name, own in chosen.items():
            recipes[name] = recipe
            plans[name] = full if name == FULL else adapters_in_layers(full, own)
            if not _layers_of(plans[name]):
                problems.append(RecipeError(f"merging {name} ({where(own)}): no adapter has a module in these layers"))
    elif full is not None and intact is not None:
        for name, own in chosen.items():
            recipes[name] = recipe if name == FULL else in_layers(recipe, full, own, intact.depth)
            try:
                plans[name] = full if name == FULL else make_plan(recipes[name])
            except PolymergeError as error:
                problems += [type(one)(f"merging {name} ({where(own)}): {one}") for one in error.problems]
    refuse_if_any(problems)
    assert full is not None
    assert intact is not None

    folder = Path(out)
    settings = _settings(recipe, full, generation)
    run, tasks = begin(folder, "an ablation", settings, drawn, generation.batch_size, force)
    marks = ask(run, tasks, {_NOTHING: intact.plan, **plans}, generation, scorer, progress)
    outcome = {
        "polymerge": importlib.metadata.version("polymerge"),
        "template": intact.plan.inputs[0].source,
        "scorer": scorer,
        "depth": intact.depth,
        "resamples": RESAMPLES,
        "seed": seed,
        **_measured(tasks, chosen, plans, recipes, marks, seed),
        "samples": samples,
        "sample_seed": sample_seed,
        "settings": settings,
    }
    run.write_json("ablation.json", outcome)
    draw_gains(outcome, folder / "ablation")
    return Ablated(folder, outcome, recipes)


def in_layers(recipe: Recipe, full: Plan, layers: Sequence[int], depth: int) -> Recipe:
    """The recipe that merges some layers as `recipe` does, and has everything else stay the template's.

    full    the plan of `recipe`
    layers  one run of them
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


def adapters_in_layers(full: Plan, layers: Sequence[int]) -> Plan:
    """The plan that merges the modules in some layers as `full` does, and leaves the others, and full weights, out."""
    own = tuple(step for step in full.steps if step.lora and text_layer(step.canonical) in layers)
    return replace(full, steps=own, inputs=full.inputs[: len(full.models)], base=None)


def _layers_of(plan: Plan) -> set[int]:
    """The layers of the text tower that a plan merges something in."""
    names = (
        [step.canonical for step in plan.steps if step.lora]
        if plan.of_adapters
        else [piece.canonical for _, piece, _ in plan.merged_pieces()]
    )
    return {layer for name in names if (layer := text_layer(name)) is not None}


def _open(recipe: Recipe, problems: list[PolymergeError]) -> tuple[Plan | None, Intact | None]:
    """The plan of the recipe, and its template, or the base of its adapters, as it is."""
    try:
        full = make_plan(recipe)
    except PolymergeError as error:
        problems += error.problems
        return None, None
    if full.config is not None:
        base = recipe.base_model or base_named(full.config)
        if not base:
            problems.append(RecipeError("recipe: its adapters name no base. Say base_model"))
            return full, None
        return full, open_intact(base, "recipe: base_model", problems)
    template = full.inputs[full.template].source
    left = [one.name for one in full.left_out if one.input == full.template and one.reason == IGNORED]
    ignore = [escape(name.removeprefix(ADAPTER)) for name in left]
    family = next((one.family for one in recipe.models if one.model == template), None)
    return full, open_intact(template, "recipe: template", problems, family, ignore)


def _settings(recipe: Recipe, full: Plan, generation: Generation) -> dict[str, Any]:
    """What the answers depend on besides the prompts and the layers."""
    return {
        "command": "ablate",
        "recipe": recipe_dict(recipe),
        "inputs": of_inputs(full),
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "device": generation.device.partition(":")[0],
        "dtype": generation.dtype,
    }


def _measured(
    tasks: Sequence[Task],
    chosen: Mapping[str, Sequence[int]],
    plans: Mapping[str, Plan],
    recipes: Mapping[str, Recipe],
    marks: Mapping[str, Mapping[str, Marks]],
    seed: int,
) -> dict[str, Any]:
    """Baseline and ranges as ablation.json has them."""
    entries: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "layers": list(layers),
            "plan": plans[name].hash,
            "recipe": recipe_dict(recipes[name]),
            "tasks": {},
        }
        for name, layers in chosen.items()
    }
    baseline = {}
    for task in tasks:
        own = marks[task.name]
        before = own[_NOTHING]
        drawn = resampled([before, *(own[name] for name in chosen)], task.name, seed)
        baseline[task.name] = {"score": before.score, "samples": before.samples and list(before.samples)}
        for place, name in enumerate(chosen, 1):
            mark = own[name]
            entries[name]["tasks"][task.name] = {
                "score": mark.score,
                "gain": mark.score - before.score,
                "interval": None if drawn is None else interval(drawn[:, place] - drawn[:, 0]),
                "samples": mark.samples and list(mark.samples),
            }
    return {
        "tasks": {
            task.name: {"prompts": len(task.asked.prompts), "ids": [one.id for one in task.asked.prompts]}
            for task in tasks
        },
        "baseline": baseline,
        "ranges": list(entries.values()),
    }
