"""Find a task's files and images, and turn its questions into prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polymerge.errors import RecipeError
from polymerge.evaluation.mm_mergebench.annotations import Item
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.predictions import some_of
from polymerge.inference.prompts import Prompt

__all__ = ["Question", "image_root", "questions_of", "task_folder"]

_GROUPS = ("seen_data", "unseen_data", "instructions")
_IMAGES = ("", "images", "datasets", "data")
_MARK = re.compile(r"<image>\s*")
_CHOOSE = "Choose an answer from the choices below: "


def task_folder(task: Task, data: Path) -> Path:
    """Find the folder that holds a task's question file.

    Candidates are `Seen_data/<Task>` and `Unseen_data/<Task>` (the hub), `instructions/<Task>` (the scripts) and
    `<Task>` in `data`, or `data` itself if it has that name; a task's folder has any of its names, in any case. The
    file may be up to two folders deeper.

    raises RecipeError if there is none or there are several.
    """
    names = {name.casefold() for name in (task.name, *task.folders)}
    above = [data, *(child for child in _folders(data) if child.name.casefold() in _GROUPS)]
    named = [child for place in above for child in _folders(place) if child.name.casefold() in names]
    if data.resolve().name.casefold() in names:
        named.append(data)
    found = [holder for folder in named for holder in _holders(folder, task.questions)]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{task.questions} lies in {' and in '.join(map(str, found))}. Give one of the two"
    elif named:
        what = f"there is no {task.questions} in {' and '.join(map(str, named))}. Is all of it downloaded?"
    else:
        there = [child.name for place in above for child in _folders(place) if child.name.casefold() not in _GROUPS]
        what = (
            f"{data} has no Seen_data/{task.name}, Unseen_data/{task.name}, instructions/{task.name} or {task.name}; "
            f"its folders are {some_of(sorted(there), 16) or 'none'}. Give the folder of the data with `data`, or name "
            "only the tasks that are there with `tasks`"
        )
    raise RecipeError(f"{task.name}: {what}")


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(child for child in place.iterdir() if child.is_dir())
    except OSError:
        return []


def _holders(folder: Path, name: str) -> list[Path]:
    for pattern in (name, f"*/{name}", f"*/*/{name}"):
        found = sorted(file.parent for file in folder.glob(pattern) if file.is_file())
        if found:
            return found
    return []


def image_root(items: Sequence[Item], data: Path, folder: Path, told: Path | None, name: str) -> Path:
    """Find the folder that a task's image paths are relative to: among likely ones, the one with most of the images.

    items   of the question file
    told    the folder, if the user names it
    folder  the folder of the question file
    name    the task's name in messages

    raises RecipeError if no image exists: then the folder is wrong, not a single image.
    """
    images = [image for item in items for image in _images_of(item) or ()]
    likely = [told] if told is not None else [
        place / inside for place in (data, folder, folder.parent, data.parent) for inside in _IMAGES
    ]  # fmt: skip
    places = list(dict.fromkeys(Path(os.path.abspath(place)) for place in likely))  # noqa: PTH100 (links are not followed)
    hits = {place: sum(os.path.isfile(os.path.join(place, image)) for image in images) for place in places}  # noqa: PTH113, PTH118
    best = max(places, key=lambda place: hits[place])
    if images and not hits[best]:
        raise RecipeError(
            f"{name}: none of its {len(images)} images, such as '{images[0]}', lies in "
            f"{some_of([str(place) for place in places if place.is_dir()], 8)}. Say what the paths are relative to "
            "with `image_folder`"
        )
    return best


@dataclass(frozen=True)
class Question:
    """A question of a file.

    written  its text as in a file of predictions, with the image placeholder
    prompt   the prompt for the model; None if it cannot be asked, for the reason in `reason`
    """

    id: str | int
    written: str
    prompt: Prompt | None
    reason: str = ""


def questions_of(items: Sequence[Item], root: Path, task: Task | None = None) -> list[Question]:
    """Turn the items of a question file into questions, in the same order.

    Image placeholders are removed from the texts: the model's chat template puts them where it was trained to see them.

    root  base of relative image paths; missing images are detected when they are opened
    task  the task whose form the text is given; None leaves it unchanged, and images are optional
    """
    form = task.form if task else "optional-image"
    names = sorted({answer for item in items if isinstance(answer := item.fields.get("answer"), str)})
    return [_question(item, root, form, names) for item in items]


def _question(item: Item, root: Path, form: str, names: Sequence[str]) -> Question:
    text, images = item.fields.get("text"), _images_of(item)
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


def _images_of(item: Item) -> list[str] | None:
    """The image paths of an item as written, empty without an image; None if they are not paths."""
    value = item.fields.get("image")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    return listed if all(isinstance(image, str) and image and "\0" not in image for image in listed) else None
