"""polymerge evaluate --with lmms-eval or vlmevalkit: the command, and what is read of the files that they write."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from mergebench_made import VLM, adapter, results_of, write
from polymerge.evaluation.harness import lmms_eval as lmmseval
from polymerge.evaluation.harness import vlmevalkit
from polymerge.evaluation.harness.registered_classes import DATASETS, WRAPPERS, wrapper_of
from polymerge.families.registry import FAMILIES
from running import cli

STAMP = "20261125_101500"


def checkpoint(folder: Path, architecture: str) -> Path:
    folder.mkdir(parents=True)
    write(folder / "config.json", {"architectures": [architecture]})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def environment(folder: Path, script: str) -> Path:
    """A virtual environment whose Python runs a script in place of the tool."""
    tool = folder / "tool.py"
    tool.parent.mkdir(parents=True)
    tool.write_text(script, encoding="utf-8")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tool))} "$@"\n')
    python.chmod(0o755)
    return folder


def lmms_output(folder: Path, tasks: Mapping[str, Mapping[str, object]], samples: Mapping[str, Sequence[Any]]) -> None:
    """What lmms-eval 0.7 writes."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {name: {"original": len(rows), "effective": len(rows)} for name, rows in samples.items()}
    write(folder / f"{STAMP}_results.json", {"results": tasks, "configs": {}, "n-samples": counts})
    for name, rows in samples.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{STAMP}_samples_{name}.jsonl").write_text(text, encoding="utf-8")


def row(number: int, **metrics: object) -> dict[str, object]:
    return {"doc_id": number, "target": "yes", "filtered_resps": "yes", "input": "?", **metrics}


EXACT = {"alias": "vqa", "exact_match,none": 0.75, "exact_match_stderr,none": 0.1, "exact_match_stderr_clt,none": "N/A"}
ROWS = [row(number, exact_match=float(number < 3)) for number in range(4)]


