"""Detect quantized weights from config.json and the stored tensors: all but fp8 cannot be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from polymerge.dtypes import MERGEABLE

__all__ = [
    "PACKED",
    "packed_tensor",
    "quantization_method",
    "quantization_settings",
    "why_quantized",
    "without_quantization",
]

Config = Mapping[str, object]


def quantization_method(config: Config) -> str | None:
    """The quantization method of the stored weights, such as `bitsandbytes`, or None if the config names none."""
    for settings in quantization_settings(config):
        method = settings.get("quant_method")
        old = settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True
        return method if isinstance(method, str) else "bitsandbytes" if old else "unknown"
    return "mlx" if _is_mlx(config) else None


def quantization_settings(config: Config) -> Iterator[Config]:
    """The settings of quantization in a config, also in those of its parts, nested at any depth."""
    parts = layer = [config]
    for _ in range(2):
        layer = [inside for part in layer for inside in part.values() if isinstance(inside, Mapping)]
        parts = parts + layer
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if isinstance(settings, Mapping) and settings:
                yield settings


def without_quantization(config: Config) -> dict[str, object]:
    """The config, including nested ones, without the fields that mark the weights as quantized."""
    keys = {"quantization_config", "compression_config"} | ({"quantization"} if _is_mlx(config) else set())
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in keys
    }


def _is_mlx(config: Config) -> bool:
    settings = config.get("quantization")
    return isinstance(settings, Mapping) and "bits" in settings


PACKED: Final = (
    ("gptq", ".g_idx"),
    ("awq or gptq", ".qweight"),
    ("bitsandbytes", ".quant_state.bitsandbytes__nf4"),
    ("bitsandbytes", ".quant_state.bitsandbytes__fp4"),
    ("bitsandbytes", ".SCB"),
    ("compressed-tensors", ".weight_packed"),
    ("hqq", ".W_q"),
    ("quanto", ".weight._data"),
    ("torchao", ".weight_qdata"),
    ("torchao", "._weight_qdata"),
    ("torchao", ".weight:qdata"),
    ("torchao", ".weight:_data"),
    ("aqlm", ".codebooks"),
    ("mxfp4", "_proj_blocks"),
)
"""Name endings that identify a quantization method."""

_SCALES: Final = (("_scale_inv", ""), ("_scales", ""), ("_scale", ""), (".scales", ".weight"))
"""Name endings of scales, and the ending of the tensor that is scaled."""

_SCALED: Final = {
    "F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E4M3FNUZ": "fp8 fnuz", "F8_E5M2FNUZ": "fp8 fnuz",
    "I8": "int8", "U32": "mlx",
}  # fmt: skip


def packed_tensor(dtypes: Mapping[str, str]) -> tuple[str, str] | None:
    """The quantization method that names and dtypes show, and the tensor that shows it; None if none does.

    dtypes   safetensors dtype of each tensor by its name; a low-bit dtype without a scale is not evidence

    Configs do not tell if a tool wrote only the weights, or the config was replaced.
    """
    for method, ending in PACKED:
        found = next((name for name in dtypes if name.endswith(ending)), None)
        if found is not None:
            return method, found
    for scale in dtypes:
        for ending, instead in (*_SCALES, (".scale", ".weight")):
            name = scale.removesuffix(ending) + instead
            if scale.endswith(ending) and (dtype := dtypes.get(name, "F32")) not in MERGEABLE:
                special = {
                    ("I8", "_scales"): "eetq",
                    ("I8", ".scale"): "mxfp4" if dtypes[scale] == "F8_E8M0" else "int8",
                    ("U8", "_scale"): "nvfp4" if f"{scale}_2" in dtypes else "packed",
                }
                return special.get((dtype, ending)) or _SCALED.get(dtype, "packed"), name
    return None


_TABLES: Final = ("I64", "BOOL")
"""Dtypes of tables such as positions and masks, which are not quantized weights."""

_LOADED: Final = "what transformers saves of it after loading it with {}(dequantize=True)"
_DEQUANTIZED: Final = {
    "bitsandbytes": "what transformers saves of it after model.dequantize()",
    "gguf": "what transformers saves of it after from_pretrained(FOLDER, gguf_file=FILE)",
    "fp8": _LOADED.format("FineGrainedFP8Config"),
    "mxfp4": _LOADED.format("Mxfp4Config"),
    "compressed-tensors": _LOADED.format("CompressedTensorsConfig"),
}
"""By method, what can be merged instead of the quantized checkpoint, with the same rounding."""


def why_quantized(config: Config, dtypes: Mapping[str, str]) -> str | None:
    """Why a quantized checkpoint cannot be merged, and what to use instead; None for plain weights.

    dtypes   without scales that are known (see `fp8`), and with the weights that these are for as plain

    Weights are plain, whatever config.json says, if all have mergeable dtypes, or are integers in
    tables, and none has a scale: a model that was dequantized and saved often keeps its old config.
    """
    said, packed = quantization_method(config), packed_tensor(dtypes)
    if packed is None and (said is None or _are_plain(dtypes)):
        return None
    method = packed[0] if packed and said in (None, "unknown") else said or "unknown"
    shown = f"; {packed[1]} is {dtypes[packed[1]]}" if packed else ""
    other = f", or {_DEQUANTIZED[said]}" if said in _DEQUANTIZED else ""  # transformers goes by the config alone
    return f"is quantized ({method}{shown}): its numbers cannot be merged. Use the unquantized checkpoint{other}"


def _are_plain(dtypes: Mapping[str, str]) -> bool:
    """Return whether all weights have mergeable dtypes, or are integers in tables, and none has a scale."""
    return (
        bool(dtypes)
        and all(dtype in MERGEABLE or dtype in _TABLES for dtype in dtypes.values())
        and not any(
            scale.endswith(ending) and scale.removesuffix(ending) + instead in dtypes
            for scale in dtypes
            for ending, instead in _SCALES
        )
    )
