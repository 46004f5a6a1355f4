"""What the output's adapter_config.json has to say so that PEFT loads the merged factors as they are meant."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.checkpoint.adapter import Adapter
from polymerge.planning.pairs import PairStep

__all__ = ["alpha_of", "output_config"]


def alpha_of(scaling: float, rank: int) -> float | None:
    """The alpha for which PEFT's alpha / rank is exactly `scaling`, a whole number where that is one; or None."""
    product = scaling * rank
    for alpha in (round(product), product, math.nextafter(product, 0), math.nextafter(product, math.inf)):
        if alpha / rank == scaling:
            return alpha
    return None


def output_config(template: Adapter, adapters: Sequence[Adapter], steps: Sequence[PairStep]) -> dict[str, Any]:
    """The template's config, with ranks, alphas, modules and saved modules as the output has them.

    Where every module comes out with the template's own rank and scaling, the config is the template's but for what
    other adapters bring along.
    """
    config = dict(template.config)
    own = {module: (pair.rank, pair.scaling) for module, pair in template.pairs.items()}
    if {step.module for step in steps} != set(own):
        config |= {"target_modules": sorted(step.module for step in steps), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    if steps and {step.module: (step.rank, step.scaling) for step in steps} != own:
        config |= _ranks(steps)
    if any(step.bias for step in steps):
        config["lora_bias"] = True
    saved = [name for adapter in adapters for name in adapter.config.get("modules_to_save") or ()]
    config["modules_to_save"] = sorted(set(saved)) or None
    trained = [adapter.config["bias"] for adapter in adapters if adapter.config.get("bias", "none") != "none"]
    if trained:
        config["bias"] = "all" if "all" in trained else trained[0]
    with_tokens = [adapter for adapter in (template, *adapters) if adapter.tokens]
    if with_tokens:
        config["trainable_token_indices"] = with_tokens[0].config.get("trainable_token_indices")
    return config | {"inference_mode": True}


def _ranks(steps: Sequence[PairStep]) -> dict[str, Any]:
    """Rank and alpha of the most, and patterns for the others."""
    alphas = {step.module: alpha_of(step.scaling, step.rank) for step in steps}
    (rank, alpha), _ = Counter((step.rank, alphas[step.module]) for step in steps).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": _pattern({step.module: step.rank for step in steps if step.rank != rank}),
        "alpha_pattern": _pattern({module: own for module, own in alphas.items() if own != alpha}),
    }


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that PEFT matches as regular expressions against the ends of names: only these names."""
    return {f"^{re.escape(module)}": value for module, value in values.items()}
