"""Several scored tasks: the Pareto front, the choice among it, and a search that goes on."""

from __future__ import annotations

import json
from itertools import product
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polymerge as pm
from polymerge.errors import RecipeError
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.prompts import Prompt, read_prompts
from polymerge.inference.worker_pool import WorkerPool
from polymerge.tuning.curve_plot import search_charts
from polymerge.tuning.objectives import RULES, choose_from, front_outcome, pareto_front, quick_first
from polymerge.tuning.space import make_space
from polymerge.tuning.trials import Scoring, run_trials
from running import cli, recipe_file
from search_made import done, outcome, prompts_file, recipe, refused, words

TASKS = ("see", "reason")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions of the demo in two files: digits that are read, and sums."""
    folder = tmp_path_factory.mktemp("tasks")
    file = prompts_file(folder, 24)
    lines = file.read_text(encoding="utf-8").splitlines()
    found = {}
    for name, own in zip(TASKS, (lines[:12], lines[12:]), strict=True):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(own) + "\n", encoding="utf-8")
    return found


def several(folder: Path, tasks: dict[str, Path], *more: object, run: str = "run") -> list[object]:
    """The words of a search over two tasks."""
    file = folder / "recipe.yaml"
    if not file.exists():
        recipe_file(recipe(), file)
    asked = [word for file_ in tasks.values() for word in ("--prompts", file_)]
    return ["search", file, *asked, "--scorer", "exact", "--keep-template-weight", "-o", folder / run,
            "--max-new-tokens", "3", *more]  # fmt: skip


# --- the front and the choice


def test_a_front_is_what_nothing_dominates() -> None:
    scores = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (3.0, 1.0), (0.0, 5.0), (1.0, 5.0), (3.0, 1.0)]
    assert pareto_front(scores) == [0, 1, 3, 5, 6]
    assert pareto_front([(1.0, 1.0)]) == [0]
    rng = np.random.default_rng(1)
    many = [tuple(map(float, row)) for row in rng.integers(0, 6, size=(60, 3))]
    on = set(pareto_front(many))
    for place, one in enumerate(many):
        dominated = any(
            all(b >= a for a, b in zip(one, other, strict=True)) and any(b > a for a, b in zip(one, other, strict=True))
            for other in many
        )
        assert (place in on) != dominated


def test_the_rules_of_the_choice() -> None:
    front = [(90.0, 10.0), (80.0, 14.0), (70.0, 26.0), (50.0, 30.0)]
    scaled = [((a - 50) / 40, (b - 10) / 20) for a, b in front]
    distances = [hypot(1 - a, 1 - b) for a, b in scaled]
    assert choose_from(front, "ideal") == distances.index(min(distances)) == 2
    assert choose_from(front, "worst") == [min(one) for one in scaled].index(max(min(one) for one in scaled)) == 2
    assert choose_from(front, "mean") == 0
    # whatever the units
    assert choose_from([(a / 7, 3 * b - 2) for a, b in front], "ideal") == 2
    assert choose_from([(40.0, 1.0)], "ideal") == 0
    assert choose_from([(40.0, 1.0), (40.0, 1.0)], "worst") == 0
    with pytest.raises(RecipeError, match="none of ideal, worst, mean"):
        choose_from(front, "best")


def test_a_front_of_few_prompts_is_decided_again_on_all() -> None:
    tried = {(0.1,): (50.0, 50.0), (0.2,): (60.0, 40.0), (0.3,): (40.0, 40.0), (0.4,): (70.0, 10.0)}
    whole = {(0.1,): (50.0, 50.0), (0.2,): (49.0, 49.0), (0.4,): (70.0, 10.0)}
    asked = []

    def again(points: Any) -> list[tuple[float, ...]]:
        asked.extend(points)
        return [whole[point] for point in points]

    front, chosen = front_outcome(tried, TASKS, "mean", again)
    assert asked == [(0.1,), (0.2,), (0.4,)]
    assert [one["value"] for one in front] == [(0.4,), (0.1,)]
    assert front[0]["scores"] == {"see": 70.0, "reason": 10.0}
    assert chosen == (0.1,)


def test_the_quick_prompts_are_drawn_by_the_seed() -> None:
    prompts = [Prompt(number, f"{number}", ()) for number in range(20)]
    first = quick_first(prompts, 5, 2)
    assert first[:5] == quick_first(prompts, 5, 2)[:5] != prompts[:5]
    assert sorted(prompt.id for prompt in first) == list(range(20))
    assert quick_first(prompts, None, 2) == quick_first(prompts, 99, 2) == prompts


# --- searches


def scores_of(run: Path, tasks: dict[str, Path], value: float) -> dict[str, float]:
    found = {}
    for name, file in tasks.items():
        lines = (run / "candidates" / f"weight-{value:g},{name}" / "answers.jsonl").read_text(encoding="utf-8")
        given = {one["id"]: one["answer"] for one in map(json.loads, lines.splitlines())}
        asked = [prompt for prompt in read_prompts(file) if prompt.id in given]
        right = [prompt.answer for prompt in asked]
        found[name] = float(SCORERS["exact"].score([given[prompt.id] for prompt in asked], right).score)
    return found


def test_a_grid_has_a_front(tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = done(*several(tmp_path, tasks, "--values", "0:1.5:0.5"))
    found = outcome(tmp_path / "run")
    by_value = {value: scores_of(tmp_path / "run", tasks, value) for value in found["values"]}
    assert found["values"] == [0.0, 0.5, 1.0, 1.5]
    for name in TASKS:
        assert found["tasks"][name] == {
            "scorer": "exact", "prompts": 12, "scores": [by_value[value][name] for value in found["values"]],
        }  # fmt: skip
    pairs = [tuple(by_value[value].values()) for value in found["values"]]
    assert {one["value"] for one in found["front"]} == {found["values"][place] for place in pareto_front(pairs)}
    assert all(one["scores"] == by_value[one["value"]] for one in found["front"])
    order = [one["scores"]["see"] for one in found["front"]]
    assert order == sorted(order, reverse=True)
    place = choose_from([tuple(one["scores"].values()) for one in found["front"]], "ideal")
    assert found["chosen"] == found["front"][place]["value"]
    assert found["chosen_by"] == "ideal"
    assert (tmp_path / "run" / "search.png").is_file()
    assert "the Pareto front of 4 tried values" in said
    assert RULES["ideal"] in said
    assert said.count("<- chosen") == 1

    def refuse(*_: object) -> None:
        raise AssertionError("something was generated")

    monkeypatch.setattr(WorkerPool, "submit", refuse)
    knob = pm.Knob("weight", values=(0.0, 0.5, 1.0, 1.5))
    options = pm.SearchOptions(
        vary=[knob], keep_template_weight=True, scoring=Scoring({"see": "exact", "reason": "exact"}, rule="mean"),
        generation=pm.Generation(max_new_tokens=3),
    )  # fmt: skip
    sources = {name: pm.PromptSource(file) for name, file in tasks.items()}
    again = pm.search(recipe(), sources, tmp_path / "run", options)
    assert [dict(point.scores) for point in again.front] == [one["scores"] for one in found["front"]]
    assert sum(point.chosen for point in again.front) == 1
    best = max(again.front, key=lambda point: sum(point.scores.values()))
    assert sum(next(point for point in again.front if point.chosen).scores.values()) == sum(best.scores.values())
    assert again.recipe.models[1].parameters["weight"] == again.best["weight"]
    assert again.curve[1].scores == by_value[0.5]
    assert [row["chosen"] for row in again.rows()].count(True) == 1
    assert set(again.rows()[0]) == {"weight", "see", "reason", "chosen"}


def test_nsga2_goes_on_and_asks_the_front_all_prompts(tasks: dict[str, Path], tmp_path: Path) -> None:
    more = (
        "--vary",
        "weight=0:1.5",
        "--vary",
        "scale=0.5:1.5",
        "--sampler",
        "nsga2",
        "--population",
        "3",
        "--quick",
        "4",
    )
    done(*several(tmp_path, tasks, *more, "--trials", "7", run="whole"))
    done(*several(tmp_path, tasks, *more, "--trials", "3", run="parts"))
    done(*several(tmp_path, tasks, *more, "--trials", "7", run="parts"))
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole == parts
    assert (whole["sampler"], whole["trials"], whole["population"], whole["quick"]) == ("nsga2", 7, 3, 4)
    assert whole["vary"] == ["weight", "scale"]
    assert len(whole["values"]) == len(whole["tasks"]["see"]["scores"]) == 7
    assert whole["chosen"] in [one["value"] for one in whole["front"]]
    quick = list(zip(*(whole["tasks"][name]["scores"] for name in TASKS), strict=True))
    candidates = [tuple(whole["values"][place]) for place in pareto_front(quick)]
    assert {tuple(one["value"]) for one in whole["front"]} <= set(candidates)
    counts = [
        len(file.read_text(encoding="utf-8").splitlines())
        for file in (tmp_path / "whole" / "candidates").glob("*/answers.jsonl")
    ]
    tried, on = len(set(map(tuple, whole["values"]))), len(set(candidates))
    assert sorted(counts) == [4] * 2 * (tried - on) + [12] * 2 * on
    assert on < tried


def test_the_second_generation_is_bred_from_the_first(tmp_path: Path) -> None:
    """NSGA-II's own bookkeeping survives that every trial has a sampler of its own, and that a run is stopped."""
    knobs = [pm.Knob(name, span=(0.0, 1.0)) for name in ("weight", "density")]
    space = make_space(pm.read_recipe(recipe("ties")), knobs)

    def objective(point: tuple[Any, ...]) -> tuple[float, float]:
        return -((point[0] - 0.3) ** 2) - point[1], -((point[0] - 0.5) ** 2) - point[1]

    def off(trials: Any) -> float:
        return sum(density + max(0.0, 0.3 - weight, weight - 0.5) for (weight, density), _ in trials) / len(trials)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    few, every = (Scoring("exact", "nsga2", trials, population=8) for trials in (11, 64))
    expected = run_trials(space, every, objective, name="n", folder=whole, tasks=2)
    run_trials(space, few, objective, name="n", folder=parts, tasks=2)
    assert run_trials(space, every, objective, name="n", folder=parts, tasks=2) == expected
    assert off(expected[-16:]) < 0.5 * off(expected[:16])
    assert all(scores == objective(point) for point, scores in expected)


