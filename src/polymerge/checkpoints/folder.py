"""A checkpoint: a folder, or a single file, of weights and its config, opened from headers alone.

A source may be a base with an adapter, `BASE+ADAPTER`; the adapter's tensors are then listed with those of its base,
under distinct names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from polymerge.checkpoints.adapter import Adapter, is_adapter, open_adapter
from polymerge.checkpoints.discovery import LAYOUTS, Weights, find_weights
from polymerge.checkpoints.files import disagreements, missing, read_config, read_file, read_index, reading
from polymerge.checkpoints.hub import companions, missing_remote, remote_of
from polymerge.checkpoints.identity import Stamp, Stamps, stamps_of
from polymerge.checkpoints.names import unwrapped
from polymerge.checkpoints.prefetch import fetch_all
from polymerge.checkpoints.stores import bring_stored, stored_at, view_of
from polymerge.checkpoints.tensor_info import Contents, TensorInfo, listed
from polymerge.errors import CheckpointError, RecipeError, Refused, collecting, refuse, refuse_if_any
from polymerge.paths import exists, given_path

__all__ = [
    "ADAPTER",
    "Checkpoint",
    "adapter_alone",
    "bring",
    "called",
    "join",
    "open_checkpoint",
    "open_joined",
    "renamed",
    "split_source",
]

_AT_ONCE = 8  # headers that are fetched from the hub or a store

ADAPTER: Final = "adapter/"
"""Prefix of an adapter's tensor names when listed with those of its base."""

_PLUS: Final = "+"

_MULTIMODAL: Final = ("vision_config", "mm_vision_tower", "mm_projector_type", "img_processor")
"""Keys that only configs of multimodal models have."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights and config, as described by its headers; no tensor has been read."""

    source: str
    """As given by the user."""
    folder: Path
    """Absolute; its files may be links, as in the hub's cache."""
    config: Mapping[str, Any]
    """config.json, or {} if there is none."""
    entries: Mapping[str, TensorInfo]
    """Every tensor, ordered by file and offset."""
    files: tuple[Path, ...]
    layout: str
    """"safetensors" or "torch"."""
    aliases: Mapping[str, str]
    """In torch files, a name -> the earlier name whose bytes it shares; both are in `entries`."""
    skipped: Mapping[str, str]
    """Objects in torch files that are not tensors of the model -> why they are left out."""
    adapter: Adapter | None = None
    """Its adapter, whose tensors are then in `entries` as well (see `open_joined`)."""
    brought: tuple[str, ...] = ()
    """Names in `entries` that come from the adapter alone; the config is then the adapter's."""
    stamps: Stamps = field(default_factory=dict, compare=False, repr=False)
    """Of every file that was read, or whose header was, from before."""


