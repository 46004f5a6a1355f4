"""The plan of a merge of adapters, as plain data: every pair of factors, every full weight that goes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from polymerge.dtypes import byte_count
from polymerge.errors import RecipeError
from polymerge.planning.plan import Input, LeftOut, Plan
from polymerge.recipe.parameters import Setting

__all__ = ["AdapterPlan", "PairRead", "PairStep"]

FORMAT = 2


@dataclass(frozen=True)
class PairRead:
    """One adapter's factors of a module: the names of its tensors, and what their product is multiplied by."""

    input: int
    a: str
    b: str
    bias: str
    rank: int
    scaling: float


@dataclass(frozen=True)
class PairStep:
    """One module of the output and what its factors are made of.

    module     its name in the base model, as the output has it; `canonical` is what joins the adapters' modules
    fate       merged, or copied from the one adapter that is read, tensor by tensor and bit by bit
    setting    which of the plan's settings merges it
    reads      the adapters that have it and take part, in the recipe's order
    shape      [out, in] of the update
    rank       of the output; `scaling` is what its config multiplies b @ a by
    dtypes     of the two factors, a and b
    embedding  whether it is an embedding, whose factors have names of their own
    reason     what a person should know of it
    """

    module: str
    canonical: str
    fate: Literal["merged", "copied"]
    setting: int | None
    reads: tuple[PairRead, ...]
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtypes: tuple[str, str]
    embedding: bool = False
    reason: str = ""

    @property
    def bias(self) -> bool:
        """Whether any of the adapters has a bias on its second factor."""
        return any(read.bias for read in self.reads)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What it is stored as: the end of each tensor's name, its dtype and shape."""
        out, width = self.shape
        ends = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            ends[0]: (self.dtypes[0], (self.rank, width)),
            ends[1]: (self.dtypes[1], (out, self.rank)),
        }
        return found | ({"lora_B.bias": (self.dtypes[1], (out,))} if self.bias else {})


@dataclass(frozen=True)
class AdapterPlan:
    """What `merge` will do with adapters, module by module.

    inputs    the adapters, in the recipe's order, and the base behind them where its tensors are read
    template  the place of the adapter whose config is taken
    config    the output's adapter_config.json
    pairs     one step per module that any adapter has
    extras    a plan of the full weights that travel with the adapters, under the names that the output stores; None
              where there are none
    beside    whose files the output has beside its weights: see `planning.inputs.files_beside`
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Input, ...]
    template: int
    models: tuple[int, ...]
    seed: int
    settings: tuple[Setting, ...]
    config: Mapping[str, Any]
    pairs: tuple[PairStep, ...]
    extras: Plan | None
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()
    beside: Mapping[str, str | None] = field(default_factory=dict)
    version: int = FORMAT

    @property
    def base(self) -> int | None:
        """The place of the base whose full weights are read, if one is."""
        return len(self.models) if len(self.inputs) > len(self.models) else None

    @property
    def size(self) -> int:
        """Bytes of all output tensors."""
        pairs = sum(byte_count(*tensor) for step in self.pairs for tensor in step.tensors().values())
        return pairs + (self.extras.size if self.extras else 0)

    @property
    def hash(self) -> str:
        """sha256 of what the merge computes: the same on any machine and for any place where the inputs lie."""
        data = self.to_json()
        data["extras"] = self.extras.hash if self.extras else None
        del data["recipe"], data["warnings"], data["left_out"], data["beside"]
        for entry in data["inputs"]:
            for place in ("label", "source", "path", "adapter", "files", "wrappers"):
                del entry[place]
        for step in data["pairs"]:
            del step["reason"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many modules and full weights are merged, and how many copied."""
        counts = {fate: sum(step.fate == fate for step in self.pairs) for fate in ("merged", "copied")}
        for step in self.extras.steps if self.extras else ():
            counts["merged" if step.fate == "merged" else "copied"] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; `from_json` gives an equal plan back."""
        data = asdict(self)
        data["recipe"], data["config"] = dict(self.recipe), dict(self.config)
        data["settings"] = [{"method": one.method, "parameters": dict(one.parameters)} for one in self.settings]
        data["extras"] = self.extras.to_json() if self.extras else None
        plain: dict[str, Any] = json.loads(json.dumps({**data, "kind": "adapters"}))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterPlan:
        """The plan that `to_json` wrote; raises RecipeError for a plan of another version."""
        if data.get("kind") != "adapters" or data.get("version") != FORMAT:
            raise RecipeError(f"no plan of adapters of format {FORMAT}: plan again")
        return cls(
            recipe=data["recipe"],
            inputs=tuple(Input.from_json(entry) for entry in data["inputs"]),
            template=data["template"],
            models=tuple(data["models"]),
            seed=data["seed"],
            settings=tuple(Setting(one["method"], _tuples(one["parameters"])) for one in data["settings"]),
            config=data["config"],
            pairs=tuple(
                PairStep(**{**_tuples(step), "reads": tuple(PairRead(**read) for read in step["reads"])})
                for step in data["pairs"]
            ),
            extras=Plan.from_json(data["extras"]) if data["extras"] else None,
            left_out=tuple(LeftOut(**entry) for entry in data["left_out"]),
            warnings=tuple(data["warnings"]),
            beside=data["beside"],
        )


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
