"""A language model into a vision-language model: by method and weight, beside a random delta and wrong bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM

from course import Course
from interview import TEXT, Interview
from polymerge.demo.digit_questions import score, told_in_words
from polymerge.demo.trained_models import load
from polymerge.demo.world import load_handwriting
from sizes import Size

__all__ = ["CONTROLS", "PLAIN", "delta_recipe", "into_vlm"]

PLAIN = "task_arithmetic"
"""The merge that others are compared with."""
DENSITY = 0.5  # of methods that keep a share of each delta
SHARES = (0.1, 0.2, 0.3)  # of the language model, where weights are averaged
CONTROLS = {
    "random delta": ("base", "random"),
    "base: sibling": ("sibling", "reason"),
    "base: ancestor": ("ancestor", "reason"),
}
"""By name the base and the model whose delta is merged."""


def delta_recipe(
    folder: Path, weight: Any, method: str = PLAIN, base: str = "base", other: str = "reason"
) -> dict[str, Any]:
    """Add so much of another model's delta to the text tower of the vision-language model."""
    models = {folder / "vlm": 1.0, folder / other: weight}
    return {
        "merge_method": method,
        "template": str(folder / "vlm"),
        "base_model": str(folder / base),
        "models": [{"model": str(model), "parameters": {"weight": own}} for model, own in models.items()],
        **({} if method == PLAIN else {"parameters": {"density": DENSITY}}),
        **TEXT,
    }


def into_vlm(course: Course, size: Size, folder: Path, _: Path) -> list[dict[str, Any]]:
    """What each merge answers, in pictures and in words, and before that what the language models do."""
    rows = [{"merge": f"{name}, in words", "weight": None, "exam": _in_words(course, size, folder / name)}
            for name in ("base", "reason")]  # fmt: skip
    with Interview(course, size, folder, delta_recipe(folder, 0.0)) as interview:
        delta = interview.merge(delta_recipe(folder, 1.0))
        for name, weight, recipe in _merges(folder, size):
            norm = interview.merge(recipe) / delta
            rows.append(
                {"merge": name, "weight": weight, "norm": norm, "dev": interview.dev(), "exam": interview.exam()}
            )
    return rows


def _merges(folder: Path, size: Size) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    yield "none", 0.0, delta_recipe(folder, 0.0)
    for method in (PLAIN, *size.searched):
        for weight in size.weights:
            yield method, weight, delta_recipe(folder, weight, method)
    for share in SHARES:
        averaged = {folder / "vlm": 1 - share, folder / "reason": share}
        models = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in averaged.items()]
        yield "linear", share, {"merge_method": "linear", "template": str(folder / "vlm"), "models": models, **TEXT}
    for name, (base, other) in CONTROLS.items():
        for weight in size.weights:
            yield name, weight, delta_recipe(folder, weight, base=base, other=other)


def _in_words(course: Course, size: Size, model: Path) -> dict[str, tuple[int, int]]:
    """What a language model answers to the same skills told in words."""
    llama, tokenizer, scans = load(LlamaForCausalLM, model), AutoTokenizer.from_pretrained(model), None
    found = {}
    for group in ("words", "order", "lists"):
        scans = scans or load_handwriting(course.seed)[1]
        questions = course.questions(group, size.exam[group], scans, "exam")
        marks = score(llama, tokenizer, told_in_words(tokenizer, questions), questions, 6)
        found[group] = sum(marks), len(marks)
    return found
