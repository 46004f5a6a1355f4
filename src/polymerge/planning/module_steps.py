"""The step of a module that adapters have factors for: what it reads, and under which name PEFT has its factors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.pairs import REGISTERED, Pair
from polymerge.errors import RecipeError
from polymerge.families.expressions import LowRank
from polymerge.planning.plan import Fate, Lora, Piece, Step
from polymerge.recipe.parameters import Setting

__all__ = ["divides_by_nothing", "is_dense", "is_identity", "is_swapped", "stem", "step_of", "wrapped"]


def step_of(
    module: str,
    key: str,
    lora: Lora,
    pairs: Mapping[int, Pair],
    reason: str,
    setting: int | None = None,
    swapped: Mapping[int, bool | None] | None = None,
) -> Step:
    """The step of a module: merged from these pairs of factors, or copied from the only pair if `setting` is None.

    swapped  by the index of an adapter, whether its factors lie the other way round than those of the output
    """
    flip = {place: bool(swapped and swapped[place]) for place in pairs}
    place, first = next(iter(pairs.items()))
    shape = first.shape[::-1] if flip[place] else first.shape
    reads = tuple(
        LowRank(
            pair.a.name, pair.b.name, pair.scaling, pair.bias.name if pair.bias else None, pair.experts, flip[place]
        )
        for place, pair in pairs.items()
    )
    piece = Piece(key, ((0, shape[0]),), setting, reads, inputs=tuple(pairs))
    fate: Fate = "copied" if setting is None else "merged"
    dtype = lora.dtypes[1]
    return Step(module, key, fate, dtype, dtype, shape, reason, (piece,), lora=lora)


def wrapped(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps with the names that the factors of parameters have in PEFT's files: the last parameter of a module
    those of the module, each one before it a `base_layer` more.
    """
    held: dict[str, list[str]] = defaultdict(list)
    for step in steps:
        if step.lora is not None and step.lora.experts:
            module, _, name = step.name.rpartition(".")
            held[module].append(name)
    for step in steps:
        if step.lora is not None and step.lora.experts:
            module, _, name = step.name.rpartition(".")
            after = sum(REGISTERED.index(other) > REGISTERED.index(name) for other in held[module] if other != name)
            yield replace(step, lora=replace(step.lora, wrapped=f"{module}{'.base_layer' * after}"))
        else:
            yield step


def divides_by_nothing(key: str, reason: str) -> RecipeError:
    """The error for a module that not all adapters have, where the weights of those that do cannot be normalized."""
    return RecipeError(f"{key}: {reason}, and their weights add up to about 0: set normalize: false, or other weights")


def stem(module: str) -> str:
    """The prefix of a module's name up to the first number; empty if there is none."""
    found = re.match(r"(.+?)\.[0-9]+(?:\.|$)", module)
    return found[1] if found else ""


def is_dense(setting: Setting) -> bool:
    """Return whether a method needs a module's full update, not only its factors."""
    return setting.parameters.get("space") == "delta" and not setting.row.additive


def is_identity(setting: Setting) -> bool:
    """Return whether a method returns a single model unchanged."""
    said = setting.parameters
    if "weight" not in said:
        return False
    (weight,) = said["weight"]
    (density,) = said.get("density", (1.0,))
    normalized = said.get("normalize") in (True, "weight") and weight > 0
    return (weight == 1 or normalized) and density == 1 and said.get("scale", 1.0) == 1


def is_swapped(pair: Pair, first: Pair, adapters: Sequence[Adapter]) -> bool | None:
    """Whether the factors of a pair lie the other way round than those of `first`; None if nothing tells."""
    if not pair.experts or not first.experts or pair.as_stored == first.as_stored:
        return False
    if pair.shape[0] != pair.shape[1]:
        return pair.shape == first.shape[::-1]
    # a square matrix: as the others of these adapters
    held = [one for adapter in adapters for one in adapter.pairs.values() if one.experts]
    ways = {
        one.shape != other.shape
        for one in held
        for other in held
        if one.module == other.module and one.as_stored != other.as_stored and one.shape[0] != one.shape[1]
    }
    return ways.pop() if len(ways) == 1 else None
