"""Read what models are to be asked: a prompt file, a folder of images, a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from polymerge.errors import OutputError, PolymergeError, RecipeError, refuse_if_any
from polymerge.inference.datasets import is_dataset, read_dataset
from polymerge.inference.images import ImageSource, StoredImage, encode_png, verify_image, write_png
from polymerge.inference.json_lines import parse, split_lines
from polymerge.inference.prompt import Prompt
from polymerge.inference.prompt_records import Names, names_from, prompt_of, unknown_fields

__all__ = ["Prompt", "check_images", "materialise", "read_prompts"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SHOWN = 50
"""Of more problems than this only the number is told."""

Placed = list[tuple[str, Prompt]]
"""Prompts, each with where it stands in its source."""


def read_prompts(
    source: str | os.PathLike[str],
    *,
    question: str | None = None,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
) -> list[Prompt]:
    """Read prompts, in the order in which they stand.

    A prompt has text (also called question or prompt), image (a path) or images (a list), id (also question_id; else
    its number, counted from 0) and answer (also answers); category and metadata are read past. `<image>` marks are
    taken out of the text: the images come first, in their order. A conversation (`conversations`) asks what is asked
    in it first, and the first reply is the answer.

    source        JSON lines; a JSON list; a folder of images, sorted by name; a dataset: a folder that `datasets`
                  saved, a file or folder of parquet, or a hub id, `owner/name` or `owner/name@revision`
    question      what is asked about each of a folder of images
    split         of a dataset; it can be left out where there is one
    fields        other names, as in {"text": "query"}; other columns of a dataset are read past, other fields refused
    image_folder  what relative image paths are relative to; else the folder that the file or dataset is in

    raises RecipeError, all of them at once and each with its line, row or entry; MissingExtraError where a dataset is
    read without `datasets`.
    """
    names = names_from(fields)
    path = Path(source).expanduser()
    told = {"question": question, "split": split, "fields": fields, "image_folder": image_folder}
    images = None if image_folder is None else Path(image_folder).expanduser()
    if images is not None and not images.is_dir():
        raise RecipeError(f"image_folder: there is no folder '{images}'")
    problems: list[PolymergeError] = []
    placed: Placed = []
    if is_dataset(source):
        _refuse_others(source, "a dataset", told, ("split", "fields", "image_folder"))
        placed = read_dataset(source, split, names, images, problems)
    elif path.is_dir():
        _refuse_others(source, "a folder of images", told, ("question",))
        placed = _image_folder(path, question)
    elif path.is_file():
        _refuse_others(source, "a prompt file", told, ("fields", "image_folder"))
        placed = _prompt_file(path, names, images or path.parent, problems)
    else:
        raise RecipeError(
            f"{source}: there is no such file or folder, and it is no hub id. Prompts are JSON lines, a JSON list, a "
            "folder of images or a dataset."
        )
    problems += _clashes(placed)
    if not placed and not problems:
        problems.append(RecipeError(f"{source}: an empty list: there is no prompt in it"))
    if len(problems) > SHOWN:
        problems[SHOWN:] = [RecipeError(f"{source}: {len(problems) - SHOWN} more such problems")]
    refuse_if_any(problems)
    return [prompt for _, prompt in placed]


def check_images(prompts: Iterable[Prompt]) -> None:
    """Open every image's header, each image once.

    raises RecipeError for all that are missing or broken at once, MissingExtraError without PIL.
    """
    first: dict[ImageSource, Prompt] = {}
    for prompt in prompts:
        for image in prompt.images:
            first.setdefault(image, prompt)
    problems: list[PolymergeError] = []
    for image, prompt in first.items():
        try:
            verify_image(image)
        except PolymergeError:
            raise
        except Exception as error:  # PIL's formats raise whatever they like
            problems.append(RecipeError(f"prompt {prompt.id!r}: {image}: no image that can be read: {error}"))
    refuse_if_any(problems)


def materialise(prompts: Sequence[Prompt], folder: str | os.PathLike[str]) -> list[Prompt]:
    """Give prompts whose images are all files: those in rows of a dataset are written to `folder` as PNG.

    Draw first, so that only the drawn ones are written. A file's name is made from its content: an image that is there
    is not written again. Paths stay where they are, made absolute.

    raises RecipeError for all images that cannot be read at once, OutputError where the folder cannot be written.
    """
    # links are not followed
    target = Path(os.path.abspath(folder))  # noqa: PTH100
    problems: list[PolymergeError] = []

    def placed(image: ImageSource, prompt: Prompt) -> str:
        if isinstance(image, str):
            return os.path.abspath(image)  # noqa: PTH100
        try:
            data = encode_png(image)
        except PolymergeError:
            raise
        except Exception as error:  # PIL's formats raise whatever they like
            problems.append(RecipeError(f"prompt {prompt.id!r}: {image}: no image that can be read: {error}"))
            return ""
        return str(write_png(data, target))

    try:
        if any(isinstance(image, StoredImage) for prompt in prompts for image in prompt.images):
            target.mkdir(parents=True, exist_ok=True)
        written = [
            replace(prompt, images=tuple(placed(image, prompt) for image in prompt.images)) for prompt in prompts
        ]
    except OSError as error:
        raise OutputError(f"{target}: images cannot be written: {error.strerror or error}") from None
    refuse_if_any(problems)
    return written


def _refuse_others(source: object, kind: str, told: Mapping[str, object], useful: Sequence[str]) -> None:
    refuse_if_any(
        RecipeError(f"{name}: {source} is {kind}, for which it says nothing. Leave it out.")
        for name, value in told.items()
        if value is not None and name not in useful
    )


def _prompt_file(path: Path, names: Names, images: Path, problems: list[PolymergeError]) -> Placed:
    placed: Placed = []
    for where, number, record in _records(path, problems):
        if not isinstance(record, dict):
            problems.append(RecipeError(f"{where}: {record!r:.60} is not an object with fields"))
            continue
        problems += unknown_fields(record, names, where)
        prompt = prompt_of(record, number, names, images, where, problems)
        if prompt is not None:
            placed.append((where, prompt))
    return placed


def _records(path: Path, problems: list[PolymergeError]) -> Iterator[tuple[str, int, object]]:
    """Every record of JSON lines, or of one JSON list (the first byte says which): where it is, its number from 0."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if data.lstrip().startswith(b"["):
        for number, entry in enumerate(parse(data, str(path))):
            yield f"{path}: [{number}]", number, entry
        return
    for line, text in split_lines(data):
        try:
            value = parse(text, str(path), line)
        except RecipeError as problem:
            problems.append(problem)
        else:
            yield f"{path}: line {line}", line - 1, value


def _image_folder(path: Path, question: str | None) -> Placed:
    """Every image of a folder under the same question; files whose name starts with a dot are none."""
    if question is None or not question.strip():
        raise RecipeError(f"{path}: a folder of images needs a question to ask about each. Say it with question.")
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    if not names:
        raise RecipeError(f"{path}: an empty list: no {', '.join(IMAGE_SUFFIXES)} and no dataset is in it")
    folder = os.path.abspath(path)  # noqa: PTH100 (links are not followed)
    return [(f"{path}: {name}", Prompt(name, question, (os.path.join(folder, name),))) for name in names]  # noqa: PTH118


def _clashes(placed: Placed) -> list[PolymergeError]:
    """Ids that two prompts have; 7 and "7" are two ids."""
    problems: list[PolymergeError] = []
    first: dict[int | str, str] = {}
    for where, prompt in placed:
        if first.setdefault(prompt.id, where) != where:
            problems.append(RecipeError(f"{where}: id {prompt.id!r} is also that of {first[prompt.id]}"))
    return problems
