"""What cannot be evaluated is said before anything is asked, all of it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergebench_made import VLM, benchmark, write
from running import cli

ONE = [{"question_id": 1, "text": "how many", "answer": "2"}]


def refused(*words: object) -> str:
    ran = cli("evaluate", *words)
    assert ran.status == 2, ran.err or ran.out
    return ran.err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("IconQQ", "there is no task 'IconQQ'. Did you mean 'IconQA'?"),
        ("mm-mergebensh", "Did you mean 'mm-mergebench'?"),
        (",", "names none"),
    ],
)
def test_a_task_that_is_not_there(tasks: str, told: str, data: Path, tmp_path: Path) -> None:
    assert told in refused(VLM, "--tasks", tasks, "--data", data, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "q.json", ONE)
    err = refused(
        tmp_path / "nothing", "--tasks", f"{file}:exakt,{tmp_path}/none.json:exact,IconQA", "-o", tmp_path / "run",
        "--workers", "0", "--dtype", "bfloat",
    )  # fmt: skip
    for told in (
        "nothing: there is no such folder",
        "there is no scorer 'exakt'. Did you mean 'exact'?",
        "none.json: cannot be read",
        "--tasks IconQA: say where its files are with `--data`",
        "--workers: 0 is too few",
        "Did you mean 'bfloat16'",
    ):
        assert told in err, told
    assert not (tmp_path / "run").exists()


def test_a_file_needs_a_scorer(tmp_path: Path) -> None:
    assert "needs a scorer's name behind it, such as q.json:exact" in refused(VLM, "--tasks", "q.json", "-o", tmp_path)


def test_the_wrong_layout(tmp_path: Path) -> None:
    (tmp_path / "stuff" / "Seen_data" / "VQAv2").mkdir(parents=True)
    err = refused(VLM, "--tasks", "mm-mergebench", "--data", tmp_path / "stuff", "-o", tmp_path / "run")
    assert err.startswith("polymerge: 12 problems")
    assert "VQAv2: there is no val.json in" in err
    assert "TabMWP: " in err
    assert "has no Seen_data/TabMWP, Unseen_data/TabMWP, instructions/TabMWP or TabMWP; its folders are VQAv2" in err
    assert "--data: there is no folder" in refused(
        VLM, "--tasks", "REC", "--data", tmp_path / "x", "-o", tmp_path / "r"
    )


def test_a_task_in_two_layouts(tmp_path: Path) -> None:
    for group in ("Seen_data", "instructions"):
        (tmp_path / group / "VQAv2").mkdir(parents=True)
        write(tmp_path / group / "VQAv2" / "val.json", ONE)
    err = refused(VLM, "--tasks", "VQAv2", "--data", tmp_path, "-o", tmp_path / "run")
    assert "val.json lies in" in err
    assert "Give one of the two" in err


def test_images_of_which_not_one_is_there(tmp_path: Path) -> None:
    file = write(tmp_path / "q.json", [{**ONE[0], "image": "a/b.png"}])
    err = refused(VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run")
    assert "none of its 1 images, such as 'a/b.png', lies in" in err
    assert "--image-folder" in err
    err = refused(VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run", "--image-folder", tmp_path / "x")
    assert "--image-folder: there is no folder" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b"[]", "is an empty array"),
        (b'{"question_id": 1}', "expected array, got object"),
        (b'[{"question_id": 1, "text": "a", "answer": "b"},\n{"text"', "is not JSON"),
        (b'[{"text": "a", "answer": "b"}]', "item 1: question_id is missing"),
        (b'[{"question_id": 1, "text": "a"}]', "answer is None, not a text or a number"),
        (b'[{"question_id": 1, "answer": "b"}]', "not one of 1 questions can be asked; the first text is None"),
        (json.dumps(ONE * 2).encode(), "the same question_id as item 1"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_question_file_that_is_broken(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    file.write_bytes(content)
    err = refused(VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run")
    assert told in err
    assert str(file) in err
    assert not (tmp_path / "run").exists()


def test_a_broken_line_of_a_file_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(ONE[0]) + "\n\n{\n", encoding="utf-8")
    assert f"{file}: line 3: is not JSON" in refused(VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run")
    file.write_text("\n", encoding="utf-8")
    assert "is an empty array" in refused(VLM, "--tasks", f"{file}:exact", "-o", tmp_path / "run")


def test_annotations_are_looked_at_before_anything_is_asked(data: Path, tmp_path: Path) -> None:
    import shutil

    made = shutil.copytree(data, tmp_path / "data")
    (made / "Seen_data" / "VizWiz" / "val_coco_type.json").unlink()
    write(made / "Seen_data" / "ScienceQA" / "pid_splits.json", {"test": ["0", "17"]})
    err = refused(VLM, "--tasks", "VizWiz,ScienceQA", "--data", made, "-o", tmp_path / "run")
    assert "val_coco_type.json: is not there" in err
    assert "problem '17'" in err


def test_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "q.json", ONE)
    tasks = f"{tmp_path}/a/q.json:exact,{tmp_path}/b/q.json:exact"
    assert "two of them are called 'q-exact'" in refused(VLM, "--tasks", tasks, "-o", tmp_path / "run")


def test_a_model_that_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "q.json", ONE)
    (tmp_path / "empty").mkdir()
    for model, told in (
        (tmp_path / "empty", "has no config.json"),
        (file, "is a file"),
        (f"{VLM}+{tmp_path}/empty", "adapter"),
        ("nonsense", "it is no hub id such as owner/name"),
    ):
        assert told in refused(model, "--tasks", f"{file}:exact", "-o", tmp_path / "run")


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    file = write(tmp_path / "q.json", ONE)
    ran = cli("evaluate", VLM, "--tasks", f"{file}:exact", "-o", tmp_path)
    assert ran.status == 1
    assert "exists and is not the folder of an evaluation" in ran.err


def test_options_of_another_tool(tmp_path: Path) -> None:
    for more, told in (
        (("--print-command",), "--print-command is for another tool"),
        (("--kit", "x"), "--kit is for another tool"),
        (("--environment", "x"), "--environment is for another tool"),
        (("--", "--limit", "5"), "--limit 5 are for another tool"),
    ):
        assert told in refused(VLM, "--tasks", "REC", "-o", tmp_path / "run", *more)
    assert "Missing option '-o'" in refused(VLM, "--tasks", "REC")
