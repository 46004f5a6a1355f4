"""What is right, read from a task's annotation files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.json_files import Broken, json_of, kind_of, shortened, text_of_file
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.scorers.boxes import parsed_box

__all__ = ["Item", "Truth", "answers_in", "question_items", "read_json", "read_truth"]


@dataclass(frozen=True)
class Item:
    """A question as its file has it: where it is, its question_id as written, all its fields."""

    where: str
    id: str | int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Truth:
    """What the scorer compares with, in the order of the annotations.

    ids         question_ids as text
    references  one for each id, as the task's scorer takes it
    items       one for each id, as written: what the published scripts see
    images      captions only: every image's reference captions, by its id, in file order
    """

    ids: tuple[str, ...]
    references: tuple[Any, ...]
    items: tuple[Item, ...]
    images: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


NO_TRUTH = Truth((), (), ())


def read_truth(task: Task, folder: Path, problems: list[PolymergeError]) -> Truth:
    """A task's truth from its annotation folder; all that is wrong with the files is added to `problems`."""
    wrong = [
        RecipeError(
            f"{folder / name}: is not there. {task.name} needs {' and '.join(task.files)} in the annotation folder."
        )
        for name in task.files
        if not (folder / name).is_file()
    ]
    if wrong:
        problems += wrong
        return NO_TRUTH
    if task.kind == "letter":
        return _letters(folder / "problems.json", folder / "pid_splits.json", problems)
    path = folder / task.questions
    items = question_items(path, problems)
    if task.kind == "captions":
        from polymerge.evaluation.mm_mergebench.captions import caption_truth

        return caption_truth(path, items, folder / task.truth[0], problems)
    found: list[PolymergeError] = []
    references = [_box(item, found) if task.kind == "box" else _answer(item, found) for item in items]
    problems += shortened(found, path)
    return Truth(tuple(str(item.id) for item in items), tuple(references), tuple(items))


def read_json(path: Path, problems: list[PolymergeError]) -> Any:
    """A file's JSON value, or None with a problem."""
    try:
        return json_of(text_of_file(path))
    except Broken as error:
        problems.append(RecipeError(f"{path}: {error}. Download it again."))
    except RecipeError as error:
        problems.append(error)
    return None


def question_items(path: Path, problems: list[PolymergeError]) -> list[Item]:
    """The questions of a file in the LLaVA format: a list of objects, each with a question_id of its own.

    A file that is called .jsonl has an object a line instead.
    """
    before = len(problems)
    value = _lines(path, problems) if path.suffix == ".jsonl" else read_json(path, problems)
    if len(problems) > before:
        return []
    if not isinstance(value, list) or not value:
        what = "an empty array" if value == [] else kind_of(value)
        problems.append(RecipeError(f"{path}: is {what}, not a list of questions. Is it the right file?"))
        return []
    items: list[Item] = []
    first: dict[str, str] = {}
    wrong: list[PolymergeError] = []
    for place, fields in enumerate(value, 1):
        where = f"{path}: item {place}"
        name = fields.get("question_id") if isinstance(fields, dict) else None
        if isinstance(name, bool) or not isinstance(name, str | int):
            wrong.append(RecipeError(f"{where}: has no question_id that is a text or a whole number"))
            continue
        where = f"{where} (question_id {name!r})"
        if str(name) in first:
            wrong.append(RecipeError(f"{where}: the same question_id as {first[str(name)]}; which of them is right?"))
            continue
        first[str(name)] = f"item {place}"
        items.append(Item(where, name, fields))
    problems += shortened(wrong, path)
    return items


def _lines(path: Path, problems: list[PolymergeError]) -> list[Any]:
    """The JSON value on each line of a file; blank lines are passed over."""
    found: list[Any] = []
    wrong: list[PolymergeError] = []
    try:
        for number, line in enumerate(text_of_file(path).split("\n"), 1):
            if line.strip():
                try:
                    found.append(json_of(line))
                except Broken as error:
                    wrong.append(RecipeError(f"{path}:{number}: {error}"))
    except RecipeError as error:
        wrong.append(error)
    problems += shortened(wrong, path)
    return found


def answers_in(item: Item, problems: list[PolymergeError]) -> list[str]:
    """The texts under `answers`, or the one under `answer`, of an item; numbers are read as they are written."""
    value = item.fields.get("answers", item.fields.get("answer"))
    values = value if isinstance(value, list) and value else [value]
    texts = [_text(one.get("answer") if isinstance(one, dict) else one) for one in values]
    if all(text is not None for text in texts):
        return [text for text in texts if text is not None]
    problems.append(RecipeError(f"{item.where}: answer is {value!r:.60}, not a text or a number"))
    return [""]


def _answer(item: Item, problems: list[PolymergeError]) -> str:
    text = _text(item.fields.get("answer"))
    if text is None:
        problems.append(
            RecipeError(f"{item.where}: answer is {item.fields.get('answer')!r:.60}, not a text or a number")
        )
    return text or ""


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return str(value)


def _box(item: Item, problems: list[PolymergeError]) -> str:
    value = item.fields.get("answer_bbox")
    text = value if isinstance(value, str) else str(value) if isinstance(value, list) else ""
    if parsed_box(text) is None:
        problems.append(RecipeError(f"{item.where}: answer_bbox is {value!r:.60}, not four numbers"))
    return text


def _letters(path: Path, splits: Path, problems: list[PolymergeError]) -> Truth:
    before = len(problems)
    every, split = read_json(path, problems), read_json(splits, problems)
    if len(problems) > before:
        return NO_TRUTH
    names: list[Any] = split["test"] if isinstance(split, dict) and isinstance(split.get("test"), list) else []
    if not names or not all(isinstance(name, str) for name in names):
        problems.append(RecipeError(f"{splits}: has no 'test' that lists question_ids as texts. Is it the right file?"))
    if not isinstance(every, dict):
        problems.append(RecipeError(f"{path}: is {kind_of(every)}, not an object of problems. Is it the right file?"))
    if len(problems) > before:
        return NO_TRUTH
    wrong: list[PolymergeError] = []
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        wrong.append(RecipeError(f"{splits}: 'test' lists {', '.join(twice[:5])} more than once"))
    items: list[Item] = []
    references: list[str] = []
    for name in names:
        problem = every.get(name)
        answer = problem.get("answer") if isinstance(problem, dict) else None
        choices = problem.get("choices") if isinstance(problem, dict) else None
        most = len(choices) if isinstance(choices, list) else 26
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < min(most, 26):
            what = "is not there" if problem is None else f"has the answer {answer!r:.60} of {most} choices"
            wrong.append(RecipeError(f"{path}: problem '{name}', which {splits.name} lists under 'test', {what}"))
            continue
        items.append(Item(f"{path}: problem '{name}'", name, problem))
        references.append("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[answer])
    problems += shortened(wrong, path)
    return Truth(tuple(str(item.id) for item in items), tuple(references), tuple(items))
