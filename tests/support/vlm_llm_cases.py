"""The merges in `golden/vlm_llm`: their recipes, their tensors as files and reference have them, and rounding errors.

    case = CASES["idefics2_ties"]
    merged = load(polymerge.merge(case.recipe(), out, check=False).folder)
    for tensor in case.tensors(): ...  # what went in, and what the reference made of it

All numbers are numpy arrays, flat; what a reference value may be off by is computed in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden_cases import Floats, load, packed_tensors
from paths import GOLDEN

FOLDER = GOLDEN / "vlm_llm"
KEPT = ["text.embed_tokens.weight", "text.lm_head.weight"]
"""What the reference leaves as it is in the VLM."""

METHODS = {"base": "linear", "layerswap": "linear", "ties": "ties", "darelinear": "dare_linear",
           "dareties": "dare_ties"}  # fmt: skip
PREFIXES = {"idefics2": ("model.text_model.", "model."), "llavanext": ("language_model.", ""),
            "internvl2": ("language_model.", ""), "qwen2vl": ("model.", "model.")}  # fmt: skip
"""By family, what stands before a tensor's name in the VLM, and what in the language model."""


@cache
def model(name: str) -> dict[str, Tensor]:
    """The tensors of one of the input checkpoints."""
    return load(FOLDER / "models" / name)


@dataclass(frozen=True)
class Merged:
    """One merged tensor of a case.

    stored    role (vlm, llm, base) -> what is on disk
    loaded    role -> what the reference loads of it
    expected  what the reference makes of it, in the VLM's dtype
    equals    [model] positions where the reference's sort decides what is kept
    masks     [model] what the reference keeps at random
    """

    name: str
    stored: dict[str, Tensor]
    loaded: dict[str, Tensor]
    expected: Tensor
    equals: tuple[NDArray[Any], NDArray[Any]]
    masks: NDArray[np.bool_] | None

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to."""
        _, found, rest = self.name.partition(".layers.")
        return int(rest.partition(".")[0]) if found else None

    def exact(self, role: str) -> Floats:
        """What is on disk, in float64."""
        return self.stored[role].double().numpy().ravel()

    def rounded(self, role: str) -> Floats:
        """What the reference loads, in float64."""
        return self.loaded[role].double().numpy().ravel()

    def deltas(self) -> Floats:
        """The task vectors [model, n] of what is on disk, in float32."""
        vlm, llm, base = (self.stored[role].float().numpy().ravel() for role in ("vlm", "llm", "base"))
        return np.stack([vlm - base, llm - base])

    def reference_deltas(self) -> Floats:
        """The task vectors [model, n] as the reference has them: subtracted in the dtypes it loads."""
        base = self.loaded["base"]
        return torch.stack([(self.loaded[role] - base).float().ravel() for role in ("vlm", "llm")]).numpy()

    def as_stored(self, values: Floats) -> Tensor:
        """Float32 values, flat, as a tensor of the VLM's dtype and shape."""
        assert values.dtype == np.float32
        return torch.from_numpy(values).to(self.expected.dtype).reshape(self.expected.shape)


@dataclass(frozen=True)
class Case:
    """One merge that the reference did; see golden/vlm_llm/README.md."""

    name: str
    facts: dict[str, Any]

    @property
    def method(self) -> str:
        """The reference's name of the method."""
        return str(self.facts["method"])

    @property
    def weights(self) -> tuple[float, float]:
        """The VLM's weight and the language model's."""
        first = self.facts["alpha"]
        return first, self.facts.get("alpha2", 1 - first)

    @property
    def computed_in(self) -> torch.dtype:
        """In what the reference computes; of `Merged.reference_deltas`, in what it subtracts."""
        return getattr(torch, self.facts["computed_in"])

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """The same merge as a recipe; `changes` are more of its parameters."""
        folders = {role: str(FOLDER / "models" / name) for role, name in self.facts["models"].items()}
        parameters: dict[str, Any] = {}
        if "density" in self.facts:
            parameters["density"] = self.facts["density"]
        if self.method in ("ties", "dareties"):
            parameters |= {"elect": "unweighted", "normalize": "count"}
        if self.method.startswith("dare"):
            parameters["rescale"] = False
        recipe: dict[str, Any] = {
            "merge_method": METHODS[self.method],
            "models": [
                {"model": folders[role], "parameters": {"weight": weight}}
                for role, weight in zip(("vlm", "llm"), self.weights, strict=True)
            ],
            "parameters": parameters | changes,
            "exclude": KEPT,
        }
        if "base" in folders:
            recipe["base_model"] = folders["base"]
        if self.method == "layerswap":
            recipe["overrides"] = [{"layers": f"0-{self.facts['base_layer_num']}", "merge_method": "copy"}]
        return recipe

    def template(self) -> dict[str, Tensor]:
        """All tensors of the VLM."""
        return model(self.facts["models"]["vlm"])

    def tensors(self) -> Iterator[Merged]:
        """Every tensor that the reference merges or passes through its arithmetic."""
        golden = packed_tensors(FOLDER / f"{self.name}.safetensors.xz")
        before, instead = PREFIXES[self.name.partition("_")[0]]
        for name, expected in golden.items():
            if "/" in name:
                continue
            own = instead + name.removeprefix(before)
            stored = {
                role: model(place)[name if role == "vlm" else own] for role, place in self.facts["models"].items()
            }
            loaded = {role: tensor.to(getattr(torch, self.facts["loaded_as"][role])) for role, tensor in stored.items()}
            equals = [golden.get(f"equals/{place}/{name}", torch.empty(0, dtype=torch.int32)) for place in (0, 1)]
            packed = [golden[f"mask/{place}/{name}"].numpy() for place in (0, 1) if f"mask/{place}/{name}" in golden]
            masks = np.stack([np.unpackbits(bits, count=expected.numel()) > 0 for bits in packed]) if packed else None
            yield Merged(name, stored, loaded, expected, (equals[0].numpy(), equals[1].numpy()), masks)


CASES = {
    facts["case"]: Case(facts["case"], facts)
    for facts in json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
}


def cases(*methods: str) -> list[str]:
    """The names of the cases of these methods."""
    return [name for name, case in CASES.items() if case.method in methods]
