"""An engine in a process of its own: the same answers as by transformers, of weights that are proved to be there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import vllm_standin
from polymerge.evaluation.evaluating import evaluate
from polymerge.inference.engines import ENGINES, engine_file
from polymerge.inference.generation import Generation
from polymerge.inference.programs.program_process import versions_in
from running import cli
from search_made import VLM, done, outcome, prompts_file, refused, words


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"), 8)


@pytest.fixture(scope="module")
def questions(prompts: Path) -> Path:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    asked = [{"question_id": one.pop("id"), **one} for one in lines]
    file = prompts.parent / "questions.json"
    file.write_text(json.dumps(asked), encoding="utf-8")
    return file


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is installed in the current environment."""
    folder = vllm_standin.installed(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    versions_in.cache_clear()
    return folder


def answers_in(run: Path) -> dict[str, str]:
    files = sorted(run.rglob("answers.jsonl"))
    return {str(file.relative_to(run)): file.read_text(encoding="utf-8") for file in files}


def test_every_engine_of_the_table_has_its_file() -> None:
    assert [name for name, row in ENGINES.items() if row.package and not engine_file(name).is_file()] == []


@pytest.mark.usefixtures("vllm")
def test_an_evaluation_is_the_same(questions: Path, tmp_path: Path) -> None:
    by = {
        engine: evaluate(
            VLM, questions, tmp_path / engine, scorer="exact", generation=Generation(engine=engine, dtype="float32")
        )
        for engine in ("transformers", "vllm")
    }
    assert answers_in(tmp_path / "vllm") == answers_in(tmp_path / "transformers")
    assert by["vllm"].tasks == by["transformers"].tasks
    told = by["vllm"].settings["engine"]
    assert (told["name"], told["versions"]["vllm"]) == ("vllm", vllm_standin.VERSION)
    assert "device" not in by["vllm"].settings
    # a run by another engine is another run
    refused("engine", "evaluate", VLM, "--tasks", f"{questions}:exact", "-o", tmp_path / "vllm")


@pytest.mark.usefixtures("vllm")
def test_a_search_of_five_weights_makes_the_same_choice(prompts: Path, tmp_path: Path) -> None:
    values = ("--values", "0:1:0.25", "--dtype", "float32")
    done(*words(tmp_path, prompts, *values, run="here"))
    done(*words(tmp_path, prompts, *values, "--engine", "vllm", run="there"))
    assert answers_in(tmp_path / "there") == answers_in(tmp_path / "here")
    assert outcome(tmp_path / "there")["chosen"] == outcome(tmp_path / "here")["chosen"]
    told = [json.loads(file.read_text()) for file in sorted((tmp_path / "there").rglob("weights.json"))]
    assert len(told) == 5
    assert {one["engine"] for one in told} == {"vllm"}
    assert all(0 < one["put"] <= one["tensors"] for one in told[1:])
    assert all(one["read_back"] > 8 and not one["not_located"] for one in told[1:])


@pytest.mark.usefixtures("vllm")
def test_knockout_and_ablate_are_the_same(prompts: Path, tmp_path: Path) -> None:
    words(tmp_path, prompts)  # which writes the recipe
    for engine in ("transformers", "vllm"):
        how = (
            "--prompts",
            prompts,
            "--scorer",
            "exact",
            "--max-new-tokens",
            "3",
            "--engine",
            engine,
            "--dtype",
            "float32",
        )
        done("knockout", VLM, *how, "-o", tmp_path / f"knockout-{engine}", "--replace", "zero", "--modules", "mlp")
        done("ablate", tmp_path / "recipe.yaml", *how, "-o", tmp_path / f"ablate-{engine}")
    for run in ("knockout", "ablate"):
        here, there = (tmp_path / f"{run}-{engine}" for engine in ("transformers", "vllm"))
        assert answers_in(there) == answers_in(here)
    drops = [
        json.loads((tmp_path / f"knockout-{engine}" / "knockout.json").read_text())["cells"]
        for engine in ("transformers", "vllm")
    ]
    assert drops[0] == drops[1]
    assert len({*answers_in(tmp_path / "knockout-vllm").values()}) > 1
    # of each layer that is knocked out, and of the one before, three matrices
    told = [json.loads(file.read_text())["put"] for file in sorted((tmp_path / "knockout-vllm").rglob("weights.json"))]
    assert max(told) == 6


@pytest.mark.usefixtures("vllm")
def test_an_engine_that_dies_loses_nothing(prompts: Path, tmp_path: Path) -> None:
    said = words(tmp_path, prompts, "--values", "0,0.5,1", "--batch-size", "4", "--engine", "vllm", run="run")
    died = cli(*said, "--engine-option", "dies_after=6")
    assert died.status == 1
    assert "vllm failed: it has ended (exit status 7" in died.err
    assert "Answers are kept: run again to go on" in died.err
    kept = answers_in(tmp_path / "run")
    assert [text.count("\n") for text in kept.values()] == [4]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["engine"]["options"] == {"dies_after": 6}
    again = cli(*said, "--engine-option", "dies_after=6")  # six more
    assert again.status == 1
    assert sum(text.count("\n") for text in answers_in(tmp_path / "run").values()) == 8
    done(*words(tmp_path, prompts, "--values", "0,0.5,1", "--batch-size", "4", "--engine", "vllm", run="whole"))
    for file, text in answers_in(tmp_path / "run").items():
        assert answers_in(tmp_path / "whole")[file].startswith(text)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("refuses=no such architecture", "vllm does not load the model: RuntimeError: no such architecture. All"),
        ("packs=true", "vllm does not keep its weights as it loads them"),
        ("forgets=true", "vllm does not hold what was put into it"),
        ("reads=true", "vllm reads"),
        ("nonsense_of_mine={1: 2", "nonsense_of_mine"),
    ],
)
def test_what_is_not_to_be_trusted_is_refused(option: str, told: str, prompts: Path, tmp_path: Path) -> None:
    said = cli(*words(tmp_path, prompts, "--values", "0.25,0.5,0.75", "--engine", "vllm", "--engine-option", option))
    assert told in said.err
    assert said.status
    assert answers_in(tmp_path / "run") == {}


@pytest.mark.usefixtures("vllm")
def test_a_prompt_that_the_engine_refuses_is_that_prompt_s_failure(questions: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = json.loads(questions.read_text(encoding="utf-8"))
    asked[2]["text"] = "impossible"
    file = questions.parent / "with one.json"
    file.write_text(json.dumps(asked), encoding="utf-8")
    found = evaluate(VLM, file, tmp_path / "run", scorer="exact", generation=Generation(engine="vllm"))
    assert [task.failed for task in found.tasks.values()] == [1]
    assert "longer than the maximum model length" in (tmp_path / "run" / "errors.jsonl").read_text(encoding="utf-8")


def test_an_engine_that_is_not_there(prompts: Path, tmp_path: Path) -> None:
    versions_in.cache_clear()
    said = words(tmp_path, prompts, "--values", "0,0.5,1")
    refused("--engine: there is none called 'vlm'. Did you mean 'vllm'?", *said, "--engine", "vlm")
    refused("--environment: is for an engine in a process of its own", *said, "--environment", tmp_path)
    refused("there is no", *said, "--engine", "vllm", "--environment", tmp_path)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    shutil.copy("/bin/false", python)
    refused("its Python does not run", *said, "--engine", "vllm", "--environment", tmp_path)
    refused("--workers: vllm is one engine", *said, "--engine", "vllm", "--workers", "2")
    refused("--device: 'cuda'", *said, "--engine", "vllm", "--device", "cuda")
    assert not (tmp_path / "run").exists()
