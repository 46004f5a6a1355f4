"""A class of transformers built without its weights: which part each of its tensors belongs to, and where a stored name
goes when it loads.

Names in memory and the renamings and conversions of stored ones are internal to transformers and change with its
versions, so both are asked of it. No code of a checkpoint runs, and nothing is read from the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from polymerge.checkpoints.loading import quiet
from polymerge.checkpoints.pairs import REGISTERED
from polymerge.families.parts import Parts

__all__ = ["TURNS", "Blueprint", "Landing", "NotBuiltError", "blueprint"]

Config = Mapping[str, Any]

_COUNT: Final = re.compile(r"layer|depth|block|stage|expert|head|group")
_MOST: Final = 1 << 20
"""Largest count in a config that is built: a class may make lists of that length."""
_FEWEST, _PARAMETERS = 20_000, 200_000
"""Most parameters of a class that is built, for a checkpoint of few tensors and for any: a layer has some ten, and
hundreds where experts lie one by one.
"""

TURNS: Final = "PermuteForRope"
"""The operation that puts the rows of each head in another order, for rotary embeddings."""

_LOST: Final = ("vision_model", "text_model")
"""The levels that names in files have, and those of CLIP's and SigLIP's towers in memory do not."""

_AUTO: Final = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_MAPPING",
)  # fmt: skip
"""The mappings of transformers from a config to a class, the most specific first."""


class NotBuiltError(Exception):
    """Why transformers' class of a config is not built; `lasting` unless installing a package would help."""

    def __init__(self, why: str, lasting: bool = True) -> None:
        super().__init__(why)
        self.lasting = lasting


@dataclass(frozen=True)
class Landing:
    """Where a stored tensor goes.

    targets     names in memory of what it becomes, or becomes a share of
    renamed     its name with only prefixes and modules renamed, as far as a conversion leaves it its own
    operations  the names of the operations that its values go through, and those of their rows
    place       which of the tensors it is that a conversion puts into one, and how many those are
    turned      for each target, the height of the heads in which a file has rows in pairs, and memory the first of all
                pairs before the second; 0 where both have the same order
    """

    targets: tuple[str, ...]
    renamed: str
    operations: tuple[str, ...] = ()
    place: tuple[int, int] = (0, 1)
    turned: tuple[int, ...] = ()


