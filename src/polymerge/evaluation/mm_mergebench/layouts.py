"""Where the benchmark's files lie: in the layout of the data set on the hub, or in that of the paper's scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.predictions import some_of

__all__ = ["image_root", "task_folder"]

_GROUPS = ("seen_data", "unseen_data", "instructions")
_IMAGES = ("", "images", "datasets", "data")


def task_folder(task: Task, data: Path, problems: list[PolymergeError]) -> Path | None:
    """The folder that holds a task's question file; None, and a problem, where there is none or there are several.

    Looked for are `Seen_data/<Task>` and `Unseen_data/<Task>` (the hub), `instructions/<Task>` (the scripts) and
    `<Task>` in `data`, or `data` itself where it is called so; a task's folder has any of its names, in any case. The
    file may lie up to two folders deeper.
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
        problems.append(
            RecipeError(
                f"{task.name}: {task.questions} lies in {' and in '.join(map(str, found))}. Give one of the two"
            )
        )
    elif named:
        where = " and ".join(map(str, named))
        problems.append(RecipeError(f"{task.name}: there is no {task.questions} in {where}. Is all of it downloaded?"))
    else:
        there = [child.name for place in above for child in _folders(place) if child.name.casefold() not in _GROUPS]
        problems.append(
            RecipeError(
                f"{task.name}: {data} has no Seen_data/{task.name}, Unseen_data/{task.name}, instructions/{task.name} "
                f"or {task.name}; its folders are {some_of(sorted(there), 16) or 'none'}. Give the folder of the data "
                "with --data, or name only the tasks that are there with --tasks"
            )
        )
    return None


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


def image_root(
    images: Sequence[str], data: Path, folder: Path, told: Path | None, name: str, problems: list[PolymergeError]
) -> Path:
    """What a task's image paths are relative to: of the likely folders the one in which most of them lie.

    images  as the question file has them
    told    the folder, where the user says it
    folder  of the question file

    A problem where not one image is there: then the folder is wrong, and not an image.
    """
    likely = [told] if told is not None else [
        place / inside for place in (data, folder, folder.parent, data.parent) for inside in _IMAGES
    ]  # fmt: skip
    places = list(dict.fromkeys(Path(os.path.abspath(place)) for place in likely))  # noqa: PTH100 (links are not followed)
    hits = {place: sum(os.path.isfile(os.path.join(place, image)) for image in images) for place in places}  # noqa: PTH113, PTH118
    best = max(places, key=lambda place: hits[place])
    if images and not hits[best]:
        problems.append(
            RecipeError(
                f"{name}: none of its {len(images)} images, such as '{images[0]}', lies in "
                f"{some_of([str(place) for place in places if place.is_dir()], 8)}. Say what the paths are relative to "
                "with --image-folder"
            )
        )
    return best