def open_checkpoint(source: str, path: Path) -> Checkpoint:
    """Read config and headers of the checkpoint at `path`, a folder or a weight file, and check them.

    `source` is its name as given by the user. Time and memory depend on the number of tensors, not on their size, and
    nothing in the files is executed.

    Raises RecipeError if `path` is not a checkpoint, CheckpointError if it cannot be listed, and Refused with
    every problem found.
    """
    try:
        if not path.exists() and stored_at(path) is None:
            raise RecipeError(f"model '{source}': {missing(path.absolute())}")
        # only the folder is resolved: in the hub's cache the files are links to blobs, whose names say nothing
        folder = (path if path.is_dir() else path.parent).resolve()
        weights = find_weights(folder) if path.is_dir() else _single_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check its permissions.") from None

    with collecting() as found:
        config: Mapping[str, Any] = {}
        beside = [folder / "config.json", *([folder / weights.index] if weights.index else [])]
        stamps: dict[Path, Stamp | None] = stamps_of(beside)
        with reading(folder / "config.json"):
            config = read_config(folder / "config.json")
        names, weight_map = weights.files, dict[str, str]()
        if weights.index:
            with reading(folder / weights.index):
                weight_map = _read_index(folder, weights.index, weights.usual)
                names = tuple(sorted(set(weight_map.values())))
        stamps |= stamps_of(folder / name for name in names)
        contents: dict[str, Contents] = {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            far = [name for name in names if missing_remote(folder / name) or stored_at(folder / name)]
            coming = {name: pool.submit(read_file, folder / name) for name in far}
            for name in names:
                with reading(folder / name):
                    contents[name] = coming[name].result() if name in coming else read_file(folder / name)

        entries = _gathered(folder, contents)
        if weights.index:
            held = {name: [entry.name for entry in file.entries] for name, file in contents.items()}
            refuse(*disagreements(folder / weights.index, weight_map, held))
        skipped = {name: why for file in contents.values() for name, why in file.skipped.items()}
        if not entries and not found:
            left_out = f" Left out: {listed(skipped)}." if skipped else ""
            refuse(CheckpointError(f"{folder}: no tensors in {listed(names)}.{left_out} Name another file."))
        if not found:
            aliases = {name: first for file in contents.values() for name, first in file.aliases.items()}
            return Checkpoint(
                source=source,
                folder=folder,
                config=MappingProxyType(config),
                entries=MappingProxyType(entries),
                files=tuple(folder / name for name in names),
                layout=LAYOUTS[Path(names[0]).suffix],
                aliases=MappingProxyType(aliases),
                skipped=MappingProxyType(skipped),
                stamps=MappingProxyType(stamps),
            )
    raise Refused(found)


def _read_index(folder: Path, index: str, usual: str | None) -> dict[str, str]:
    weight_map = read_index(folder / index)
    if inside := index.rpartition("/")[0]:
        weight_map = {name: f"{inside}/{file}" for name, file in weight_map.items()}
    if usual and usual not in weight_map.values():
        raise RecipeError(
            f"{folder}: has both '{usual}' and '{index}', which does not list it. Remove one of them, or name "
            f"'{usual}' itself."
        )
    return weight_map


def _gathered(folder: Path, contents: Mapping[str, Contents]) -> dict[str, TensorInfo]:
    """Gather the tensors of all files; tensors that two files hold are refused."""
    entries: dict[str, TensorInfo] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for name, file in contents.items():
        for entry in file.entries:
            first = entries.setdefault(entry.name, entry)
            if first is not entry:
                twice.setdefault((first.file.relative_to(folder).as_posix(), name), []).append(entry.name)
    refuse(
        *(
            CheckpointError(
                f"{folder}: '{first}' and '{second}' both hold {listed(tensors)}. Remove the file that is not part of "
                "this model."
            )
            for (first, second), tensors in twice.items()
        )
    )
    return entries


def _single_file(path: Path) -> Weights:
    if path.suffix not in LAYOUTS:
        raise RecipeError(
            f"{path}: is neither a folder nor a readable weight file ({', '.join(LAYOUTS)}). Name the folder that "
            "holds the checkpoint."
        )
    return Weights((path.name,))


def split_source(source: str) -> tuple[str, str | None]:
    """Split `BASE+ADAPTER` into base and adapter; the adapter is None if the source is a single model.

    An existing path is a single model, whatever characters it contains.
    """
    if _PLUS not in source or exists(source):
        return source, None
    cuts = [place for place, character in enumerate(source) if character == _PLUS]
    there = [cut for cut in reversed(cuts) if is_adapter(given_path(source[cut + 1 :]))]
    cut = (there or cuts[-1:])[0]
    return source[:cut], source[cut + 1 :]


def open_joined(source: str, base: Path, adapter: Path) -> Checkpoint:
    """Open a checkpoint with an adapter; raises as `open_checkpoint` and `open_adapter` do."""
    return join(open_checkpoint(source, base), open_adapter(source, adapter))


def join(checkpoint: Checkpoint, beside: Adapter) -> Checkpoint:
    """Combine a checkpoint with an adapter.

    An adapter may turn its base into another model: LLaVA's is trained on a language model, and adds the projector and
    the config.json of the resulting LLaVA. Then that is the config, and these weights are tensors like its own.
    """
    entries = dict(checkpoint.entries)
    brought = _brought(checkpoint, beside)
    if brought:
        non_lora = {name: entry for name, entry in beside.non_lora.items() if name not in brought}
        beside = replace(beside, non_lora=MappingProxyType(non_lora))
        entries |= {name: replace(entry, name=name) for name, entry in brought.items()}
    for entry in beside.entries:
        entries[ADAPTER + entry.name] = replace(entry, name=ADAPTER + entry.name)
    return replace(
        checkpoint,
        config=beside.model_config if brought else checkpoint.config,
        entries=MappingProxyType(entries),
        files=(*checkpoint.files, *beside.files),
        skipped=MappingProxyType({**checkpoint.skipped, **beside.skipped}),
        adapter=beside,
        brought=tuple(brought),
        stamps=MappingProxyType({**checkpoint.stamps, **beside.stamps}),
    )


def adapter_alone(adapter: Adapter) -> Checkpoint:
    """An adapter as a checkpoint with only the adapter's tensors, under their own names."""
    return Checkpoint(
        source=adapter.source,
        folder=adapter.folder,
        config=adapter.model_config,
        entries=MappingProxyType({entry.name: entry for entry in adapter.entries}),
        files=adapter.files,
        layout="safetensors",
        aliases={},
        skipped=adapter.skipped,
        adapter=adapter,
        stamps=adapter.stamps,
    )


def _brought(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, TensorInfo]:
    """The full weights of an adapter that turn its base into another model, by their names there.

    Empty unless the base is text-only, a config.json beside the adapter is for another model, and every module
    that the adapter changes exists in the base: then both share the layout of the common part. A head is the base's.
    """
    ours, theirs = (
        (config.get("architectures"), config.get("model_type")) for config in (checkpoint.config, adapter.model_config)
    )
    shared = all(pair.parameter in checkpoint.entries for pair in adapter.pairs.values())
    if not adapter.model_config or ours == theirs or not shared or any(key in checkpoint.config for key in _MULTIMODAL):
        return {}
    new = {name: entry for name, entry in adapter.non_lora.items() if name not in checkpoint.entries}
    return {name: entry for name, entry in new.items() if not name.endswith("lm_head.weight")}


def renamed(checkpoint: Checkpoint, wrappers: Sequence[str]) -> Checkpoint:
    """Strip trainers' wrappers from the names of a checkpoint's tensors; names of an adapter are unchanged.

    wrappers  as for `names.unwrapped`

    raises Refused if two tensors then have the same name.
    """
    if not wrappers:
        return checkpoint
    plain = {name: name if name.startswith(ADAPTER) else unwrapped(name, wrappers) for name in checkpoint.entries}
    first: dict[str, str] = {}
    refuse_if_any(
        CheckpointError(
            f"{checkpoint.folder}: '{first[name]}' and '{own}' are one tensor, '{name}', without what a trainer put "
            "around their names. Keep one of them in the checkpoint."
        )
        for own, name in plain.items()
        if first.setdefault(name, own) != own
    )
    return called(checkpoint, plain)


def called(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The same checkpoint with other names for its tensors; those that are not in `names` keep theirs.

    names  name as it is -> name as it shall be

    raises CheckpointError if two would have the same.
    """
    own = {name: names.get(name, name) for name in checkpoint.entries}
    if len(set(own.values())) < len(own):
        twice = next(name for name, count in Counter(own.values()).items() if count > 1)
        raise CheckpointError(f"{checkpoint.folder}: two of its tensors would be called '{twice}'. Keep one of them")
    return replace(
        checkpoint,
        entries=MappingProxyType({own[name]: replace(e, name=own[name]) for name, e in checkpoint.entries.items()}),
        aliases=MappingProxyType({own[name]: own[earlier] for name, earlier in checkpoint.aliases.items()}),
        brought=tuple(own[name] for name in checkpoint.brought),
    )


def bring(source: str, folder: Path) -> None:
    """Download everything that loading a model needs: its weights and the files beside them.

    folder  the result of `locate` for `source`; nothing happens for a local one

    raises RecipeError if there are no weights, or they are not accessible, CheckpointError if the hub or store fails.
    """
    if remote_of(folder) is None and view_of(folder) is None:
        return
    if is_adapter(folder):
        weights = list(open_adapter(source, folder).files)
    else:
        chosen = find_weights(folder)
        names = {*chosen.files, *([chosen.usual] if chosen.usual else [])}
        if chosen.index:
            names |= set(read_index(folder / chosen.index).values())
        weights = [folder / name for name in sorted(names)]
    fetch_all([*companions(folder), *weights])
    bring_stored(weights)