def test_the_command_of_lmms_eval(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    told = ("evaluate", VLM, "--with", "lmms-eval", "--tasks", "mme,ok_vqa", "-o", run, "--print-command")
    ran = cli(*told, "--", "--limit", "5")
    assert ran.status == 0, ran.err
    words = shlex.split(ran.out.strip("()\n"))
    assert words[:5] == ["cd", "$(mktemp -d)", "&&", "PYTHONSAFEPATH=1", "LMMS_EVAL_USE_CACHE=False"]
    assert words[6:] == [
        "-m", "lmms_eval", "--model", "llava_hf", "--force_simple", "--model_args",
        f"pretrained={VLM},device_map=cpu", "--tasks", "mme,ok_vqa", "--batch_size", "1", "--device", "cpu",
        "--gen_kwargs", "temperature=0,do_sample=False", "--log_samples", "--output_path",
        str(run / "tasks" / "lmms-eval"), "--limit", "5",
    ]  # fmt: skip
    assert not run.exists()


@pytest.mark.parametrize(
    ("architecture", "model", "arguments"),
    [
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", "pretrained={},device_map=cuda"),
        ("LlavaNextForConditionalGeneration", "llava_hf", "pretrained={},device_map=cuda"),
        ("Phi3VForCausalLM", "phi3v", "model_id_name={}"),
    ],
)
def test_each_family_has_its_wrapper(architecture: str, model: str, arguments: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", architecture)
    ran = cli(
        "evaluate", folder, "--with", "lmms-eval", "--tasks", "mme", "-o", tmp_path / "r", "--print-command",
        "--device", "cuda", "--batch-size", "8", "--trust-remote-code",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    words = shlex.split(ran.out.strip("()\n"))
    assert words[words.index("--model") + 1] == model
    assert words[words.index("--model_args") + 1] == arguments.format(folder)
    assert words[words.index("--batch_size") + 1] == "8"
    assert words[-1] == "--trust_remote_code"


def test_the_table_names_families_that_are_there() -> None:
    without_a_table = {"qwen3_5", "gemma4"}
    assert {one.family for one in WRAPPERS} - set(FAMILIES) == without_a_table
    assert all(one.lmms or one.kit for one in WRAPPERS)


def test_the_command_and_the_config_of_vlmevalkit(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "merged 1", "Qwen2_5_VLForConditionalGeneration")
    kit = tmp_path / "VLMEvalKit"
    kit.mkdir()
    (kit / "run.py").touch()
    run = tmp_path / "run"
    ran = cli(
        "evaluate", folder, "--with", "vlmevalkit", "--tasks", "MathVista_MINI,Own=OwnDataset", "-o", run, "--kit", kit,
        "--print-command",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    made, *text, last = ran.out.splitlines()
    assert shlex.split(made)[:2] == ["mkdir", "-p"]
    assert shlex.split(last)[1:] == [
        str(kit / "run.py"), "--config", str(run / "vlmevalkit.json"),
        "--work-dir", str(run / "tasks" / "vlmevalkit"),
    ]  # fmt: skip
    config = json.loads("\n".join(text[1:-1]))
    assert config == {
        "model": {"merged-1": {"class": "Qwen2VLChat", "model_path": str(folder), "do_sample": False}},
        "data": {
            "MathVista_MINI": {"class": "MathVista", "dataset": "MathVista_MINI"},
            "Own": {"class": "OwnDataset", "dataset": "Own"},
        },
    }
    assert not run.exists()


def test_a_path_that_would_be_misread(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "omni-alpha", "Qwen3VLForConditionalGeneration")
    row = wrapper_of(config_of(folder), "vlmevalkit")
    assert vlmevalkit.place(row, folder, tmp_path / "run") == tmp_path / "run" / "model"
    assert vlmevalkit.place(row, tmp_path / "alpha", tmp_path / "run") == tmp_path / "alpha"
    ran = cli(
        "evaluate", folder, "--with", "vlmevalkit", "--tasks", "MME", "-o", tmp_path / "run-omni", "--print-command"
    )  # fmt: skip
    assert ran.status == 2
    assert "must have none of omni. Name another folder with -o" in ran.err


@pytest.mark.parametrize(
    ("config", "lmms", "kit"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "llava", "LLaVA"),
        ({"architectures": ["LlavaQwenForCausalLM"]}, "llava_onevision", "LLaVA_OneVision"),
        ({"architectures": ["MiniCPMV"], "version": 2.6}, "minicpm_v", "MiniCPM_V_2_6"),
        ({"architectures": ["MiniCPMV"], "version": "2.5"}, "minicpm_v", "MiniCPM_Llama3_V"),
        ({"architectures": ["MiniCPMV"]}, "minicpm_v", "MiniCPM_V"),
        ({"architectures": ["CogVLMForCausalLM"]}, "cogvlm2", "CogVlm"),
        ({"architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm"}, None, "SmolVLM2"),
        ({"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}, "qwen3_5", None),
    ],
)
def test_the_rows_of_a_family_with_several_layouts(config: dict[str, Any], lmms: str | None, kit: str | None) -> None:
    if lmms is not None:
        assert wrapper_of(config, "lmms-eval").lmms == lmms
    if kit is not None:
        assert wrapper_of(config, "vlmevalkit").kit == kit


def test_the_name_that_the_code_of_llava_reads_its_kind_off(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "llava" / "merged", "LlavaLlamaForCausalLM")
    row = wrapper_of(config_of(folder), "lmms-eval")
    links = tmp_path / "run"
    assert lmmseval.place(row, folder, links) == vlmevalkit.place(row, folder, links) == links / "llava-merged"
    named = tmp_path / "my-LLaVA"
    assert lmmseval.place(row, named, links) == vlmevalkit.place(row, named, links) == named


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--with", "vlmevalkit", "--tasks", "MME"), "VLMEvalKit runs from its clone: say where it is with `--kit`"),
        (("--with", "lmms-eval", "--tasks", "mme", "--data", "x"), "--data says nothing to lmms-eval"),
        (("--with", "lmms-eval", "--tasks", "mme", "--kit", "x"), "--kit says nothing to lmms-eval"),
        (("--with", "lmms-eval", "--tasks", ","), "--tasks: names none"),
        (("--with", "lmms-eval", "--tasks", "mme", "--environment", "/nowhere"), "there is no /nowhere"),
    ],
)
def test_what_cannot_be_bridged(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    ran = cli("evaluate", VLM, *words, "-o", tmp_path / "run")
    assert ran.status == 2
    assert told in ran.err
    assert not (tmp_path / "run").exists()


def test_a_family_without_a_wrapper_and_a_model_without_a_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "LlamaForCausalLM")
    told = ("--with", "lmms-eval", "--tasks", "mme", "-o", tmp_path / "run")
    ran = cli("evaluate", folder, *told)
    assert ran.status == 2
    assert "lmms-eval has no model that is known to run checkpoints of the family llama" in ran.err
    assert "qwen2_vl" in ran.err
    ran = cli("evaluate", f"{VLM}+{adapter(tmp_path / 'adapter', 1)}", *told)
    assert ran.status == 2
    assert "polymerge fold" in ran.err
    kit = checkpoint(tmp_path / "kit", "Gemma3ForConditionalGeneration")
    ran = cli("evaluate", kit, "--with", "vlmevalkit", "--tasks", "MNE", "-o", tmp_path / "run")
    assert "the class of the data set 'MNE' is not known. Did you mean 'MME'?" in ran.err
    ran = cli("evaluate", kit, "--with", "vlmevalkit", "--tasks", "MME", "-o", tmp_path / "run")
    assert "say where it is with `--kit`" in ran.err
    ran = cli("evaluate", kit, "--with", "vlmevalkit", "--tasks", "MME", "-o", tmp_path / "run", "--kit", kit)
    assert "has no run.py" in ran.err


FAKE = """
import json, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output_path") + 1]) / "work__vlm"
out.mkdir(parents=True)
print("Model Responding: 50%", end="\\r", flush=True)
print("done", file=sys.stderr)
(out / "20261125_101500_results.json").write_text(json.dumps({"results": {"vqa": RESULT}}))
(out / "20261125_101500_samples_vqa.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in ROWS))
"""


def test_the_tool_is_run_shown_and_read(tmp_path: Path) -> None:
    made = environment(tmp_path / "venv", FAKE.replace("RESULT", repr(EXACT)).replace("ROWS", repr(ROWS)))
    run = tmp_path / "run"
    told = ("evaluate", VLM, "--with", "lmms-eval", "--tasks", "vqa", "--environment", made, "-o", run)
    ran = cli(*told, "--name", "mine")
    assert ran.status == 0, ran.err
    assert "Model Responding: 50%\rdone" in ran.err.replace("\n", "") or "50%" in ran.err
    assert (run / "lmms-eval.log").read_bytes().count(b"done") == 1
    found = results_of(run)
    assert (found["tool"], found["model"]["name"]) == ("lmms-eval", "mine")
    task = found["tasks"]["vqa"]
    assert (task["score"], task["unit"], task["right"], task["total"]) == (75.0, "%", 3.0, 4)
    assert task["samples"] == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}
    assert task["metrics"] == {"exact_match": 0.75}
    assert "75.00" in ran.out
    assert cli("compare", run).status == 0
    ran = cli(*told, "--name", "mine", "--", "--limit", "3")
    assert ran.status == 2
    assert "holds an evaluation with other settings: command was" in ran.err


def test_requests_that_failed_are_counted(tmp_path: Path) -> None:
    rows = [dict(one) for one in ROWS]
    rows[1]["filtered_resps"] = ["[LMMS_EVAL_REQUEST_FAILED after 3 retries] timeout"]
    lmms_output(tmp_path / "lmms", {"vqa": EXACT}, {"vqa": rows})
    task = lmmseval.read(tmp_path / "lmms", ["vqa"], set())[0]["vqa"]
    assert (task.score, task.failed, task.total) == (75.0, 1, 4)
    said = "1 of the answers is a message of a failed request, and is scored as if the model had said it"
    assert task.notes == (said,)
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "m_OWN_acc.csv").write_text('"split","Overall"\n"none","0.5"\n', encoding="utf-8")
    table = "index\tprediction\thit\n1\tA\t1\n2\tFailed to obtain answer via API. \t0\n"
    (kit / "m_OWN_openai_result.tsv").write_text(table, encoding="utf-8")
    task = vlmevalkit.read(kit, "m", ["OWN"], set(), kit / "log")[0]["OWN"]
    assert (task.score, task.failed, task.total, task.notes) == (50.0, 1, 2, (said,))


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import sys; print('boom'); sys.exit(3)", "lmms-eval ended with exit status 3"),
        ("print('an error that it only logs')", "lmms-eval wrote no results"),
    ],
)
def test_a_tool_that_fails(script: str, told: str, tmp_path: Path) -> None:
    made = environment(tmp_path / "venv", script)
    ran = cli(
        "evaluate", VLM, "--with", "lmms-eval", "--tasks", "vqa", "--environment", made, "-o", tmp_path / "run"
    )  # fmt: skip
    assert ran.status == 1
    assert told in ran.err
    assert "lmms-eval.log" in ran.err
    assert not (tmp_path / "run" / "results.json").exists()


