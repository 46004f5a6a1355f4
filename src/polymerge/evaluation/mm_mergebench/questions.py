"""From a question file to prompts: what a model is asked, and which questions cannot be asked at all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polymerge.evaluation.mm_mergebench.annotations import Item
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.inference.prompts import Prompt

__all__ = ["Question", "images_of", "questions_of"]

_MARK = re.compile(r"<image>\s*")
_CHOOSE = "Choose an answer from the choices below: "


@dataclass(frozen=True)
class Question:
    """A question of a file.

    written  its text as a file of predictions has it, with the image mark
    prompt   what the model is asked; None where it cannot be asked, and `reason` says why
    """

    id: str | int
    written: str
    prompt: Prompt | None
    reason: str = ""


def images_of(item: Item) -> list[str] | None:
    """The image paths of an item as written, none where it has no image; None where they are no paths."""
    value = item.fields.get("image")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    return listed if all(isinstance(image, str) and image and "\0" not in image for image in listed) else None


def questions_of(items: Sequence[Item], root: Path, task: Task | None = None) -> list[Question]:
    """The questions of a file, in its order.

    Image marks are taken out of the texts: the model's chat template puts them where it was taught to see them.

    root  what image paths are relative to; an image that is not there is found missing when it is opened
    task  whose form the text is brought into; None leaves it as it is, and an image is not needed
    """
    form = task.form if task else "optional-image"
    names = sorted({answer for item in items if isinstance(answer := item.fields.get("answer"), str)})
    return [_question(item, root, form, names) for item in items]


def _question(item: Item, root: Path, form: str, names: Sequence[str]) -> Question:
    text, images = item.fields.get("text"), images_of(item)
    written = text if isinstance(text, str) else ""
    if images and form == "optional-image" and "<image>" not in written:
        written = f"<image>\n{written}"  # by the mark the published script knows the questions that have an image
    asked = _MARK.sub("", text).strip() if isinstance(text, str) else ""
    reason = ""
    if not asked:
        reason = f"text is {text!r:.60}, not what can be asked"
    elif images is None:
        reason = f"image is {item.fields.get('image')!r:.60}, not a path"
    elif not images and form != "optional-image":
        reason = "has no image"
    if reason or images is None:
        return Question(item.id, written, None, reason)
    if form == "choices":
        asked = f"{asked.splitlines()[0]}\n{_CHOOSE}{', '.join(names)}"
    paths = tuple(os.path.abspath(os.path.join(root, image)) for image in images)  # noqa: PTH100, PTH118
    return Question(item.id, written, Prompt(item.id, asked, paths))
