"""Make what the local tasks of lmms-eval, lm-eval and VLMEvalKit are about: merged models of the demo, and questions.

    python examples/local_tasks/make_data.py WORK [QUESTIONS]

WORK gets weight-0.0, weight-0.5, weight-1.0; pictures and questions.json; `lmms_eval` and `lm_eval`, which the two are
told with `--include_path`; and `vlmevalkit`, which VLMEvalKit is told with the variable LMUData.
"""

from __future__ import annotations

import base64
import csv
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import polymerge
from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.story import EXCLUDED, SHIPPED, SHIPPED_SEED
from polymerge.demo.world import load_handwriting, split_pairs

HERE = Path(__file__).parent
KIT_DATA = ("GQA_POLYMERGE", "MCQ_POLYMERGE")
"""VLMEvalKit's class for short answers marks those to a data set with GQA in its name by equality."""

LETTERS = "ABCD"


def make_models(work: Path) -> None:
    """The reasoning model's delta added to the VLM's text tower, with three weights."""
    vlm, base, reason = (str(SHIPPED / name) for name in ("vlm", "base", "reason"))
    for weight in (0.0, 0.5, 1.0):
        added = [(vlm, 1.0), (reason, weight)]
        recipe = {
            "merge_method": "task_arithmetic",
            "template": vlm,
            "base_model": base,
            "models": [{"model": model, "parameters": {"weight": number}} for model, number in added],
            "parts": ["text"],
            "exclude": EXCLUDED,
        }
        polymerge.merge(recipe, work / f"weight-{weight}", force=True)


def make_tasks(work: Path, count: int) -> None:
    """Evenly spaced test questions with their pictures, and each tool's task about them."""
    every = draw_questions(split_pairs(SHIPPED_SEED), load_handwriting(SHIPPED_SEED)[1], SHIPPED_SEED, pictures=1)
    chosen = every[:: max(1, len(every) // count)][:count]
    (work / "pictures").mkdir(parents=True, exist_ok=True)
    dice = random.Random(SHIPPED_SEED)
    answers = sorted({question.answer for question in every})
    records = []
    for number, question in enumerate(chosen):
        picture = (work / "pictures" / f"{number}.png").resolve()
        Image.fromarray(question.picture).save(picture)
        alike = [one for one in answers if one != question.answer and _form(one) == _form(question.answer)]
        wrong = dice.sample(alike, len(LETTERS) - 1)
        options = dice.sample([question.answer, *wrong], len(LETTERS))
        records.append(
            {
                "question_id": number,
                "image": str(picture),
                "scene": " ".join(question.sentence),
                "text": question.prompt,
                "answer": question.answer,
                "choices": options,
            }
        )
    file = (work / "questions.json").resolve()
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    for tool in ("lmms_eval", "lm_eval"):
        shutil.copytree(HERE / tool, work / tool, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        for task in (work / tool).glob("*.yaml"):
            task.write_text(task.read_text(encoding="utf-8").replace("QUESTIONS", str(file)), encoding="utf-8")
    for name in KIT_DATA:
        write_table(work / "vlmevalkit" / f"{name}.tsv", records, choices="MCQ" in name)


def _form(answer: str) -> list[bool]:
    """What tells kinds of answers apart: how many words they have, and which of them are numbers."""
    return [word.isdigit() for word in answer.split()]


def write_table(file: Path, records: Sequence[dict[str, Any]], *, choices: bool) -> None:
    """The questions as VLMEvalKit has them, with four options each or without."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer", *(LETTERS if choices else "")])
        for one in records:
            image = base64.b64encode(Path(one["image"]).read_bytes()).decode()
            said = [LETTERS[one["choices"].index(one["answer"])], *one["choices"]] if choices else [one["answer"]]
            rows.writerow([one["question_id"], image, one["text"], *said])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    make_tasks(place, int(sys.argv[2]) if len(sys.argv) > 2 else 300)
    make_models(place)
