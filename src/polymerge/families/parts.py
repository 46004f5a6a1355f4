"""The parts of a model that transformers has built, and the canonical names of its tensors.

The decoder and the output embedding are the text tower, the encoders of images and of sound are vision and audio, all
else is the projector.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["Parts"]

_KINDS: Final = {"vision": ("vision", "image", "visual"), "audio": ("audio", "speech", "sound", "talker", "2wav")}
"""By part, what the keys of its configs have in common."""
_PROJECTORS: Final = ("multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger")
"""Modules that join a tower to the decoder, wherever they lie; their names are left out of canonical ones."""
_JOINS: Final = re.compile(r"(?:.*_)?(?:projector|connector|aligner|merger)(?:_.*)?")


class Parts:
    """Where the parts of a model lie, by the paths of its modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.paths = {id(module): path for path, module in self.modules.items()}
        self.multimodal = model.config.get_text_config() is not model.config
        self.outer = self._asked("get_decoder") or self._by_text_config()
        around = [path for path, _ in self._models() if _under(self.outer, path)]
        heads = (self._asked("get_output_embeddings", at=path) for path in (*around, self.outer))
        self.head = next((path for path in heads if path), "")
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
