"""A record of a prompt file or a row of a dataset -> a prompt, or everything that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.inference.images import StoredImage
from polymerge.inference.prompt import Prompt

__all__ = ["ALIASES", "Names", "names_from", "prompt_of", "unknown_fields"]

ALIASES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "text": ("text", "question", "prompt"),
    "image": ("image",),
    "images": ("images",),
    "answer": ("answer", "answers"),
    "conversations": ("conversations",),
}
"""The fields of a record and what files call them."""

_READ_PAST = ("category", "metadata")
"""Fields that files may have and that say nothing to a model."""

Names = Mapping[str, tuple[str, ...]]
"""By field, what it is called here."""

_MARK = re.compile(r"<image>\s*")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


def names_from(fields: Mapping[str, str] | None) -> Names:
    """What each field is called: as `fields` says, else by its aliases.

    raises RecipeError for fields that are none, all at once.
    """
    problems: list[PolymergeError] = []
    names = dict(ALIASES)
    for field, name in (fields or {}).items():
        if field not in ALIASES:
            problems.append(RecipeError(f"fields: '{field}' is none of a prompt.{did_you_mean(str(field), ALIASES)}"))
        elif not isinstance(name, str) or not name:
            problems.append(RecipeError(f"fields: {field}: {name!r} is not the name of a field"))
        else:
            names[field] = (name,)
    for field, other in (("text", "conversations"), ("image", "images")):
        # who names one of the two does not want the other
        for named, left in ((field, other), (other, field)):
            if fields and named in fields and left not in fields:
                names[left] = ()
    refuse_if_any(problems)
    return names


def unknown_fields(record: Iterable[str], names: Names, where: str) -> list[PolymergeError]:
    """A problem for every field of a record that nothing reads."""
    known = {*_READ_PAST, *(name for group in (*names.values(), *ALIASES.values()) for name in group)}
    return [
        RecipeError(f"{where}: '{name}' is no field of a prompt.{did_you_mean(name, known)}")
        for name in record
        if name not in known
    ]


def prompt_of(
    record: Mapping[str, Any],
    number: int,
    names: Names,
    folder: Path | None,
    where: str,
    problems: list[PolymergeError],
) -> Prompt | None:
    """The prompt that a record is; None where it is none, and then `problems` has more than before.

    record  images are paths, or `StoredImage` in a list
    number  its id where it names none
    folder  what relative image paths are relative to; None where there is no such folder
    """
    wrong: list[str] = []
    found = _found(record, names, wrong)
    text, answer = found.get("text"), found.get("answer")
    if "conversations" in found:
        if "text" in found:
            wrong.append("has a text and conversations, which have one, too. Say one of them.")
        text, said = _turns(found["conversations"], wrong)
        answer = said if answer is None else answer
    elif "text" not in found:
        wrong.append(f"has no text: none of the fields {', '.join((*names['text'], *names['conversations']))} is there")
    elif not isinstance(text, str):
        wrong.append(f"text: {text!r} is not a text")
    images = _images(found, folder, wrong)
    if isinstance(text, str):
        text, marks = _MARK.subn("", text)
        text = text.strip() if marks else text
        if marks and images is not None and marks != len(images):
            wrong.append(f"text has {marks} <image> mark(s), and the record {len(images)} image(s)")
        if not text.strip():
            wrong.append("text is empty")
    name = found.get("id", number)
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        wrong.append(f"id: {name!r} is neither a whole number nor a text")
    problems += [RecipeError(f"{where}: {one}") for one in wrong]
    if wrong or not isinstance(text, str):
        return None
    return Prompt(name, text, images or (), answer)


def _found(record: Mapping[str, Any], names: Names, wrong: list[str]) -> dict[str, Any]:
    """The values that a record has, by field."""
    found = {}
    for field, accepted in names.items():
        present = [name for name in accepted if name in record]
        if len(present) > 1:
            wrong.append(f"has both {' and '.join(present)}. Say which is the {field} with fields.")
        if present:
            found[field] = record[present[0]]
    return found


def _turns(turns: Any, wrong: list[str]) -> tuple[str | None, str | None]:
    """What is asked first in a conversation, and what is answered first."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        wrong.append('conversations is not a list of {"from": "...", "value": "..."}')
        return None, None
    asked = [turn["value"] for turn in turns if turn["from"] in _ASKS]
    said = [turn["value"] for turn in turns if turn["from"] in _ANSWERS]
    if not asked:
        wrong.append(f"conversations has no turn from {' or '.join(_ASKS)}")
        return None, None
    return asked[0], said[0] if said else None


def _images(found: Mapping[str, Any], folder: Path | None, wrong: list[str]) -> tuple[str | StoredImage, ...] | None:
    """The images of a record, paths made absolute; None where they are wrong."""
    before = len(wrong)
    one, several = found.get("image"), found.get("images")
    if one is not None and several is not None:
        wrong.append("has both image and images. Say one of them.")
    if several is not None and not isinstance(several, list):
        wrong.append(f"images: {several!r} is not a list of paths")
        return None
    listed = several if several is not None else one if isinstance(one, list) else [] if one is None else [one]
    images: list[str | StoredImage] = []
    for image in listed:
        if isinstance(image, StoredImage):
            images.append(image)
        elif not isinstance(image, str) or not image:
            wrong.append(f"image: {image!r} is not a path")
        elif folder is None and not os.path.isabs(image):  # noqa: PTH117 (a text, as the file has it)
            wrong.append(f"image: '{image}' is relative to nothing. Say image_folder.")
        else:
            path = os.path.abspath(os.path.join(folder or "", image))  # noqa: PTH100, PTH118 (links are not followed)
            if not os.path.isfile(path):  # noqa: PTH113 (this one answers for every text)
                wrong.append(f"image: there is no file '{path}'")
            images.append(path)
    return tuple(images) if len(wrong) == before else None
