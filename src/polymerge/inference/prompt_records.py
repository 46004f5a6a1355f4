"""A prompt, and its parsing from a record of a prompt file or a row of a dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import RecipeError, collecting, did_you_mean, refuse, refuse_if_any, shown
from polymerge.inference.images import ImageSource, StoredImage

__all__ = ["ALIASES", "Names", "Prompt", "names_from", "prompt_of", "refuse_unknown"]


@dataclass(frozen=True)
class Prompt:
    """A question to a model.

    id      unique among the prompts; an integer or a string, as in the file
    text    the question, without image placeholders: the chat template adds them
    images  absolute paths, in the model's order; or images in rows of a dataset, which
            `polymerge.inference.prompts.materialise` writes to files
    answer  the correct answer, or several, for scorers; None if there is none
    """

    id: int | str
    text: str
    images: tuple[ImageSource, ...] = ()
    answer: Any = None


ALIASES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "text": ("text", "question", "prompt"),
    "image": ("image",),
    "images": ("images",),
    "answer": ("answer", "answers"),
    "conversations": ("conversations",),
}
"""The fields of a record and their aliases in files."""

_READ_PAST = ("category", "metadata")
"""Fields that are accepted and ignored."""

Names = Mapping[str, tuple[str, ...]]
"""The name of each field in a file."""

_MOST_OF_A_PATH = 500  # characters in a message
_MARK = re.compile(r"<image>\s*")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


def names_from(fields: Mapping[str, str] | None) -> Names:
    """The name of each field: from `fields`, else by its aliases.

    raises RecipeError, or Refused for several, if a field is unknown.
    """
    given = fields or {}
    refuse_if_any(
        RecipeError(f"fields: '{field}' is none of a prompt.{did_you_mean(str(field), ALIASES)}")
        if field not in ALIASES
        else RecipeError(f"fields: {field}: {name!r} is not the name of a field")
        for field, name in given.items()
        if field not in ALIASES or not isinstance(name, str) or not name
    )
    names = {**ALIASES, **{field: (name,) for field, name in given.items()}}
    for one, other in (("text", "conversations"), ("conversations", "text"), ("image", "images"), ("images", "image")):
        if one in given and other not in given:
            names[other] = ()  # who names one of the two does not want the other
    return names


def refuse_unknown(record: Iterable[str], names: Names, where: str) -> None:
    """Refuse every unknown field of a record."""
    known = {*_READ_PAST, *(name for group in (*names.values(), *ALIASES.values()) for name in group)}
    for name in record:
        if name not in known:
            refuse(RecipeError(f"{where}: '{name}' is no field of a prompt.{did_you_mean(name, known)}"))


def prompt_of(record: Mapping[str, Any], number: int, names: Names, folder: Path | None, where: str) -> Prompt | None:
    """Build the prompt of a record; None, with the problems refused, if it is invalid.

    record  images are paths, or `StoredImage` in a list
    number  its id if the record has none
    folder  base of relative image paths; None if there is none
    where   the record's name in messages
    """
    with collecting() as wrong:
        found = _values(record, names, where)
        name = found.get("id", number)
        text, answer = _text_and_answer(found, names, where)
        images = _images(found, folder, where)
        if isinstance(text, str):
            text = _without_marks(text, images, where)
        if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
            refuse(RecipeError(f"{where}: id: {name!r} is neither a whole number nor a text"))
    return None if wrong else Prompt(name, str(text), images or (), answer)


def _values(record: Mapping[str, Any], names: Names, where: str) -> dict[str, Any]:
    """The values of a record by field."""
    found = {}
    for field, accepted in names.items():
        present = [name for name in accepted if name in record]
        if len(present) > 1:
            refuse(RecipeError(f"{where}: has both {' and '.join(present)}. Say which is the {field} with fields."))
        if present:
            found[field] = record[present[0]]
    return found


def _text_and_answer(found: Mapping[str, Any], names: Names, where: str) -> tuple[Any, Any]:
    """Question and answer, from text fields or the first turns of a conversation."""
    text, answer = found.get("text"), found.get("answer")
    if "conversations" in found:
        if "text" in found:
            refuse(RecipeError(f"{where}: has a text and conversations, which have one, too. Say one of them."))
        text, said = _first_turns(found["conversations"], where)
        return text, said if answer is None else answer
    if "text" not in found:
        accepted = ", ".join((*names["text"], *names["conversations"]))
        refuse(RecipeError(f"{where}: has no text: none of the fields {accepted} is there"))
    elif not isinstance(text, str):
        refuse(RecipeError(f"{where}: text: {text!r} is not a text"))
    return text, answer


def _first_turns(turns: Any, where: str) -> tuple[str | None, str | None]:
    """The first question and the first answer of a conversation."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        refuse(RecipeError(f'{where}: conversations is not a list of {{"from": "...", "value": "..."}}'))
        return None, None
    asked = [turn["value"] for turn in turns if turn["from"] in _ASKS]
    answered = [turn["value"] for turn in turns if turn["from"] in _ANSWERS]
    if not asked:
        refuse(RecipeError(f"{where}: conversations has no turn from {' or '.join(_ASKS)}"))
        return None, None
    return asked[0], answered[0] if answered else None


def _without_marks(text: str, images: tuple[ImageSource, ...] | None, where: str) -> str:
    text, marks = _MARK.subn("", text)
    if marks and images is not None and marks != len(images):
        refuse(RecipeError(f"{where}: text has {marks} <image> mark(s), and the record {len(images)} image(s)"))
    if not text.strip():
        refuse(RecipeError(f"{where}: text is empty"))
    return text.strip() if marks else text


def _images(found: Mapping[str, Any], folder: Path | None, where: str) -> tuple[ImageSource, ...] | None:
    """The images of a record with absolute paths; None if any is refused."""
    one, several = found.get("image"), found.get("images")
    with collecting() as wrong:
        if one is not None and several is not None:
            refuse(RecipeError(f"{where}: has both image and images. Say one of them."))
        if several is not None and not isinstance(several, list):
            raise RecipeError(f"{where}: images: {several!r} is not a list of paths")
        listed = several if several is not None else one if isinstance(one, list) else [] if one is None else [one]
        images = tuple(_placed(image, folder, where) for image in listed)
    return None if wrong else images


def _placed(image: Any, folder: Path | None, where: str) -> ImageSource:
    if isinstance(image, StoredImage):
        return image
    if not isinstance(image, str) or not image:
        refuse(RecipeError(f"{where}: image: {image!r} is not a path"))
        return ""
    if folder is None and not os.path.isabs(image):  # noqa: PTH117 (a text, as the file has it)
        refuse(RecipeError(f"{where}: image: '{image}' is relative to nothing. Say image_folder."))
        return ""
    path = os.path.abspath(os.path.join(folder or "", image))  # noqa: PTH100, PTH118 (links are not followed)
    if not os.path.isfile(path):  # noqa: PTH113 (this one answers for every text)
        refuse(RecipeError(f"{where}: image: there is no file '{shown(path, _MOST_OF_A_PATH)}'"))
    return path
