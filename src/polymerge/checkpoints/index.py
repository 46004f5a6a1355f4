"""The index of a sharded checkpoint: which file holds which tensor, and whether the files agree.

{"metadata": {"total_size": 16060522496}, "weight_map": {"lm_head.weight": "model-00004-of-00004.safetensors"}}
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from polymerge.checkpoints.discovery import INDEX_SUFFIX
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["disagreements", "is_plain", "read_index"]


def read_index(index: Path) -> dict[str, str]:
    """The weight map: for each tensor the file that holds it, as a path relative to the index.

    Raises CheckpointError where the index cannot be read, and Refused with every file name that would leave the
    folder. Links are followed, since the cache of the hub consists of them; it is the written name that must be plain.
    """
    weight_map = read_json(index, dict[str, object]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: has no 'weight_map' that says which file holds which tensor. Download it again."
        )
    suffix = PurePosixPath(index.name.removesuffix(INDEX_SUFFIX)).suffix
    refuse_if_any(
        CheckpointError(
            f"{index}: names the file {name!r} for {listed(tensors)}, only plain paths below its own folder that end "
            f"in {suffix} are followed. Correct the index if you trust it."
        )
        for name, tensors in _by_file(weight_map).items()
        if not (is_plain(name) and name.endswith(suffix))
    )
    return weight_map


def _by_file(weight_map: Mapping[str, object]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        found.setdefault(str(file), []).append(tensor)
    return found


def is_plain(name: str) -> bool:
    """Whether a file's name is a path that stays below the folder it is relative to."""
    parts = name.split("/")
    return (
        not PureWindowsPath(name).anchor  # a drive, a share or a leading slash
        and not any(part in ("", ".", "..") for part in parts)
        and not any(character in name for character in "\\\0")
    )


def disagreements(
    index: Path, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]
) -> Iterator[CheckpointError]:
    """Where the index and what the files hold differ, one problem per file and way of differing.

    `held` has the tensor names of each file that could be read, by its name in the index; of the others nothing is
    said.
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
