"""Prompts from the rows of a Hugging Face dataset; images are only read when opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from polymerge.errors import MissingExtraError, RecipeError, did_you_mean, refuse_if_any
from polymerge.inference.images import StoredImage
from polymerge.inference.prompt_records import ALIASES, Names, Prompt, prompt_of
from polymerge.paths import given_path

__all__ = ["is_dataset", "open_dataset", "read_rows"]

_HUB_ID: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")

_IN_THE_ROW: Final = object()
"""Placeholder for an image whose bytes are in the dataset."""


def is_dataset(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is a folder that `datasets` saved, a file or folder of parquet, or a hub id."""
    path = given_path(source)
    if path.is_dir():
        return _saved(path) or any(path.rglob("*.parquet"))
    if path.is_file():
        return path.suffix == ".parquet"
    # beside a folder that is there, a name that is not is a typing error
    return _HUB_ID.fullmatch(str(source)) is not None and not path.parent.is_dir()


def read_rows(
    source: str | os.PathLike[str], rows: Any, names: Names, image_folder: Path | None
) -> list[tuple[str, Prompt]]:
    """The prompts of a dataset, each with its location; invalid rows are refused.

    rows  of the dataset, from `open_dataset`

    raises RecipeError if a column is missing.
    """
    columns = _columns(source, rows.column_names, names)
    path = given_path(source)
    folder = image_folder
    if folder is None and path.exists():
        folder = path if path.is_dir() else path.parent
    images = {
        column: _image_cells(source, column, rows) for field in ("image", "images") for column in columns.get(field, ())
    }
    others = [column for group in columns.values() for column in group if column not in images]
    placed = []
    for number, row in enumerate(rows.select_columns(others)):
        where = f"{source}: row {number}"
        record = row | {column: cells[number] for column, cells in images.items()}
        prompt = prompt_of(record, number, names, folder, where)
        if prompt is not None:
            placed.append((where, prompt))
    return placed


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_dataset(source: str | os.PathLike[str], split: str | None) -> Any:
    """Open one split of a dataset; `split` may be omitted if there is only one.

    raises RecipeError if it cannot be loaded, MissingExtraError without `datasets`.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError:
        raise MissingExtraError(f"{source}: a dataset needs datasets: pip install 'polymerge[datasets]'") from None
    path = given_path(source)
    try:
        if _saved(path):
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset("parquet", data_dir=str(path.resolve()), split=split)
        elif path.exists():
            found = datasets.load_dataset("parquet", data_files=str(path.resolve()), split=split)
        else:
            hub = _HUB_ID.fullmatch(str(source))
            assert hub is not None
            found = datasets.load_dataset(hub["id"], revision=hub["revision"], split=split)
    except Exception as error:  # whatever `datasets` and the hub raise means that it cannot be loaded
        told = next(iter(str(error).strip().splitlines()), "")
        raise RecipeError(f"{source}: the dataset cannot be loaded: {type(error).__name__}: {told}") from error
    if not isinstance(found, Mapping):
        if split is not None and _saved(path):
            raise RecipeError(f"{source}: split: '{split}' cannot be chosen, it was saved as one. Leave it out.")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        said = "no split is named" if split is None else f"it has no split '{split}'"
        hint = f" Say split: {', '.join(found)}." if split is None else did_you_mean(split, found)
        raise RecipeError(f"{source}: {said}.{hint}")
    return found[split]


def _columns(source: object, there: list[str], names: Names) -> dict[str, tuple[str, ...]]:
    """The columns to read, by field."""
    columns = {field: tuple(name for name in accepted if name in there) for field, accepted in names.items()}
    wrong = []
    for field, accepted in names.items():
        present = columns[field]
        if accepted and accepted != ALIASES[field] and not present:
            wrong.append(f"fields: {field}: no column '{accepted[0]}'.{did_you_mean(accepted[0], there)}")
        if len(present) > 1:
            wrong.append(f"has columns {' and '.join(present)}. Say which is the {field} with fields.")
    if columns["text"] and columns["conversations"]:
        wrong.append(f"has columns {columns['text'][0]} and conversations. Name one of them with fields.")
    if not wrong and not columns["text"] and not columns["conversations"]:
        wrong.append(
            f"no column {', '.join(names['text'])} or conversations; there are {', '.join(there)}. Say which holds the "
            "text with fields."
        )
    refuse_if_any(RecipeError(f"{source}: {one}") for one in wrong)
    return columns


def _image_cells(source: object, column: str, rows: Any) -> list[list[Any] | None]:
    """The images in every row of an image column: paths as text, `StoredImage` for embedded images."""
    alone = rows.select_columns([column]).with_format("arrow")
    cells = []
    for number, row in enumerate(_cells(source, column, alone[:].column(0))):
        cells.append(
            None
            if row is None
            else [
                StoredImage(str(source), column, number, place, alone) if image is _IN_THE_ROW else image
                for place, image in enumerate(row)
            ]
        )
    return cells


def _cells(source: object, column: str, array: Any) -> list[list[Any] | None]:
    """The same, from the array's structure alone: no image bytes are read."""
    types: Any = import_module("pyarrow.types")
    compute: Any = import_module("pyarrow.compute")
    if types.is_list(array.type) or types.is_large_list(array.type):
        lengths = compute.list_value_length(array).to_pylist()
        flat = iter(_values(source, column, compute.list_flatten(array)))
        return [None if length is None else [next(flat) for _ in range(length)] for length in lengths]
    return [None if value is None else [value] for value in _values(source, column, array)]


def _values(source: object, column: str, array: Any) -> list[Any]:
    types: Any = import_module("pyarrow.types")
    compute: Any = import_module("pyarrow.compute")
    kind = array.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        values: list[Any] = array.to_pylist()
        return values
    if types.is_binary(kind) or types.is_large_binary(kind):
        return [_IN_THE_ROW if there else None for there in array.is_valid().to_pylist()]
    if types.is_struct(kind) and "bytes" in {field.name for field in kind}:
        paths = [None] * len(array)
        if "path" in {field.name for field in kind}:
            paths = compute.struct_field(array, "path").to_pylist()
        inside = compute.struct_field(array, "bytes").is_valid().to_pylist()
        return [_IN_THE_ROW if there else path for there, path in zip(inside, paths, strict=True)]
    raise RecipeError(f"{source}: column {column} holds {kind}, and not images or paths")
