"""polymerge evaluate on a miniature MM-MergeBench and on question files, with the demo's VLM."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mergebench_made import EACH, VLM, adapter, benchmark, results_of, write
from polymerge.evaluation import asking
from polymerge.evaluation.mm_mergebench.tasks import TASKS
from polymerge.evaluation.scorers.caption_metrics import has_java
from polymerge.inference.images import SquareImages, padded
from running import Ran, cli, killed_in_the_middle, merged

FEW = ("--max-new-tokens", "4")
COMMAND = [sys.executable, "-c", "from polymerge.cli import main; main()"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the hub."""
    return benchmark(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run of the VLM as it is."""
    folder = tmp_path_factory.mktemp("direct") / "run"
    ran = evaluate(data, folder)
    assert ran.status == 0, ran.err
    return folder


def evaluate(data: Path, run: Path, *more: object, model: object = VLM, tasks: object = "mm-mergebench") -> Ran:
    return cli("evaluate", model, "--tasks", tasks, "--data", data, "-o", run, *FEW, *more)


def questions(folder: Path, count: int = 24) -> Path:
    """Questions about digits in LLaVA's format, the images beside them."""
    made = benchmark(folder / "made")
    items: list[dict[str, Any]] = []
    for task in ("IconQA", "TabMWP", "OCR-VQA", "Flickr30k", "VizWiz"):
        group = "Seen_data" if TASKS[task].seen else "Unseen_data"
        for item in json.loads((made / group / task / TASKS[task].questions).read_text()):
            if item["question_id"] != 1:  # its image is not square
                items.append({**item, "question_id": len(items), "image": f"made/images/{item['image']}"})
    assert len(items) >= count - 4
    return write(folder / "questions.json", items[:count])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_all_twelve_tasks_are_asked_and_scored(direct: Path, data: Path) -> None:
    found = results_of(direct)
    assert list(found["tasks"]) == list(TASKS)
    assert found["model"] == {"name": "vlm", "source": VLM, "plan": None}
    for name, task in found["tasks"].items():
        assert task["total"] == EACH
        assert task["failed"] == 0, name  # the images that are not square were padded
        assert task["group"] == TASKS[name].group
        assert task["settings"]["image"] == TASKS[name].image
        said = cli(
            "score", "--task", name, "--predictions", direct / "tasks" / name / "predictions.jsonl", "--annotations",
            data / f"{task['group'].title()}_data" / name, "--json",
        )  # fmt: skip
        alone = json.loads(said.out)
        assert (task["score"], task["as_published"]) == (alone["score"], alone["as_published"])
        if alone["samples"] is not None:
            assert task["samples"] == dict(zip(alone["ids"], alone["samples"], strict=True))
    assert found["tasks"]["VQAv2"]["score"] > 50
    assert 0 < found["tasks"]["OCR-VQA"]["score"] < 100 or found["tasks"]["IconQA"]["score"] > 0
    assert (found["tasks"]["VizWiz"]["score"] is not None) == has_java()
    assert (direct / "errors.jsonl").read_text() == ""


def test_the_layout_of_the_scripts_gives_the_same_scores(direct: Path, tmp_path: Path) -> None:
    made = benchmark(tmp_path / "scripts", "scripts")
    assert evaluate(made, tmp_path / "run").status == 0
    here, there = results_of(direct)["tasks"], results_of(tmp_path / "run")["tasks"]
    for name in TASKS:
        assert here[name]["samples"] == there[name]["samples"]
        assert here[name]["score"] == there[name]["score"]


def test_prompts_have_the_form_of_their_task(data: Path) -> None:
    from polymerge.evaluation.asking import read_tasks

    tasks = {task.name: task for task in read_tasks(["mm-mergebench"], data, None, None)}
    science = tasks["ScienceQA"]
    assert [len(prompt.images) for prompt in science.prompts] == [1, 1, 0, 1, 1]
    assert science.questions[0].written.startswith("<image>\n")
    assert "<image>" not in science.questions[2].written
    asked = tasks["ImageNet"].prompts[0].text.splitlines()
    assert asked[0] == "what colour is top ?" or asked[0].startswith("what")
    assert len(asked) == 2
    assert asked[1].startswith("Choose an answer from the choices below: ")
    assert "replaced" not in asked[1]
    assert all("<image>" not in prompt.text for task in tasks.values() for prompt in task.prompts)
    assert {name: task.how.max_new_tokens for name, task in tasks.items()} == {
        name: task.max_new_tokens for name, task in TASKS.items()
    }


def test_base_and_adapter_are_as_the_folded_checkpoint(tmp_path: Path, data: Path) -> None:
    made = adapter(tmp_path / "adapter", 1)
    folded = tmp_path / "folded"
    assert cli("fold", made, "--base", VLM, "-o", folded).status == 0
    tasks = "OCR-VQA,IconQA,AOKVQA,ImageNet-R"
    for model, run in ((f"{VLM}+{made}", "plus"), (made, "alone"), (folded, "whole")):
        ran = evaluate(data, tmp_path / run, model=model, tasks=tasks)
        assert ran.status == 0, ran.err
    plus, alone, whole = (results_of(tmp_path / run) for run in ("plus", "alone", "whole"))
    assert plus["tasks"] == alone["tasks"] == whole["tasks"]
    assert plus["model"]["name"] == "vlm+adapter"
    assert plus["model"]["plan"] is not None
    answers = [
        [line["text"] for line in lines(tmp_path / run / "tasks" / "OCR-VQA" / "predictions.jsonl")]
        for run in ("plus", "whole")
    ]
    assert answers[0] == answers[1]


def test_direct_merged_and_compared(tmp_path: Path, data: Path) -> None:
    parents = [adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)]
    recipe = {
        "merge_method": "linear",
        "base_model": VLM,
        "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in parents],
    }
    made = merged(recipe, tmp_path / "merged")
    tasks = "OCR-VQA,VizWiz,AOKVQA,TabMWP" if has_java() else "OCR-VQA,VQAv2,AOKVQA,TabMWP"
    models = {"vlm": VLM, **{one.name: f"{VLM}+{one}" for one in (*parents, made)}}
    runs = []
    for name, model in models.items():
        runs.append(tmp_path / "runs" / name)
        ran = evaluate(data, runs[-1], "--name", name, model=model, tasks=tasks)
        assert ran.status == 0, ran.err
    answers = {(run / "tasks/OCR-VQA/predictions.jsonl").read_text().replace(run.name, "") for run in runs}
    assert len(answers) > 1
    ran = cli("compare", *runs, "--parents", "one,two", "--template", "vlm", "-o", tmp_path / "table")
    assert ran.status == 0, ran.err
    rows = list(csv.DictReader((tmp_path / "table" / "compare.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == list(models)
    by_name = {row["model"]: row for row in rows}
    for row in rows:
        assert float(row["unseen"]) == pytest.approx((float(row["AOKVQA"]) + float(row["TabMWP"])) / 2)
    gains = list(csv.DictReader((tmp_path / "table" / "gains.csv").read_text().splitlines()))
    seen = [gain for gain in gains if (gain["model"], gain["column"], gain["over"]) == ("merged", "seen", "one + two")]
    mean = (float(by_name["one"]["seen"]) + float(by_name["two"]["seen"])) / 2
    assert float(seen[0]["gain"]) == pytest.approx(float(by_name["merged"]["seen"]) - mean, abs=1e-3)
    assert float(seen[0]["low"]) <= float(seen[0]["high"])
    assert seen[0]["rough"] == str(has_java()).lower()


def test_a_question_file_with_a_scorer(tmp_path: Path) -> None:
    file = questions(tmp_path)
    as_lines = tmp_path / "lines.jsonl"
    as_lines.write_text("".join(json.dumps(item) + "\n" for item in json.loads(file.read_text())), encoding="utf-8")
    ran = cli("evaluate", VLM, "--tasks", f"{file}:exact,{as_lines}:exact", "-o", tmp_path / "run", *FEW, "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found == results_of(tmp_path / "run")
    one, other = found["tasks"]["questions-exact"], found["tasks"]["lines-exact"]
    assert one["samples"] == other["samples"]
    assert one["group"] is None
    assert 0 < one["right"] <= one["total"]


def test_a_broken_image_is_counted_and_costs_nobody_else(tmp_path: Path) -> None:
    file = questions(tmp_path, 12)
    whole = cli("evaluate", VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "whole", *FEW)
    assert whole.status == 0, whole.err
    items = json.loads(file.read_text())
    broken = {2: "broken", 5: "missing", 7: "no text", 9: "no path"}
    (tmp_path / "bad.png").write_bytes((tmp_path / items[2]["image"]).read_bytes()[:90])
    items[2]["image"], items[5]["image"] = "bad.png", "nowhere.png"
    items[7]["text"], items[9]["image"] = 3, 17
    write(file, items)
    ran = cli("evaluate", VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run", *FEW, "--batch-size", "5")
    assert ran.status == 0, ran.err
    assert "4 of 12 have no answer and count as wrong; see errors.jsonl" in ran.out
    before, after = (results_of(tmp_path / run)["tasks"]["questions-exact"] for run in ("whole", "run"))
    assert (after["failed"], after["total"], before["failed"]) == (4, 12, 0)
    for name, share in before["samples"].items():
        assert after["samples"][name] == (0.0 if int(name) in broken else share)
    told = {line["id"]: line["reason"] for line in lines(tmp_path / "run" / "errors.jsonl")}
    assert list(told) == list(broken)
    assert "bad.png" in told[2] or "image" in told[2]
    assert "nowhere.png" in told[5]
    assert "text is 3" in told[7]
    assert "image is 17" in told[9]
    texts = {
        line["question_id"]: line["text"] for line in lines(tmp_path / "run/tasks/questions-exact/predictions.jsonl")
    }
    assert [name for name, text in texts.items() if text is None] == list(broken)
    # what failed is tried again when the run goes on
    shutil.copy(tmp_path / "made/images/IconQA/0.png", tmp_path / "nowhere.png")
    again = cli("evaluate", VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run", *FEW, "--batch-size", "5")
    assert again.status == 0, again.err
    assert results_of(tmp_path / "run")["tasks"]["questions-exact"]["failed"] == 3


def test_a_finished_run_is_scored_again_without_asking(
    direct: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(direct, tmp_path / "run")
    (run / "results.json").unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("something was asked")

    monkeypatch.setattr(asking, "_calls", refuse)
    assert evaluate(data, run).status == 0
    assert (run / "results.json").read_bytes() == (direct / "results.json").read_bytes()


def test_other_settings_are_refused_and_force_begins_anew(tmp_path: Path) -> None:
    file = questions(tmp_path, 6)
    told = ("evaluate", VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run", "--batch-size")
    assert cli(*told, "3", *FEW).status == 0
    ran = cli(*told, "2", *FEW)
    assert ran.status == 2
    assert "holds an evaluation with other settings: batch_size was 3, now 2" in ran.err
    assert cli(*told, "2", *FEW, "--force").status == 0
    assert results_of(tmp_path / "run")["settings"]["batch_size"] == 2


def test_two_workers_come_to_the_same_file(tmp_path: Path) -> None:
    file = questions(tmp_path)
    told = ("evaluate", VLM, "--tasks", f"{file}:exact", *FEW, "--batch-size", "4", "--torch-threads", "1")
    for count in (1, 2):
        ran = cli(*told, "--workers", count, "-o", tmp_path / f"run{count}")
        assert ran.status == 0, ran.err
    assert (tmp_path / "run1/results.json").read_bytes() == (tmp_path / "run2/results.json").read_bytes()


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    file = questions(tmp_path)
    told = ["evaluate", VLM, "--tasks", f"{file}:exact", *FEW, "--batch-size", "1", "--torch-threads", "1"]
    assert cli(*told, "-o", tmp_path / "whole").status == 0
    log = tmp_path / "run/tasks/questions-exact/answers.jsonl"
    killed_in_the_middle([*COMMAND, *told, "-o", tmp_path / "run"], log.exists)
    assert not (tmp_path / "run/results.json").exists()
    kept = log.read_bytes()
    assert cli(*told, "-o", tmp_path / "run").status == 0
    assert (tmp_path / "run/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert log.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


def test_images_are_padded_with_the_mean_colour() -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    made = padded(picture, (1, 2, 3))
    assert made.size == (4, 4)
    assert [made.getpixel((0, row)) for row in range(4)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]
    assert padded(made, (0, 0, 0)) is made

    class Processor:
        image_processor = type("Of", (), {"image_mean": [0.5, 0.25, 1.0]})()
        chat_template = "own"

        def __call__(self, **given: Any) -> Any:
            return given

    wrapped = SquareImages(Processor())
    assert wrapped.chat_template == "own"
    [[seen]] = wrapped(text=["a"], images=[[picture]])["images"]
    assert seen.getpixel((0, 0)) == (127, 63, 255)
    assert wrapped(text=["a"]) == {"text": ["a"]}
