"""What the task does with a question: open its picture, mark its answer."""

from __future__ import annotations

from typing import Any

from PIL import Image


def picture(question: dict[str, Any]) -> list[Any]:
    """The pictures that are shown."""
    return [Image.open(question["image"]).convert("RGB")]


def mark(question: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Right where the words are equal."""
    return {"exam_accuracy": float(answers[0].split() == question["answer"].split())}
