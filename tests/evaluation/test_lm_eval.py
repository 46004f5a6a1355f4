"""polymerge evaluate --with lm-eval: the command, and what is read of the files that lm-evaluation-harness writes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mergebench_made import VLM, results_of, write
from polymerge.evaluation.harness import lm_eval
from polymerge.evaluation.harness.registered_classes import OWN_CODE
from polymerge.families.registry import FAMILIES
from running import cli

STAMP = "2026-11-30T20-19-51.123456"

FAKE = """
import json, pathlib, sys
words = sys.argv[1:]
def after(name):
    return words[words.index(name) + 1]
out = pathlib.Path(after("--output_path")) / "model"
out.mkdir(parents=True, exist_ok=True)
(out.parent / "words.json").write_text(json.dumps(sys.argv))
tasks = after("--tasks").split(",")
cache = pathlib.Path(after("--use_cache") + "_rank0.db")
resumed = cache.exists()
cache.touch()
score = json.loads((pathlib.Path(after("--model_args").partition("=")[2]) / "config.json").read_text())["score"]
response = [["-1.5", "False"]]
rows = [{"doc_id": n, "filter": "none", "acc": float(n < 4 * score), "filtered_resps": response} for n in range(4)]
numbers = {"alias": "a task", "acc,none": score, "acc_stderr,none": 0.1}
results = {task: numbers for task in tasks if task != "late" or resumed}
said = {"results": results, "n-samples": {task: {"effective": 4} for task in results}, "higher_is_better": {}}
stamp = "2026-11-30T21-00-00.000000" if resumed else "STAMP"
(out / f"results_{stamp}.json").write_text(json.dumps(said))
for task in results:
    (out / f"samples_{task}_{stamp}.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
""".replace("STAMP", STAMP)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment whose Python stands in for that of lm-eval."""
    folder = tmp_path / "venv"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "tool.py").write_text(FAKE, encoding="utf-8")
    python.write_text(
        f'#!/bin/sh\nshift\nexec {shlex.quote(sys.executable)} {shlex.quote(str(folder / "tool.py"))} "$@"\n'
    )
    python.chmod(0o755)
    return folder


