"""A search on the demo's models: pictures of two digits with questions, and the recipe that is searched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.story import EXCLUDED, SHIPPED, SHIPPED_SEED
from polymerge.demo.world import load_handwriting, split_pairs
from running import cli, recipe_file

VLM, BASE, REASON = (str(SHIPPED / name) for name in ("vlm", "base", "reason"))


def prompts_file(folder: Path, count: int = 24) -> Path:
    """Evenly spaced questions of the demo, as JSON lines beside its pictures."""
    questions = draw_questions(split_pairs(SHIPPED_SEED), load_handwriting(SHIPPED_SEED)[1], SHIPPED_SEED, pictures=1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, question in enumerate(questions[:: len(questions) // count][:count]):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
        lines.append({"id": number, "text": question.prompt, "image": f"{number}.png", "answer": question.answer})
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def recipe(method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    """The reasoning model's delta added to the VLM's text tower."""
    return {
        "merge_method": method,
        "template": VLM,
        "base_model": BASE,
        "models": [
            {"model": VLM, "parameters": {"weight": 1.0}},
            {"model": REASON, "parameters": {"weight": 0.5}},
        ],
        "parts": ["text"],
        "exclude": EXCLUDED,
        **more,
    }


def words(folder: Path, prompts: Path, *more: object, run: str = "run") -> Sequence[object]:
    """The words of a search command whose run lies in a folder."""
    file = folder / "recipe.yaml"
    if not file.exists():
        recipe_file(recipe(), file)
    return (
        "search", file, "--prompts", prompts, "--keep-template-weight", "-o", folder / run, "--max-new-tokens", "3",
        *more,
    )  # fmt: skip


def outcome(run: Path) -> dict[str, Any]:
    """What a run has found."""
    found: dict[str, Any] = json.loads((run / "search.json").read_text(encoding="utf-8"))
    return found


def done(*said: object) -> str:
    """Run a command that succeeds; what it prints."""
    ran = cli(*said)
    assert ran.status == 0, ran.err
    return ran.out


def refused(told: str, *said: object, status: int = 2) -> None:
    """Run a command that is refused, with these words."""
    ran = cli(*said)
    assert told in ran.err, ran.err
    assert ran.status == status
