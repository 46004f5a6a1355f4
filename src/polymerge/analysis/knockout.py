"""Knock out every layer of a model in turn, and score what is left of it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.analysis.cells import Cell, make_cells, parse_modules, third_of
from polymerge.analysis.knockout_plots import draw_curves, draw_maps
from polymerge.analysis.knockout_summary import RESAMPLES, Drops, drops, interval, thirds
from polymerge.analysis.replacements import knocked_out, parse_replacement, plan_parent
from polymerge.analysis.scoring_prompts import Marks, Task, ask, begin, read_tasks
from polymerge.analysis.unchanged import Intact, open_intact
from polymerge.checkpoints.hub import one_commit
from polymerge.errors import PolymergeError, RecipeError, refuse_if_any
from polymerge.inference.fingerprints import of_inputs
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run
from polymerge.planning import Plan

__all__ = ["INTACT", "KnockedOut", "knockout"]

INTACT = "intact"
"""The name under which the answers of the model as it is are kept."""


@dataclass(frozen=True)
class KnockedOut:
    """The outcome of a knockout.

    folder   of the run
    outcome  what knockout.json holds
    """

    folder: Path
    outcome: Mapping[str, Any]


@one_commit()
def knockout(
    model: str | os.PathLike[str],
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    *,
    scorer: str,
    against: str | os.PathLike[str] | None = None,
    replace: str = "uniform",
    noise_size: float | None = None,
    seed: int = 42,
    modules: str = "attention,mlp",
    layers: str | None = None,
    stride: int | None = None,
    group: int = 1,
    samples: int = 100,
    sample_seed: int = 2,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> KnockedOut:
    """Measure what each layer contributes: replace the weights of a module in memory, score, and put them back.

    Bring Reason to Vision (Chen et al. 2025, arXiv:2505.05464), section 5, replaces by uniform weights, 1/out_features.
    Here a merged model is knocked out after it was merged; its scores are held against those of the model before.

    model        a checkpoint, or BASE+ADAPTER
    prompts      of each task FILE or NAME=FILE; each prompt has an answer
    out          the folder of the run; a run that was stopped goes on
    scorer       a row of the table of scorers
    against      the model before it was merged: the same is done to it
    replace      uniform, zero, noise or from:CHECKPOINT
    noise_size   standard deviation of noise, as a multiple of the tensor's own; 1 unless said
    seed         of noise, and of the resamples that intervals are made of
    modules      a list out of attention, mlp and both
    layers       such as 0-31; all unless said
    group        how many layers are knocked out at a time; `stride` says how far apart groups begin
    samples      prompts to draw for each task; 0 for all
    force        drop an earlier run in `out` that had other settings

    raises Refused with everything that is wrong, before anything is generated.
    """
    generation = generation or Generation()
    problems: list[PolymergeError] = []
    drawn = read_tasks(prompts, scorer, samples, sample_seed, generation, problems)
    replacement = parse_replacement(replace, noise_size, seed, problems)
    opened = {
        who: open_intact(os.fspath(source), what, problems)
        for who, what, source in (("model", "MODEL", model), ("against", "--against", against))
        if source is not None
    }
    models = {who: one for who, one in opened.items() if one is not None}
    asked_for = parse_modules(modules, problems)
    wrong: list[PolymergeError] = []
    depth = models["model"].depth if "model" in models else None
    cells = make_cells(asked_for, layers, stride, group, depth, wrong)
    if len({one.depth for one in models.values()}) > 1:
        words = " and ".join(f"'{one.label}' {one.depth}" for one in models.values())
        wrong.append(RecipeError(f"--against: the two have unequally many layers: {words}"))
    problems += wrong
    parents = {
        who: plan_parent(one, replacement.source, problems)
        for who, one in models.items()
        if replacement.kind == "from" and replacement.source
    }
    plans: dict[str, dict[str, Plan]] = {}
    if not problems:
        for who, one in models.items():
            plans[who] = {INTACT: one.plan} | knocked_out(one, cells, replacement, parents.get(who), problems)
    refuse_if_any(problems)

    folder, replaced = Path(out), replacement.settings
    if parents:
        replaced["inputs"] = [of_inputs(parent)[-1] for parent in parents.values() if parent is not None]
    settings = _settings(models, replaced, generation)
    run, tasks = begin(folder, "a knockout", settings, drawn, generation.batch_size, force)
    marks = _ask_all(run, tasks, plans, generation, scorer, progress)
    assert depth is not None
    outcome: dict[str, Any] = {
        "polymerge": importlib.metadata.version("polymerge"),
        "model": os.fspath(model),
        "against": None if against is None else os.fspath(against),
        "replace": replacement.words,
        "scorer": scorer,
        "depth": depth,
        "modules": list(asked_for),
        "resamples": RESAMPLES,
        "seed": seed,
        **_measured(tasks, cells, plans, marks, depth, seed),
        "samples": samples,
        "sample_seed": sample_seed,
        "settings": settings,
    }
    run.write_json("knockout.json", outcome)
    draw_maps(outcome, folder / "knockout-map")
    draw_curves(outcome, folder / "knockout-curves")
    return KnockedOut(folder, outcome)


def _settings(models: Mapping[str, Intact], replaced: Mapping[str, Any], generation: Generation) -> dict[str, Any]:
    """What the answers depend on besides the prompts."""
    return {
        "command": "knockout",
        **{who: of_inputs(one.plan) for who, one in models.items()},
        "replace": replaced,
        "max_new_tokens": generation.max_new_tokens,
        "batch_size": generation.batch_size,
        "device": generation.device.partition(":")[0],
        "dtype": generation.dtype,
    }


def _ask_all(
    run: Run,
    tasks: Sequence[Task],
    plans: Mapping[str, Mapping[str, Plan]],
    generation: Generation,
    scorer: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, dict[str, Marks]]]:
    """The marks of every model, task and cell; one model is loaded at a time."""
    marks = {}
    for number, (who, own) in enumerate(plans.items()):

        def tell(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(plans) * total)

        marks[who] = ask(run, tasks, own, generation, scorer, tell, f"{who}-")
    return marks


def _measured(
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    plans: Mapping[str, Mapping[str, Plan]],
    marks: Mapping[str, Mapping[str, Mapping[str, Marks]]],
    depth: int,
    seed: int,
) -> dict[str, Any]:
    """Baseline, cells and summary as knockout.json has them."""
    told: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    for task in tasks:
        own = {who: found[task.name] for who, found in marks.items()}
        for module in dict.fromkeys(cell.module for cell in cells):
            some = [cell for cell in cells if cell.module == module]
            found = {
                who: drops(one[INTACT], [one[cell.name] for cell in some], task.name, seed) for who, one in own.items()
            }
            if len(found) > 1:
                found["difference"] = _difference(found["model"], found["against"])
            for place, cell in enumerate(some):
                entry: dict[str, Any] = {
                    "task": task.name,
                    "module": module,
                    "layers": list(cell.layers),
                    "third": third_of(cell.layers, depth),
                }
                for who, dropped in found.items():
                    again = None if dropped.resampled is None else dropped.resampled[:, place]
                    entry[who] = {"drop": float(dropped.values[place]), "interval": interval(again)}
                    if who in own:
                        mark = own[who][cell.name]
                        entry[who] |= {
                            "score": mark.score,
                            "samples": _listed(mark),
                            "plan": plans[who][cell.name].hash,
                        }
                told.append(entry)
            line = {"task": task.name, "module": module}
            summary.append(line | {who: thirds(dropped, some, depth) for who, dropped in found.items()})
    return {
        "tasks": {task.name: {"prompts": len(task.asked.prompts), "ids": _ids(task.asked.prompts)} for task in tasks},
        "baseline": {
            who: {
                task.name: {"score": found[task.name][INTACT].score, "samples": _listed(found[task.name][INTACT])}
                for task in tasks
            }
            for who, found in marks.items()
        },
        "cells": told,
        "summary": summary,
    }


def _difference(one: Drops, other: Drops) -> Drops:
    if one.resampled is None or other.resampled is None:
        return Drops(one.values - other.values, None)
    return Drops(one.values - other.values, one.resampled - other.resampled)


def _ids(prompts: Sequence[Prompt]) -> list[int | str]:
    return [prompt.id for prompt in prompts]


def _listed(marks: Marks) -> list[float] | None:
    return None if marks.samples is None else list(marks.samples)
