"""Parse names of tensors: wrappers that trainers add, and the roles of an adapter's tensors.

Trainers wrap a model (DDP, torch.compile, FSDP, DeepSpeed, PEFT, TRL), and its names too. An adapter's names
distinguish factors of a module, full weights of the base, and rows of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from polymerge.checkpoints.files import read_blocks
from polymerge.checkpoints.hub import missing_remote
from polymerge.checkpoints.prefetch import fetch_all
from polymerge.checkpoints.tensor_info import Contents, TensorInfo, listed
from polymerge.errors import CheckpointError

__all__ = ["Sorted", "is_lora", "sort_names", "unwrapped", "without_wraps", "wrappers_in"]

_ANYWHERE: Final = (
    "_orig_mod",  # torch.compile, of the whole or of a part
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP in fairscale
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning with DeepSpeed
)
"""Name components that no model uses itself; they may occur anywhere, and in only some names."""

_BEFORE_ALL: Final = ("module.", "base_model.model.", "pretrained_model.")
"""Prefixes that a model may use too; they count as wrappers only if every name has them."""

_MOST_WRAPPERS: Final = 16  # around one model; each is looked for in all names

_LORA: Final = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_",
    ".lora_magnitude_vector",
    ".base_layer.",
    ".modules_to_save.",
)
"""Parts of the names of modules that PEFT or loralib wrapped and did not merge; the last may end a name."""

_PREFIX: Final = "base_model.model."

# PEFT leaves out the name of the adapter today; in older files it comes after the factor's
_FACTOR: Final = re.compile(r"(.+)\.lora_(A|B)(?:\.([^.]+))?\.(weight|bias)", re.DOTALL)
_EMBEDDING: Final = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.([^.]+))?", re.DOTALL)
_TOKENS: Final = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?", re.DOTALL)
_TOKENS_BEFORE: Final = re.compile(r".+\.token_adapter\.trainable_tokens_original(?:\.[^.]+)?", re.DOTALL)
_BASE: Final = re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.(weight|bias)", re.DOTALL)
_TRAINED: Final = re.compile(r"(.+?)\.modules_to_save\.(?:([^.]+)\.)?(.+)", re.DOTALL)
_MAGNITUDE: Final = re.compile(r".+\.lora_magnitude_vector(?:\..+)?", re.DOTALL)
_WRAPPER: Final = re.compile(
    r"(?:.*\.)?(?:lora_[^.]*|base_layer|modules_to_save|token_adapter|original_module)(?:\..*)?", re.DOTALL
)

_AGAIN: Final = "Save the adapter again with PEFT."


def is_lora(name: str) -> bool:
    """Return whether a name belongs to a module with unmerged LoRA."""
    return any(mark in f"{name}." for mark in _LORA)


def without_wraps(module: str) -> tuple[str, int]:
    """The name of a module without the `base_layer`s that PEFT puts behind it for each further parameter that it
    adapts, and their number.
    """
    plain = module
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    return plain, (len(module) - len(plain)) // len(".base_layer")


def wrappers_in(names: Collection[str]) -> tuple[str, ...]:
    """The wrappers that trainers added to the names of a checkpoint, for `unwrapped`, outermost first."""
    found = [f".{part}." for part in _ANYWHERE if any(f".{part}." in f".{name}" for name in names)]
    rest = [unwrapped(name, found) for name in names]
    while rest and len(found) < _MOST_WRAPPERS:
        prefix = next((one for one in _BEFORE_ALL if all(name.startswith(one) for name in rest)), None)
        if prefix is None:
            break
        found.append(prefix)
        rest = [name.removeprefix(prefix) for name in rest]
    return tuple(found)


def unwrapped(name: str, wrappers: Sequence[str]) -> str:
    """Remove wrappers from a name: `.x.` is removed wherever that component occurs, `x.` only as a prefix."""
    for wrapper in wrappers:
        if wrapper.startswith("."):
            parts = name.split(".")
            name = ".".join(part for part in parts if part != wrapper.strip("."))
        else:
            name = name.removeprefix(wrapper)
    return name


@dataclass
class Sorted:
    """The tensors of an adapter by role, in file order."""

    factors: dict[tuple[str, bool], dict[str, TensorInfo]] = field(default_factory=dict)
    """By module and whether it is an embedding: its 'A', 'B' and 'bias' as far as present."""
    non_lora: dict[str, TensorInfo] = field(default_factory=dict)
    """Full weights, by the name of the parameter in the base."""
    tokens: dict[str, TensorInfo] = field(default_factory=dict)
    """Rows of embeddings, by the name of the parameter in the base."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Tensors that are not part of the adapter -> why they are left out."""
    repeated: dict[tuple[Path, Path], list[str]] = field(default_factory=dict)
    """By pair of files, the tensors of the second file that the first holds byte for byte."""


