"""The step of a module that adapters have factors for: what it reads, and under which name PEFT has its factors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from polymerge.checkpoints.pairs import REGISTERED, Pair
from polymerge.errors import RecipeError
from polymerge.families.expressions import LowRank
from polymerge.planning.plan import Fate, Lora, Piece, Step
from polymerge.recipe.parameters import Setting

__all__ = ["divides_by_nothing", "is_dense", "is_identity", "stem", "step_of", "swapped_in", "wrapped"]
__all__ += ["wrapped_name"]


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

    swapped  by the index of an adapter, whether its factors of experts lie the other way round than the output's
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
            module = step.name.rpartition(".")[0]
            yield replace(step, lora=replace(step.lora, wrapped=wrapped_name(step.name, held[module])))
        else:
            yield step


def wrapped_name(parameter: str, names: Iterable[str]) -> str:
    """The name that the factors of a parameter have as if of a module, where PEFT adapts those of these names in it."""
    module, _, own = parameter.rpartition(".")
    after = sum(REGISTERED.index(other) > REGISTERED.index(own) for other in names if other != own)
    return f"{module}{'.base_layer' * after}"


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
    whole = density == 1 and said.get("share") in (None, 1)
    normalized = said.get("normalize") in (True, "weight") and weight > 0
    return (weight == 1 or normalized) and whole and said.get("scale", 1.0) == 1


def swapped_in(
    held: Mapping[str, Mapping[int, Pair]], natural: Mapping[str, tuple[int, ...]]
) -> dict[int, bool | None]:
    """Whether the factors of experts in each adapter lie the other way round than PEFT has them today.

    held     by module, the pairs of adapters by their index
    natural  by module, the shape [out, in] of one expert in the base, as far as that is known
    returns  None for an adapter of which nothing tells
    """
    found: dict[int, bool | None] = {}
    ways: dict[int, set[bool]] = defaultdict(set)
    for key, pairs in held.items():
        today = [pair.shape for pair in pairs.values() if pair.experts and not pair.as_stored]
        known = natural.get(key) or next(iter(today), None)
        for place, pair in pairs.items():
            if pair.experts:
                found[place] = None if pair.as_stored else False
                if pair.as_stored and known is not None and known[0] != known[1]:
                    ways[place].add(pair.shape != known)
    return found | {place: own == {True} for place, own in ways.items() if len(own) == 1}
