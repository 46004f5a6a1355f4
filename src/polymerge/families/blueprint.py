"""A class of transformers built without its weights: which part each of its tensors belongs to, and where a stored name
goes when it loads.

Names in memory and the renamings and conversions of stored ones are internal to transformers and change with its
versions, so both are asked of it. No code of a checkpoint runs, and nothing is read from the network.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from polymerge.checkpoints.loading import quiet

__all__ = ["Blueprint", "Landing", "NotBuiltError", "blueprint"]

Config = Mapping[str, Any]

_COUNT: Final = re.compile(r"layer|depth|block|stage|expert|head|group")
_MOST: Final = 1 << 20
"""Largest count in a config that is built: a class may make lists of that length."""
_FEWEST, _PARAMETERS = 20_000, 200_000
"""Most parameters of a class that is built, for a checkpoint of few tensors and for any: a layer has some ten, and
hundreds where experts lie one by one.
"""

_AUTO: Final = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_MAPPING",
)  # fmt: skip
"""The mappings of transformers from a config to a class, the most specific first."""

_KINDS: Final = {"vision": ("vision", "image", "visual"), "audio": ("audio", "speech", "sound")}
"""By part, what the keys of its configs have in common."""
_PROJECTORS: Final = ("multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger")
"""Modules that join a tower to the decoder, wherever they lie; their names are left out of canonical ones."""
_JOINS: Final = re.compile(r"(?:.*_)?(?:projector|connector|aligner|merger)(?:_.*)?")


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
    """

    targets: tuple[str, ...]
    renamed: str
    operations: tuple[str, ...] = ()
    place: tuple[int, int] = (0, 1)


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
    """

    name: str
    kind: str
    text: str
    shapes: Mapping[str, tuple[int, ...]]
    canonical: Mapping[str, str]
    optional: frozenset[str]
    integers: frozenset[str]
    sizes: Mapping[str, int]
    ties: bool
    prefix: str
    _renamings: list[Any] = field(repr=False)
    _converters: list[Any] = field(repr=False)

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
        return Landing(targets, before + plain.removeprefix(after), operations, place)


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
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError as error:
        raise NotBuiltError(f"transformers 5 cannot be imported ({_first(error)})", lasting=False) from None
    kind = str(config.get("model_type"))
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
        known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        if known and isinstance(settings, named.config_class or ()):
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
    parts = _Parts(model)
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
        "ties": bool(getattr(model.config, "tie_word_embeddings", False)),
        "prefix": model.base_model_prefix,
    }


class _Parts:
    """Where the parts of a model lie, by the paths of its modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.paths = {id(module): path for path, module in self.modules.items()}
        self.multimodal = model.config.get_text_config() is not model.config
        self.outer = self._asked("get_decoder") or self._by_text_config()
        self.head = self._asked("get_output_embeddings") or self._asked("get_output_embeddings", at=self.outer) or ""
        self.decoder = self.outer
        while self.head.startswith(f"{self.decoder}.") and (inner := self._inside(self.decoder)):
            self.decoder = inner
        self.towers = self._towers()
        self.embedding = self._asked("get_input_embeddings", at=self.decoder) or "\0"
        self.layers = self._layers()

    def names(self, state: Mapping[str, Any]) -> dict[str, str]:
        """The canonical name of every tensor; a projector's module is named where it would not be the only one."""
        found = {name: self._canonical(name) for name in state}
        short = {name: _without_projector(canonical) for name, canonical in found.items()}
        times = Counter(short.values())
        return {name: one if times[one] == 1 else found[name] for name, one in short.items()}

    def _canonical(self, name: str) -> str:
        if self.head and _under(name, self.head):
            return "text.lm_head" + name.removeprefix(self.head)
        for path, part in self.towers.items():
            if _under(name, path):
                inside = name.removeprefix(f"{path}.")
                first = next(tower for tower, other in self.towers.items() if other == part)
                if _JOINS.fullmatch(inside.partition(".")[0]):
                    part = "projector"
                return f"{part}.{inside}" if path == first else f"{part}.{path.rpartition('.')[2]}.{inside}"
        if _under(name, self.embedding):
            return "text.embed_tokens" + name.removeprefix(self.embedding)
        if _under(name, self.decoder):
            inside = name.removeprefix(f"{self.decoder}.") if self.decoder else name
            around = next((path for path in self.towers if _under(path, self.decoder)), "")
            child = inside.partition(".")[0]
            if around and around.removeprefix(f"{self.decoder}.").partition(".")[0] == child:
                return f"projector.{inside}"
            return "text." + (f"layers.{inside.removeprefix(self.layers + '.')}" if child == self.layers else inside)
        base = self.model.base_model_prefix
        inside = name.removeprefix(f"{base}.") if self.paths.get(id(self.model.base_model)) == base else name
        if self.outer and _under(name, self.outer):
            return f"text.{name.removeprefix(f'{self.outer}.')}"
        return f"{'projector' if self.multimodal else 'text'}.{inside}"

    def _asked(self, method: str, *more: str, at: str = "") -> str | None:
        """The path of the module that a model answers with; None if it has no answer, or is that itself."""
        try:
            found = getattr(self.modules[at], method)(*more)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return None
        return self.paths.get(id(found)) or None

    def _by_text_config(self, inside: str = "") -> str:
        """The first model that has the text tower's config, for one that is made of several."""
        text = self.model.config.get_text_config()
        below = (path for path, one in self._models() if type(one.config) is type(text))
        return next((path for path in below if path != inside and _under(path, inside)), "")

    def _inside(self, path: str) -> str:
        """The decoder in what a model calls its decoder, and has the head in it; empty if there is none."""
        found = self._asked("get_decoder", at=path) or ""
        return found if found.startswith(f"{path}.") else self._by_text_config(path)

    def _models(self) -> Iterator[tuple[str, Any]]:
        from transformers import PreTrainedModel

        return ((path, module) for path, module in self.modules.items() if isinstance(module, PreTrainedModel))

    def _towers(self) -> dict[str, str]:
        """The paths of encoders, innermost last, each with its part: those that the model names, or, by its config,
        those that it does not.
        """
        kinds = dict(_kinds(self.model.config))
        said = {
            self._asked("get_encoder", modality): part for modality, part in (("audio", "audio"), ("image", "vision"))
        }
        if "vision" not in kinds.values() and len(said) == 1:  # one encoder, whatever it is asked for
            said = dict.fromkeys(said, "audio")
        found = {path: part for path, part in said.items() if path and not _under(self.decoder or "\0", path)}
        for path, module in self._models():
            part = kinds.get(type(module.config).__name__)
            inside = any(_under(path, tower) for tower in found)
            if part and path and not inside and not _under(self.decoder or "\0", path):
                found[path] = part
        return found

    def _layers(self) -> str:
        """The decoder's list of layers, if it is not called `layers`; otherwise the same."""
        children = dict(self.modules[self.decoder].named_children())
        if "layers" in children:
            return "layers"
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
        lists = [
            name for name, child in children.items() if type(child).__name__ == "ModuleList" and len(child) == count
        ]
        return lists[0] if lists and count else "layers"


def _kinds(config: Any) -> Iterator[tuple[str, str]]:
    """The names of config classes inside a config that are of another part than text, each with its part."""
    for key, inner in vars(config).items():
        if hasattr(inner, "get_text_config"):
            part = next((part for part, words in _KINDS.items() if any(word in key for word in words)), "")
            if part and type(inner) is not type(config):
                yield type(inner).__name__, part
            yield from _kinds(inner)


def _without_projector(canonical: str) -> str:
    """`projector.model.connector.linear.weight` -> `projector.linear.weight`."""
    part, *inside = canonical.split(".")
    place = next((place for place, word in enumerate(inside[:-1]) if word in _PROJECTORS), None)
    return canonical if part != "projector" or place is None else ".".join((part, *inside[place + 1 :]))


def _under(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
