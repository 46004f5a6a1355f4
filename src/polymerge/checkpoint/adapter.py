"""LoRA adapters: pairs of factors, and the full weights that were trained beside them, from headers alone.

PEFT writes an adapter_config.json and one adapter_model.safetensors (older: .bin), in which every name begins with
`base_model.model.` and goes on as in the base model. LLaVA puts a non_lora_trainables.bin beside it, with the full
weights that were trained, such as the projector's, and the config.json of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from polymerge.checkpoint.adapternames import Sorted, sort_names
from polymerge.checkpoint.entry import Contents, Entry, listed
from polymerge.checkpoint.folder import collected, missing, read_config, read_file
from polymerge.checkpoint.loraconfig import LoraConfig, foreign_kind, read_lora_config
from polymerge.dtypes import MERGEABLE
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, refuse_if_any

__all__ = ["Adapter", "Pair", "is_adapter", "open_adapter"]

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference, as for PEFT
_BESIDE: Final = "non_lora_trainables.bin"
_WHOLE: Final = re.compile(r"(?:model|pytorch_model|consolidated).*\.(?:safetensors|bin|pth)(?:\.index\.json)?")
_AGAIN: Final = "Save the adapter again with PEFT."


@dataclass(frozen=True)
class Pair:
    """The two factors of one module's update, `scaling * b @ a`."""

    module: str
    """As the base model calls it: 'model.layers.0.self_attn.q_proj'."""
    a: Entry
    """[rank, in]; of an embedding [rank, vocabulary]."""
    b: Entry
    """[out, rank]; of an embedding [dimension, rank]."""
    rank: int
    scaling: float
    embedding: bool
    transposed: bool
    """The base stores the transpose: the weight of an embedding is [vocabulary, dimension], that of GPT-2 [in, out]."""
    bias: Entry | None
    """[out], to be scaled as the product is and added to the bias of the base."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update, [out, in], before it is transposed."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, as its headers describe it; no tensor has been read."""

    source: str
    """As the user wrote it."""
    folder: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    model_config: Mapping[str, Any]
    """config.json beside it, or {} where there is none."""
    layout: Literal["peft", "llava"]
    """"llava" where a non_lora_trainables.bin lies beside the factors."""
    pairs: Mapping[str, Pair]
    """By module, in order of the file."""
    extras: Mapping[str, Entry]
    """By the name of a parameter in the base model, the full tensor that stands in its place."""
    tokens: Mapping[str, tuple[tuple[int, ...], Entry]]
    """By the name of an embedding's parameter, token indices and the rows that stand in their place."""
    files: tuple[Path, ...]
    skipped: Mapping[str, str]
    """What the files hold that is no part of the adapter -> why it is left out."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor of the adapter, under its name in the file."""
        factors = [entry for pair in self.pairs.values() for entry in (pair.a, pair.b, pair.bias) if entry]
        return (*factors, *self.extras.values(), *(rows for _, rows in self.tokens.values()))

    @property
    def parameters(self) -> tuple[str, ...]:
        """What it changes, as the model that it was trained on calls it, each once."""
        weights = (f"{module}.weight" for module in self.pairs)
        biases = (f"{module}.bias" for module, pair in self.pairs.items() if pair.bias)
        return tuple(dict.fromkeys((*self.extras, *self.tokens, *weights, *biases)))


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder with an adapter_config.json and without a full model's weights."""
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:
        return False
    return _CONFIG in names and not any(_WHOLE.fullmatch(name) for name in names)


def open_adapter(source: str, path: Path) -> Adapter:
    """Read configs and headers of the adapter in the folder `path`, and check that they agree.

    `source` is what the user called it. Nothing in the files is executed.

    Raises RecipeError where `path` is no adapter, CheckpointError where it cannot be listed, and Refused with all that
    is wrong with it.
    """
    try:
        if not path.exists():
            raise RecipeError(f"adapter '{source}': {missing(path.absolute())}")
        folder = path.resolve()
        present = {file.name for file in folder.iterdir()} if folder.is_dir() else set[str]()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check its permissions.") from None
    where = folder / _CONFIG
    if _CONFIG not in present:
        held = f"It holds {listed(sorted(present), 8)}. " if present else ""
        raise RecipeError(f"{folder}: has no {_CONFIG}, so it is no adapter. {held}Name the folder that PEFT saved.")

    problems: list[PolymergeError] = []
    configs: dict[str, Mapping[str, Any]] = {}
    for name in (_CONFIG, "config.json"):
        with collected(problems, folder / name):
            configs[name] = read_config(folder / name)
    rules: LoraConfig | None = None
    if _CONFIG in configs:
        if foreign := foreign_kind(configs[_CONFIG], str(where)):
            refuse_if_any([*problems, foreign])
        with collected(problems, where):
            rules = read_lora_config(configs[_CONFIG], str(where))

    contents: dict[str, Contents] = {}
    weights = next((name for name in _WEIGHTS if name in present), None)
    if weights is None:
        problems.append(CheckpointError(f"{folder}: has neither {' nor '.join(_WEIGHTS)}. Download it."))
    files = [name for name in (weights, _BESIDE) if name in present]
    for name in files:
        with collected(problems, folder / name):
            contents[name] = read_file(folder / name)
    found, misnamed = sort_names(folder, [(file, name == _BESIDE) for name, file in contents.items()])
    problems += misnamed
    if not (found.factors or found.extras or found.tokens or problems):
        problems.append(CheckpointError(f"{folder}: holds no tensors in {listed(files)}. {_AGAIN}"))
    problems += _unmergeable(found)
    pairs, unpaired = _paired(found, rules, where)
    problems += unpaired
    tokens: dict[str, tuple[tuple[int, ...], Entry]] = {}
    if rules and len(contents) == len(files):
        tokens, lost = _token_rows(found, rules, where)
        problems += lost
    refuse_if_any(problems)
    return Adapter(
        source=source,
        folder=folder,
        config=MappingProxyType(dict(configs[_CONFIG])),
        model_config=MappingProxyType(dict(configs["config.json"])),
        layout="llava" if _BESIDE in present else "peft",
        pairs=MappingProxyType(pairs),
        extras=MappingProxyType(found.extras),
        tokens=MappingProxyType(tokens),
        files=tuple(folder / name for name in files),
        skipped=MappingProxyType(found.skipped),
    )


