"""Write a checkpoint: its weights, and the files beside them.

Safetensors shards are laid out before any values are known, so that blocks can be written in any order; torch files and
their index are converted from them for loaders that need them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polymerge.dtypes import byte_count
from polymerge.durable import begin_flush, reason_of
from polymerge.errors import OutputError, RecipeError, human_size

__all__ = [
    "Place",
    "Shards",
    "Write",
    "as_torch_file",
    "as_torch_files",
    "lay_out",
    "parse_size",
]

Write = Callable[[str, memoryview, int], None]
"""Writes bytes of the named tensor at byte offset `start`, from any thread; the view is valid until it returns."""

_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_METADATA: Final = {"format": "pt"}  # what transformers asks a file for before it loads it


@dataclass(frozen=True)
class Place:
    """The position of a tensor: its shard, and the offset of its first byte there."""

    shard: int
    start: int


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint to write: names, headers, sizes, and every tensor's position."""

    names: tuple[str, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    places: Mapping[str, Place]
    data_size: int

    @contextmanager
    def create(self, folder: Path) -> Iterator[Write]:
        """Create every file at full size with its header; yields the function that writes bytes of tensors.

        Files of the same names, from a run that was killed, are written into, and what they hold stays until then.

        raises OutputError if the disk has no room.
        """
        descriptors: list[int] = []

        def write(name: str, view: memoryview, start: int) -> None:
            place, done = self.places[name], 0
            descriptor, begin = descriptors[place.shard], place.start + start
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], begin + done)
            # the disk writes while the merge goes on, which has less to wait for in the end
            begin_flush(descriptor, begin, begin + done)

        self.clear(folder)
        try:
            try:
                for name, header, size in zip(self.names, self.headers, self.sizes, strict=True):
                    descriptors.append(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(descriptors[-1], 0, size)
                    else:  # macOS
                        os.ftruncate(descriptors[-1], size)
                    os.pwrite(descriptors[-1], header, 0)
            except OSError as error:
                room = human_size(sum(self.sizes))
                raise OutputError(f"{folder}: cannot make room for {room}: {reason_of(error)}") from error
            yield write
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def clear(self, folder: Path) -> None:
        """Remove from a folder what a run that was killed has made beside these files."""
        for path in folder.iterdir():
            if path.name not in self.names:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def hollow(self, shard: int, folder: Path) -> None:
        """Put a file with one shard's header and size into a folder, which takes no room there."""
        with (folder / self.names[shard]).open("wb") as file:
            file.write(self.headers[shard])
            file.truncate(self.sizes[shard])

    def only(self, shard: int) -> Shards:
        """One of the files alone."""
        places = {name: Place(0, place.start) for name, place in self.places.items() if place.shard == shard}
        header, size = self.headers[shard], self.sizes[shard]
        return Shards((self.names[shard],), (header,), (size,), places, size - len(header))

    def room(self, as_torch: bool) -> int:
        """Bytes that the files need on the disk; as torch files, one lies there twice while it is converted."""
        return sum(self.sizes) + (max(self.sizes, default=0) if as_torch else 0)

    def write_index(self, folder: Path) -> None:
        """Write the index that maps tensors to shards, if there are several."""
        if len(self.names) > 1:
            weight_map = {name: self.names[place.shard] for name, place in self.places.items()}
            _write_index(folder / "model.safetensors.index.json", weight_map, self.data_size)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_size: int, stem: str = "model") -> Shards:
    """Assign tensors (name, dtype, shape), in order, to shards of at most `shard_size` bytes of data each.

    A larger tensor gets its own shard. `stem` is the stem of the file names.
    """
    groups: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        size = byte_count(dtype, shape)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape, size))
        filled += size
    names, headers, sizes = [], [], []
    places: dict[str, Place] = {}
    data_size = 0
    for shard, group in enumerate(groups):
        # Wide elements first: every tensor then starts at a multiple of its element's size, as mapping readers want.
        ordered = sorted(group, key=lambda tensor: -_alignment(tensor[1]))
        table: dict[str, object] = {"__metadata__": _METADATA}
        end = 0
        for name, dtype, shape, size in ordered:
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        end = len(header)
        for name, _, _, size in ordered:
            places[name] = Place(shard, end)
            end += size
        data_size += end - len(header)
        headers.append(header)
        sizes.append(end)
        part = "" if len(groups) == 1 else f"-{shard + 1:05}-of-{len(groups):05}"
        names.append(f"{stem}{part}.safetensors")
    return Shards(tuple(names), tuple(headers), tuple(sizes), places, data_size)


def parse_size(text: str) -> int:
    """Parse a size such as `5GB` or `500MiB` into bytes; raises RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]?i?B?)\s*", text, re.IGNORECASE)
    unit = (found[2].upper() or "B") if found else ""
    unit = unit if unit.endswith("B") else f"{unit}B"
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"shard size: '{text}' is not a size such as 5GB or 500MB")
    return max(1, int(float(found[1]) * _UNITS[unit]))


def _alignment(dtype: str) -> int:
    """The alignment of an element's address, in bytes."""
    return byte_count(dtype, (8,)) // 8


def as_torch_file(file: Path, target: Path) -> None:
    """Replace one safetensors file by a torch file with the same tensors; raises OSError if the disk is full."""
    from safetensors.torch import load_file

    _save(load_file(file), target)
    file.unlink()


def as_torch_files(folder: Path, tied: Mapping[str, str]) -> None:
    """Replace the safetensors files of a folder by torch files with the same tensors, one shard at a time.

    tied   additional names that share the storage of another tensor, each with that tensor's name

    The tensors of a shard are views of the mapped file while torch writes them, so memory does not grow with them.

    raises OSError if the disk is full.
    """
    from safetensors import safe_open

    shards = sorted(folder.glob("model*.safetensors"))
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards:
        name = shard.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            size += sum(tensor.nbytes for tensor in tensors.values())
            tensors |= {alias: tensors[same] for alias, same in tied.items() if same in tensors}
            _save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        del tensors
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(shards) > 1:
        _write_index(folder / "pytorch_model.bin.index.json", weight_map, size)


def _save(tensors: Mapping[str, object], target: Path) -> None:
    import torch

    try:
        with target.open("xb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # which torch hides behind the position that it expected to be at
            raise error.__context__ from None
        raise


def _write_index(index: Path, weight_map: Mapping[str, str], data_size: int) -> None:
    content = {"metadata": {"total_size": data_size}, "weight_map": dict(sorted(weight_map.items()))}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
