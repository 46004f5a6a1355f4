"""A checkpoint: a folder, or a single file, of weights and its config, opened from headers alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from polymerge.checkpoints.discovery import LAYOUTS, Weights, find_weights
from polymerge.checkpoints.hub_files import head_of, missing_remote
from polymerge.checkpoints.index import disagreements, read_index
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.prefetch import fetch_all
from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.checkpoints.tensor_info import Contents, Entry, listed
from polymerge.checkpoints.torch_files import read_torch
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, did_you_mean, refuse_if_any

if TYPE_CHECKING:
    from polymerge.checkpoints.adapter import Adapter

__all__ = ["Checkpoint", "check_file", "collected", "missing", "open_checkpoint", "read_config", "read_file"]

_LFS_POINTER = b"version https://git-lfs"
_MOST_NEIGHBOURS = 12  # a longer list of what lies there helps nobody
_AT_ONCE = 8  # headers that are fetched from the hub

log = logging.getLogger("polymerge")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights and config, as its headers describe it; no tensor has been read."""

    source: str
    """As the user wrote it."""
    folder: Path
    """Absolute; the files in it may be links, as in the cache of the hub."""
    config: Mapping[str, Any]
    """config.json, or {} where there is none."""
    entries: Mapping[str, Entry]
    """Every tensor, in order of files and then of offset."""
    files: tuple[Path, ...]
    layout: str
    """"safetensors" or "torch"."""
    aliases: Mapping[str, str]
    """In torch files, a name -> the earlier name whose bytes it shares; both are in `entries`."""
    skipped: Mapping[str, str]
    """In torch files, what is no tensor of the model -> why it is left out."""
    adapter: Adapter | None = None
    """The adapter that stands beside it, whose tensors are then in `entries` as well (see `checkpoint.joined`)."""
    brought: tuple[str, ...] = ()
    """Tensors in `entries` that it has from the adapter alone, whose config is then its own."""


def open_checkpoint(source: str, path: Path) -> Checkpoint:
    """Read config and headers of the checkpoint at `path`, a folder or a weight file, and check all they say.

    `source` is what the user called it. Time and memory depend on the number of tensors, not on their size, and
    nothing in the files is executed.

    Raises RecipeError where `path` is no checkpoint, CheckpointError where it cannot be listed, and Refused with
    everything that is wrong with it.
    """
    try:
        if not path.exists():
            raise RecipeError(f"model '{source}': {missing(path.absolute())}")
        # only the folder is resolved: in the hub's cache the files are links to blobs, whose names say nothing
        folder = (path if path.is_dir() else path.parent).resolve()
        weights = find_weights(folder) if path.is_dir() else _single_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check its permissions.") from None

    problems: list[PolymergeError] = []
    config: Mapping[str, Any] = {}
    with collected(problems, folder / "config.json"):
        config = read_config(folder / "config.json")
    names, weight_map = weights.files, dict[str, str]()
    if weights.index:
        with collected(problems, folder / weights.index):
            weight_map = _read_index(folder, weights.index, weights.whole)
            names = tuple(sorted(set(weight_map.values())))
    contents: dict[str, Contents] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        coming = {name: pool.submit(read_file, folder / name) for name in names if missing_remote(folder / name)}
        for name in names:
            with collected(problems, folder / name):
                contents[name] = coming[name].result() if name in coming else read_file(folder / name)

    entries, repeated = _gathered(folder, contents)
    problems += repeated
    if weights.index:
        held = {name: [entry.name for entry in file.entries] for name, file in contents.items()}
        problems += disagreements(folder / weights.index, weight_map, held)
    skipped = {name: why for file in contents.values() for name, why in file.skipped.items()}
    if not entries and not problems:
        left_out = f" Left out: {listed(skipped)}." if skipped else ""
        problems.append(CheckpointError(f"{folder}: no tensors in {listed(names)}.{left_out} Name another file."))
    refuse_if_any(problems)
    return Checkpoint(
        source=source,
        folder=folder,
        config=MappingProxyType(config),
        entries=MappingProxyType(entries),
        files=tuple(folder / name for name in names),
        layout=LAYOUTS[Path(names[0]).suffix],
        aliases=MappingProxyType({name: first for file in contents.values() for name, first in file.aliases.items()}),
        skipped=MappingProxyType(skipped),
    )


