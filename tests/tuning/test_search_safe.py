"""What a search must not do: give old scores to new values, mix answers, lose what is kept, go on without effect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import polymerge
from polymerge.tuning import trials
from polymerge.tuning.knobs import Knob
from polymerge.tuning.space import Space, make_space
from polymerge.tuning.trials import SAMPLERS, Scoring, run_trials
from running import cli, recipe_file
from search_made import REASON, VLM, prompts_file, recipe, words

GRID = ("--values", "0:1.5:0.5", "--samples", "6")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path / "prompts", 6)


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "search.json").read_text(encoding="utf-8"))
    return found


def done(*said: object) -> None:
    ran = cli(*said)
    assert ran.status == 0, ran.err


def refused(told: str, *said: object, status: int = 2) -> None:
    ran = cli(*said)
    assert told in ran.err, ran.err
    assert ran.status == status


# --- samplers


def test_another_scorer_or_other_values_begin_a_study_of_their_own(prompts: Path, tmp_path: Path) -> None:
    random = ("--sampler", "random", "--trials", "2")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0,1.5", *random))
    first = outcome(tmp_path / "run")
    done(*words(tmp_path, prompts, "--scorer", "letter", "--vary", "weight=0,1.5", *random))
    assert outcome(tmp_path / "run")["scorer"] == "letter"
    assert outcome(tmp_path / "run")["scores"] != first["scores"]
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0.2,0.4", *random))
    assert set(outcome(tmp_path / "run")["values"]) <= {0.2, 0.4}
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0,1.5", *random))
    assert outcome(tmp_path / "run") == first


def test_searches_that_share_a_storage_do_not_share_scores(prompts: Path, tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--sampler", "random", "--trials", "2")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0:1", *storage, run="one"))
    recipe_file(recipe("dare_linear", parameters={"density": 0.1}), tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0:1", *storage, run="two"))
    assert len(list((tmp_path / "two" / "candidates").iterdir())) == 2


@pytest.mark.parametrize("storage", ["foo", "sqlite:////nowhere/x.db"])
def test_a_storage_that_cannot_be_opened(storage: str, prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--sampler", "random", "--vary", "weight=0:1", "--storage", storage)
    refused(f"--storage {storage}", *words(tmp_path, prompts, *more))


def space_of(**spans: tuple[float, float]) -> Space:
    knobs = [Knob(name, span=span) for name, span in spans.items()]
    return make_space(polymerge.read_recipe(recipe("ties")), knobs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_as_if_it_had_not_been_stopped(sampler: str, tmp_path: Path) -> None:
    space = space_of(weight=(0, 1), density=(0.1, 1))

    def objective(point: tuple[Any, ...]) -> float:
        return -((point[0] - 0.3) ** 2) - (point[1] - 0.7) ** 2

    def stop(_: tuple[Any, ...]) -> float:
        raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    few, more, every = (Scoring("exact", sampler, count) for count in (5, 6, 14))
    expected = run_trials(space, every, objective, name="n", folder=whole)
    run_trials(space, few, objective, name="n", folder=parts)
    with pytest.raises(KeyboardInterrupt):
        run_trials(space, more, stop, name="n", folder=parts)
    assert run_trials(space, every, objective, name="n", folder=parts) == expected
    assert len(expected) == 14


def test_a_sampler_s_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "find_spec", lambda name: None if name == "cmaes" else name)
    with pytest.raises(polymerge.PolymergeError, match=r"needs cmaes: pip install 'polymerge\[optuna\]'"):
        run_trials(space_of(weight=(0, 1)), Scoring("exact", "cmaes", 1), lambda _: 0.0, name="n", folder=tmp_path)


def test_both_ends_of_a_range_are_planned_before_anything_is_drawn(prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe("ties"), tmp_path / "recipe.yaml")
    more = ("--scorer", "exact", "--sampler", "random", "--vary", "density=0.1:3")
    refused("density", *words(tmp_path, prompts, *more))
    assert not (tmp_path / "run").exists()


# --- what is varied has an effect


@pytest.mark.parametrize(
    ("changes", "vary"),
    [
        ({}, "weight@vision"),
        ({}, "weight@text.embed_tokens.weight"),
        ({"overrides": [{"match": "text.*", "parameters": {"weight": [0.5, 0.5]}}]}, "weight"),
    ],
)
def test_a_parameter_that_nothing_depends_on(changes: dict, vary: str, prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe(**changes), tmp_path / "recipe.yaml")
    refused("nothing that the recipe merges depends on it", *words(tmp_path, prompts, *GRID, "--vary", vary))


def test_the_recipe_s_own_overrides_keep_their_say(prompts: Path, tmp_path: Path) -> None:
    made = recipe("linear", overrides=[{"layers": "0-0", "merge_method": "copy"}])
    recipe_file(made, tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, *GRID, "--vary", "weight@layers:0-1", "--write", tmp_path / "merged"))
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "merged", VLM))
    same = {name for name, tensor in ours.items() if tensor.equal(theirs[name])}
    assert all(name in same for name in ours if "language_model.model.layers.0." in name)


@pytest.mark.parametrize("spelled", ["{}/", "{}/../vlm"])
def test_the_template_is_found_among_the_models_however_it_is_spelled(
    spelled: str, prompts: Path, tmp_path: Path
) -> None:
    made = {
        "merge_method": "linear",
        "template": spelled.format(VLM),
        "models": [{"model": REASON}, {"model": VLM}],
        "parts": ["text"],
    }
    file = recipe_file(made, tmp_path / "r.yaml")
    done(
        "search", file, "--prompts", prompts, "--values", "0,0.2,0.4", "-o", tmp_path / "run", "--write", tmp_path / "m"
    )
    record = json.loads((tmp_path / "m" / "polymerge.json").read_text(encoding="utf-8"))
    assert [one["parameters"]["weight"] for one in record["recipe"]["models"]] == [0.2, 0.8]


# --- answers are not mixed


def test_a_picture_that_has_changed(prompts: Path, tmp_path: Path) -> None:
    done(*words(tmp_path, prompts, *GRID))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(prompts.parent / "0.png")
    refused("prompts was", *words(tmp_path, prompts, *GRID))


def test_a_checkpoint_that_has_changed_and_one_that_was_only_touched(prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "reason"
    shutil.copytree(REASON, other)
    made = recipe()
    made["models"][1]["model"] = str(other)
    recipe_file(made, tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, *GRID))
    (other / "NOTES.txt").write_text("mine")
    (other / "model.safetensors").touch()
    done(*words(tmp_path, prompts, *GRID, "--criterion", "sum"))
    tensors = load_file(other / "model.safetensors")
    for tensor in tensors.values():
        tensor.mul_(1.5)
    stat = (other / "model.safetensors").stat()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    os.utime(other / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused("inputs[1].content was", *words(tmp_path, prompts, *GRID))


def test_labels_that_come_later_do_not_matter_to_the_answers(prompts: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    unlabelled = "".join(json.dumps({**line, "answer": None}) + "\n" for line in lines)
    bare = prompts.with_name("bare.jsonl")
    bare.write_text(unlabelled.replace(', "answer": null', ""), encoding="utf-8")
    done(*words(tmp_path, bare, *GRID))
    done(*words(tmp_path, prompts, *GRID, "--scorer", "exact"))
    assert len(outcome(tmp_path / "run")["scores"]) == 4


def test_a_start_that_failed_does_not_pin_the_folder(prompts: Path, tmp_path: Path) -> None:
    refused("cuda:7", *words(tmp_path, prompts, *GRID, "--device", "cuda:7"))
    done(*words(tmp_path, prompts, *GRID))


def test_two_processes_do_not_work_in_one_folder(prompts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from polymerge.cli import main; main()"]
    told = list(map(str, words(tmp_path, prompts, *GRID)))
    first = subprocess.Popen([*command, *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while (
            not list((tmp_path / "run").glob("candidates/*")) and first.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert first.poll() is None, "it was done too soon"
        refused("another process is at work in it", *told, status=1)
    finally:
        assert first.wait() == 0


# --- nothing is lost


def test_the_merged_model_does_not_take_the_place_of_the_run(prompts: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "run", tmp_path / "run" / "merged", tmp_path):
        refused("the folder of the search", *words(tmp_path, prompts, *GRID, "--write", target, "--force"))
    done(*words(tmp_path, prompts, *GRID))
    (tmp_path / "run" / "mine.txt").write_text("kept")
    done(*words(tmp_path, prompts, *GRID, "--max-new-tokens", "2", "--force"))
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"


def test_an_output_that_is_there_is_found_before_the_search(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    refused("exists already", *words(tmp_path, prompts, *GRID, "--write", tmp_path / "merged"), status=1)
    assert not (tmp_path / "run").exists()


def test_a_run_read_as_logs_is_merged_by_what_it_varied(prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe("ties"), tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, "--samples", "6", "--vary", "density", "--values", "0.2,0.5,0.9"))
    file = tmp_path / "recipe.yaml"
    done("search", file, "--from-logs", tmp_path / "run", "--write", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "polymerge.json").read_text(encoding="utf-8"))
    assert record["recipe"]["parameters"] == {"density": 0.5}
    more = ("--vary", "weight", "--write", tmp_path / "other")
    refused("varied density", "search", file, "--from-logs", tmp_path / "run", *more)
    refused("no such recipe", "search", tmp_path / "nosuch.yaml", "--from-logs", tmp_path / "run", *more[2:])
    refused("whose outcome stays", "search", "--from-logs", tmp_path / "run", "-o", tmp_path / "run", status=1)


def test_mme_is_perception_whether_its_name_is_said_or_found(tmp_path: Path) -> None:
    from logged import laid_out

    golden, root = laid_out("limit_mme", tmp_path)
    said, found = (cli("search", "--from-logs", root, "--json", *more) for more in (("--task", "mme"), ()))
    assert said.out == found.out
    assert json.loads(found.out)["differences"] == golden["expected"]["smooth0"]["differences"]


# --- all that is wrong, at once


def test_what_would_not_do_anything_is_refused(prompts: Path, tmp_path: Path) -> None:
    ran = cli(
        "search", "--from-logs", tmp_path, "--scorer", "exact", "--workers", "3", "--question", "x", "--values", "1"
    )
    assert ran.status == 2
    assert all(f"--{name} is for --prompts" in ran.err for name in ("scorer", "workers", "question", "values"))
    ran = cli(*words(tmp_path, prompts, "--embedding-model", "m", "--trials", "3", "--keep", "x"))
    assert ran.status == 2
    for told in ("--embedding-model is for --compare", "--trials is for a --sampler", "--keep is for --from-logs"):
        assert told in ran.err


def test_every_mistake_of_the_command_line_is_told_with_those_of_the_files(tmp_path: Path) -> None:
    ran = cli("search", tmp_path / "nosuch.yaml", "--prompts", tmp_path / "nope", "--values", "0:q:1", "--task", "mme",
              "--criterion", "foo", "--compare", "bar", "--smooth", "-1", "--dtype", "x", "--batch-size", "0",
              "-o", tmp_path / "run")  # fmt: skip
    assert ran.status == 2
    for told in ("no such recipe", "nope", "'q'", "--task", "'foo'", "'bar'", "--smooth", "'x'", "--batch-size"):
        assert told in ran.err, told


def test_a_grid_that_is_too_large(prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--vary", "weight=0:1:0.001", "--vary", "scale=0:1:0.001")
    refused("1002001 combinations", *words(tmp_path, prompts, *more))