def read_lmms(folder: Path, *tasks: str) -> tuple[Mapping[str, Any], list[str]]:
    found, problems = lmmseval.read(folder, tasks, set())
    return found, [str(problem) for problem in problems]


def test_a_score_that_is_no_mean_of_its_documents_stays_as_it_is(tmp_path: Path) -> None:
    marked = [row(n, mme_perception_score={"question_id": f"{n}", "category": "ocr", "score": 1.0}) for n in range(4)]
    numbers = {"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1400.5, "alias": "mme"}
    lmms_output(tmp_path / "w__m", {"mme": numbers}, {"mme": marked})
    found, problems = read_lmms(tmp_path, "mme")
    assert problems == []
    mme = found["mme"]
    assert (mme.score, mme.unit, mme.samples, mme.total) == (300.0, "points", None, 4)
    assert mme.metrics == {"mme_cognition_score": 300.0, "mme_perception_score": 1400.5}
    assert mme.notes == ("the score is mme_cognition_score, the first of mme_cognition_score, mme_perception_score",)


def test_the_newest_results_and_the_tasks_that_were_asked_for(tmp_path: Path) -> None:
    lmms_output(
        tmp_path / "w__m", {"vqa": EXACT, "group": {"alias": "g", " ": " "}, "b": {"acc,none": 1.0}}, {"vqa": ROWS}
    )
    write(tmp_path / "w__m" / "20240101_000000_results.json", {"results": {"vqa": {"exact_match,none": 0.1}}})
    found, problems = read_lmms(tmp_path, "vqa")
    assert (list(found), found["vqa"].score, problems) == (["vqa"], 75.0, [])
    found, problems = read_lmms(tmp_path, "vqa", "unknown_name")
    assert list(found) == ["vqa", "b"]
    assert ["not one number is there for unknown_name" in problem for problem in problems] == [True]
    assert (found["b"].score, found["b"].unit) == (1.0, "points")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "expected object, got array"),
        ('{"results": {"vqa": {"acc": "N/A"}}}', "not one number"),
    ],
)
def test_results_of_lmms_eval_that_are_broken(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / f"{STAMP}_results.json").write_text(content)
    found, problems = read_lmms(tmp_path, "vqa")
    assert found == {}
    assert told in problems[0]


