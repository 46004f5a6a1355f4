"""Schedules that a knockout or a layer-wise merge suggests: the shares by hand, and recipes that plan and merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import polymerge as pm
from polymerge.analysis.knockout import CellDrops, Knockout, ModelDrop
from polymerge.analysis.layerwise import LayerRange, Layerwise, RangeScore
from polymerge.analysis.suggested import refuse_unfit_for_schedules, shares_of, suggest, suggestion_text
from polymerge.analysis.task_scores import TaskPrompts
from polymerge.errors import PolymergeError, RecipeError
from running import cli, recipe_file
from search_made import BASE, REASON, VLM, prompts_file, recipe

DEPTH = 4
"""Of the demo's models."""


def ablation(gains: Mapping[str, tuple[Sequence[int], Sequence[float]]], made: Mapping[str, Any]) -> Layerwise:
    """A layer-wise merge: of each range its layers, and the gain on each task."""
    tasks = {name: TaskPrompts(3, (0, 1, 2)) for name in ("see", "reason")}
    ranges = tuple(
        LayerRange(
            name, tuple(layers), "hash", {},
            {task: RangeScore(50.0, gain, None, None) for task, gain in zip(tasks, own, strict=True)},
        )
        for name, (layers, own) in gains.items()
    )  # fmt: skip
    return Layerwise(
        folder=Path("run"), template=VLM, scorer="exact", depth=DEPTH, seed=1, tasks=tasks, baseline={}, ranges=ranges,
        samples=3, sample_seed=2, settings={"recipe": dict(made)},
    )  # fmt: skip


def knocked(drops: Mapping[str, Sequence[float]], against: Mapping[str, Sequence[float]] | None = None) -> Knockout:
    """A knockout: of each task the drop of each layer's attention; half as much of its MLP."""

    def drop(value: float) -> ModelDrop:
        return ModelDrop(value, None, 50.0, None, "hash")

    cells = tuple(
        CellDrops(task, module, (layer,), "", drop(size * own[layer]),
                  None if against is None else drop(size * against[task][layer]))
        for task, own in drops.items()
        for module, size in (("attention", 1.0), ("mlp", 0.5))
        for layer in range(len(own))
    )  # fmt: skip
    return Knockout(
        folder=Path("run"), model=VLM, against=None, replace="uniform", scorer="exact", depth=DEPTH,
        modules=("attention", "mlp"), seed=1, tasks={name: TaskPrompts(3, (0, 1, 2)) for name in drops}, baseline={},
        cells=cells, summary=(), samples=3, sample_seed=2, settings={},
    )  # fmt: skip


def linear(*weights: float) -> dict[str, Any]:
    pairs = zip((VLM, REASON), weights, strict=True)
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in pairs]
    return {"merge_method": "linear", "template": VLM, "models": models, "parts": ["text"]}


# --- shares


def test_layers_that_gain_are_merged() -> None:
    gains = {"early": ([0], (-4.0, 3.0)), "middle": ([1, 2], (-1.0, 2.0)), "full": (range(4), (-9.0, -9.0))}
    assert shares_of(ablation(gains, linear(0.9, 0.1))) == [0.0, 1.0, 1.0, 1.0]
    windows = {"0-1": ([0, 1], (2.0, 0.0)), "1-2": ([1, 2], (-3.0, -1.0)), "2-3": ([2, 3], (1.0, 1.0))}
    assert shares_of(ablation(windows, linear(0.9, 0.1))) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(RecipeError, match="says nothing of single layers"):
        shares_of(ablation({"full": (range(4), (1.0, 1.0))}, linear(0.9, 0.1)))


def test_layers_that_perception_needs_keep_the_template() -> None:
    outcome = knocked({"see": [60.0, 30.0, 10.0, 0.0], "reason": [10.0, 10.0, 20.0, 0.0]})
    p, r = [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]
    expected = [round(min(2 * b / (a + b), 1.0), 4) for a, b in zip(p, r, strict=True)]
    other = [round(min(2 * a / (a + b), 1.0), 4) for a, b in zip(p, r, strict=True)]
    assert shares_of(outcome) == [*expected, 1.0]
    assert shares_of(outcome, "reason") == [*other, 1.0]
    # drops below 0 say nothing; of the kept task it is the model before the merge that counts
    assert shares_of(knocked({"see": [-5.0, 8.0, 0.0, 0.0], "reason": [8.0, -1.0, 0.0, 0.0]})) == [1.0, 0.0, 1.0, 1.0]
    before = {"see": [0.0, 10.0, 0.0, 0.0], "reason": [9.0, 9.0, 9.0, 9.0]}
    both = knocked({"see": [10.0, 0.0, 0.0, 0.0], "reason": [5.0, 5.0, 0.0, 0.0]}, before)
    assert shares_of(both) == [1.0, round(2 * 0.5 / 1.5, 4), 1.0, 1.0]
    with pytest.raises(RecipeError, match="there is no task 'sums', there are see, reason"):
        shares_of(outcome, "sums")
    with pytest.raises(RecipeError, match="'see' is the only task"):
        shares_of(knocked({"see": [1.0, 1.0, 1.0, 1.0]}))


# --- recipes

GAINS = {"early": ([0], (-4.0, 3.0)), "rest": ([1, 2], (-1.0, 2.0)), "late": ([3], (-1.0, 0.0))}


