"""`polymerge score`, and what it says about files that are not as they should be."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from polymerge.cli.evaluate import score
from polymerge.errors import RecipeError, Refused
from polymerge.evaluation.mm_mergebench.tasks import TASKS, task_named
from polymerge.evaluation.predictions import MOST_SHOWN
from polymerge.evaluation.scorers import SCORERS
from polymerge.evaluation.scoring import score_predictions, score_questions
from score_files import NEEDS_CAPTIONS, NEEDS_JAVA, written


def run(*arguments):
    return CliRunner().invoke(score, [str(argument) for argument in arguments])


def files(folder, lines, questions, name="val.json"):
    """A predictions file of the given lines and an annotation folder with one question file."""
    predictions = folder / "merge.jsonl"
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    predictions.write_bytes(text.encode() if isinstance(text, str) else text)
    (folder / name).write_text(questions if isinstance(questions, str) else json.dumps(questions), encoding="utf-8")
    return predictions, folder


QUESTIONS = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": "two"}]
LINES = [{"question_id": 1, "text": "Red"}, {"question_id": 2, "text": "three"}]


def problems_of(folder, lines, questions=QUESTIONS, task="VQAv2", name="val.json"):
    with pytest.raises(Refused) as refused:
        score_predictions(task, *files(folder, lines, questions, name))
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=[NEEDS_CAPTIONS, NEEDS_JAVA] if t == "VizWiz" else []) for t in ("REC", "VizWiz")]
)
def test_json(task, tmp_path):
    predictions, annotations, expected = written(task, None, tmp_path)
    done = run("--task", task, "--predictions", predictions, "--annotations", annotations, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {"score", "as_published", "right", "total"} <= report.keys()
    sound = expected["sound"]
    assert report["published_total"] == report["total"]
    assert report["score"] == pytest.approx(sound.get("accuracy", sound.get("Average")), abs=1e-6)
    published = expected["reference"]
    assert report["as_published"] == pytest.approx(published.get("printed", published.get("Average")), abs=1e-6)
    assert len(report["samples"]) == len(report["ids"]) == report["total"]


def test_a_message_of_a_failure_is_wrong_and_told(tmp_path):
    # the scorer takes what contains an answer, and the message contains "API"
    failed = {"question_id": 1, "text": "Failed to obtain answer via API."}
    questions = [{"question_id": 1, "answer": "api"}, {"question_id": 2, "answer": "two"}]
    predictions, _ = files(tmp_path, [failed, {"question_id": 2, "text": "It is two"}], questions, "q.json")
    found = score_questions("containment", predictions, tmp_path / "q.json")
    assert (found.score, found.samples) == (50.0, (0.0, 1.0))
    assert found.notes == (
        f"{predictions}: 1 line with a tool's message of a failure for a text: no answer, and wrong: 1",
    )
    task = score_predictions("VQAv2", *files(tmp_path, [failed, {"question_id": 2, "text": "two"}], questions))
    assert (task.score, task.metrics["answered"], task.metrics["accuracy_over_answered"]) == (50.0, 1, 100.0)


def test_both_scores_are_shown_where_they_differ(tmp_path):
    predictions, annotations, _ = written("REC", None, tmp_path)
    arguments = ("--task", "rec", "--predictions", predictions, "--annotations", annotations)
    first = "REC: 50 questions, 33 right\n"
    sound = "  score: 66.00 (answered 50, accuracy_over_answered 66.00)\n"
    assert run(*arguments).stdout == f"{first}{sound}  as published: 36.00\n"
    assert run(*arguments, "--as-published").stdout == f"{first}  as published: 36.00\n{sound}"


def test_one_score_is_shown_where_they_agree(tmp_path):
    predictions, annotations = files(tmp_path, LINES, QUESTIONS)
    done = run("--task", "VQAv2", "--predictions", predictions, "--annotations", annotations)
    assert "score: 50.00" in done.stdout
    assert "as published" not in done.stdout


def test_where_the_script_stops_the_reason_is_shown(tmp_path):
    predictions, annotations, _ = written("IconQA", "id_type", tmp_path)
    arguments = ("--task", "IconQA", "--predictions", predictions, "--annotations", annotations)
    done = run(*arguments)
    assert done.exit_code == 0
    assert "  as published: none\n" in done.stdout
    reason = f"{predictions}:1: question_id is '1501', the annotations have 1501; eval_iconqa.py stops (KeyError)"
    assert reason in done.stdout
    failed = run(*arguments, "--as-published")
    assert isinstance(failed.exception, RecipeError)
    assert reason in str(failed.exception)


def test_any_question_file_by_a_scorer(tmp_path):
    questions = [
        {"question_id": "a", "answers": [{"answer": "blue"}] * 10},
        {"question_id": "b", "answers": ["red", "red", "red", 7]},
        {"question_id": "c", "answers": ["x", "y", "y", "y"]},
    ]
    lines = [
        {"question_id": "a", "text": "Blue."},
        {"question_id": "b", "text": "7"},
        {"question_id": "z", "text": "x"},
    ]
    predictions, folder = files(tmp_path, lines, questions)
    done = run("--scorer", "vqa", "--predictions", predictions, "--annotations", folder / "val.json", "--json")
    report = json.loads(done.stdout)
    assert report["samples"] == pytest.approx([1.0, 0.25, 0.0])  # three leavings out leave one who agrees
    assert report["as_published"] is None
    assert "has no published script" in report["reason"]
    assert len(report["notes"]) == 2
    boxes = [{"question_id": 1, "answer": [0, 0, 1, 1]}, {"question_id": 2, "answer": "[0, 0, 1, 1]"}]
    lines = [{"question_id": 1, "text": "[0, 0, 1, 1]"}, {"question_id": 2, "text": "0 0 1 .5"}]
    predictions, folder = files(tmp_path, lines, boxes)
    done = run("--scorer", "box_iou", "--predictions", predictions, "--annotations", folder / "val.json")
    assert "score: 100.00" in done.stdout


def test_a_command_line_that_says_too_little_or_too_much(tmp_path):
    predictions, annotations = files(tmp_path, LINES, QUESTIONS)
    rest = ("--predictions", predictions, "--annotations", annotations)
    for said in ((), ("--task", "VQAv2", "--scorer", "exact")):
        assert "--task TASK or --scorer NAME" in str(run(*said, *rest).exception)
    assert "Did you mean 'VQAv2'?" in str(run("--task", "VQA2", *rest).exception)
    assert "Did you mean 'exact'?" in str(run("--scorer", "exat", *rest).exception)


def test_every_problem_is_named_at_once(tmp_path):
    lines = (
        '{"question_id": 1, "text": "red"}\n'
        "[1]\n"
        '{"question_id": true, "text": "red"}\n'
        '{"question_id": 1, "text": 7}\n'
        '{"question_id": 1, "text": "a", "text": "b"}\n'
        '{"question_id": 1, "text": "\\ud800"}\n'
        '{"text": "red"}\n'
        '{"question_id": 1, "text": "cut o'
    )
    questions = [
        {"question_id": 1, "answer": "red"},
        {"question_id": "1", "answer": "red"},
        {"question_id": 2, "answer": None},
        {"question_id": 3, "answer": float("nan")},
        {"question_id": 1.5, "answer": "red"},
        7,
    ]
    found = problems_of(tmp_path, lines, questions)
    said = {
        "merge.jsonl:2: expected object, got array": "",
        "merge.jsonl:3: question_id: expected int | str, got true": "",
        "merge.jsonl:4: text: expected str | null, got 7": "null stands for no answer",
        "merge.jsonl:5: cannot be read: 'text' appears twice": "",
        "merge.jsonl:6: holds half of a surrogate pair": "",
        "merge.jsonl:7: question_id is missing": "",
        "merge.jsonl:8: is not JSON: Unterminated string": "may have been cut off",
        "val.json: item 2 (question_id '1'): the same question_id as item 1": "",
        "val.json: item 5: question_id: expected int | str, got 1.5": "",
        "val.json: item 6: expected object, got 7": "",
        "val.json: item 3 (question_id 2): answer is None": "",
        "val.json: item 4 (question_id 3): answer is nan": "",
    }
    assert len(found) == len(said)
    for problem, (start, rest) in zip(found, said.items(), strict=True):
        assert start in problem
        assert rest in problem


def test_a_file_of_the_wrong_kind_is_not_listed_line_by_line(tmp_path):
    found = problems_of(tmp_path, "nonsense\n" * 500)
    assert len(found) == MOST_SHOWN + 1
    assert "480 more problems like these" in found[-1]
    assert "is a JSON array, not a line of JSON for each prediction" in problems_of(tmp_path, '[{"question_id": 1}]')[0]


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(Refused) as refused:
        score_predictions("VizWiz", tmp_path / "none.jsonl", tmp_path)
    said = [str(problem) for problem in refused.value.problems]
    assert "none.jsonl: cannot be read: No such file" in said[0]
    assert "val.json: is not there. VizWiz needs val.json and val_coco_type.json" in said[1]
    assert "val_coco_type.json: is not there" in said[2]
    (tmp_path / "latin.jsonl").write_bytes(b'{"question_id": 1, "text": "red"}\n{"text": "\xe9"}\n')
    (tmp_path / "val.json").write_text(json.dumps(QUESTIONS))
    with pytest.raises(Refused, match=r"latin.jsonl:2: is not UTF-8: byte 44 is 0xe9"):
        score_predictions("VQAv2", tmp_path / "latin.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ("{", "val.json: is not JSON: Expecting property name"),
        ("[]", "val.json: is an empty array, not a list of questions"),
        ('{"a": 1}', "val.json: expected array, got object"),
        ("null", "val.json: expected array, got null"),
        ("[" * 100_000, "val.json: is nested too deeply"),
    ],
)
def test_broken_question_files(tmp_path, questions, said):
    (found,) = problems_of(tmp_path, LINES, questions)
    assert said in found


def test_broken_boxes(tmp_path):
    boxes = ["[0, 0, 1, 1]", "[0, 0, 1]", None, [0, 0, 1, 1], "1e999999999 0 0 0"]
    questions = [{"question_id": place, "answer_bbox": box, "size": [4, 3]} for place, box in enumerate(boxes)]
    found = problems_of(tmp_path, LINES, questions, "REC", "test.json")
    assert [problem.partition("item ")[2][0] for problem in found] == ["2", "3", "5"]
    del questions[1:3], questions[-1], questions[0]["size"]
    lines = [{"question_id": 3, "text": "[0.0, 0.0, 1.0, 1.0]"}, {"question_id": 0, "text": "0 0 1 1"}]
    scored = score_predictions("REC", *files(tmp_path, lines, questions, "test.json"))
    assert scored.score == 100
    assert "size is None, not width and height" in scored.reason


def test_broken_science_questions(tmp_path):
    good = {"answer": 1, "choices": ["a", "b"], "image": None}
    (tmp_path / "problems.json").write_text(
        json.dumps({"1": good, "2": good | {"answer": 2}, "3": good | {"answer": "B"}, "4": 7})
    )
    found = problems_of(tmp_path, LINES, {"test": ["1", "2", "3", "4", "5", "1"]}, "ScienceQA", "pid_splits.json")
    assert "'test' lists 1 more than once" in found[0]
    assert "problem '2', which pid_splits.json lists under 'test', has the answer 2 of 2 choices" in found[1]
    assert "has the answer 'B' of 2 choices" in found[2]
    assert "has the answer None" in found[3]
    assert "problem '5', which pid_splits.json lists under 'test', is not there" in found[4]
    assert (
        "'test' lists no question_id" in problems_of(tmp_path, LINES, {"test": []}, "ScienceQA", "pid_splits.json")[0]
    )
    lines = [{"question_id": "1", "text": "B"}]
    scored = score_predictions("ScienceQA", *files(tmp_path, lines, {"test": ["1"]}, "pid_splits.json"))
    assert (scored.score, scored.as_published, scored.metrics["image_accuracy"]) == (100, None, None)
    assert "prompt is not there" in scored.reason


def test_broken_reference_captions(tmp_path):
    questions = [
        {"question_id": 1, "image": "./a/1.jpg"},
        {"question_id": 2, "image": "elsewhere/1.jpg"},
        {"question_id": 3, "image": "9.jpg"},
        {"question_id": 4},
    ]
    (tmp_path / "val.json").write_text(json.dumps(questions))
    images = [{"id": 1, "file_name": "a/1.jpg"}, {"id": 1, "file_name": "b"}, {"id": 2}]
    captions = [{"image_id": 1, "caption": "a dog"}, {"image_id": 7, "caption": "a cat"}, {"image_id": 1}]
    coco = {"images": images, "annotations": captions}
    found = problems_of(tmp_path, LINES, coco, "VizWiz", "val_coco_type.json")
    said = [
        "image 2: the id 1 is there twice",
        "image 3: file_name is missing",
        "annotation 2: there is no image 7",
        "annotation 3: caption is missing",
        "item 2 (question_id 2): the image 'elsewhere/1.jpg' is already that of",
        "item 3 (question_id 3): the image '9.jpg' is no image of",
        "item 4 (question_id 4): has no image",
    ]
    assert len(found) == len(said)
    assert all(words in problem for words, problem in zip(said, found, strict=True))
    none = {"images": images[:1], "annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(questions[:1]))
    assert "no image has a reference caption" in problems_of(tmp_path, LINES, none, "VizWiz", "val_coco_type.json")[0]
    assert "expected object, got array" in problems_of(tmp_path, LINES, [], "VizWiz", "val_coco_type.json")[0]


def test_the_table_of_tasks():
    assert len(TASKS) == 12
    assert sum(task.seen for task in TASKS.values()) == 8
    for name, task in TASKS.items():
        assert task.name == name
        assert task.scorer in SCORERS
        assert task_named(name.lower()) is task
        assert task.max_new_tokens in (128, 1024)
    assert task_named("VizWiz-caption").name == "VizWiz"
    assert task_named("Grounding").name == "REC"