def test_a_broken_line_of_samples(tmp_path: Path) -> None:
    lmms_output(tmp_path, {"vqa": EXACT}, {"vqa": ROWS})
    file = tmp_path / f"{STAMP}_samples_vqa.jsonl"
    file.write_text(file.read_text() + "{\n", encoding="utf-8")
    _, problems = read_lmms(tmp_path, "vqa")
    assert "line 5: is not JSON" in problems[0]


def sheet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    book = Workbook()
    page = book.active
    assert page is not None
    page.append(list(rows[0]))
    for one in rows:
        page.append(list(one.values()))
    book.save(file)


def read_kit(folder: Path, *names: str) -> tuple[Mapping[str, Any], str]:
    found, problems = vlmevalkit.read(folder, "mine", names, set(), folder / "log")
    return found, "\n".join(map(str, problems))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder of VLMEvalKit after five data sets."""
    run = tmp_path / "T20261125_Gabcdef12"
    run.mkdir()
    hits = [{"index": n, "question": "?", "prediction": "A", "answer": "A", "hit": int(n < 3)} for n in range(4)]
    answers = [{name: one[name] for name in ("index", "question", "prediction", "answer")} for one in hits]
    for name in ("MMStar", "MathVista_MINI", "MME", "OCRBench", "ChartQA_TEST"):
        sheet(run / f"mine_{name}.xlsx", answers)
    sheet(run / "mine_MMStar_exact_matching_result.xlsx", hits)
    (run / "mine_MMStar_acc.csv").write_text('"split","Overall","math"\n"none","0.75","0.5"\n')
    (run / "mine_MathVista_MINI_gpt-4o-mini_score.csv").write_text(
        '"Task&Skill","tot","prefetch","hit","prefetch_rate","acc"\n"Overall","1000","900","553","90.0","55.3"\n'
        '"geometry","200","180","90","90.0","45.0"\n'
    )
    (run / "mine_MME_score.csv").write_text('"perception","reasoning","OCR"\n"1400.5","300.0","90.0"\n')
    write(run / "mine_OCRBench_score.json", {"Text Recognition": 200, "Final Score": 700, "Final Score Norm": 70.0})
    (run / "mine_ChartQA_TEST_acc.csv").write_text('"Overall","human"\n"61.2","50.0"\n')
    return tmp_path


def test_the_scores_of_vlmevalkit(work: Path) -> None:
    names = ("MMStar", "MathVista_MINI", "MME", "OCRBench", "ChartQA_TEST")
    found, problems = read_kit(work, *names)
    assert problems == ""
    assert [(found[name].score, found[name].unit) for name in names] == [
        (75.0, "%"), (55.3, "%"), (None, "points"), (70.0, "%"), (61.2, "%"),
    ]  # fmt: skip
    assert found["MMStar"].samples == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}
    assert found["MathVista_MINI"].metrics["Task&Skill geometry: acc"] == 45.0
    assert found["MME"].metrics == {"perception": 1400.5, "reasoning": 300.0, "OCR": 90.0}
    assert "has no overall number" in found["MME"].reason
    assert found["MMStar"].settings == {"scorer": "acc.csv: split none: Overall"}


def short(*matches: str) -> list[dict[str, Any]]:
    """Rows of short answers, with how well each right answer is matched."""
    return [
        {"index": n, "prediction": "7", "answer": "7", "eval_match": f"[{one}]",
         "eval_score": sum(map(float, one.split(", "))) / len(one.split(", "))}
        for n, one in enumerate(matches)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("matches", "score", "right"),
    [
        (("1.0", "0.0", "1.0", "0.0"), 50.0, 2.0),  # GQA
        (("0.3, 0.6", "0.0, 1.0", "1.0, 1.0", "0.0, 0.0"), 48.75, 1.95),  # TextVQA: the mean
        (("0.0, 1.0", "0.0, 0.0", "1.0, 1.0", "0.0, 0.0"), 50.0, 2.0),  # OCRVQA: the best
        (("0.25, 1.0", "0.8, 0.9", "0.0", "0.5"), 56.25, 2.25),  # DocVQA: distances, of which far ones are nothing
    ],
)
def test_short_answers_of_vlmevalkit_are_counted(
    matches: tuple[str, ...], score: float, right: float, work: Path
) -> None:
    run = work / "T20261125_Gabcdef12"
    sheet(run / "mine_ChartQA_TEST_results.xlsx", short(*matches))
    (run / "mine_ChartQA_TEST_acc.csv").write_text(f'"Overall"\n"{score}"\n')
    found, problems = read_kit(work, "ChartQA_TEST")
    assert problems == ""
    task = found["ChartQA_TEST"]
    assert (task.score, task.right, task.total) == (pytest.approx(score), pytest.approx(right), 4)
    assert sum(task.samples.values()) == pytest.approx(right)


@pytest.mark.parametrize(
    ("numbers", "score", "right", "samples"),
    [
        ('"split","Overall","acc"\n"Overall","82.5","75.0"\n', 82.5, 3.0, None),  # POPE: its overall number is F1
        ('"perception","reasoning"\n"1400.5","300.0"\n', None, 3.0, None),  # MME
        ('"split","Overall"\n"Overall","75.0"\n', 75.0, 3.0, 4),
    ],
)
def test_yes_and_no_of_vlmevalkit_are_counted(
    numbers: str, score: float | None, right: float, samples: int | None, work: Path
) -> None:
    run = work / "T20261125_Gabcdef12"
    rows = [{"index": n, "prediction": "Yes", "answer": "Yes", "extracted": "Yes", "score": n < 3} for n in range(4)]
    sheet(run / "mine_MME_auxmatch.xlsx", rows)
    (run / "mine_MME_score.csv").write_text(numbers)
    found, problems = read_kit(work, "MME")
    assert problems == ""
    task = found["MME"]
    assert (task.score, task.right, task.total) == (score, right, 4)
    assert (None if task.samples is None else len(task.samples)) == samples
    assert any("they are counted alone" in note for note in task.notes) == (score == 82.5)


def test_a_data_set_whose_name_begins_another(work: Path) -> None:
    run = work / "T20261125_Gabcdef12"
    (run / "mine_MathVista_acc.csv").write_text('"Overall"\n"10.0"\n')
    found, problems = read_kit(work, "MathVista", "MathVista_MINI")
    assert problems == ""
    assert [found[name].score for name in ("MathVista", "MathVista_MINI")] == [10.0, 55.3]


def test_what_vlmevalkit_did_not_write_or_wrote_broken(work: Path) -> None:
    run = work / "T20261125_Gabcdef12"
    (run / "mine_OCRBench_score.json").write_text("{")
    (run / "mine_ChartQA_TEST_acc.csv").write_text("")
    found, problems = read_kit(work, "POPE", "OCRBench", "ChartQA_TEST")
    assert found == {}
    assert "wrote no score of POPE; it wrote nothing" in problems
    assert "mine_OCRBench_score.json: is not JSON" in problems
    assert "mine_ChartQA_TEST_acc.csv: holds no number" in problems


KIT = """
import json, pathlib, sys
config = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
(name, about), = config["model"].items()
work = pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1]) / name / "T20261125_Gabcdef12"
work.mkdir(parents=True, exist_ok=True)
assert pathlib.Path("run.py").exists()
print("OPENAI API is not working properly, will use exact matching for evaluation" if "judge" in config["data"] else "")
answers = work / "answers"
if not (answers.exists() and "--reuse" in sys.argv):
    answers.write_text((pathlib.Path(about["model_path"]) / "score.json").read_text())
