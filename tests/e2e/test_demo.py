"""The demo's world, its shipped checkpoints, and a short run of its story."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("altair")

from PIL import Image  # noqa: E402
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration  # noqa: E402

from paths import ROOT  # noqa: E402
from polymerge.demo import shipped, story, train  # noqa: E402
from polymerge.demo import trained_models as models  # noqa: E402
from polymerge.demo.digit_questions import draw_questions, score_vlm, share  # noqa: E402
from polymerge.demo.train import Lesson, base_lesson, reason_lesson, vlm_lesson  # noqa: E402
from polymerge.demo.world import (  # noqa: E402  # noqa: E402
    ARITHMETIC,
    PERCEPTION,
    WORDS,
    Pairs,
    Scene,
    answer,
    ask,
    draw,
    draw_scene,
    load_handwriting,
    spell,
    split_pairs,
    tell,
)
from running import cli  # noqa: E402


@pytest.mark.parametrize("seed", range(5))
def test_eighteen_pairs_are_seen_and_hold_every_digit(seed: int) -> None:
    pairs = split_pairs(seed)
    assert (len(pairs.seen), len(pairs.unseen)) == (18, 82)
    assert len(pairs.every) == len(set(pairs.every)) == 100
    assert {digit for pair in pairs.seen for digit in pair} == set(range(10))
    assert {(b, a) for a, b in pairs.seen} == set(pairs.seen)


def test_training_and_held_out_scans_are_disjoint() -> None:
    training, held_out = load_handwriting(0)
    rows = [{row for of_digit in part.source for row in of_digit} for part in (training, held_out)]
    assert rows[0].isdisjoint(rows[1])
    assert [len(part) for part in rows] == [1300, 497]
    assert all(len(scans) > 20 for scans in held_out.by_digit)


@pytest.mark.parametrize("lesson", [base_lesson, vlm_lesson])
def test_base_and_vlm_are_never_taught_arithmetic_on_unseen_pairs(
    lesson: Callable[[random.Random, Pairs], Lesson],
) -> None:
    pairs, dice = split_pairs(3), random.Random(3)
    asked = [x for x in (lesson(dice, pairs) for _ in range(20_000)) if x.kind in ARITHMETIC]
    assert {x.scene.digits for x in asked if x.scene} == set(pairs.seen)
    assert len(asked) > 2000


def test_the_reasoning_model_is_taught_arithmetic_on_all_pairs() -> None:
    pairs, dice = split_pairs(3), random.Random(3)
    asked = [x for x in (reason_lesson(dice, pairs) for _ in range(20_000)) if x.kind in ARITHMETIC]
    assert {x.scene.digits for x in asked if x.scene} == set(pairs.every)


def test_answers_are_right() -> None:
    scene = Scene((3, 8), ("red", "blue"), (0, 2))
    said = {kind: " ".join(answer(kind, scene)) for kind in (*ARITHMETIC, *PERCEPTION)}
    assert said == {
        "sum": "11",
        "difference": "5",
        "larger": "8",
        "smaller": "3",
        "read": "3 8",
        "top digit": "3",
        "bottom digit": "8",
        "top colour": "red",
        "bottom colour": "blue",
        "how many red": "1",
    }


def test_every_word_is_in_the_vocabulary_and_scenes_in_words_tell_all() -> None:
    dice = random.Random(0)
    for _ in range(300):
        scene = draw_scene((dice.randrange(10), dice.randrange(10)), dice)
        sentence, grid = tell(scene, dice), spell(scene, dice)
        for words in (sentence, grid):
            assert set(words) <= set(WORDS)
            assert {*map(str, scene.digits), *scene.colours} <= set(words)
        assert len(grid) == 16
    assert {word for kind in (*ARITHMETIC, *PERCEPTION) for word in ask(kind)} <= set(WORDS)


def test_the_world_is_the_same_every_time() -> None:
    _, held_out = load_handwriting(1)
    first, second = (draw_questions(split_pairs(1), held_out, 1, pictures=1) for _ in range(2))
    other = draw_questions(split_pairs(2), held_out, 2, pictures=1)
    assert [q.scene for q in first] == [q.scene for q in second]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(first, second, strict=True))
    assert [q.scene for q in first] != [q.scene for q in other]
    # pinned: with another random generator the shipped checkpoints would be asked about another world
    assert split_pairs(1).seen[:5] == ((0, 3), (0, 6), (1, 3), (2, 5), (2, 8))


def test_training_sees_what_the_processor_makes() -> None:
    """Training builds its batches by itself, for speed; they must be what a user's processor builds."""
    pairs, dice = split_pairs(0), random.Random(0)
    _, held_out = load_handwriting(0)
    lesson = vlm_lesson(dice, pairs)
    assert lesson.scene
    picture = draw(lesson.scene, held_out, dice)
    processor = models.load_processor(story.SHIPPED / "vlm")
    content = [{"type": "image"}, {"type": "text", "text": " ".join(ask(lesson.kind))}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(images=[Image.fromarray(picture)], text=[text], return_tensors="pt")
    taught = train.encode([lesson], with_image=True)
    prompt = made["input_ids"].shape[1]
    assert torch.equal(made["input_ids"], taught["input_ids"][:, :prompt])
    assert (taught["labels"][:, :prompt] == -100).all()
    assert (taught["labels"][:, prompt:] == taught["input_ids"][:, prompt:]).all()
    assert torch.allclose(made["pixel_values"], train.pixels([picture]), atol=1e-6)


def test_training_runs_through_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SCHEDULE", {stage: (2, rate) for stage, (_, rate) in train.SCHEDULE.items()})
    monkeypatch.setattr(train, "BATCH", 8)
    for run in ("first", "second"):
        train.train_all(tmp_path / run, seed=5, say=lambda _: None)
    for name in ("base", "reason", "vlm"):
        first, second = (tmp_path / run / name / "model.safetensors" for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        shipped = {file.name for file in (story.SHIPPED / name).iterdir()}
        assert {file.name for file in first.parent.iterdir()} == shipped


def test_standard_errors_know_that_questions_on_one_pair_belong_together() -> None:
    _, held_out = load_handwriting(0)
    exam = [q for q in draw_questions(split_pairs(0), held_out, 0, pictures=4) if q.kind == "sum"]
    by_pair = [float(sum(q.scene.digits) % 2) for q in exam]
    alternating = [float(place % 2) for place in range(len(exam))]
    assert share(alternating, exam).value == 0.5
    assert share(by_pair, exam).error > 3 * share(alternating, exam).error


@pytest.mark.parametrize("name", ["base", "reason", "vlm"])
def test_shipped_checkpoints_load_completely(name: str) -> None:
    kind: Any = LlavaForConditionalGeneration if name == "vlm" else LlamaForCausalLM
    folder = story.SHIPPED / name
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shipped = sum(file.stat().st_size for file in story.SHIPPED.rglob("*") if file.is_file())
    assert shipped < 6_000_000


def test_the_three_text_towers_differ() -> None:
    base, reason = (models.load(LlamaForCausalLM, story.SHIPPED / name).model for name in ("base", "reason"))
    vlm = models.load(LlavaForConditionalGeneration, story.SHIPPED / "vlm").model.language_model
    towers = [dict(model.named_parameters()) for model in (base, reason, vlm)]
    for name, tensor in towers[0].items():
        rows = len(tensor)
        assert not torch.equal(tensor, towers[1][name]), name
        assert not torch.equal(tensor, towers[2][name][:rows]), name


def test_a_short_run_of_the_story(tmp_path: Path) -> None:
    said: list[str] = []
    results = story.run(tmp_path, weights=(0.8,), pictures=1, say=said.append)
    rows = {(row["method"], row["weight"]): row for row in results["rows"]}
    assert set(rows) == {("none", 0.0), ("task_arithmetic", 0.8), ("random", 0.8), ("linear", 0.1), ("linear", 0.2)}
    merged, plain, control = rows["task_arithmetic", 0.8], rows["none", 0.0], rows["random", 0.8]
    assert plain["perception"]["value"] > 0.9
    assert merged["unseen"]["value"] > plain["unseen"]["value"] + 0.02
    assert merged["gain"]["value"] > control["gain"]["value"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo.json").is_file()
    assert any("random delta" in line for line in said)
    assert results["choice"]["chosen"] == 0.8  # of three weights the middle one is all that can be chosen
    assert set(results["choice"]["by labels"]) == {"0", "0.8"}
    assert (tmp_path / "search" / "search.json").is_file()
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "Content-Security-Policy" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"merges", "searches", "scores", "knockouts"} <= told.keys(), sorted(told)
    _, held_out = load_handwriting(story.SHIPPED_SEED)
    exam = draw_questions(split_pairs(story.SHIPPED_SEED), held_out, story.SHIPPED_SEED, pictures=1)
    folder = tmp_path / "reason-0.8"
    model: Any = models.load(LlavaForConditionalGeneration, folder)
    marks = score_vlm(model, models.load_processor(folder), exam)
    assert sum(m for m, q in zip(marks, exam, strict=True) if q.group == "unseen") == pytest.approx(
        merged["unseen"]["value"] * merged["unseen"]["count"]
    )


def test_the_control_is_as_far_from_the_base_as_the_reasoning_model(tmp_path: Path) -> None:
    base, reason = story.SHIPPED / "base", story.SHIPPED / "reason"
    story.write_control(base, reason, tmp_path, 0)
    start, goal, control = (models.load(LlamaForCausalLM, folder).state_dict() for folder in (base, reason, tmp_path))
    for name, tensor in start.items():
        wanted, got = (goal[name] - tensor).norm(), (control[name] - tensor).norm()
        assert got == pytest.approx(wanted.item(), rel=0.02), name


def test_without_the_repository_the_demo_says_where_its_models_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "demo" / "shipped.py"))
    monkeypatch.chdir(ROOT / "tests")
    assert shipped.shipped_models().samefile(story.SHIPPED)
    monkeypatch.chdir(tmp_path)
    said = cli("demo")
    assert said.status == 1
    assert "clone it and run `make demo` there" in said.err
    assert "`--train`" in said.err