def test_weights_become_lists_that_add_up() -> None:
    made = suggest(ablation(GAINS, linear(0.9, 0.1)))
    assert made.models[1].parameters["weight"] == [0.0, 0.1, 0.1, 0.0]
    assert made.models[0].parameters["weight"] == [1.0, 0.9, 0.9, 1.0]
    assert made.layers == DEPTH
    # on deltas the template's weight stays
    delta = suggest(ablation(GAINS, recipe()))
    assert delta.models[0].parameters["weight"] == 1.0
    assert delta.models[1].parameters["weight"] == [0.0, 0.5, 0.5, 0.0]
    soft = suggest(knocked({"see": [60.0, 30.0, 10.0, 0.0], "reason": [10.0, 10.0, 20.0, 0.0]}), linear(0.9, 0.1))
    assert soft.models[1].parameters["weight"] == pytest.approx([0.1 * 0.5882, 0.1 * 0.9091, 0.1, 0.1])
    sums = [sum(column) for column in zip(*(one.parameters["weight"] for one in soft.models), strict=True)]
    assert sums == pytest.approx([1.0] * DEPTH)


def test_a_method_without_weights_copies_the_layers() -> None:
    slerp = {"merge_method": "slerp", "template": VLM, "models": [VLM, REASON]}
    made = slerp | {"parameters": {"t": 0.3}, "parts": ["text"]}
    found = suggest(ablation(GAINS, made))
    assert [(one.layers, one.merge_method) for one in found.overrides] == [((0, 0), "copy"), ((3, 3), "copy")]
    plan = pm.plan(found)
    merged = {piece.canonical for _, piece, _ in plan.merged_pieces()}
    assert any(name.startswith("text.layers.1.") for name in merged)
    assert not any(name.startswith(("text.layers.0.", "text.layers.3.")) for name in merged)


def test_the_written_recipe_plans_and_merges(tmp_path: Path) -> None:
    outcome = ablation(GAINS, linear(0.5, 0.5))
    text = suggestion_text(suggest(outcome), outcome)
    assert text.startswith("# suggested by run: of the weights in each layer 0, 1, 1, 0\n# 1 where merging")
    (tmp_path / "out.yaml").write_text(text, encoding="utf-8")
    assert yaml.safe_load(text)["models"][1]["parameters"]["weight"] == [0.0, 0.5, 0.5, 0.0]
    merged = pm.merge(tmp_path / "out.yaml", tmp_path / "merged")
    assert merged.verification is not None
    assert merged.verification.passed
    copies = [{"layers": layer, "merge_method": "copy"} for layer in (0, 3)]
    outside = [f"text.{name}.weight" for name in ("embed_tokens", "norm", "lm_head")]
    by_hand = linear(0.5, 0.5) | {"overrides": copies, "exclude": outside}
    plan = pm.plan(by_hand)
    other = pm.merge(plan, tmp_path / "by-hand")
    assert (merged.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()


def test_what_cannot_be_scheduled_is_said_first(tmp_path: Path) -> None:
    graded = linear(0.9, 0.1)
    graded["models"][0]["parameters"]["weight"] = [0.9, 0.8]
    with pytest.raises(PolymergeError, match=r"its weight is \[0.9, 0.8\], and a schedule is of numbers"):
        refuse_unfit_for_schedules(graded)
    with pytest.raises(PolymergeError, match=r"has no polymerge\.json with the recipe"):
        refuse_unfit_for_schedules(None, BASE, ["see", "reason"])
    with pytest.raises(PolymergeError, match="'see' is the only task"):
        refuse_unfit_for_schedules(linear(0.9, 0.1), VLM, ["see"])
    refuse_unfit_for_schedules(linear(0.9, 0.1), VLM, ["see", "reason"])
    ran = cli("knockout", VLM, "--prompts", "x.jsonl", "--scorer", "exact", "-o", tmp_path / "run", "--keep", "see")
    assert "--keep is for --write-recipe" in ran.err
    assert ran.status == 2


# --- the command line


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("tasks")
    lines = prompts_file(folder, 12).read_text(encoding="utf-8").splitlines()
    for name, own in (("see", lines[:6]), ("reason", lines[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    return ["--prompts", folder / "see.jsonl", "--prompts", folder / "reason.jsonl", "--scorer", "exact",
            "--max-new-tokens", "3"]  # fmt: skip


def test_ablate_writes_what_it_suggests(tasks: list[object], tmp_path: Path) -> None:
    file = recipe_file(recipe(), tmp_path / "recipe.yaml")
    ran = cli("ablate", file, *tasks, "-o", tmp_path / "run", "--window", 1, "--write-recipe", tmp_path / "out.yaml")
    assert ran.status == 0, ran.err
    assert "the schedule that this suggests, as a recipe" in ran.err
    weights = pm.read_recipe(tmp_path / "out.yaml").models[1].parameters["weight"]
    assert len(weights) == DEPTH
    assert set(weights) <= {0.0, 0.5}
    assert cli("plan", tmp_path / "out.yaml").status == 0


def test_knockout_writes_what_it_suggests(tasks: list[object], tmp_path: Path) -> None:
    pm.merge(recipe(), tmp_path / "merged")
    line = ["knockout", tmp_path / "merged", *tasks, "-o", tmp_path / "run", "--modules", "both", "--against", VLM]
    ran = cli(*line, "--write-recipe", tmp_path / "out.yaml", "--keep", "see")
    assert ran.status == 0, ran.err
    text = (tmp_path / "out.yaml").read_text(encoding="utf-8")
    assert "p is the layer's share of what see loses" in text
    made = pm.read_recipe(tmp_path / "out.yaml")
    assert made.merge_method == "task_arithmetic"
    assert all(0 <= weight <= 0.5 for weight in made.models[1].parameters["weight"])
    own = recipe_file(linear(0.9, 0.1), tmp_path / "l.yaml")
    other = cli(*line, "--write-recipe", tmp_path / "linear.yaml", "--recipe-of", own)
    assert other.status == 0, other.err
    assert pm.read_recipe(tmp_path / "linear.yaml").merge_method == "linear"