for data in config["data"]:
    if data != "broken" or "--reuse" in sys.argv:
        (work / f"{name}_{data}_acc.csv").write_text(f'"split","Overall"\\n"none","{answers.read_text()}"\\n')
"""


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "run.py").write_text(KIT, encoding="utf-8")
    return folder


def model_with(folder: Path, score: str) -> Path:
    """A checkpoint that the stand-in for VLMEvalKit gives a score to."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint(folder, "Qwen2_5_VLForConditionalGeneration")
    (folder / "score.json").write_text(score, encoding="utf-8")
    return folder


def by_kit(model: Path, kit: Path, *words: str, tasks: str = "one=C") -> Any:
    told = ("--with", "vlmevalkit", "--tasks", tasks, "-o", kit.parent / "run", "--kit", kit)
    return cli("evaluate", model, *told, "--environment", sys.executable, *words)


def test_vlmevalkit_is_run_in_its_clone(tmp_path: Path, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative path to the clone, which the tool is started in
    ran = by_kit(model_with(tmp_path / "merged", "0.5"), kit, "--kit", "kit", tasks="MMStar")
    assert ran.status == 0, ran.err
    task = results_of(tmp_path / "run")["tasks"]["MMStar"]
    assert (task["score"], task["unit"]) == (50.0, "%")


def test_another_model_at_the_same_path_gets_its_own_score(tmp_path: Path, kit: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "merged"
    assert by_kit(model_with(model, "0.5"), kit).status == 0
    model_with(model, "0.75")
    ran = by_kit(model, kit)
    assert ran.status == 2
    assert "holds an evaluation with other settings: model.files was" in ran.err
    assert results_of(run)["tasks"]["one"]["score"] == 50.0
    ran = by_kit(model, kit, "--force")
    assert ran.status == 0, ran.err
    assert results_of(run)["tasks"]["one"]["score"] == 75.0
    (kit / "run.py").unlink()
    (kit / "run.py").write_text("raise SystemExit('started again')", encoding="utf-8")
    ran = by_kit(model, kit)  # a finished run is read again
    assert (ran.status, results_of(run)["tasks"]["one"]["score"]) == (0, 75.0)
    assert "the run has ended, and is read again" in ran.err


def test_answers_are_taken_over_within_one_unfinished_run_alone(tmp_path: Path, kit: Path) -> None:
    model = model_with(tmp_path / "merged", "0.5")
    ran = by_kit(model, kit, tasks="one=C,broken=C")
    assert ran.status == 1
    assert "50.00" in ran.out
    assert "missing: " in ran.err
    assert "wrote no score of broken" in ran.err
    found = results_of(tmp_path / "run")
    assert (list(found["tasks"]), found["tasks"]["one"]["score"]) == (["one"], 50.0)
    assert "wrote no score of broken" in found["settings"]["missing"][0]
    assert cli("compare", tmp_path / "run").status == 0
    ran = by_kit(model, kit, tasks="one=C,broken=C")
    assert ran.status == 0, ran.err
    found = results_of(tmp_path / "run")
    assert [found["tasks"][name]["score"] for name in ("one", "broken")] == [50.0, 50.0]
    assert "missing" not in found["settings"]


def test_a_judge_that_was_replaced_is_said(tmp_path: Path, kit: Path) -> None:
    ran = by_kit(model_with(tmp_path / "merged", "0.5"), kit, tasks="judge=C")
    assert ran.status == 0, ran.err
    (note,) = results_of(tmp_path / "run")["tasks"]["judge"]["notes"]
    assert note.startswith("a judge could not be reached, and exact matching took its place")
    assert note in ran.out


def test_a_cache_that_knows_models_by_their_paths_is_refused(tmp_path: Path) -> None:
    told = ("evaluate", VLM, "--with", "lmms-eval", "--tasks", "mme", "-o", tmp_path / "run", "--print-command")
    ran = cli(*told, "--", "--use_cache", "somewhere")
    assert ran.status == 2
    assert "lmms-eval tells models apart by their paths. Leave its cache out" in ran.err


def test_classes_of_data_sets_are_names() -> None:
    assert all(name.isidentifier() for name in DATASETS.values())


SAFE = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "m"
out.mkdir(parents=True)
seen = {"place": os.getcwd(), "arguments": sys.argv[1:], "held": os.listdir(), "path": sys.path}
(out.parent / "seen.json").write_text(json.dumps(seen))
(out / "20261125_101500_results.json").write_text(json.dumps({"results": {"vqa": {"acc,none": 1.0}}}))
"""
CANARY = "import pathlib; pathlib.Path({!r}).touch()\n"


def test_a_tool_finds_no_modules_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in a checkpoint's folder, with relative paths among the tool's options and in PYTHONPATH."""
    here, tools, ran = tmp_path / "here", tmp_path / "tools", tmp_path / "ran"
    shutil.copytree(VLM, here)
    (tools / "lmms_eval").mkdir(parents=True)
    (tools / "lmms_eval" / "__init__.py").touch()
    (tools / "lmms_eval" / "__main__.py").write_text(SAFE, encoding="utf-8")
    for name in ("json", "pathlib", "lmms_eval", "sitecustomize"):
        (here / f"{name}.py").write_text(CANARY.format(str(ran)), encoding="utf-8")
    (here / "tasks").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f":{os.path.relpath(tools)}")
    monkeypatch.syspath_prepend(str(tools))
    run = tmp_path / "run"
    done = cli("evaluate", ".", "--with", "lmms-eval", "--tasks", "vqa", "-o", run, "--", "--include_path=./tasks")
    assert done.status == 0, done.err
    assert not ran.exists()
    seen = json.loads((run / "tasks" / "lmms-eval" / "seen.json").read_text(encoding="utf-8"))
    assert (seen["place"], seen["held"]) == (str(run / "work-1"), [])
    assert f"--include_path={here / 'tasks'}" in seen["arguments"]
    assert str(tools) in seen["path"]
    assert not (run / "work-1").exists()  # nothing was written there


def test_a_folders_name_is_no_argument(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a,trust_remote_code=True", "Qwen2VLForConditionalGeneration")
    told = ("--with", "lmms-eval", "--tasks", "mme", "--print-command")
    ran = cli("evaluate", folder, *told, "-o", tmp_path / "run")
    assert ran.status == 0, ran.err
    link = tmp_path / "run" / "models" / "a-trust_remote_code-True"
    assert f"ln -sfn {shlex.quote(str(folder))} {link}" in ran.out
    words = shlex.split(ran.out.splitlines()[-1].strip("()"))
    assert words[words.index("--model_args") + 1] == f"pretrained={link},device_map=cpu"
    ran = cli("evaluate", folder, *told, "-o", tmp_path / "a=b")
    assert ran.status == 2
    assert "for lmms-eval a path ends at a comma or an equals sign. Name another `--out`" in ran.err
    ran = cli("evaluate", folder, *told, "-o", tmp_path / "run", "--device", "cpu,trust_remote_code=True")
    assert ran.status == 2
    assert "is no device such as cpu, cuda or cuda:1" in ran.err