def sort_names(
    folder: Path, files: Iterable[tuple[Contents, bool]], wrapped: bool = False
) -> tuple[Sorted, list[CheckpointError]]:
    """Sort the tensors of an adapter by role; each file is given with whether it is one beside PEFT's own, such as
    LLaVA's.

    wrapped  whether parameters are adapted themselves: then modules of factors may end in `base_layer`

    Also says what is wrong with the names: those of no known form, and those that mean one thing twice. Two files may
    hold one tensor where it is the same byte for byte; that alone is looked at here beside names.
    """
    found = Sorted()
    named: list[tuple[str, TensorInfo]] = []
    misnamed: list[str] = []
    strange: dict[Path, list[str]] = {}
    for contents, beside in files:
        found.skipped.update(contents.skipped)
        keys = [entry.name for entry in contents.entries]
        short = _llava_names(keys) if beside else _peft_names(keys)
        for entry in contents.entries:
            name = short[entry.name]
            if not name:
                misnamed.append(entry.name)
            elif beside and any(form.fullmatch(name) for form in (_FACTOR, _EMBEDDING, _TOKENS, _MAGNITUDE)):
                strange.setdefault(entry.file, []).append(entry.name)
            else:
                named.append((name, entry))
    adapters = {
        match[3] for name, _ in named for match in (_FACTOR.fullmatch(name), _EMBEDDING.fullmatch(name)) if match
    }
    adapters -= {None}
    sorting = _Sorting(found, adapters | {"default"}, misnamed, wrapped)
    for name, entry in named:
        sorting.put(name, entry)
    problems = [
        CheckpointError(
            f"{file}: holds parts of a LoRA ({listed(names)}), which {folder.name}/adapter_config.json does not tell "
            "how to scale. Move it to a folder of its own with its config, or out of this one."
        )
        for file, names in strange.items()
    ]
    return found, [*problems, *sorting.problems(folder, adapters)]


def _peft_names(keys: Collection[str]) -> dict[str, str]:
    """Map names in PEFT's file to names in the base model; empty for a name without PEFT's prefix."""
    short: dict[str, str] = {}
    for key, name in _unwrapped({key: key for key in keys}).items():
        short[key] = _inner(name) if name.startswith(_PREFIX) else ""
    return _unwrapped(short)


def _llava_names(keys: Collection[str]) -> dict[str, str]:
    """Map names in non_lora_trainables.bin to names in the base model, as LLaVA's loader does.

    It takes off `base_model.`, and then one `model.` from every name where any begins with `model.model.`. Where none
    does, `base_model.model.` is the prefix all the same.
    """
    whole = {
        key: _PREFIX + _inner(name) if name.startswith(_PREFIX) else name
        for key, name in _unwrapped({key: key for key in keys}).items()
    }
    short = {key: name.removeprefix("base_model.") for key, name in whole.items()}
    nested = any(name.startswith("model.model.") for name in short.values())
    return _unwrapped(
        {
            key: name.removeprefix("model.") if nested or whole[key].startswith(_PREFIX) else name
            for key, name in short.items()
        }
    )


def _inner(name: str) -> str:
    """Remove PEFT's prefix, which occurs twice if an adapted model was adapted again."""
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


def _unwrapped(names: Mapping[str, str]) -> dict[str, str]:
    """Remove the wrappers of training from names, by key."""
    said = [name for name in names.values() if name]
    before = {name.partition(_PREFIX)[0] if _PREFIX in name else "" for name in said}
    outer = [*before] if len(before) == 1 and before != {""} else []  # whatever stands before PEFT's prefix everywhere
    inner = wrappers_in([unwrapped(name, outer) for name in said])
    wrappers = [*outer, *(one for one in inner if one != _PREFIX)]
    return {key: unwrapped(name, wrappers) for key, name in names.items()}


def _same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Return whether two tensors are equal bytewise; files on the hub are downloaded, as they are needed anyway."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    fetch_all(tensor.file for tensor in (first, second) if missing_remote(tensor.file))
    return all(one == other for one, other in zip(read_blocks(first), read_blocks(second), strict=True))


