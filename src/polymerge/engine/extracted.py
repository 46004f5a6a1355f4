"""What an extraction found, as the user sees it, and what it writes beside the factors: config and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from polymerge.dtypes import dtype_code
from polymerge.engine.differences import Found
from polymerge.engine.model_card import to_complete
from polymerge.engine.provenance import RECORD
from polymerge.engine.verify import Verification
from polymerge.planning.difference import Difference, Extraction
from polymerge.planning.model import EMBEDDING
from polymerge.planning.peft_config import base_said, ranks_and_alphas
from polymerge.planning.plan import Lora
from polymerge.tables import Table

__all__ = ["Extracted", "Missed", "adapter_config", "card", "settings_of"]


@dataclass(frozen=True)
class Missed:
    """A difference that an adapter does not hold: its Frobenius norm, and what its tensor is."""

    norm: float
    why: str


@dataclass(frozen=True)
class Extracted(Table):
    """The result of `extract`.

    modules   each module of the adapter, by its name; of experts that are one parameter, the parameter
    left_out  what differs and is not in the adapter, by canonical name
    saved     parameters that it keeps in full
    resumed   the number of matrices that a run which was killed had finished, and that were taken from it
    """

    folder: Path
    modules: Mapping[str, Found]
    left_out: Mapping[str, Missed] = field(repr=False)
    saved: tuple[str, ...]
    verification: Verification | None
    warnings: tuple[str, ...] = ()
    resumed: int = 0

    @property
    def error(self) -> float:
        """The relative error of all modules together, in the Frobenius norm: what their ranks leave out."""
        whole = sum(one.energy for one in self.modules.values())
        return sqrt(sum(one.lost for one in self.modules.values()) / whole) if whole else 0.0

    @property
    def held(self) -> float:
        """The share of the squared norm of the whole difference that is in tensors which the adapter changes."""
        inside = sum(one.energy for one in self.modules.values())
        outside = sum(one.norm**2 for one in self.left_out.values())
        return inside / (inside + outside)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each module: its rank, the norm of its difference, and the share of it that the rank leaves out."""
        several = any(one.experts for one in self.modules.values())
        return [
            {
                "module": name,
                **({"experts": one.experts or None} if several else {}),
                "rank": one.rank,
                "norm": one.norm,
                "error": one.error,
            }
            for name, one in self.modules.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data, with the total and what is left out."""
        return {
            "error": self.error,
            "modules": {name: one.to_json() for name, one in self.modules.items()},
            "saved": list(self.saved),
            "left_out": {name: vars(one) for name, one in self.left_out.items()},
            "share_of_difference": self.held,
        }


def adapter_config(plan: Extraction, modules: Mapping[str, Found], saved: Sequence[Difference]) -> dict[str, Any]:
    """The adapter_config.json."""
    code = str(dtype_code(plan.wanted.dtype))
    loras = {name: Lora(one.rank, 1.0, (code, code)) for name, one in modules.items()}
    adapted = plan.adapted(modules)
    kept = sorted({one.module for one in saved} - set(modules))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if plan.named_by.endswith("ForCausalLM") else None,
        **base_said(plan.base.checkpoint.source, {}),
        **ranks_and_alphas(loras, {one.key for one in adapted if one.targeted and not one.experts}),
        **plan.targets(modules),
        "modules_to_save": kept or None,
        "bias": "lora_only" if any(one.module in modules for one in saved) else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": all(one.transposed and not one.experts for one in adapted),
        "ensure_weight_tying": bool(plan.tied) and any(one.canonical == EMBEDDING for one in saved),
        "init_lora_weights": True,
        "inference_mode": True,
        # from which on factors of experts lie as they do here
        **({"peft_version": "0.19.0"} if any(one.experts for one in adapted) else {}),
    }


def settings_of(plan: Extraction) -> dict[str, Any]:
    """What was asked for, as recorded."""
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plan.wanted).items()}
    if plan.wanted.energy is None:
        del said["max_rank"]
    return {name: value for name, value in said.items() if value not in (None, [])}


def card(plan: Extraction, name: str, found: Extracted) -> str:
    """The README.md of the adapter."""
    ranks = sorted({one.rank for one in found.modules.values()})
    said = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    base = plan.base.checkpoint.source
    together = "All experts of a layer are one parameter (`target_parameters`), in the layout of PEFT 0.19 and later."
    experts = [together, ""] if any(one.experts for one in found.modules.values()) else []
    named = [f"base_model: {base}", "base_model_relation: adapter"]
    front = ["---", *(named if plan.base.checkpoint.source.count("/") == 1 else [])]
    lines = [
        *front, "library_name: peft", "tags:", "- lora", "- polymerge", "---", "", f"# {name}", "",
        f"A LoRA adapter extracted with polymerge from {plan.tuned.checkpoint.source}: its difference from {base}, "
        "truncated by SVD.", "",
        f"{len(found.modules)} modules of rank {said}; {found.error:.1%} of their differences' norm is left out"
        + (f", and what differs in {len(found.left_out)} other tensors." if found.left_out else "."), "",
        *experts,
        *to_complete([plan.tuned.summary(), plan.base.summary()]), "",
        f"`{RECORD}` holds the error of each module, the digests of both models and the versions used.", "",
    ]  # fmt: skip
    return "\n".join(lines)