def model_with(folder: Path, score: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", {"architectures": ["LlavaForConditionalGeneration"], "score": score})
    return folder


def by_lm_eval(model: Path | str, run: Path | str, environment: Path, *words: str, tasks: str = "arc") -> Any:
    told = ("--with", "lm-eval", "--tasks", tasks, "-o", run, "--environment", environment)
    return cli("evaluate", model, *told, *words)


def test_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = ("evaluate", VLM, "--with", "lm-eval", "--tasks", "arc_easy,gsm8k", "-o", run, "--print-command")
    ran = cli(*told, "--batch-size", "8", "--trust-remote-code", "--", "--limit", "5")
    assert ran.status == 0, ran.err
    words = shlex.split(ran.out.strip("()\n"))
    assert words[4] == "LMMS_EVAL_USE_CACHE=False"
    assert Path(words[6]).is_file()
    folder = run / "tasks" / "lm-eval"
    assert words[7:] == [
        "--model", "text-tower", "--model_args", f"pretrained={VLM},trust_remote_code=True", "--tasks",
        "arc_easy,gsm8k", "--batch_size", "8", "--device", "cpu", "--log_samples", "--output_path", str(folder),
        "--use_cache", str(folder / "answers"), "--limit", "5",
    ]  # fmt: skip
    assert not run.exists()


def test_two_models_at_one_path_get_their_own_scores(
    tmp_path: Path, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    told = ("--", "--include_path", "tasks")
    assert by_lm_eval(model_with(tmp_path / "merged", 0.5), tmp_path / "run", environment, *told).status == 0
    task = results_of(tmp_path / "run")["tasks"]["arc"]
    assert (task["score"], task["unit"], task["right"], task["total"]) == (50.0, "%", 2.0, 4)
    assert task["samples"] == {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.0}
    model_with(tmp_path / "merged", 0.75)
    ran = by_lm_eval("merged", "run", environment, *told)
    assert ran.status == 2
    assert "holds an evaluation with other settings: " in ran.err
    ran = by_lm_eval("merged", "run", environment, "--force", *told)
    assert ran.status == 0, ran.err
    found = results_of(tmp_path / "run")
    assert found["tasks"]["arc"]["score"] == 75.0
    words = json.loads((tmp_path / "run/tasks/lm-eval/words.json").read_text())
    assert words[-1] == str(tmp_path / "tasks")  # the tool runs elsewhere
    assert str(tmp_path) not in json.dumps(found)  # a file that may be published
    assert found["settings"]["command"][-2:] == ["--include_path", "tasks"]
    assert cli("compare", "run").status == 0


def test_an_unfinished_run_goes_on_with_the_answers_that_it_has(tmp_path: Path, environment: Path) -> None:
    model = model_with(tmp_path / "merged", 0.5)
    ran = by_lm_eval(model, tmp_path / "run", environment, tasks="arc,late")
    assert ran.status == 1
    assert "missing: " in ran.err
    assert "not one number is there for late" in ran.err
    assert results_of(tmp_path / "run")["tasks"]["arc"]["score"] == 50.0
    ran = by_lm_eval(model, tmp_path / "run", environment, tasks="arc,late")
    assert ran.status == 0, ran.err
    assert sorted(results_of(tmp_path / "run")["tasks"]) == ["arc", "late"]


def test_a_cache_of_ones_own_is_refused(tmp_path: Path, environment: Path) -> None:
    ran = by_lm_eval(VLM, tmp_path / "run", environment, "--", "--use_cache", "somewhere")
    assert ran.status == 2
    assert "lm-eval tells models apart by their paths. Leave its cache out" in ran.err


def test_a_path_that_would_be_several_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "a,b=[1]"
    link = lm_eval.place({"model_type": "llava"}, folder, tmp_path / "run")
    assert link == tmp_path / "run" / "a-b--1-"
    assert lm_eval.place({"model_type": "llava"}, tmp_path / "merged_1.5", tmp_path) == tmp_path / "merged_1.5"


def test_families_that_transformers_has_no_class_for(tmp_path: Path) -> None:
    assert set(FAMILIES) >= OWN_CODE
    write(tmp_path / "config.json", {"architectures": ["LlavaLlamaForCausalLM"]})
    told = ("--with", "lm-eval", "--tasks", "arc", "-o", tmp_path / "run", "--print-command")
    ran = cli("evaluate", tmp_path, *told)
    assert ran.status == 2
    assert "there is none for the family llava_original" in ran.err


def test_the_filter_of_the_score_chooses_the_lines(tmp_path: Path) -> None:
    numbers = {"exact_match,strict": 0.5, "exact_match,flexible": 0.75, "word_perplexity,none": 9.0}
    better = {"gsm8k": {"exact_match": True}, "wiki": {"word_perplexity": False}}
    wiki = {"word_perplexity,none": 9.0}
    write(tmp_path / f"results_{STAMP}.json", {"results": {"gsm8k": numbers, "wiki": wiki}, "higher_is_better": better})
    rows = [
        {"doc_id": n, "filter": kind, "exact_match": float(n < right), "filtered_resps": ["7"]}
        for kind, right in (("strict", 2), ("flexible", 3))
        for n in range(4)
    ]
    (tmp_path / f"samples_gsm8k_{STAMP}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, problems = lm_eval.read(tmp_path, ["gsm8k", "wiki"], set())
    assert problems == []
    assert (found["gsm8k"].score, found["gsm8k"].total) == (50.0, 4)
    assert found["gsm8k"].samples == {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.0}
    assert (found["wiki"].score, found["wiki"].unit, found["wiki"].notes) == (9.0, "points", ("lower is better",))
