"""Read prompts from a file, a folder of images or a dataset, and draw a sample."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from polymerge.checkpoints.bounds import lines_of, open_regular
from polymerge.durable import make_folder
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse, refuse_if_any
from polymerge.inference.datasets import is_dataset, open_dataset, read_rows
from polymerge.inference.images import ImageSource, StoredImage, encode_png, verify_image, write_png
from polymerge.inference.json_lines import json_lines, json_list
from polymerge.inference.prompt_records import Names, Prompt, names_from, prompt_of, refuse_unknown
from polymerge.paths import given_path

__all__ = ["Prompt", "PromptSource", "check_images", "draw_prompts", "materialise", "read_prompts", "sample"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_START_BYTES = 1 << 16  # of a file, in which its first value begins
SHOWN = 50
"""Maximum number of problems that are listed; of further ones only the number is given."""

Placed = list[tuple[str, Prompt]]
"""Prompts, each with its location in the source."""

Id = TypeVar("Id", bound=int | str)
T = TypeVar("T")


@dataclass(frozen=True)
class PromptSource:
    """The source of prompts, and the number to draw.

    source        JSON lines, LLaVA's question format, a folder of images, or a dataset (see `read_prompts`)
    samples       number of prompts to draw; 0 for all
    seed          of the draw; AdaMMS's is 2
    question, split, fields, image_folder   as for `read_prompts`
    """

    source: str | os.PathLike[str]
    samples: int = 100
    seed: int = 2
    question: str | None = None
    split: str | None = None
    fields: Mapping[str, str] | None = None
    image_folder: str | os.PathLike[str] | None = None


def draw_prompts(source: PromptSource) -> list[Prompt]:
    """Read prompts, draw a sample, and check that their images can be opened; empty if anything is refused."""
    drawn: list[Prompt] = []
    with collecting() as wrong:
        if source.samples < 0:
            raise RecipeError(f"samples: {source.samples} is no number of prompts; 0 takes all")
        every = read_prompts(
            source.source, question=source.question, split=source.split, fields=source.fields,
            image_folder=source.image_folder,
        )  # fmt: skip
        if not wrong:
            by_id = {prompt.id: prompt for prompt in every}
            drawn = [by_id[one] for one in sample(list(by_id), source.samples, source.seed)]
            check_images(drawn)
    return [] if wrong else drawn


def sample(ids: Sequence[Id], count: int, seed: int = 2) -> list[Id]:
    """Sample `count` ids without replacement; all of them if there are no more, or if `count` is 0.

    AdaMMS (CVPR 2025), section 4.1: 100 prompts. Its code draws indices with Python's generator and seed 2; so does
    this, from the sorted ids, so that the file's order does not matter. Integers are sorted numerically,
    before strings.

    returns  in the order of the draw, as in the paper's code; sorted if all are taken
    """
    ordered = sorted(ids, key=lambda one: (isinstance(one, str), one))
    if not count or len(ordered) <= count:
        return ordered
    return [ordered[place] for place in random.Random(seed).sample(range(len(ordered)), count)]


def read_prompts(
    source: str | os.PathLike[str],
    *,
    question: str | None = None,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
) -> list[Prompt]:
    """Read prompts in the order of their source.

    A prompt has text (also called question or prompt), image (a path) or images (a list), id (also question_id; else
    its number, counted from 0) and answer (also answers); category and metadata are ignored. `<image>` placeholders are
    removed from the text: the images come first, in order. In a conversation (`conversations`) the first turn is
    the question, and the first reply the answer.

    source        JSON lines; a JSON list; a folder of images, sorted by name; a dataset: a folder that `datasets`
                  saved, a file or folder of parquet, or a hub id, `owner/name` or `owner/name@revision`
    question      the question about each image of a folder
    split         of a dataset; optional if there is only one
    fields        other names, as in {"text": "query"}; further columns of a dataset are ignored, further fields refused
    image_folder  base of relative image paths; by default the folder of the file or dataset

    raises RecipeError, or Refused for several, each with its line, row or item; MissingExtraError if a dataset is
    read without `datasets`.
    """
    names = names_from(fields)
    path = given_path(source)
    told = {"question": question, "split": split, "fields": fields, "image_folder": image_folder}
    images = None if image_folder is None else given_path(image_folder)
    if images is not None and not images.is_dir():
        raise RecipeError(f"image_folder: there is no folder '{images}'")
    if is_dataset(source):
        _refuse_others(source, "a dataset", told, ("split", "fields", "image_folder"))
        rows = open_dataset(source, split)
        read = partial(read_rows, source, rows, names, images)
    elif path.is_dir():
        _refuse_others(source, "a folder of images", told, ("question",))
        read = partial(_image_folder, path, question)
    elif path.is_file():
        _refuse_others(source, "a prompt file", told, ("fields", "image_folder"))
        read = partial(_prompt_file, path, names, images or path.parent)
    else:
        raise RecipeError(
            f"{source}: there is no such file or folder, and it is no hub id. Prompts are JSON lines, a JSON list, a "
            "folder of images or a dataset."
        )
    with collecting(needed=True) as problems:
        placed: Placed = read()
        _refuse_clashes(placed)
        if not placed and not problems:
            raise RecipeError(f"{source}: an empty list: there is no prompt in it")
        if len(problems) > SHOWN:
            problems[SHOWN:] = [RecipeError(f"{source}: {len(problems) - SHOWN} more such problems")]
    return [prompt for _, prompt in placed]


def check_images(prompts: Iterable[Prompt]) -> None:
    """Open the header of every image, once each.

    raises RecipeError, or Refused for several, if images are missing or broken; MissingExtraError without PIL.
    """
    first: dict[ImageSource, Prompt] = {}
    for prompt in prompts:
        for image in prompt.images:
            first.setdefault(image, prompt)
    broken: list[PolymergeError] = []
    for image, prompt in first.items():
        _opened(verify_image, image, prompt, broken)
    refuse(*broken)


def materialise(prompts: Sequence[Prompt], folder: str | os.PathLike[str]) -> list[Prompt]:
    """Write images in rows of datasets to `folder` as PNG; returns prompts whose images are all files.

    Sample first, so that only sampled images are written. Files are named after their content: an existing image
    is not written again. Paths are made absolute.

    raises RecipeError, or Refused for several, if images cannot be read; OutputError if the folder cannot be
    written.
    """
    # links are not followed
    target = Path(os.path.abspath(folder))  # noqa: PTH100
    broken: list[PolymergeError] = []

    def placed(image: ImageSource, prompt: Prompt) -> str:
        if isinstance(image, str):
            return os.path.abspath(image)  # noqa: PTH100
        data = _opened(encode_png, image, prompt, broken)
        return "" if data is None else str(write_png(data, target))

    if any(isinstance(image, StoredImage) for prompt in prompts for image in prompt.images):
        make_folder(target)
    written = [replace(prompt, images=tuple(placed(image, prompt) for image in prompt.images)) for prompt in prompts]
    refuse(*broken)
    return written


def _opened(
    read: Callable[[ImageSource], T], image: ImageSource, prompt: Prompt, broken: list[PolymergeError]
) -> T | None:
    """The result of reading an image; None if it is missing or broken."""
    try:
        return read(image)
    except PolymergeError:
        raise
    except Exception as error:  # PIL's formats raise whatever they like
        broken.append(RecipeError(f"prompt {prompt.id!r}: {image}: no image that can be read: {error}"))
        return None


def _refuse_others(source: object, kind: str, told: Mapping[str, object], useful: Sequence[str]) -> None:
    refuse_if_any(
        RecipeError(f"{name}: {source} is {kind}, for which it says nothing. Leave it out.")
        for name, value in told.items()
        if value is not None and name not in useful
    )


def _prompt_file(path: Path, names: Names, images: Path) -> Placed:
    placed: Placed = []
    for where, number, record in _records(path):
        if not isinstance(record, dict):
            refuse(RecipeError(f"{where}: {record!r:.60} is not an object with fields"))
            continue
        refuse_unknown(record, names, where)
        prompt = prompt_of(record, number, names, images, where)
        if prompt is not None:
            placed.append((where, prompt))
    return placed


def _records(path: Path) -> Iterator[tuple[str, int, object]]:
    """Every record of JSON lines, or of one JSON list (detected by the first byte): its location, and its number
    from 0.
    """
    try:
        with open_regular(path) as stream:
            if stream.read(_START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                for number, record in enumerate(json_list(path)):
                    yield f"{path}: [{number}]", number, record
                return
            stream.seek(0)
            for line, value in json_lines(lines_of(stream), str(path)):
                yield f"{path}: line {line}", line - 1, value
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None


def _image_folder(path: Path, question: str | None) -> Placed:
    """Every image of a folder with the same question; hidden files are skipped."""
    if question is None or not question.strip():
        raise RecipeError(f"{path}: a folder of images needs a question to ask about each. Say it with question.")
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not names:
        raise RecipeError(f"{path}: an empty list: no {', '.join(IMAGE_SUFFIXES)} and no dataset is in it")
    folder = os.path.abspath(path)  # noqa: PTH100 (links are not followed)
    return [(f"{path}: {name}", Prompt(name, question, (os.path.join(folder, name),))) for name in names]  # noqa: PTH118


def _refuse_clashes(placed: Placed) -> None:
    """Refuse ids shared by two prompts; 7 and "7" are different ids."""
    first: dict[int | str, str] = {}
    for where, prompt in placed:
        if first.setdefault(prompt.id, where) != where:
            refuse(RecipeError(f"{where}: id {prompt.id!r} is also that of {first[prompt.id]}"))