class _Sorting:
    """Assigns each tensor its role and keeps the conflicts."""

    def __init__(self, found: Sorted, adapters: Collection[str], misnamed: list[str], wrapped: bool) -> None:
        self.found, self.adapters, self.misnamed, self.wrapped = found, adapters, misnamed, wrapped
        self.twice: list[tuple[TensorInfo, TensorInfo]] = []
        self.magnitudes: list[str] = []
        self.trained: dict[str, TensorInfo] = {}
        """Parameters trained through `modules_to_save`, which PEFT writes beside the plain name for biases."""

    def put(self, name: str, entry: TensorInfo) -> None:
        """Assign one tensor; `name` has no prefix."""
        if ".original_module." in name:
            self.found.skipped[entry.name] = "is the base's own, which a trained copy stands in for"
            return
        if _TOKENS_BEFORE.fullmatch(name):
            self.found.skipped[entry.name] = "are rows of the base as they were before training"
            return
        trained = _TRAINED.fullmatch(name)
        if trained:
            module, adapter, rest = trained.groups()
            name = f"{module}.{rest}" if adapter in (None, *self.adapters) else f"{module}.{adapter}.{rest}"
        if match := _FACTOR.fullmatch(name):
            slot = "bias" if match[4] == "bias" else match[2]
            if match[4] == "bias" and match[2] == "A":  # lora_A never has one
                self.misnamed.append(entry.name)
            else:
                self._factor(match[1], False, slot, entry)
        elif match := _EMBEDDING.fullmatch(name):
            self._factor(match[1], True, match[2], entry)
        elif (match := _TOKENS.fullmatch(name)) and not _WRAPPER.fullmatch(match[1]):
            self._once(self.found.tokens, f"{match[1]}.weight", entry)
        elif _MAGNITUDE.fullmatch(name):
            self.magnitudes.append(entry.name)
        elif trained and not _WRAPPER.fullmatch(name):
            self._once(self.trained, name, entry)
        else:
            if match := _BASE.fullmatch(name):
                name = f"{match[1]}.{match[2]}"
            if _WRAPPER.fullmatch(name):
                self.misnamed.append(entry.name)
            else:
                self._once(self.found.non_lora, name, entry)

    def _factor(self, module: str, embedding: bool, slot: str, entry: TensorInfo) -> None:
        if _WRAPPER.fullmatch(without_wraps(module)[0] if self.wrapped else module):
            self.misnamed.append(entry.name)
        else:
            self._once(self.found.factors.setdefault((module, embedding), {}), slot, entry)

    def _once(self, place: dict[str, TensorInfo], name: str, entry: TensorInfo) -> None:
        first = place.setdefault(name, entry)
        if first is not entry:
            self._again(first, entry)

    def _again(self, first: TensorInfo, entry: TensorInfo) -> None:
        """Handle a tensor stored in two files: the first is read if both are equal; otherwise it is a conflict."""
        if first.file != entry.file and _same_bytes(first, entry):
            self.found.repeated.setdefault((first.file, entry.file), []).append(entry.name)
        else:
            self.twice.append((first, entry))

    def problems(self, folder: Path, adapters: Collection[str]) -> list[CheckpointError]:
        """Settle tensors with two names and return all errors."""
        for name, entry in self.trained.items():
            first = self.found.non_lora.setdefault(name, entry)
            if first is entry:
                continue
            if first.file == entry.file and (first.dtype, first.shape) == (entry.dtype, entry.shape):
                self.found.skipped[entry.name] = f"is '{first.name}' once more"  # the one that PEFT loads
            else:
                self._again(first, entry)
        problems = [*self._twice()]
        if len(adapters) > 1:
            problems.append(
                CheckpointError(
                    f"{folder}: its tensors belong to {len(adapters)} adapters, {listed(sorted(adapters))}. Save each "
                    "in a folder of its own."
                )
            )
        if self.magnitudes:
            problems.append(
                CheckpointError(
                    f"{folder}: {listed(self.magnitudes)} belong to DoRA, whose update depends on the base's weights. "
                    "Fold it into its base with PEFT's merge_and_unload(), and merge the result as a full model."
                )
            )
        if self.misnamed:
            problems.append(
                CheckpointError(
                    f"{folder}: {listed(self.misnamed)} have names of no form that is known "
                    f"({_PREFIX}MODULE.lora_A.weight, .lora_B.weight, .lora_embedding_A, ..., or a parameter of the "
                    f"base after {_PREFIX}). {_AGAIN}"
                )
            )
        return problems

    def _twice(self) -> Iterator[CheckpointError]:
        """One error per pair of files for the tensors in both, also under one name with two meanings."""
        kept: dict[str, TensorInfo] = {}
        factors = [entry for slots in self.found.factors.values() for entry in slots.values()]
        for entry in (*factors, *self.found.non_lora.values(), *self.found.tokens.values()):
            first = kept.setdefault(entry.name, entry)
            if first is not entry:
                self.twice.append((first, entry))
        by_files: dict[tuple[Path, Path], list[tuple[TensorInfo, TensorInfo]]] = {}
        for first, second in self.twice:
            by_files.setdefault((first.file, second.file), []).append((first, second))
        for (one, other), pairs in by_files.items():
            first, second = pairs[0]
            more = f", and so do {len(pairs) - 1} more" if len(pairs) > 1 else ""
            then = _AGAIN if one == other else "They are not equal: move the file that is not meant out of the folder."
            yield CheckpointError(
                f"{other}: '{second.name}' {list(second.shape)} and '{first.name}' {list(first.shape)} of {one.name} "
                f"stand for one tensor{more}. {then}"
            )