def test_the_chosen_one_is_merged_and_shown(tasks: dict[str, Path], tmp_path: Path) -> None:
    done(*several(tmp_path, tasks, "--values", "0,1", "--choose-by", "worst", "--write", tmp_path / "merged"))
    found = outcome(tmp_path / "run")
    assert found["chosen_by"] == "worst"
    written = json.loads((tmp_path / "merged" / "polymerge.json").read_text(encoding="utf-8"))
    assert written["recipe"]["models"][1]["parameters"]["weight"] == found["chosen"]
    pm.report([tmp_path / "run"], tmp_path / "page.html")
    assert "Pareto front" in (tmp_path / "page.html").read_text(encoding="utf-8")
    (chart,) = search_charts(found)
    data = chart.to_dict()
    assert data["title"]["text"] == "reason against see"


def test_charts_of_three_tasks() -> None:
    names = ("a", "b", "c")
    values = [list(point) for point in product((0.1, 0.2), repeat=2)]
    told = {name: {"scorer": "exact", "prompts": 9, "scores": [1.0, 2.0, 3.0, 4.0]} for name in names}
    front = [{"value": [0.2, 0.2], "scores": dict.fromkeys(names, 4.0)}]
    made = {"vary": ["weight", "scale"], "values": values, "tasks": told, "front": front, "chosen": [0.2, 0.2]}
    charts = search_charts(made | {"quick": 3, "prompts": 27})
    assert len(charts) == 3
    line = next(layer for layer in charts[0].to_dict()["layer"] if layer["mark"]["type"] == "line")
    # what was tried is not joined, and does not break the line of the front
    assert [one["filter"] for one in line["transform"]] == [
        {"field": "series", "oneOf": ["front (all prompts)"]}, "isValid(datum.value)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--sampler", "cmaes", "--vary", "weight=0:1"), "sampler cmaes: seeks one highest score"),
        (("--choose-by", "criterion"), "is for one task"),
        (("--quick", "0"), "--quick: 0 is no number of prompts"),
        (("--population", "1", "--sampler", "nsga2", "--vary", "weight=0:1"), "--population: 1 is for nsga2"),
        (("--population", "5"), "--population: 5 is for nsga2"),
        (("--scorer", "see=exact"), "these are not the tasks: see for see, reason"),
        (("--scorer", "see=exact,reason=exakt"), "there is no scorer 'exakt'. Did you mean 'exact'"),
    ],
)
def test_what_does_not_fit_several_tasks(
    more: tuple[str, ...], told: str, tasks: dict[str, Path], tmp_path: Path
) -> None:
    ran = cli(*several(tmp_path, tasks, *more))
    assert told in ran.err, ran.err
    assert ran.status == 2
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_one_task(tasks: dict[str, Path], tmp_path: Path) -> None:
    one = tasks["see"]
    refused("is for several tasks", *words(tmp_path, one, "--scorer", "exact", "--choose-by", "ideal"))
    refused("quick and population are for several tasks", *words(tmp_path, one, "--scorer", "exact", "--quick", "3"))
    refused("two tasks have one name", *words(tmp_path, one, "--prompts", one, "--scorer", "exact"))
    refused("say --scorer", *words(tmp_path, one, "--prompts", tasks["reason"]))


def test_tasks_of_one_name_can_be_told_apart(tasks: dict[str, Path], tmp_path: Path) -> None:
    one = tasks["see"]
    done(
        *words(tmp_path, f"a={one}", "--prompts", f"b={one}", "--scorer", "exact", "--values", "0,1", "--samples", "3")
    )
    assert set(outcome(tmp_path / "run")["tasks"]) == {"a", "b"}


def test_one_task_by_name_is_a_search_as_ever(tasks: dict[str, Path], tmp_path: Path) -> None:
    options = pm.SearchOptions(
        vary=[pm.Knob("weight", values=(0.0, 1.0))],
        scoring=Scoring("exact"),
        generation=pm.Generation(max_new_tokens=3),
    )
    found = pm.search(recipe(), {"see": tasks["see"]}, tmp_path / "run", options)
    assert found.front == []
    assert "tasks" not in found.outcome
    assert found.outcome["scorer"] == "exact"
