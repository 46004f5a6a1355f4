"""Pairs of LoRA factors, each with what it changes and how it is scaled, and trained rows of embeddings.

PEFT adapts modules, and parameters of modules where all experts are one tensor: then one pair of factors holds those of
all experts. Each further parameter of a module puts a `base_layer` into the names of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polymerge.checkpoints.adapter_config import LoraConfig
from polymerge.checkpoints.names import Sorted, without_wraps
from polymerge.checkpoints.tensor_info import TensorInfo, listed
from polymerge.errors import CheckpointError, refuse

__all__ = ["AGAIN", "GATHER", "REGISTERED", "Pair", "paired", "token_rows"]

GATHER: Final = (
    "Gather it before it is saved: with ZeRO-3 by stage3_gather_16bit_weights_on_model_save: true, or from its "
    "checkpoint by zero_to_fp32.py; with FSDP by state dicts of type FULL_STATE_DICT."
)
AGAIN: Final = "Save the adapter again with PEFT."
_WITHOUT: Final = "Train it without that module, or use the two side by side in PEFT."
_FOLD: Final = "Fold it into its base with PEFT's merge_and_unload(), and merge the result as a full model."

REGISTERED: Final = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""Parameters of experts in the order in which transformers' classes have them; PEFT wraps the first one first."""


