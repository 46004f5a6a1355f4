"""Reference captions: a question file, which names an image each, and a COCO file, which has each image's captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from posixpath import basename, normpath
from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.json_files import shortened
from polymerge.evaluation.mm_mergebench.annotations import NO_TRUTH, Item, Truth, read_json
from polymerge.evaluation.predictions import some_of

__all__ = ["caption_truth"]


def caption_truth(path: Path, items: Sequence[Item], coco: Path, problems: list[PolymergeError]) -> Truth:
    """Every image that has a reference caption, in the order of the COCO file, with its captions.

    A question finds its image by file name, by the whole path or, where that is unknown, by its last part. Images
    without a reference cannot be scored and are left out; one without a question has no prediction and stays in.
    """
    before = len(problems)
    value = read_json(coco, problems)
    if len(problems) > before:
        return NO_TRUTH
    names, captions = _images(value, coco, problems)
    question = _questions(path, items, names, coco, problems)
    if len(problems) > before:
        return NO_TRUTH
    scored = [image for image in names if captions[image]]
    notes = []
    if without := [str(image) for image in names if not captions[image]]:
        notes.append(f"{coco}: {len(without)} images have no reference caption and are left out: {some_of(without)}")
    if unasked := [str(image) for image in scored if image not in question]:
        notes.append(f"{path}: {len(unasked)} images have no question, so no caption: {some_of(unasked)}")
    if not scored:
        problems.append(RecipeError(f"{coco}: no image has a reference caption. Is it the right file?"))
    found = [question.get(image, Item(f"{coco}: image {image!r}", f"image {image}", {})) for image in scored]
    return Truth(
        tuple(str(item.id) for item in found),
        tuple(captions[image] for image in scored),
        tuple(found),
        captions,
        tuple(notes),
    )


def _images(
    value: Any, coco: Path, problems: list[PolymergeError]
) -> tuple[dict[Any, str], dict[Any, tuple[str, ...]]]:
    """Each image's file name and its captions, by its id."""
    images = value.get("images") if isinstance(value, dict) else None
    annotations = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(images, list) or not isinstance(annotations, list):
        problems.append(RecipeError(f"{coco}: has no lists 'images' and 'annotations'. Is it a COCO caption file?"))
        return {}, {}
    wrong: list[PolymergeError] = []
    names: dict[Any, str] = {}
    for place, image in enumerate(images, 1):
        found = image if isinstance(image, dict) else {}
        if not _is_id(found.get("id")) or not isinstance(found.get("file_name"), str):
            wrong.append(RecipeError(f"{coco}: image {place}: needs an id and a file_name"))
        elif found["id"] in names:
            wrong.append(RecipeError(f"{coco}: image {place}: the id {found['id']!r} is there twice"))
        else:
            names[found["id"]] = found["file_name"]
    captions: dict[Any, list[str]] = {image: [] for image in names}
    for place, annotation in enumerate(annotations, 1):
        found = annotation if isinstance(annotation, dict) else {}
        if not _is_id(found.get("image_id")) or not isinstance(found.get("caption"), str):
            wrong.append(RecipeError(f"{coco}: annotation {place}: needs an image_id and a caption"))
        elif found["image_id"] not in captions:
            wrong.append(RecipeError(f"{coco}: annotation {place}: there is no image {found['image_id']!r}"))
        else:
            captions[found["image_id"]].append(found["caption"])
    problems += shortened(wrong, coco)
    return names, {image: tuple(texts) for image, texts in captions.items()}


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _questions(
    path: Path, items: Sequence[Item], names: dict[Any, str], coco: Path, problems: list[PolymergeError]
) -> dict[Any, Item]:
    """The question of each image, by the image's id."""
    whole = _by_name(names, normpath)
    last = _by_name(names, basename)
    wrong: list[PolymergeError] = []
    found: dict[Any, Item] = {}
    for item in items:
        file = item.fields.get("image")
        if not isinstance(file, str):
            wrong.append(RecipeError(f"{item.where}: has no image"))
            continue
        images = whole.get(normpath(file)) or last.get(basename(file)) or []
        if len(images) != 1:
            many = f"{len(images)} images of {coco}" if images else f"no image of {coco}"
            wrong.append(RecipeError(f"{item.where}: the image '{file}' is {many}"))
        elif images[0] in found:
            wrong.append(RecipeError(f"{item.where}: the image '{file}' is already that of {found[images[0]].where}"))
        else:
            found[images[0]] = item
    problems += shortened(wrong, path)
    return found


def _by_name(names: dict[Any, str], part: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for image, name in names.items():
        found.setdefault(part(name), []).append(image)
    return found
