"""Every task and every variant of its files: the sound score, and the number that the published script gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from polymerge.errors import Refused
from polymerge.evaluation.mm_mergebench.annotations import read_truth
from polymerge.evaluation.mm_mergebench.published import Published, as_published
from polymerge.evaluation.mm_mergebench.tasks import TASKS
from polymerge.evaluation.predictions import Predictions, read_predictions
from polymerge.evaluation.scorers import SCORERS
from polymerge.evaluation.scorers.caption_metrics import METRICS, WITHOUT_JAVA, caption_metrics, ptb_tokens
from polymerge.evaluation.scorers.vqa import evalai, punctuation_then_words
from polymerge.evaluation.scoring import score_predictions, score_questions
from score_files import CASES, FOLDER, NEEDS_JAVA, written

GENERAL = json.loads((FOLDER / "general.json").read_text(encoding="utf-8"))
CAPTIONS = [name for name, task in TASKS.items() if task.kind == "captions"]
REFUSED = {"bad_json_line": "5: is not JSON: Unterminated string", "no_text_key": "3: text is missing"}


def marked(task, *others):
    return pytest.param(task, *others, marks=[NEEDS_JAVA] if task in CAPTIONS else [], id="-".join((task, *others)))


VARIANTS = [(task, variant) for task, case in CASES.items() for variant in case["variants"]]
SCORED = [marked(*pair) for pair in VARIANTS if pair[1] not in REFUSED]


def check_sound(found, sound):
    if "Average" in sound:
        assert found.score == pytest.approx(sound["Average"], abs=1e-6)
        assert dict(found.metrics) == pytest.approx({name: sound[name] for name in METRICS}, abs=1e-6)
        assert len(found.samples) == found.total
        return
    assert found.score == pytest.approx(sound["accuracy"], abs=1e-9)
    assert (found.right, found.total) == (sound["right"], sound["n"])
    assert sum(found.samples) == sound["right"]
    assert found.metrics["answered"] == sound["answered"]
    assert found.metrics["accuracy_over_answered"] == pytest.approx(sound["accuracy_over_answered"], abs=1e-9)
    assert found.metrics.get("normalised_accuracy") == pytest.approx(sound.get("normalised_accuracy"), abs=1e-9)
    assert found.metrics.get("image_accuracy") == pytest.approx(sound.get("img_accuracy"), abs=1e-9)


def check_published(found, reference):
    if "error" in reference:
        assert found.as_published is None
        assert "stops" in found.reason
        assert found.published_metrics == {}
        return
    assert found.reason is None
    if "Average" in reference:
        assert found.as_published == pytest.approx(reference["Average"], abs=1e-6)
        assert dict(found.published_metrics) == pytest.approx({name: reference[name] for name in METRICS}, abs=1e-6)
        return
    assert f"{found.as_published:.2f}" == f"{reference['printed']:.2f}"
    if "image_printed" in reference:
        assert f"{found.published_metrics['image_accuracy']:.2f}" == f"{reference['image_printed']:.2f}"


@pytest.mark.parametrize("task", [marked(task) for task in TASKS])
def test_a_task(task, tmp_path):
    predictions, annotations, expected = written(task, None, tmp_path)
    found = score_predictions(task, predictions, annotations)
    check_sound(found, expected["sound"])
    check_published(found, expected["reference"])


@pytest.mark.parametrize(("task", "variant"), SCORED)
def test_a_variant(task, variant, tmp_path):
    predictions, annotations, expected = written(task, variant, tmp_path)
    found = score_predictions(task, predictions, annotations)
    if expected["sound"] is not None:
        check_sound(found, expected["sound"])
    check_published(found, expected["reference"])


@pytest.mark.parametrize(("task", "variant"), [pair for pair in VARIANTS if pair[1] in REFUSED])
def test_a_variant_that_nobody_can_score(task, variant, tmp_path):
    predictions, annotations, expected = written(task, variant, tmp_path)
    with pytest.raises(Refused, match=f"merge.jsonl:{REFUSED[variant]}"):
        score_predictions(task, predictions, annotations)
    assert expected["sound"] is None
    assert "error" in expected["reference"]


@pytest.mark.parametrize("task", [task for task in TASKS if "items" in CASES[task]])
def test_every_item_alone(task, tmp_path):
    predictions, annotations, expected = written(task, None, tmp_path)
    found = score_predictions(task, predictions, annotations)
    assert found.ids == tuple(str(name) for name, _, _ in expected["items"])
    assert found.samples == tuple(float(sound) for _, _, sound in expected["items"])
    if task == "ScienceQA":
        return  # its script goes through the problems, not through the lines
    lines, truth = read_predictions(predictions), read_truth(TASKS[task], annotations)
    by_id = lines.by_id()
    for place, (name, right, _) in enumerate(expected["items"]):
        alone = Predictions(predictions, (by_id[str(name)],), ())
        against = replace(truth, items=truth.items[place : place + 1])
        assert as_published(TASKS[task], alone, against) == Published(100.0 * right, right, 1), name


NOTED = {
    "blank_line": "1 line blank, passed over: 5",
    "duplicates_conflicting": "where the last line counts: 1, 3",
    "unknown_id": "of a question_id that is not annotated, ignored: ",
    "null_text": "null for a text: no answer, and wrong: 3",
    "missing": "annotated questions have no line and count as wrong",
    "empty_file": "annotated questions have no line and count as wrong",
    "image_without_reference": "have no reference caption and are left out: 5",
}


@pytest.mark.parametrize(("task", "variant"), [marked(*pair) for pair in VARIANTS if pair[1] in NOTED])
def test_what_is_odd_is_noted(task, variant, tmp_path):
    predictions, annotations, _ = written(task, variant, tmp_path)
    found = score_predictions(task, predictions, annotations)
    assert any(NOTED[variant] in note for note in found.notes)
    assert all(str(tmp_path) in note for note in found.notes)


@pytest.mark.parametrize("task", CAPTIONS)
def test_captions_on_ready_tokens_need_no_java(task, monkeypatch):
    monkeypatch.setenv("PATH", "")
    case = CASES[task]
    tokens = dict(case["ptb"]) | dict(case.get("ptb_in_place", []))
    coco = next(content for content in case["annotations"].values() if isinstance(content, dict))
    said = [tokens[json.loads(line)["text"]] for line in case["lines"]]
    truths = [[tokens[a["caption"]] for a in coco["annotations"] if a["image_id"] == i["id"]] for i in coco["images"]]
    found = caption_metrics(said, truths, WITHOUT_JAVA)
    assert {name: 100 * metric.score for name, metric in found.items()} == pytest.approx(
        {name: case["reference"][name] for name in WITHOUT_JAVA}, abs=1e-6
    )


@pytest.mark.parametrize("task", CAPTIONS)
def test_captions_without_java_have_no_score_and_say_so(task, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    predictions, annotations, expected = written(task, None, tmp_path)
    found = score_predictions(task, predictions, annotations)
    assert (found.score, found.as_published, found.right, found.samples) == (None, None, None, None)
    assert "no `java` on the PATH" in found.reason
    assert any("not the Penn Treebank one" in note for note in found.notes)
    assert found.metrics["METEOR"] is None
    for name in WITHOUT_JAVA:  # near, not equal: the tokenizer is another
        assert found.metrics[name] == pytest.approx(expected["sound"][name], rel=0.05)


@NEEDS_JAVA
@pytest.mark.parametrize("task", CAPTIONS)
def test_the_tokenizer_is_the_one_that_is_published(task):
    pairs = [(text, tokens) for text, tokens in CASES[task]["ptb"] if text]
    assert ptb_tokens([text for text, _ in pairs]) == [tokens for _, tokens in pairs]


SOFT = {
    "vqa": ("vqa_soft_10", "lmms_eval_vqav2"),
    "vqa_official": ("vqa_soft_10", "gt_vision_lab"),
    "vqa_evalai": ("vqa_soft_10", "evalai_leave_one_out"),
    "anls": ("anls", "paper_strict"),
    "anls_lmms_eval": ("anls", "lmms_eval"),
}


@pytest.mark.parametrize("scorer", SOFT)
def test_soft_scorers(scorer, tmp_path):
    case, rule = SOFT[scorer]
    (tmp_path / "lines.jsonl").write_text("\n".join(GENERAL[case]["lines"]), encoding="utf-8")
    (tmp_path / "questions.json").write_text(json.dumps(GENERAL[case]["annotations"]), encoding="utf-8")
    found = score_questions(scorer, tmp_path / "lines.jsonl", tmp_path / "questions.json")
    assert found.samples == pytest.approx([item[rule] for item in GENERAL[case]["items"]], abs=1e-12)
    assert found.score / 100 == pytest.approx(GENERAL[case]["mean"][rule], abs=1e-12)
    assert found.as_published is None
    assert scorer in SCORERS


@pytest.mark.parametrize("case", GENERAL["vqa_normaliser"], ids=lambda case: repr(case["text"])[:40])
def test_answers_are_rewritten_in_two_ways(case):
    assert evalai(case["text"]) == case["evalai"]
    assert punctuation_then_words(case["text"]) == case["punctuation_then_digit_article"]
