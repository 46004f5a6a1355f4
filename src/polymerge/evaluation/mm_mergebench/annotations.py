"""Read a task's annotation files: answers, boxes, options' letters, reference captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import isfinite
from pathlib import Path
from posixpath import basename, normpath
from typing import Any, TypeVar

import msgspec

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import checked, read_json, read_text
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.predictions import at_most_shown, some_of
from polymerge.evaluation.scorers.answers import parsed_box
from polymerge.inference.json_lines import json_lines

__all__ = ["Item", "Truth", "answers_in", "question_items", "read_truth", "truth_of"]

T = TypeVar("T")

_AGAIN = "Is it the right file? If so, download it again."


class _Question(msgspec.Struct):
    """The field that every item of a question file needs; scorers use the others as written."""

    question_id: str | int


class _Image(msgspec.Struct):
    """An image of a COCO file."""

    id: str | int
    file_name: str


class _Caption(msgspec.Struct):
    """A caption of a COCO file."""

    image_id: str | int
    caption: str


class _Coco(msgspec.Struct):
    """A COCO file of captions."""

    images: list[Any]
    annotations: list[Any]


class _Splits(msgspec.Struct):
    """ScienceQA's splits."""

    test: list[str]


@dataclass(frozen=True)
class Item:
    """A question of a file: its location, its question_id as written, all its fields."""

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
    images: Mapping[str | int, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def truth_of(items: Sequence[Item], references: Sequence[Any]) -> Truth:
    """Build the truth of items that each have a reference."""
    return Truth(tuple(str(item.id) for item in items), tuple(references), tuple(items))


_NO_TRUTH = Truth((), (), ())


def read_truth(task: Task, folder: Path) -> Truth:
    """Read a task's truth from its annotation folder; broken or missing files are refused."""
    with collecting() as wrong:
        for name in task.files:
            if not (folder / name).is_file():
                files = " and ".join(task.files)
                refuse(
                    RecipeError(f"{folder / name}: is not there. {task.name} needs {files} in the annotation folder.")
                )
    if wrong:
        return _NO_TRUTH
    if task.kind == "letter":
        return _letters(folder / "problems.json", folder / "pid_splits.json")
    path = folder / task.questions
    items = question_items(path)
    if task.kind == "captions":
        return _captions(path, items, folder / task.truth[0])
    with at_most_shown(path):
        references = [_box(item) if task.kind == "box" else _answer(item) for item in items]
    return truth_of(items, references)


def _read(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file; returns None after refusing it."""
    try:
        return read_json(path, kind, encoding="utf-8-sig", most=RECORDS_BYTES, error=RecipeError, then=_AGAIN)
    except PolymergeError as error:
        refuse(error)
    return None


def _each(values: Sequence[Any], kind: type[T], where: str) -> Iterator[tuple[str, Any, T]]:
    """Iterate over the values of the right type: place, value as written, value converted; others are refused."""
    for number, value in enumerate(values, 1):
        place = f"{where} {number}"
        try:
            found = checked(value, kind, place, error=RecipeError, then="Correct it, or download the file again.")
        except PolymergeError as error:
            refuse(error)
        else:
            yield place, value, found


# question files


def question_items(path: Path) -> list[Item]:
    """Read a question file in the LLaVA format: a list of objects with unique question_ids (or ids).

    A .jsonl file has one object per line instead. Broken items are refused.
    """
    items: list[Item] = []
    first: dict[str, str] = {}
    with at_most_shown(path) as wrong:
        if path.suffix == ".jsonl":
            text = read_text(path, encoding="utf-8-sig", most=RECORDS_BYTES, error=RecipeError, then=_AGAIN)
            values: list[Any] | None = [value for _, value in json_lines(BytesIO(text.encode()), str(path))]
        else:
            values = _read(path, list[Any])
        if values == [] and not wrong:
            raise RecipeError(f"{path}: is an empty array, not a list of questions. Is it the right file?")
        # polymerge's own prompt files may say `id`
        values = [
            {"question_id": one["id"], **one} if isinstance(one, dict) and "id" in one else one for one in values or ()
        ]
        for place, fields, question in _each(values, _Question, f"{path}: item"):
            name = question.question_id
            where = f"{place} (question_id {name!r})"
            if str(name) in first:
                other = first[str(name)]
                refuse(RecipeError(f"{where}: the same question_id as {other}; which of them is right?"))
                continue
            first[str(name)] = place.removeprefix(f"{path}: ")
            items.append(Item(where, name, fields))
    return items


def answers_in(item: Item) -> list[str]:
    """The texts under `answers` of an item, or the one under `answer`; numbers are used as written."""
    value = item.fields.get("answers", item.fields.get("answer"))
    values = value if isinstance(value, list) and value else [value]
    texts = [_text(one.get("answer") if isinstance(one, dict) else one) for one in values]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        refuse(RecipeError(f"{item.where}: answer is {value!r:.60}, not a text or a number"))
    return known


def _answer(item: Item) -> str:
    value = item.fields.get("answer")
    text = _text(value)
    if text is None:
        refuse(RecipeError(f"{item.where}: answer is {value!r:.60}, not a text or a number"))
    return text or ""


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return str(value)


def _box(item: Item) -> str:
    value = item.fields.get("answer_bbox")
    text = value if isinstance(value, str) else str(value) if isinstance(value, list) else ""
    if parsed_box(text) is None:
        refuse(RecipeError(f"{item.where}: answer_bbox is {value!r:.60}, not four numbers"))
    return text


# ScienceQA


def _letters(path: Path, splits: Path) -> Truth:
    every, split = _read(path, dict[str, Any]), _read(splits, _Splits)
    names = split.test if split else []
    if split and not names:
        refuse(RecipeError(f"{splits}: 'test' lists no question_id. Is it the right file?"))
    if every is None:
        return _NO_TRUTH
    items: list[Item] = []
    references: list[str] = []
    with at_most_shown(path):
        if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
            refuse(RecipeError(f"{splits}: 'test' lists {', '.join(twice[:5])} more than once"))
        for name in names:
            problem = every.get(name)
            fields = problem if isinstance(problem, dict) else {}
            answer, choices = fields.get("answer"), fields.get("choices")
            most = len(choices) if isinstance(choices, list) else 26
            if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < min(most, 26):
                what = "is not there" if problem is None else f"has the answer {answer!r:.60} of {most} choices"
                refuse(RecipeError(f"{path}: problem '{name}', which {splits.name} lists under 'test', {what}"))
                continue
            items.append(Item(f"{path}: problem '{name}'", name, fields))
            references.append("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[answer])
    return truth_of(items, references)


# captions


def _captions(path: Path, items: Sequence[Item], coco: Path) -> Truth:
    """Every image with a reference caption, in the order of the COCO file, with its captions.

    Questions are matched to images by file name: by the full path or, if that is unknown, by its last part. Images
    without a reference cannot be scored and are left out; images without a question have no prediction and are kept.

    path  the question file, whose items each name an image
    coco  the file with each image's captions
    """
    with collecting() as wrong:
        names, captions = _images(coco)
        question = _question_of_each(path, items, names, coco)
        scored = [image for image in names if captions[image]]
        if not scored and not wrong:
            refuse(RecipeError(f"{coco}: no image has a reference caption. Is it the right file?"))
    if wrong:
        return _NO_TRUTH
    notes = []
    if without := [str(image) for image in names if not captions[image]]:
        notes.append(f"{coco}: {len(without)} images have no reference caption and are left out: {some_of(without)}")
    if unasked := [str(image) for image in scored if image not in question]:
        notes.append(f"{path}: {len(unasked)} images have no question, so no caption: {some_of(unasked)}")
    found = [question.get(image, Item(f"{coco}: image {image!r}", f"image {image}", {})) for image in scored]
    return Truth(
        tuple(str(item.id) for item in found),
        tuple(captions[image] for image in scored),
        tuple(found),
        captions,
        tuple(notes),
    )


def _images(coco: Path) -> tuple[dict[str | int, str], dict[str | int, tuple[str, ...]]]:
    """Each image's file name and its captions, by its id."""
    names: dict[str | int, str] = {}
    captions: dict[str | int, list[str]] = {}
    with at_most_shown(coco):
        value = _read(coco, _Coco)
        for place, _, image in _each(value.images if value else (), _Image, f"{coco}: image"):
            if image.id in names:
                refuse(RecipeError(f"{place}: the id {image.id!r} is there twice"))
            names.setdefault(image.id, image.file_name)
            captions[image.id] = []
        for place, _, caption in _each(value.annotations if value else (), _Caption, f"{coco}: annotation"):
            if caption.image_id in captions:
                captions[caption.image_id].append(caption.caption)
            else:
                refuse(RecipeError(f"{place}: there is no image {caption.image_id!r}"))
    return names, {image: tuple(texts) for image, texts in captions.items()}


def _question_of_each(
    path: Path, items: Sequence[Item], names: Mapping[str | int, str], coco: Path
) -> dict[str | int, Item]:
    """The question of each image, by the image's id."""
    by_path, by_last_part = _by_name(names, normpath), _by_name(names, basename)
    found: dict[str | int, Item] = {}
    with at_most_shown(path):
        for item in items:
            file = item.fields.get("image")
            if not isinstance(file, str):
                refuse(RecipeError(f"{item.where}: has no image"))
                continue
            images = by_path.get(normpath(file)) or by_last_part.get(basename(file)) or []
            if len(images) != 1:
                many = f"{len(images)} images of {coco}" if images else f"no image of {coco}"
                refuse(RecipeError(f"{item.where}: the image '{file}' is {many}"))
            elif images[0] in found:
                other = found[images[0]].where
                refuse(RecipeError(f"{item.where}: the image '{file}' is already that of {other}"))
            else:
                found[images[0]] = item
    return found


def _by_name(names: Mapping[str | int, str], part: Callable[[str], str]) -> dict[str, list[str | int]]:
    found: dict[str, list[str | int]] = {}
    for image, name in names.items():
        found.setdefault(part(name), []).append(image)
    return found
