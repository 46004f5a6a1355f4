"""lmms-eval, lm-eval and VLMEvalKit for real, on local files: scores that are those of the model they are said of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from environments import environment, folder
from mergebench_made import results_of
from running import Ran, cli
from vicuna import as_vicuna

EXAMPLE = Path(__file__).parents[2] / "examples" / "local_tasks"
QUESTIONS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged models of the demo, and every tool's task about them."""
    work = tmp_path_factory.mktemp("local")
    subprocess.run([sys.executable, EXAMPLE / "make_data.py", work, str(QUESTIONS)], check=True)
    return work


def put(model: Path, place: Path) -> Path:
    """Put a model where another one may lie."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place)
    return place


def offline(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}.items():
        monkeypatch.setenv(name, value)


def tasks_of(ran: Ran, run: Path) -> Mapping[str, Any]:
    assert ran.status == 0, ran.err
    found: Mapping[str, Any] = results_of(run)["tasks"]
    return found


@environment("lmms-eval")
def test_lmms_eval(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    place, run = tmp_path / "merged,v=1", tmp_path / "run"  # for lmms-eval the end of an argument
    told = ("--with", "lmms-eval", "--environment", f"{folder()}/lmms-eval", "--tasks", "polymerge_exam", "-o", run)
    after = ("--", "--include_path", made / "lmms_eval")
    first = tasks_of(cli("evaluate", put(made / "weight-0.0", place), *told, *after), run)
    assert first["polymerge_exam"]["total"] == QUESTIONS
    put(made / "weight-1.0", place)
    ran = cli("evaluate", place, *told, *after)
    assert ran.status == 2
    assert "holds an evaluation with other settings: model.files was" in ran.err
    second = tasks_of(cli("evaluate", place, *told, "--force", *after), run)
    own = tmp_path / "own"
    alone = ("--with", "lmms-eval", "--environment", f"{folder()}/lmms-eval", "--tasks", "polymerge_exam", "-o", own)
    wanted = tasks_of(cli("evaluate", made / "weight-1.0", *alone, *after), own)
    assert second["polymerge_exam"]["samples"] == wanted["polymerge_exam"]["samples"]
    assert second["polymerge_exam"]["samples"] != first["polymerge_exam"]["samples"]


@environment("lm-eval")
def test_lm_eval(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text tower's own greedy answers, read off transformers' modules, are what the harness scores."""
    offline(monkeypatch)
    place, run = tmp_path / "merged", tmp_path / "run"
    told = ("--with", "lm-eval", "--environment", f"{folder()}/lm-eval", "-o", run, "--batch-size", "8")
    more = ("--tasks", "polymerge_words,polymerge_words_written", "--", "--include_path", made / "lm_eval")
    first = tasks_of(cli("evaluate", put(made / "weight-0.0", place), *told, *more), run)
    assert first["polymerge_words_written"]["right"] == right_in_words(made / "weight-0.0", made)
    put(made / "weight-1.0", place)
    assert cli("evaluate", place, *told, *more).status == 2
    second = tasks_of(cli("evaluate", place, *told, "--force", *more), run)
    assert second["polymerge_words_written"]["right"] == right_in_words(made / "weight-1.0", made)
    assert second["polymerge_words"]["total"] == QUESTIONS
    assert cli("compare", run).status == 0


@torch.inference_mode()
def right_in_words(folder: Path, made: Path) -> int:
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for question in json.loads((made / "questions.json").read_text(encoding="utf-8")):
        text = f"<s> <user> {question['scene']} {question['text']} <assistant>"
        told = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        words: list[str] = []
        while len(words) < 3 and "</s>" not in words:
            states = model.model.language_model(input_ids=told).last_hidden_state
            best = model.lm_head(states[:, -1]).argmax(-1, keepdim=True)
            told, words = torch.cat([told, best], 1), [*words, tokenizer.decode(best[0]).strip()]
        right += [word for word in words if word != "</s>"] == question["answer"].split()
    return right


@environment("VLMEvalKit-src")
def test_vlmevalkit(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative clone; two models at one path; a data set that is not there; a judge that cannot be reached."""
    here = os.fspath(Path(__file__).with_name("cpu_for_cuda"))
    offline(monkeypatch, LMUData=os.fspath(made / "vlmevalkit"), PYTHONPATH=here)
    clients = Path(f"{folder()}").absolute()
    monkeypatch.chdir(clients)
    place, run = tmp_path / "merged", tmp_path / "run"
    tasks = "GQA_POLYMERGE=ImageVQADataset,MCQ_POLYMERGE=CustomMCQDataset,GQA_MISSING=ImageVQADataset"
    told = ("--with", "vlmevalkit", "--kit", "VLMEvalKit-src", "--environment", "VLMEvalKit", "--tasks", tasks)
    as_vicuna(made / "weight-0.0", place)
    ran = cli("evaluate", place, *told, "-o", run)
    assert ran.status == 1
    assert "wrote no score of GQA_MISSING" in ran.err
    first = results_of(run)
    assert set(first["tasks"]) == {"GQA_POLYMERGE", "MCQ_POLYMERGE"}
    assert "a judge could not be reached" in " ".join(first["tasks"]["MCQ_POLYMERGE"]["notes"])
    as_vicuna(made / "weight-1.0", place)
    ran = cli("evaluate", place, *told, "-o", run)
    assert ran.status == 2
    assert "holds an evaluation with other settings: model.files was" in ran.err
    assert cli("evaluate", place, *told, "-o", run, "--force").status == 1
    second = results_of(run)
    assert answers(run, "GQA_POLYMERGE") != {}
    assert second["tasks"]["GQA_POLYMERGE"]["score"] == share_right(run, made)
    assert second["tasks"]["GQA_POLYMERGE"]["score"] != first["tasks"]["GQA_POLYMERGE"]["score"]


def answers(run: Path, task: str) -> dict[str, str]:
    """What the tool's own file of answers says."""
    from openpyxl import load_workbook

    (file,) = {path.resolve() for path in (run / "tasks").rglob(f"*_{task}.xlsx")}
    header, *rows = load_workbook(file).active.iter_rows(values_only=True)
    return {str(row[header.index("index")]): str(row[header.index("prediction")]) for row in rows}


def share_right(run: Path, made: Path) -> float:
    questions = json.loads((made / "questions.json").read_text(encoding="utf-8"))
    said = answers(run, "GQA_POLYMERGE")
    right = [said[str(one["question_id"])].split() == one["answer"].split() for one in questions]
    return pytest.approx(100 * sum(right) / len(right), abs=0.01)  # type: ignore[no-any-return]
