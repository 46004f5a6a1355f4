"""Knock out every layer of a model in turn, and score the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polymerge.analysis.baseline import BASELINE, Baseline, layer_words, open_baseline, third_of
from polymerge.analysis.drops import Drop, Thirds, drops, thirds
from polymerge.analysis.knockout_plots import draw_curves, draw_maps, drop_curves, drop_maps
from polymerge.analysis.replacements import Cell, Replacement, knocked_out, make_cells, plan_parent
from polymerge.analysis.task_scores import (
    RESAMPLES,
    Score,
    Task,
    TaskPrompts,
    Tasks,
    ask,
    begin,
    draw_tasks,
    installed_version,
)
from polymerge.charts import stacked
from polymerge.checkpoints.hub import one_commit
from polymerge.errors import RecipeError, collecting, refuse, refuse_if_gathered
from polymerge.inference.generation import Generation
from polymerge.inference.run_folder import Run, identity_of_inputs
from polymerge.paths import given_path
from polymerge.planning import Plan
from polymerge.tables import Table

if TYPE_CHECKING:
    import altair as alt

__all__ = ["CellDrops", "Knockout", "ModelDrop", "Summary", "knockout"]


@dataclass(frozen=True)
class ModelDrop(Drop):
    """The drop of one model when a cell is knocked out.

    score    the remaining score, in percent
    samples  the score of each answer, in [0, 1]; None if the score is not their mean
    plan     hash of the plan that knocks the cell out
    """

    score: float
    samples: tuple[float, ...] | None
    plan: str


@dataclass(frozen=True)
class CellDrops:
    """The cost of knocking out a cell on a task; `against` and `difference` if there is another model."""

    task: str
    module: str
    layers: tuple[int, ...]
    third: str
    model: ModelDrop
    against: ModelDrop | None = None
    difference: Drop | None = None


@dataclass(frozen=True)
class Summary:
    """The thirds of a module on a task; `against` and `difference` if there is another model."""

    task: str
    module: str
    model: Thirds
    against: Thirds | None = None
    difference: Thirds | None = None


@dataclass(frozen=True, kw_only=True)
class Knockout(Table):
    """The outcome of a knockout.

    folder    of the run
    baseline  `model` or `against` -> task -> the score of the unchanged model
    cells     by task, module and layers
    settings  the settings that answers depend on besides the prompts
    """

    folder: Path
    polymerge: str = field(default_factory=installed_version)
    model: str
    against: str | None
    replace: str
    scorer: str
    depth: int
    modules: tuple[str, ...]
    resamples: int = RESAMPLES
    seed: int
    tasks: Mapping[str, TaskPrompts]
    baseline: Mapping[str, Mapping[str, Score]]
    cells: tuple[CellDrops, ...]
    summary: tuple[Summary, ...]
    samples: int
    sample_seed: int
    settings: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and knocked-out cell."""
        return [
            {
                "task": cell.task,
                "module": cell.module,
                "layers": layer_words(cell.layers),
                "third": cell.third,
                "score": cell.model.score,
                "drop": cell.model.drop,
                "interval": cell.model.interval,
                **({} if cell.against is None else {f"drop of {self.against}": cell.against.drop}),
            }
            for cell in self.cells
        ]

    def plot(self, *, curves: bool = False) -> alt.VConcatChart:
        """Draw the drops as heat maps, or along the layers as curves with their intervals, as a chart of altair's.

        raises MissingExtraError without altair or vl-convert.
        """
        return stacked((drop_curves if curves else drop_maps)(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """The content of knockout.json: everything but the folder, and nothing about another model if there is none."""
        data = asdict(self)
        del data["folder"]
        for row in (*data["cells"], *data["summary"]) if self.against is None else ():
            del row["against"], row["difference"]
        return data


@one_commit()
def knockout(
    model: str | os.PathLike[str],
    tasks: Tasks,
    out: str | os.PathLike[str],
    *,
    scorer: str,
    against: str | os.PathLike[str] | None = None,
    replace: Replacement | None = None,
    modules: Sequence[str] | str = ("attention", "mlp"),
    layers: Sequence[int] | None = None,
    stride: int | None = None,
    group: int = 1,
    seed: int = 42,
    samples: int = 100,
    sample_seed: int = 2,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Knockout:
    """Measure what each layer contributes: replace the weights of a module in memory, score, and restore them.

    Bring Reason to Vision (Chen et al. 2025, arXiv:2505.05464), section 5, replaces by uniform weights, 1/out_features.
    Here a merged model's knockouts can be compared with those of the model before the merge.

    model    a checkpoint, or BASE+ADAPTER
    tasks    a file of prompts, each with an answer, by the name of the task; or one such file
    out      the folder of the run; an interrupted run resumes from it
    scorer   a row of the table of scorers
    against  the model before the merge, which gets the same knockouts
    replace  the replacement of weights; uniform by default
    modules  out of attention, mlp and both; or one of them
    layers   layers to knock out; all by default
    stride   distance between the starts of groups; by default the group size
    group    number of layers knocked out at a time
    seed     of the resamples for confidence intervals
    samples  prompts to draw for each task; 0 for all
    force    discard an earlier run in `out` that had other settings

    raises Refused with every problem, before anything is generated.
    """
    generation, replace = generation or Generation(), replace or Replacement()
    modules = (modules,) if isinstance(modules, str) else modules
    plans: dict[str, dict[str, Plan]] = {}
    parents: dict[str, Plan | None] = {}
    with collecting() as found:
        drawn = draw_tasks(tasks, scorer, samples, sample_seed, generation)
        replace.check()
        opened = {"model": open_baseline(os.fspath(model), "model")}
        if against is not None:
            opened["against"] = open_baseline(os.fspath(against), "against")
        models = {who: one for who, one in opened.items() if one is not None}
        depth = models["model"].depth if "model" in models else None
        cells = make_cells(modules, layers, stride, group, depth)
        if len({one.depth for one in models.values()}) > 1:
            words = " and ".join(f"'{one.label}' {one.depth}" for one in models.values())
            refuse(RecipeError(f"against: the two have unequally many layers: {words}"))
        if replace.kind == "from" and replace.source:
            parents = {who: plan_parent(one, replace.source) for who, one in models.items()}
        if not found:
            for who, one in models.items():
                plans[who] = {BASELINE: one.plan} | knocked_out(one, cells, replace, parents.get(who))
    refuse_if_gathered()

    settings = _settings(models, replace, [plan for plan in parents.values() if plan is not None], generation)
    run, asked = begin(given_path(out), "a knockout", settings, drawn, generation.batch_size, force)
    scores = _ask_all(run, asked, plans, generation, scorer, progress)
    depth = models["model"].depth
    measured = [
        _measured(task, module, [cell for cell in cells if cell.module == module], plans, scores, depth, seed)
        for task in asked
        for module in dict.fromkeys(modules)
    ]
    outcome = Knockout(
        folder=run.folder,
        model=os.fspath(model),
        against=None if against is None else os.fspath(against),
        replace=str(replace),
        scorer=scorer,
        depth=depth,
        modules=tuple(dict.fromkeys(modules)),
        seed=seed,
        tasks={task.name: task.prompts for task in asked},
        baseline={who: {task.name: own[task.name][BASELINE] for task in asked} for who, own in scores.items()},
        cells=tuple(cell for own, _ in measured for cell in own),
        summary=tuple(summary for _, summary in measured),
        samples=samples,
        sample_seed=sample_seed,
        settings=settings,
    )
    data = outcome.to_json()
    run.write_json("knockout.json", data)
    draw_maps(data, run.folder / "knockout-map")
    draw_curves(data, run.folder / "knockout-curves")
    return outcome


def _settings(
    models: Mapping[str, Baseline], replace: Replacement, parents: Sequence[Plan], generation: Generation
) -> dict[str, Any]:
    inputs = {"inputs": [identity_of_inputs(parent)[-1] for parent in parents]} if parents else {}
    return {
        "command": "knockout",
        **{who: identity_of_inputs(one.plan) for who, one in models.items()},
        "replace": {**replace.settings, **inputs},
        **generation.settings,
    }


def _ask_all(
    run: Run,
    tasks: Sequence[Task],
    plans: Mapping[str, Mapping[str, Plan]],
    generation: Generation,
    scorer: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, dict[str, Score]]]:
    """The scores by model, task and cell; one model is loaded at a time."""
    scores = {}
    for number, (who, own) in enumerate(plans.items()):

        def tell(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(plans) * total)

        scores[who] = ask(run, tasks, own, generation, scorer, tell, f"{who}-")
    return scores


def _measured(
    task: Task,
    module: str,
    cells: Sequence[Cell],
    plans: Mapping[str, Mapping[str, Plan]],
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    depth: int,
    seed: int,
) -> tuple[list[CellDrops], Summary]:
    """The drops of a module on a task: of each cell, and by thirds."""
    own = {who: scored[task.name] for who, scored in scores.items()}
    found = {
        who: drops(scored[BASELINE], [scored[cell.name] for cell in cells], task.name, seed)
        for who, scored in own.items()
    }
    if len(found) > 1:
        found["difference"] = found["model"] - found["against"]
    told = []
    for place, cell in enumerate(cells):
        of_models: dict[str, Drop] = {}
        for who, dropped in found.items():
            drop, ends = dropped.cell(place)
            score = own[who][cell.name] if who in own else None
            of_models[who] = (
                Drop(drop, ends)
                if score is None
                else ModelDrop(drop, ends, score.score, score.samples, plans[who][cell.name].hash)
            )
        told.append(CellDrops(task.name, module, cell.layers, third_of(cell.layers, depth), **cast(Any, of_models)))
    return told, Summary(task.name, module, **{who: thirds(one, cells, depth) for who, one in found.items()})
