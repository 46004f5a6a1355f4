"""Open a checkpoint's files (config, index, weights, one tensor), refusing missing or unsuitable ones."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final

from polymerge.checkpoints.bounds import INDEX_BYTES, PROBLEMS, open_regular
from polymerge.checkpoints.discovery import INDEX_SUFFIX, LAYOUTS, is_plain
from polymerge.checkpoints.hub import missing_remote
from polymerge.checkpoints.hub_api import head_of
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.prefetch import fetch_all, fetched
from polymerge.checkpoints.ranges import opened_ranges
from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.checkpoints.stores import bring_stored, stored_at
from polymerge.checkpoints.tensor_info import Contents, TensorInfo, listed
from polymerge.checkpoints.torch_files import read_torch
from polymerge.errors import CheckpointError, PolymergeError, did_you_mean, refuse, refuse_if_any, shown

__all__ = [
    "check_file",
    "class_names",
    "disagreements",
    "missing",
    "read_blocks",
    "read_config",
    "read_file",
    "read_index",
    "reading",
]

_LFS_POINTER: Final = b"version https://git-lfs"
_MOST_NEIGHBOURS: Final = 12  # a longer list of what lies there helps nobody

log = logging.getLogger("polymerge")


@contextmanager
def reading(file: Path, then: str = "") -> Iterator[None]:
    """Refuse any error of one file and continue, so that the others are checked as well.

    then  text to add to the next step
    """
    try:
        yield
    except PolymergeError as error:
        refuse(*(CheckpointError(f"{problem} {then}") for problem in error.problems) if then else error.problems)
    except OSError as error:
        refuse(CheckpointError(f"{file}: cannot be read: {error.strerror}. Check its permissions. {then}".rstrip()))


def check_file(file: Path) -> None:
    """Raise CheckpointError if the file does not exist or is not a regular file."""
    if not file.is_file():
        if file.is_symlink():
            raise CheckpointError(f"{file}: is a link to {file.readlink()}, which is not there. Download it again.")
        what = "is not a file" if file.exists() else "is missing"
        raise CheckpointError(f"{file}: {what}. Download it.")
    with open_regular(file) as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` there.")


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file that may be missing, which gives {}."""
    if not file.exists() and not file.is_symlink():
        return {}
    check_file(file)
    return read_json(file, dict[str, Any], unique_keys=False)  # as transformers reads it


def class_names(config: Mapping[str, object]) -> tuple[str, ...]:
    """The classes that a config.json names; what else may be there in their place names none."""
    said = config.get("architectures")
    return tuple(name for name in said if isinstance(name, str)) if isinstance(said, list) else ()


def read_file(file: Path) -> Contents:
    """Read the headers of a weight file, in the format of its suffix; for a file on the hub or in a store only the
    header is downloaded.

    The names in a torch file are at its end and between the data, so that one from there is downloaded in full.
    """
    torch, remote = LAYOUTS[file.suffix] == "torch", missing_remote(file)
    if remote and not torch:
        return Contents(read_safetensors(file, head_of(file, remote)))
    if remote:
        log.warning(
            "%s: '%s' is not a safetensors file, so it has to be downloaded in full", remote.repository, remote.name
        )
        fetch_all([file])
    if torch and (stored := stored_at(file)) is not None:
        log.warning("%s: is not a safetensors file, so it has to be downloaded in full", stored.url)
        bring_stored([file])
    if stored_at(file) is None:
        check_file(file)
    return read_torch(file) if torch else Contents(read_safetensors(file))


def read_blocks(tensor: TensorInfo, size: int = 1 << 20) -> Iterator[memoryview]:
    """Read the bytes of a tensor, `size` at a time; its file is downloaded first if it is on the hub.

    Each block is valid until the next. Raises CheckpointError if the file cannot be read, or was truncated
    since its header was read.
    """
    fetched(tensor.file)
    buffer = memoryview(bytearray(min(size, tensor.nbytes)))
    try:
        with opened_ranges(tensor.file) as file:
            for left in range(tensor.nbytes, 0, -size):
                block, done, start = buffer[:left], 0, tensor.start + tensor.nbytes - left
                while done < len(block):
                    count = file.read_into(block[done:], start + done)
                    if not count:
                        raise CheckpointError(
                            f"{tensor.file}: ends inside {tensor.name}; it was truncated since its header was read"
                        )
                    done += count
                yield block
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}. Check its permissions.") from None


def read_index(index: Path) -> dict[str, str]:
    """Read the weight map of an index: the file of each tensor, relative to the index.

    Raises CheckpointError where the index cannot be read, and Refused with every file name that would leave the
    folder. Links are followed, since the cache of the hub consists of them; it is the written name that must be plain.
    """
    check_file(index)
    weight_map = read_json(index, dict[str, object], most=INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: has no 'weight_map' that says which file holds which tensor. Download it again."
        )
    suffix = PurePosixPath(index.name.removesuffix(INDEX_SUFFIX)).suffix
    outside = (
        CheckpointError(
            f"{index}: names the file '{shown(name)}' for {listed(tensors)}, only plain paths below its own folder "
            f"that end in {suffix} are followed. Correct the index if you trust it."
        )
        for name, tensors in _by_file(weight_map).items()
        if not (is_plain(name) and PurePosixPath(name).suffix == suffix)
    )
    refuse_if_any(islice(outside, PROBLEMS))
    return weight_map


def _by_file(weight_map: Mapping[str, object]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        found.setdefault(str(file), []).append(tensor)
    return found


def disagreements(
    index: Path, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]
) -> Iterator[CheckpointError]:
    """Compare an index with the content of its files; one error per file and kind of difference.

    `held` maps the name in the index of each readable file to its tensor names; other files are skipped.
    """
    place = {tensor: file for file, tensors in held.items() for tensor in tensors}
    for file, promised in _by_file(weight_map).items():
        if file not in held:
            continue
        there = set(held[file])
        if absent := [tensor for tensor in promised if tensor not in there]:
            elsewhere = sorted({place[tensor] for tensor in absent if tensor in place})
            found = f"; some are in {listed(elsewhere)}" if elsewhere else ""
            yield CheckpointError(
                f"{index}: places {_count(absent)} in '{file}' that the file does not hold{found}. Download both again."
            )
        if extra := [tensor for tensor in held[file] if tensor not in weight_map]:
            yield CheckpointError(
                f"{index}: does not list {_count(extra)} that '{file}' holds. Download both again, or name the file "
                "itself to read it alone."
            )


def _count(tensors: Collection[str]) -> str:
    return f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''} ({listed(tensors)})"


def missing(path: Path) -> str:
    """Describe a path that does not exist: its existing part, and what is there instead."""
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