@contextmanager
def collected(problems: list[PolymergeError], file: Path) -> Iterator[None]:
    """Go on after what goes wrong with one file, so that all the others are looked at as well."""
    try:
        yield
    except PolymergeError as error:
        problems += error.problems
    except OSError as error:
        problems.append(CheckpointError(f"{file}: cannot be read: {error.strerror}. Check its permissions."))


def read_config(file: Path) -> dict[str, Any]:
    """The object in a JSON file that need not be there: {} where it is not."""
    if not file.exists() and not file.is_symlink():
        return {}
    check_file(file)
    return read_json(file, dict[str, Any], unique_keys=False)  # as transformers reads it


def _read_index(folder: Path, index: str, whole: str | None) -> dict[str, str]:
    check_file(folder / index)
    weight_map = read_index(folder / index)
    if inside := index.rpartition("/")[0]:
        weight_map = {name: f"{inside}/{file}" for name, file in weight_map.items()}
    if whole and whole not in weight_map.values():
        raise RecipeError(
            f"{folder}: has both '{whole}' and '{index}', which does not list it. Remove one of them, or name "
            f"'{whole}' itself."
        )
    return weight_map


def read_file(file: Path) -> Contents:
    """What a weight file holds, read as the end of its name says; of one on the hub only its header is fetched.

    The names in a torch file lie at its end and between the data, so that one on the hub is fetched whole.
    """
    torch, remote = LAYOUTS[file.suffix] == "torch", missing_remote(file)
    if remote and not torch:
        return Contents(read_safetensors(file, head_of(file, remote)))
    if remote:
        log.warning("%s: '%s' is no safetensors file, so it has to be fetched whole", remote.repository, remote.name)
        fetch_all([file])
    check_file(file)
    return read_torch(file) if torch else Contents(read_safetensors(file))


def check_file(file: Path) -> None:
    """Raise CheckpointError where the file is not there, or where something else stands in its place."""
    if not file.is_file():
        if file.is_symlink():
            raise CheckpointError(f"{file}: is a link to {file.readlink()}, which is not there. Download it again.")
        what = "is not a file" if file.exists() else "is missing"
        raise CheckpointError(f"{file}: {what}. Download it.")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` there.")


def _gathered(folder: Path, contents: Mapping[str, Contents]) -> tuple[dict[str, Entry], list[CheckpointError]]:
    """The tensors of all files, and what to say of those that more than one of them has."""
    entries: dict[str, Entry] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for name, file in contents.items():
        for entry in file.entries:
            first = entries.setdefault(entry.name, entry)
            if first is not entry:
                twice.setdefault((first.file.relative_to(folder).as_posix(), name), []).append(entry.name)
    return entries, [
        CheckpointError(
            f"{folder}: '{first}' and '{second}' both hold {listed(tensors)}. Remove the file that is not of this "
            "model."
        )
        for (first, second), tensors in twice.items()
    ]


def _single_file(path: Path) -> Weights:
    if path.suffix not in LAYOUTS:
        raise RecipeError(
            f"{path}: is no folder, and no weight file that can be read ({', '.join(LAYOUTS)}). Name the folder that "
            "holds the checkpoint."
        )
    return Weights((path.name,))


def missing(path: Path) -> str:
    """What to say of a path that does not exist: how much of it does, and what lies there."""
    while not path.is_symlink() and not path.parent.exists():
        path = path.parent
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there. Download it again, or name its target."
    if not path.parent.is_dir():
        return f"{path.parent} is a file, not a folder. Name the file or its folder."
    names = sorted(sibling.name for sibling in path.parent.iterdir())
    near = get_close_matches(path.name, names) or names[:_MOST_NEIGHBOURS]
    hint = did_you_mean(path.name, near) if near else " That folder is empty."
    return f"{path.parent} has no '{path.name}'.{hint}"
