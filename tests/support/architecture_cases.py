"""The merges in `golden/architectures`: their recipes, and how the reference rounds while it computes them.

    case = CASES["owl_into_cog_ties_0.2"]
    merged = load(polymerge.merge(case.recipe(), out, check=False).folder)
    case.joined(case.rows())          # [n] what the reference makes of its rounded deltas

A merge is one flat vector here, all changed tensors in the order of their names: that is what the reference trims.
What goes into a tensor is written down once more, so that the tables of polymerge are not checked against themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden_cases import Bools, Floats, load, packed_tensors
from paths import GOLDEN

FOLDER = GOLDEN / "architectures"
METHODS = {"interpolation": "linear"}
VOCABULARY = ["text.embed_tokens.weight", "text.lm_head.weight"]


@cache
def model(name: str) -> Mapping[str, Tensor]:
    """The tensors of one of the input checkpoints."""
    return load(FOLDER / "models" / name)


def taken(name: str, source: Mapping[str, Tensor]) -> Tensor:
    """What of a source belongs into the template's tensor `name`."""
    for expert, way in (("language", 0), ("vision", 1)):
        fused = f"{expert}_expert_query_key_value"
        if fused in name:
            return torch.cat([taken(name.replace(fused, f"{part}_proj.multiway.{way}"), source) for part in "qkv"])
        name = name.replace(f"{expert}_expert_dense", "o_proj").replace(f"{expert}_mlp.", "")
    two_ways = name.replace("layernorm.weight", "layernorm.multiway.0.weight")
    return source[next(n for n in (name, two_ways, re.sub(r"\.multiway\.\d", "", name)) if n in source)]


def exactly(tensor: Tensor) -> Floats:
    """A tensor in float64, flat."""
    return tensor.double().numpy().ravel()


@dataclass(frozen=True)
class Case:
    """One merge that the reference did; see golden/architectures/README.md."""

    name: str
    facts: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.facts["method"])

    @property
    def weights(self) -> tuple[float, float]:
        """The template's weight and the source's."""
        first, second = self.facts["weights"]
        return first, second

    @property
    def density(self) -> float:
        return float(self.facts["density"])

    @property
    def no_norms(self) -> bool:
        return bool(self.facts.get("no_norms"))

    @property
    def template(self) -> Mapping[str, Tensor]:
        return model(self.facts["models"]["template"])

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """What the reference changes, in the order in which it flattens the tensors."""
        golden = packed_tensors(FOLDER / f"{self.name}.safetensors.xz")
        return {name: golden[name] for name in sorted(golden) if not name.startswith("mask/")}

    @cached_property
    def masks(self) -> Bools:
        """The reference's random masks [model, n]."""
        golden = packed_tensors(FOLDER / f"{self.name}.safetensors.xz")
        sizes = {name: tensor.numel() for name, tensor in self.expected.items()}
        packed = [np.unpackbits(golden[f"mask/{name}"].numpy(), axis=1, count=size) for name, size in sizes.items()]
        return np.concatenate(packed, axis=1) > 0

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """The same merge as a recipe; `changes` are more of its parameters."""
        folders = {role: str(FOLDER / "models" / name) for role, name in self.facts["models"].items()}
        parameters: dict[str, Any] = {}
        exclude = []
        if self.method in ("task_arithmetic", "dare_linear"):
            parameters["normalize"] = True  # the reference's is the mean
        if "density" in self.facts:
            parameters["density"] = self.density
        if self.method in ("ties", "dare_ties"):
            parameters |= {"elect": "unweighted", "normalize": "none"}
        if self.method == "ties":
            parameters["trim"] = "model"
        if self.method == "interpolation":
            exclude += VOCABULARY if "onevision" in folders["source"] else []
            exclude += ["text.*norm.weight"] if self.no_norms else []
        elif "cogvlm" in folders["template"]:
            exclude.append("text.layers.*.mlp.*@image")  # that script of the reference leaves them out
        weights: Iterable[dict[str, Any]] = ({}, {})
        if self.method != "metagpt":
            weights = [{"parameters": {"weight": weight}} for weight in self.facts.get("weights", (1.0, 1.0))]
        recipe: dict[str, Any] = {
            "merge_method": METHODS.get(self.method, self.method),
            "models": [
                {"model": folders[role]} | own for role, own in zip(("template", "source"), weights, strict=True)
            ],
            "parameters": parameters | changes,
            "exclude": exclude,
        }
        if "base" in folders:
            recipe["base_model"] = folders["base"]
        return recipe

    # --- what goes in, flat, over all changed tensors

    def flat(self, tensors: Mapping[str, Tensor]) -> Floats:
        """The changed tensors of a checkpoint of the template's layout, in float64."""
        return np.concatenate([exactly(tensors[name]) for name in self.expected])

    def split(self, flat: Floats) -> dict[str, Floats]:
        """A flat vector cut into the changed tensors."""
        places = np.cumsum([tensor.numel() for tensor in self.expected.values()])[:-1]
        return dict(zip(self.expected, np.split(flat, places), strict=True))

    def of(self, role: str) -> list[Tensor]:
        """What each changed tensor is made of in the model of a role."""
        own = model(self.facts["models"][role])
        return [own[name] if role == "template" else taken(name, own) for name in self.expected]

    def deltas(self) -> Floats:
        """Both models' deltas [model, n] in float32, from what is on disk: what polymerge works on."""
        base = np.concatenate([exactly(tensor) for tensor in self.of("base")]).astype(np.float32)
        rows = [
            np.concatenate([exactly(one) for one in self.of(role)]).astype(np.float32)
            for role in ("template", "source")
        ]
        return np.stack(rows) - base

    def delta_types(self) -> tuple[torch.dtype, torch.dtype]:
        """What the reference rounds each model's deltas to: it subtracts in place, or in the wider of two dtypes."""
        if "llava_into_owl" in self.name:
            return torch.float32, torch.float16
        return torch.bfloat16, torch.bfloat16

    def rows(self) -> Tensor:
        """The reference's deltas [model, n], in the dtype that it goes on with."""
        wide = torch.from_numpy(self.deltas())
        first, second = (row.to(dtype) for row, dtype in zip(wide, self.delta_types(), strict=True))
        return torch.stack([first.to(torch.promote_types(first.dtype, second.dtype)), second])

    @property
    def computed_in(self) -> torch.dtype:
        """What the reference adds up deltas in."""
        return torch.promote_types(*self.delta_types())

    def joined(self, change: Tensor) -> dict[str, Tensor]:
        """The reference's last step: a flat change and the base, added in float32 and rounded to what it writes."""
        found = {}
        for (name, expected), base in zip(self.expected.items(), self.of("base"), strict=True):
            own, change = change[: base.numel()].reshape(base.shape), change[base.numel() :]
            found[name] = (own.float() + base.float()).to(expected.dtype)
        return found


CASES = {
    facts["case"]: Case(facts["case"], facts)
    for facts in json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
}


def cases(*methods: str) -> list[str]:
    """The names of the cases of these methods."""
    return [name for name, case in CASES.items() if case.method in methods]
