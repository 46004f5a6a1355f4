"""Find the weights in fp8 of a checkpoint and the scales that make numbers of them, by names, dtypes and shapes.

A value is that of the 8 bits times the scale of its block, whatever the tool: DeepSeek and Qwen store
`weight_scale_inv` for blocks of 128 x 128, FBGEMM, compressed-tensors and ModelOpt `weight_scale` for a tensor, for
rows or for blocks, Mistral `qscale_weight`, and MXFP8 the exponents of powers of 2 as bytes, for 32 of a row. Scales of
activations and of caches belong to a way of computing, and not to the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final

from polymerge.checkpoints.tensor_info import TensorInfo, listed
from polymerge.dtypes import FP8, MERGEABLE
from polymerge.families.expressions import Read, Scaled, Shape
from polymerge.families.quantization import PACKED, Config, quantization_settings

__all__ = ["Fp8", "read_fp8"]

_OF_WEIGHTS: Final = (("_scale_inv", ""), ("_scale", ""), (".scale", ".weight"), (".qscale_weight", ".weight"))
"""Name endings of a weight's scales, and that of the weight."""

_PLAINLY: Final = ("_scale_inv", ".weight_scale", ".qscale_weight")
"""Those that nothing else ends in."""

_OF_ACTIVATIONS: Final = (
    "input_scale", "input_zero_point", "activation_scale", "input_scale_ub", "output_scale", "qscale_act",
)  # fmt: skip
_OF_CACHES: Final = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point")
_CACHED: Final = ("kv_cache_scheme", "kv_cache_quant_algo")
"""Settings that say that a cache is quantized."""

_BESIDE_SCALES: Final = (
    (".weight_zero_point", "quantized with zero points besides scales"),
    (".pre_quant_scale", "for inputs that are scaled first (pre_quant_scale)"),
)
"""Name endings of what more than a scale changes a weight, and what that says of the weights."""

_USUAL: Final = (128, 128)
_SCALES: Final = (*MERGEABLE, "F8_E8M0")
_MX: Final = (1, 32)
"""The size of blocks whose scales are F8_E8M0 stored as U8."""

_PLAIN: Final = "Use the unquantized checkpoint"


@dataclass(frozen=True)
class Fp8:
    """The weights of a checkpoint in fp8, and what belongs to them; nothing for other checkpoints.

    scaled    by the name of a weight, the expression that reads it
    dropped   names of scales that no weight is multiplied by -> why they are left out
    kind      what there is one scale for, as text, in most of the weights
    problems  what is wrong, as text with the next step
    """

    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""
    problems: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, str]:
        """By the name of the scales, the weight that they are for."""
        return {scaled.by: name for name, scaled in self.scaled.items()}

    @property
    def beside(self) -> frozenset[str]:
        """The names of all scales, which are no tensors of the model."""
        return frozenset((*self.weights, *self.dropped))


def read_fp8(config: Config, entries: Mapping[str, TensorInfo]) -> Fp8:
    """Find the weights in fp8 and their scales.

    config   config.json, which gives the size of blocks where it is not 128 x 128
    entries  the tensors of the checkpoint by name
    """
    others = tuple(end for end, _ in _OF_WEIGHTS) + tuple(end for _, end in PACKED)
    weights = {name for name, entry in entries.items() if entry.dtype in FP8 and not name.endswith(others)}
    cached = any(settings.get(key) for settings in quantization_settings(config) for key in _CACHED)
    if not weights:
        return Fp8(dropped=dict(_dropped(entries, weights, cached)))
    held: dict[str, list[str]] = {}
    alone: dict[str, list[str]] = {}
    for name in entries:
        found = [weight for end, instead in _OF_WEIGHTS if (weight := _instead(name, end, instead)) in weights]
        if found:
            held.setdefault(found[0], []).append(name)
        elif name.endswith(_PLAINLY):
            weight = next(_instead(name, end, instead) for end, instead in _OF_WEIGHTS if name.endswith(end))
            there = entries[weight].dtype if weight in entries else ""
            if not there or there in MERGEABLE:  # what is packed in another way is refused for that
                alone.setdefault(there, []).append(name)
    if not held and not alone and not any(quantization_settings(config)):
        return Fp8()  # bits that nothing says how to read
    sizes = tuple(_sizes(config)) or (_USUAL,)
    scaled: dict[str, Scaled] = {}
    unfit: dict[str, list[str]] = {}
    for name in sorted(weights):
        made = _scaled(entries[name], [entries[one] for one in held.get(name, ())], sizes)
        if isinstance(made, Scaled):
            scaled[name] = made
        else:
            unfit.setdefault(made, []).append(name)
    kinds = Counter(_kind(entries[name].shape, one.block) for name, one in scaled.items())
    return Fp8(
        scaled,
        dict(_dropped(entries, weights, cached)),
        kinds.most_common(1)[0][0] if kinds else "",
        (*_problems(unfit, alone), *_not_by_scales_alone(entries, weights), *_rotated(config)),
    )


def _instead(name: str, end: str, instead: str) -> str:
    """A name with another ending; empty if it does not have the first one."""
    return name.removesuffix(end) + instead if name.endswith(end) else ""