@dataclass
class Blueprint:
    """A class of transformers without its weights.

    name       of the class
    kind       model type of its config, and `text` that of its text tower's
    shapes     of its tensors, by their names in memory
    canonical  their canonical names
    optional   those that need not be stored: tied ones, and buffers
    integers   buffers of whole numbers, which are never merged
    sizes      of the text tower, as the class has them where config.json says nothing
    linear     weights of its linear layers -> whether a layer keeps its columns as rows (GPT-2's Conv1D)
    stacked    parameters that hold the matrices of all experts -> whether the class says that they lie as [in, out]
    routers    weights of the layers beside these that choose among experts, where they are of a class of their own
    """

    name: str
    kind: str
    text: str
    shapes: Mapping[str, tuple[int, ...]]
    canonical: Mapping[str, str]
    optional: frozenset[str]
    integers: frozenset[str]
    sizes: Mapping[str, int]
    linear: Mapping[str, bool]
    stacked: Mapping[str, bool]
    routers: frozenset[str]
    ties: bool
    prefix: str
    _renamings: list[Any] = field(repr=False)
    _converters: list[Any] = field(repr=False)
    _model: Any = field(repr=False)

    def land(self, name: str) -> Landing | None:
        """Where transformers puts a stored tensor of that name; None if it does not load it."""
        from transformers.core_model_loading import rename_source_key

        held: Any = self.shapes
        final, source = rename_source_key(name, self._renamings, self._converters, self.prefix, held)
        if final not in held and name in held:
            return Landing((name,), name)
        if final not in held:
            return None
        if source is None:
            return Landing((final,), final)
        plain, _ = rename_source_key(name, self._renamings, [])
        moved, _ = rename_source_key(name, self._renamings, self._converters)
        before = final.removesuffix(moved) if final.endswith(moved) else ""
        after = moved.removesuffix(final) if moved.endswith(final) else ""
        converter = next(one for one in self._converters if source in one.source_patterns)
        first = converter.target_patterns[0]
        targets = tuple(final.replace(first, target) for target in converter.target_patterns)
        # only what splits and joins along rows leaves numbers where a name can say they are
        operations = tuple(
            type(one).__name__ + (str(one.dim) if isinstance(getattr(one, "dim", None), int) else "")
            for one in converter.operations
        )
        place = (converter.source_patterns.index(source), len(converter.source_patterns))
        turned = tuple(self._turned(converter.operations, target) for target in targets)
        return Landing(targets, before + plain.removeprefix(after), operations, place, turned)

    def _turned(self, operations: list[Any], target: str) -> int:
        """The height of a target's heads, as in `Landing.turned`; 0 if its rows are not put in another order."""
        for one in operations:
            only = getattr(one, "permute_layer_names", None)
            if type(one).__name__ == TURNS and (only is None or any(name in target for name in only)):
                config = self._model.config
                part = config if one.subconfig_key is None else getattr(config, one.subconfig_key, config)
                high, left = divmod(self.shapes[target][0], getattr(part, "num_attention_heads", 1))
                return 0 if left or high % 2 else high
        return 0

    def published(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors by the names that files have: transformers' conversions, in reverse.

        raises NotBuiltError if transformers cannot reverse them.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion

        # a prefix may be there or not, and saving leaves out all; files have the level that a CLIP lost in memory
        self._model._weight_conversions = [
            one
            for one in get_model_conversion_mapping(self._model, add_legacy=False)
            if not isinstance(one, PrefixChange) or (one.scope_prefix and one.prefix_to_remove in _LOST)
        ]
        try:
            found: Mapping[str, Any] = revert_weight_conversion(self._model, self._model.state_dict())
        except Exception as error:  # an operation may raise anything where it cannot be reversed
            raise NotBuiltError(f"transformers cannot reverse its conversion ({_first(error)})") from None
        return {name: tuple(tensor.shape) for name, tensor in found.items()}


def blueprint(config: Config, tensors: int = 0) -> Blueprint:
    """Build the class that transformers loads a config with, on the meta device.

    tensors   number of stored tensors: a class with many times as many is not built

    raises NotBuiltError with the reason if it has none, or does not build it.
    """
    most = min(_PARAMETERS, max(_FEWEST, 4 * tensors))
    return _built(json.dumps(config, sort_keys=True, default=dict), most)


@lru_cache(maxsize=4)
def _built(text: str, most: int) -> Blueprint:
    config: dict[str, Any] = json.loads(text)
    if too_large := next(_too_large(config), None):
        raise NotBuiltError(f"its config.json asks for {too_large}")
    if not isinstance(kind := config.get("model_type"), str):
        raise NotBuiltError("its config.json has no model_type")
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError as error:
        raise NotBuiltError(f"transformers 5 cannot be imported ({_first(error)})", lasting=False) from None
    if kind not in transformers.CONFIG_MAPPING:
        raise NotBuiltError(f"transformers {transformers.__version__} has no model_type '{kind}'")
    try:
        with quiet(), torch.device("meta"), _counted(torch, most):
            settings = transformers.CONFIG_MAPPING[kind].from_dict(_plain(config))
            model = _class_of(transformers, config, settings)(settings)
            transforms = get_model_conversion_mapping(model)
            return Blueprint(
                **_described(model),
                _renamings=[one for one in transforms if isinstance(one, WeightRenaming)],
                _converters=[one for one in transforms if isinstance(one, WeightConverter)],
                _model=model,
            )
    except ImportError as error:
        raise NotBuiltError(f"its class needs a package that is not installed ({_first(error)})", False) from None
    except NotBuiltError:
        raise
    except Exception as error:  # a class may raise anything where a config is not what it expects
        raise NotBuiltError(f"transformers cannot build it ({type(error).__name__}: {_first(error)})") from None


def _too_large(config: Any, key: str = "") -> Iterator[str]:
    """Counts in a config that no model has; what they count would be built one by one."""
    if isinstance(config, Mapping):
        for inner, value in config.items():
            yield from _too_large(value, str(inner))
    elif isinstance(config, list):
        for value in config:
            yield from _too_large(value, key)
    elif isinstance(config, int) and abs(config) > _MOST and _COUNT.search(key):
        yield f"{key} {config}"


class _counted:  # noqa: N801  (a context, read as a verb)
    """Stop a class that registers more parameters than any model has."""

    def __init__(self, torch: Any, most: int) -> None:
        self._register = torch.nn.modules.module.register_module_parameter_registration_hook
        self._count, self._most = 0, most

    def __enter__(self) -> None:
        self._handle = self._register(self._add)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _add(self, *_: object) -> None:
        self._count += 1
        if self._count > self._most:
            raise NotBuiltError(f"its config.json asks for more than {self._most} tensors")


def _plain(config: Config) -> dict[str, Any]:
    """A config without what a class would fetch, quantize or run beside its modules, and with numbers as numbers."""
    left_out = ("auto_map", "quantization_config", "compression_config", "attn_implementation", "_attn_implementation")
    fixed = {"use_pretrained_backbone": False}
    return {key: fixed.get(key, _value(value)) for key, value in config.items() if key not in left_out}


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        infinite = value.get("__float__") if len(value) == 1 else None  # what JSON has no number for
        return _plain(value) if infinite is None else float(infinite)
    return [_value(one) for one in value] if isinstance(value, list) else value


def _class_of(transformers: Any, config: Config, settings: Any) -> Any:
    """The class that config.json names, if it is one of that config; else the one transformers has for it."""
    for name in config.get("architectures") or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            expected: Any = getattr(named, "config_class", None)
            if expected is not None and isinstance(settings, expected):
                return named
    for mapping in _AUTO:
        known = getattr(transformers, mapping, None) or getattr(transformers.models.auto.modeling_auto, mapping, None)
        if known is not None and type(settings) in known:
            found = known[type(settings)]
            return found[0] if isinstance(found, tuple) else found
    raise NotBuiltError(f"transformers {transformers.__version__} has no class for {type(settings).__name__}")


def _described(model: Any) -> dict[str, Any]:
    """What a blueprint says of a model that is built."""
    state, text = model.state_dict(), model.config.get_text_config()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parts = Parts(model)
    head = f"{parts.head}." if parts.head else "\0"
    optional = {*tied, *tied.values(), *(name for name in state if name.startswith(head) or name not in parameters)}
    sizes = {key: getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    return {
        "name": type(model).__name__,
        "kind": str(model.config.model_type),
        "text": str(text.model_type),
        "shapes": {name: tuple(tensor.shape) for name, tensor in state.items()},
        "canonical": parts.names(state),
        "optional": frozenset(optional & state.keys()),
        "integers": frozenset(name for name, tensor in state.items() if not tensor.dtype.is_floating_point),
        "sizes": {key: value for key, value in sizes.items() if type(value) is int},
        "linear": _linear(model),
        "stacked": _stacked(model),
        "routers": frozenset(_routers(model)),
        "ties": bool(getattr(model.config, "tie_word_embeddings", False)),
        "prefix": model.base_model_prefix,
    }


def _linear(model: Any) -> dict[str, bool]:
    """The weights of the layers that an adapter can be put on, and whether they lie transposed."""
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        # torch's own attention reads the weight of such a layer and never calls it
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def _stacked(model: Any) -> dict[str, bool]:
    """The parameters of experts, and what their classes say of them, which PEFT goes by."""
    return {
        f"{name}.{own}": bool(getattr(module, "is_transposed", False))
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if own in REGISTERED and parameter.ndim == 3
    }


def _routers(model: Any) -> Iterator[str]:
    """The weights of layers beside experts that have a row for each of these."""
    from torch import nn

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        beside = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
        held = beside.parameters(recurse=False) if isinstance(beside, nn.Module) else ()
        if any(one.ndim == 3 and len(one) == len(weight) for one in held):
            yield f"{name}.weight"


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