@dataclass(frozen=True)
class Pair:
    """The two factors of one module's update, `scaling * b @ a`."""

    module: str
    """The module's name in the base model: 'model.layers.0.self_attn.q_proj'; or a parameter's, of all experts."""
    a: TensorInfo
    """[rank, in]; for an embedding [rank, vocabulary]; for experts [experts * rank, in], one expert after the other;
    for a convolution [rank, in, ...], with the size of its kernel."""
    b: TensorInfo
    """[out, rank]; for an embedding [dimension, rank]; for experts [out, rank * experts], the experts of one row of
    each `lora_A` side by side; for a convolution [out, rank, 1, ...]."""
    rank: int
    scaling: float
    embedding: bool
    transposed: bool
    """Whether the base stores the transpose, as far as the config tells: an embedding's weight is [vocabulary,
    dimension], GPT-2's [in, out]."""
    bias: TensorInfo | None
    """[out], to be scaled like the product and added to the bias of the base."""
    experts: int = 0
    """The number of matrices of a parameter that is adapted itself; 0 for the weight of a module."""
    as_stored: bool = False
    """Whether [in, out] are the dimensions of such a parameter as it lies, as up to PEFT 0.18."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the update, [out, in], before transposition; of one expert."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; empty for other modules."""
        return self.a.shape[2:]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the weight that it is added to, as far as the config tells."""
        return self.shape[::-1] if self.transposed else (*self.shape, *self.kernel)

    @property
    def parameter(self) -> str:
        """The name of the parameter that it changes."""
        return self.module if self.experts else f"{self.module}.weight"


def paired(found: Sorted, rules: LoraConfig | None, where: Path) -> dict[str, Pair]:
    """Pair the factors by module; incomplete or unfit ones are refused, with one message per kind of fault."""
    pairs: dict[str, Pair] = {}
    faults: dict[tuple[Path, str], list[str]] = {}
    parameters = _parameters(found, rules, faults) if rules else {}
    for (module, embedding), slots in found.factors.items():
        if module in parameters:
            parameter = parameters[module]
            made = rules and _of_parameter(parameter, slots, rules, where)
            if isinstance(made, Pair):
                pairs[parameter] = made
            elif made:
                faults.setdefault((next(iter(slots.values())).file, made), []).append(parameter)
            continue
        a, b, bias = slots.get("A"), slots.get("B"), slots.get("bias")
        fault = _fault(a, b, bias, embedding)
        if a and b and not fault:
            rank = a.shape[0]
            if (module, not embedding) in found.factors:
                fault = f"has the factors of an embedding and of a linear layer. {AGAIN}"
            elif rules and rules.rank_of(module) != rank:
                fault = (
                    f"of rank {rank}, {where.name} says {rules.rank_of(module)}. Find the config that belongs to it."
                )
            elif rules:
                transposed = embedding or (rules.fan_in_fan_out and len(a.shape) == 2)
                scaling = rules.scaling_of(module, rank)
                pairs[module] = Pair(module, a, b, rank, scaling, embedding, transposed, bias)
        if fault:
            faults.setdefault((next(iter(slots.values())).file, fault), []).append(module)
    refuse(*(CheckpointError(f"{file}: {listed(modules)}: {fault}") for (file, fault), modules in faults.items()))
    return pairs


def _parameters(found: Sorted, rules: LoraConfig, faults: dict[tuple[Path, str], list[str]]) -> dict[str, str]:
    """The parameters that are adapted themselves, by the names that their factors have as if of modules."""
    depths: dict[str, dict[int, str]] = {}
    for module, _ in found.factors:
        plain, depth = without_wraps(module)
        depths.setdefault(plain, {})[depth] = module
    named: dict[str, str] = {}
    for plain, modules in depths.items():
        names = rules.parameters_of(plain)
        if names in ((), ("weight",)) and max(modules) == 0:
            continue
        fault = ""
        if sorted(modules) != list(range(len(names))):
            those = f"the {len(names)} parameters {listed(names)}" if names[1:] else listed(names) or "no parameter"
            fault = f"has {len(modules)} pairs of factors, and target_parameters names {those} of it"
        elif len(names) > 1 and not set(names) <= set(REGISTERED):
            fault = f"has factors of {listed(names)}, and their names do not tell which are whose"
        outermost = sorted(names, key=REGISTERED.index, reverse=True) if len(names) > 1 and not fault else names
        for depth, module in modules.items():
            named[module] = "" if fault else f"{plain}.{outermost[depth]}"
        if fault:
            file = next(iter(found.factors[modules[min(modules)], False].values())).file
            faults.setdefault((file, f"{fault}. {_FOLD}"), []).append(plain)
    return named


def _of_parameter(parameter: str, slots: Mapping[str, TensorInfo], rules: LoraConfig, where: Path) -> Pair | str:
    """The pair of a parameter, or what keeps it from being one; an empty name has been refused already."""
    if not parameter:
        return ""
    a, b, bias = slots.get("A"), slots.get("B"), slots.get("bias")
    rank = rules.rank_of(parameter)
    if fault := _fault(a, b, None, False):
        return fault
    assert a is not None
    assert b is not None
    if bias is not None or rules.fan_in_fan_out:
        return f"has lora_bias or fan_in_fan_out, which no parameter can have. {AGAIN}"
    if len(a.shape) > 2:
        return f"of shape {list(a.shape)}: factors of a convolution, which is no parameter of experts. {AGAIN}"
    if a.shape[0] % rank:
        return f"of {a.shape[0]} rows, {where.name} says rank {rank}. Find the config that belongs to it."
    experts = a.shape[0] // rank
    return Pair(parameter, a, b, rank, rules.scaling_of(parameter, rank), False, False, None, experts, rules.as_stored)


def _fault(a: TensorInfo | None, b: TensorInfo | None, bias: TensorInfo | None, embedding: bool) -> str | None:
    """Why two factors cannot be multiplied and what to do about it, or None if they can."""
    prefix = "lora_embedding_" if embedding else "lora_"
    if a is None or b is None:
        there = [name for name, entry in ((f"{prefix}A", a), (f"{prefix}B", b), ("lora_B.bias", bias)) if entry]
        return f"has {' and '.join(there)} and no {prefix}{'A' if a is None else 'B'}. Download the file again."
    shapes = f"{prefix}A {list(a.shape)}, {prefix}B {list(b.shape)}"
    if min(len(a.shape), len(b.shape)) < 2 or 0 in a.shape + b.shape:
        return f"{shapes}: one shard of a factor, or none. {GATHER}"
    if len(a.shape) != len(b.shape) or set(b.shape[2:]) - {1} or (embedding and len(a.shape) > 2):
        return f"{shapes}: not the factors of a linear layer or of a convolution. {AGAIN}"
    if a.shape[0] != b.shape[1]:
        if len(a.shape) > 2 and a.shape[0] % b.shape[1] == 0:
            return f"{shapes}: factors of a convolution in groups, which PEFT cannot merge either. {_WITHOUT}"
        return f"{shapes}: ranks {a.shape[0]} and {b.shape[1]}. {AGAIN}"
    if bias and bias.shape != b.shape[:1]:
        return f"lora_B.bias {list(bias.shape)}, lora_B {list(b.shape)}. {AGAIN}"
    return None


def token_rows(found: Sorted, rules: LoraConfig, where: Path) -> dict[str, tuple[tuple[int, ...], TensorInfo]]:
    """The trained rows and the token indices that the config gives for them; mismatches are refused."""
    rows: dict[str, tuple[tuple[int, ...], TensorInfo]] = {}
    said = f"{where}: trainable_token_indices"
    if rules.tokens and not found.tokens:
        refuse(CheckpointError(f"{said} is set, and no trainable_tokens_delta is there. {AGAIN}"))
    for parameter, entry in found.tokens.items():
        module = parameter.removesuffix(".weight")
        named = (name for name in rules.tokens if name == module or module.endswith(f".{name}"))
        name = "" if "" in rules.tokens else next(named, None)
        if name is None:
            refuse(CheckpointError(f"{said} does not say which rows '{entry.name}' holds. {AGAIN}"))
        elif len(entry.shape) != 2 or entry.shape[0] != len(rules.tokens[name]):
            refuse(
                CheckpointError(
                    f"{entry.file}: '{entry.name}' is {list(entry.shape)}, {where.name} names "
                    f"{len(rules.tokens[name])} rows. Find the config that belongs to it."
                )
            )
        else:
            rows[parameter] = rules.tokens[name], entry
    return rows
