"""The output's adapter_config.json, from which PEFT loads the merged factors with the intended scaling."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.adapter_config import saved_modules
from polymerge.checkpoints.hub import split_revision
from polymerge.dtypes import dtype_code, dtype_name, holding, holds
from polymerge.errors import RecipeError
from polymerge.planning.plan import Lora, Step

__all__ = ["alpha_of", "base_said", "foreign_names", "output_config", "ranks_and_alphas"]


def alpha_of(scaling: float, rank: int) -> float | None:
    """The alpha for which PEFT's alpha / rank is exactly `scaling`, as an int if possible; None if there is none."""
    product = scaling * rank
    for alpha in (round(product), product, math.nextafter(product, 0), math.nextafter(product, math.inf)):
        if alpha / rank == scaling:
            return alpha
    return None


def output_config(
    template: Adapter, adapters: Sequence[Adapter], modules: Sequence[Step], full: Sequence[Step]
) -> dict[str, Any]:
    """The template's config, with the output's ranks, alphas, target modules and saved modules.

    If every module has the template's rank and scaling, the config is the template's, except for what
    other adapters add.

    modules, full  the steps of modules with factors, and those of full weights
    """
    config = dict(template.config)
    own = {module: (pair.rank, pair.scaling) for module, pair in template.pairs.items()}
    factors = {step.name: step.lora for step in modules if step.lora is not None}
    experts = {name for name, lora in factors.items() if lora.experts}
    by_weight = {name for name in factors if _targeted(f"{name}.weight", (template, *adapters))}
    if factors.keys() != own.keys():
        parameters = sorted(experts | {f"{name}.weight" for name in by_weight})
        config |= {"target_modules": sorted(factors.keys() - experts - by_weight), "exclude_modules": None}
        config |= {"target_parameters": parameters} if parameters or "target_parameters" in config else {}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    if factors and {module: (lora.rank, lora.scaling) for module, lora in factors.items()} != own:
        config |= ranks_and_alphas(factors, by_weight)
    if any(lora.bias for lora in factors.values()):
        config["lora_bias"] = True
    loaded = dtype_code(str(config.get("lora_dtype")))  # what ms-swift loads factors in; PEFT has none of it
    written = {dtype for lora in factors.values() for dtype in lora.dtypes}
    if loaded is not None and not all(holds(loaded, dtype) for dtype in written):
        config["lora_dtype"] = dtype_name(holding(written))
    saved = [name for adapter in adapters for name in saved_modules(adapter.config)]
    config["modules_to_save"] = sorted(name for name in set(saved) if _holds(name, full)) or None
    trained = [bias for adapter in adapters if (bias := adapter.config.get("bias") or "none") != "none"]
    if trained:
        config["bias"] = "all" if "all" in trained else trained[0]
    with_tokens = [adapter for adapter in (template, *adapters) if adapter.tokens]
    if with_tokens:
        config["trainable_token_indices"] = with_tokens[0].config.get("trainable_token_indices")
    return config | {"inference_mode": True}


def base_said(base: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that name another base in a config like `config`: PEFT stores the revision of a hub id separately."""
    name, revision = split_revision(base)
    said = {"base_model_name_or_path": name}
    return said | ({"revision": revision} if revision or "revision" in config else {})


def foreign_names(
    adapters: Sequence[Adapter],
    labels: Sequence[str],
    template: int,
    key: Callable[[int, str], str],
    steps: Sequence[Step],
) -> Iterator[RecipeError]:
    """An error for each module of the output that would not follow the template's naming: names are not translated
    back.
    """
    own = {key(template, pair.parameter): module for module, pair in adapters[template].pairs.items()}
    for place, adapter in enumerate(adapters):
        named = ((own.get(key(place, pair.parameter)), module) for module, pair in adapter.pairs.items())
        other = next(((ours, theirs) for ours, theirs in named if ours and ours != theirs), None)
        readers = [(step.name, step.pieces[0].inputs) for step in steps]
        alone = [name for name, places in readers if template not in places and places[0] == place]
        if other and alone:
            yield RecipeError(
                f"'{labels[place]}' has {alone[0]}, which the template '{labels[template]}' has not, and names modules "
                f"by another layout: {other[1]}, there {other[0]}. Make '{labels[place]}' the template, or exclude "
                f"what it alone has ({len(alone)})"
            )


def _targeted(parameter: str, adapters: Sequence[Adapter]) -> bool:
    """Return whether the config of one of these adapters names a parameter itself."""
    ends = [end for adapter in adapters for end in adapter.config.get("target_parameters") or ()]
    return any(f".{parameter}".endswith(f".{end}") for end in ends)


def _holds(module: str, full: Sequence[Step]) -> bool:
    """Return whether one of the full weights belongs to a module that ends in this name, or is inside it."""
    return any(f".{module}." in f".{step.name}" for step in full)


def ranks_and_alphas(factors: Mapping[str, Lora], targeted: Collection[str] = ()) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the others.

    targeted  the modules that PEFT knows by the name of their weight
    """
    # where no alpha gives a copied module's scaling exactly, the nearest does, one rounding off
    exact = {module: alpha_of(lora.scaling, lora.rank) for module, lora in factors.items()}
    nearest = {module: lora.scaling * lora.rank for module, lora in factors.items()}
    alphas = {module: nearest[module] if alpha is None else alpha for module, alpha in exact.items()}
    (rank, alpha), _ = Counter((lora.rank, alphas[module]) for module, lora in factors.items()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": _pattern({name: lora.rank for name, lora in factors.items() if lora.rank != rank}, targeted),
        "alpha_pattern": _pattern({name: own for name, own in alphas.items() if own != alpha}, targeted),
    }


def _pattern(values: Mapping[str, Any], targeted: Collection[str]) -> dict[str, Any]:
    """Keys that PEFT matches as regular expressions at the ends of names, matching only these names."""
    weight = dict.fromkeys(targeted, r"(\.weight)?")
    return {f"^{re.escape(name)}{weight.get(name, '')}": value for name, value in values.items()}
