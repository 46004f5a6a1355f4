"""Make what the task is about: merged checkpoints of the demo, and test questions with their pictures.

    python examples/lmms_eval_local_task/make_data.py WORK [QUESTIONS]

WORK gets weight-0.0, weight-0.5, weight-1.0, questions.json, pictures and task, which is what lmms-eval is told with
`--include_path`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

import polymerge
from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.story import EXCLUDED, SHIPPED, SHIPPED_SEED
from polymerge.demo.world import load_handwriting, split_pairs

TASK = Path(__file__).parent / "task"


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


def make_task(work: Path, count: int) -> None:
    """Evenly spaced test questions, and the task that names their file."""
    questions = draw_questions(split_pairs(SHIPPED_SEED), load_handwriting(SHIPPED_SEED)[1], SHIPPED_SEED, pictures=1)
    (work / "pictures").mkdir(parents=True, exist_ok=True)
    questions = []
    for number, question in enumerate(questions[:: max(1, len(questions) // count)][:count]):
        picture = (work / "pictures" / f"{number}.png").resolve()
        Image.fromarray(question.picture).save(picture)
        questions.append(
            {"question_id": number, "image": str(picture), "text": question.prompt, "answer": question.answer}
        )
    file = (work / "questions.json").resolve()
    file.write_text(json.dumps(questions, indent=1), encoding="utf-8")
    shutil.copytree(TASK, work / "task", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    named = work / "task" / "polymerge_exam.yaml"
    named.write_text(named.read_text(encoding="utf-8").replace("QUESTIONS", str(file)), encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    make_task(place, int(sys.argv[2]) if len(sys.argv) > 2 else 300)
    make_models(place)