def _scaled(weight: TensorInfo, scales: Sequence[TensorInfo], sizes: Sequence[tuple[int, int]]) -> Scaled | str:
    """The expression that reads a weight, or what keeps it from being read."""
    if len(scales) != 1:
        return f"{weight.dtype} with {len(scales)} scales each" if scales else f"{weight.dtype} without a scale"
    if len(weight.shape) not in (2, 3):
        return f"{weight.dtype} of shape {list(weight.shape)}, which is no matrix"
    small = (1, *_MX)[-len(weight.shape) :]
    if scales[0].dtype == "U8" and _block(weight.shape, scales[0].shape, (_MX,)) == small:
        return Scaled(Read(weight.name), scales[0].name, small)
    if scales[0].dtype not in _SCALES:
        return f"{weight.dtype} with scales of dtype {scales[0].dtype}"
    block = _block(weight.shape, scales[0].shape, sizes)
    if block is None:
        blocks = " or ".join(f"{rows} x {columns}" for rows, columns in sizes)
        return (
            f"{weight.dtype} with scales that are not one for the tensor, for each row or for each block of {blocks}: "
            f"{list(scales[0].shape)} for {list(weight.shape)}"
        )
    return Scaled(Read(weight.name), scales[0].name, block)


def _problems(unfit: Mapping[str, Sequence[str]], alone: Mapping[str, Sequence[str]]) -> Iterator[str]:
    then = f"Download it again, or {_PLAIN[0].lower()}{_PLAIN[1:]}"
    for what, names in unfit.items():
        yield f"{listed(names)} {'are' if names[1:] else 'is'} {what}. {then}"
    for dtype, names in alone.items():
        whose = f"weights that are plain ({dtype})" if dtype else "weights that are not there"
        yield f"{listed(names)}: scales of {whose}. {then}"


def _not_by_scales_alone(entries: Mapping[str, TensorInfo], weights: set[str]) -> Iterator[str]:
    for end, why in _BESIDE_SCALES:
        if names := [weight for name in entries if (weight := _instead(name, end, ".weight")) in weights]:
            yield f"{listed(names)} {'are' if names[1:] else 'is'} {why}. {_PLAIN}"


def _rotated(config: Config) -> Iterator[str]:
    if any(settings.get("transform_config") for settings in quantization_settings(config)):
        yield f"its weights were rotated before they were quantized (transform_config). {_PLAIN}"


def _dropped(entries: Mapping[str, TensorInfo], weights: set[str], cached: bool) -> Iterator[tuple[str, str]]:
    """The scales of activations and of caches, each with the reason why it is left out.

    cached  whether the config says that a cache is quantized; if not, only single numbers beside weights in fp8 are
            taken for its scales
    """
    for name, entry in entries.items():
        for end in _OF_ACTIVATIONS:
            if _instead(name, f".{end}", ".weight") in weights or _instead(name, f"_{end}", "") in weights:
                yield name, "scales activations, which the output computes with as they are"
                break
        else:
            if (cached or (weights and prod(entry.shape) == 1)) and any(name.endswith(f".{end}") for end in _OF_CACHES):
                yield name, "scales a quantized cache, which is not part of the weights"


def _sizes(config: Config) -> Iterator[tuple[int, int]]:
    """The sizes of blocks that a config names."""
    for settings in quantization_settings(config):
        groups = settings.get("config_groups")
        schemes = groups.values() if isinstance(groups, Mapping) else ()
        for said in (settings, *(one.get("weights") for one in schemes if isinstance(one, Mapping))):
            if isinstance(said, Mapping):
                for size in (said.get("weight_block_size"), said.get("block_structure"), [1, said.get("group_size")]):
                    match size:
                        case [int(rows), int(columns)] if min(rows, columns) > 0:
                            yield rows, columns


def _block(shape: Shape, scales: Shape, sizes: Sequence[tuple[int, int]]) -> Shape | None:
    """The size of the blocks of a weight that have one scale each, in each dimension; None if the shapes do not fit."""
    if prod(scales) == 1:
        return shape
    if len(scales) == 2 * len(shape) and set(scales[1::2]) == {1}:  # the blocks of ModelOpt, [rows, 1, columns, 1]
        scales = scales[::2]
    if scales == shape[: len(scales)]:
        scales += (1,) * (len(shape) - len(scales))
    if len(scales) != len(shape):
        return None
    for size in sizes:
        steps = tuple(
            whole if count == 1 else 1 if count == whole else step
            for whole, count, step in zip(shape, scales, (1, *size)[-len(shape) :], strict=True)
        )
        if all(-(-whole // step) == count for whole, count, step in zip(shape, scales, steps, strict=True)):
            return steps
    return None


def _kind(shape: Shape, block: Shape) -> str:
    rows, columns = block[-2:]
    if block == shape:
        return "tensor"
    if (rows, columns) == shape[-2:]:
        return "matrix"
    if columns == shape[-1] and rows == 1:
        return "row"
    return "column" if rows == shape[-2] and columns == 1 else f"block of {rows} x {columns}"