def _unmergeable(found: Sorted) -> list[CheckpointError]:
    """What to say of tensors that no arithmetic can be done on, such as those of a quantized base."""
    factors = [entry for slots in found.factors.values() for entry in slots.values()]
    names: dict[tuple[Path, str], list[str]] = {}
    for entry in (*factors, *found.extras.values(), *found.tokens.values()):
        if entry.dtype not in MERGEABLE:
            names.setdefault((entry.file, entry.dtype), []).append(entry.name)
    return [
        CheckpointError(
            f"{file}: {listed(held)} of dtype {dtype}, which cannot be merged. Save the adapter in one of "
            f"{', '.join(MERGEABLE)}."
        )
        for (file, dtype), held in names.items()
    ]


def _paired(found: Sorted, rules: LoraConfig | None, where: Path) -> tuple[dict[str, Pair], list[CheckpointError]]:
    """The pairs of factors, and what is wrong with those that make none; one message for all that have one fault."""
    pairs: dict[str, Pair] = {}
    faults: dict[tuple[Path, str], list[str]] = {}
    for (module, embedding), slots in found.factors.items():
        a, b, bias = slots.get("A"), slots.get("B"), slots.get("bias")
        fault = _fault(a, b, bias, embedding)
        if a and b and not fault:
            rank = a.shape[0]
            if (module, not embedding) in found.factors:
                fault = f"has the factors of an embedding and of a linear layer. {_AGAIN}"
            elif rules and rules.rank_of(module) != rank:
                fault = (
                    f"of rank {rank}, {where.name} says {rules.rank_of(module)}. Find the config that belongs to it."
                )
            elif rules:
                transposed = embedding or rules.fan_in_fan_out
                scaling = rules.scaling_of(module, rank)
                pairs[module] = Pair(module, a, b, rank, scaling, embedding, transposed, bias)
        if fault:
            faults.setdefault((next(iter(slots.values())).file, fault), []).append(module)
    return pairs, [CheckpointError(f"{file}: {listed(modules)}: {fault}") for (file, fault), modules in faults.items()]


def _fault(a: Entry | None, b: Entry | None, bias: Entry | None, embedding: bool) -> str | None:
    """What keeps two factors from being multiplied, and what to do about it."""
    prefix = "lora_embedding_" if embedding else "lora_"
    if a is None or b is None:
        there = [name for name, entry in ((f"{prefix}A", a), (f"{prefix}B", b), ("lora_B.bias", bias)) if entry]
        return f"has {' and '.join(there)} and no {prefix}{'A' if a is None else 'B'}. Download the file again."
    shapes = f"{prefix}A {list(a.shape)}, {prefix}B {list(b.shape)}"
    if min(len(a.shape), len(b.shape)) < 2 or 0 in a.shape + b.shape:
        return f"{shapes}: one shard of a factor, or none. Gather it (ZeRO-3, FSDP) before it is saved."
    if len(a.shape) > 2 or len(b.shape) > 2:
        return (
            f"{shapes}: factors of a convolution, which are not supported. Fold it into its base with PEFT's "
            "merge_and_unload(), and merge the result as a full model."
        )
    if a.shape[0] != b.shape[1]:
        return f"{shapes}: ranks {a.shape[0]} and {b.shape[1]}. {_AGAIN}"
    if bias and bias.shape != b.shape[:1]:
        return f"lora_B.bias {list(bias.shape)}, lora_B {list(b.shape)}. {_AGAIN}"
    return None


def _token_rows(
    found: Sorted, rules: LoraConfig, where: Path
) -> tuple[dict[str, tuple[tuple[int, ...], Entry]], list[CheckpointError]]:
    """The trained rows with the indices that the config gives them, and what is wrong with them."""
    rows: dict[str, tuple[tuple[int, ...], Entry]] = {}
    problems: list[CheckpointError] = []
    said = f"{where}: trainable_token_indices"
    if rules.tokens and not found.tokens:
        problems.append(CheckpointError(f"{said} is set, and no trainable_tokens_delta is there. {_AGAIN}"))
    for parameter, entry in found.tokens.items():
        module = parameter.removesuffix(".weight")
        named = (name for name in rules.tokens if name == module or module.endswith(f".{name}"))
        name = "" if "" in rules.tokens and len(found.tokens) == 1 else next(named, None)
        if name is None:
            problems.append(CheckpointError(f"{said} does not say which rows '{entry.name}' holds. {_AGAIN}"))
        elif len(entry.shape) != 2 or entry.shape[0] != len(rules.tokens[name]):
            problems.append(
                CheckpointError(
                    f"{entry.file}: '{entry.name}' is {list(entry.shape)}, {where.name} names "
                    f"{len(rules.tokens[name])} rows. Find the config that belongs to it."
                )
            )
        else:
            rows[parameter] = rules.tokens[name], entry
    return rows, problems
