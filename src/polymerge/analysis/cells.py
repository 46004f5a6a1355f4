"""What is knocked out at a time: a module of a layer, or of several layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.families.rules import text_layer
from polymerge.planning.text_words import ranges

__all__ = ["MODULES", "THIRDS", "Cell", "layers_in", "make_cells", "parse_layers", "parse_modules", "third_of"]

MODULES = {"attention": ("self_attn",), "mlp": ("mlp",), "both": ("self_attn", "mlp")}
"""The words for modules, and what canonical names call them."""

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Cell:
    """A module of some layers of the text tower: what one knockout replaces.

    module  one of `MODULES`
    layers  as canonical names count them
    """

    module: str
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """`attention-3`, or `both-0-3`."""
        return f"{self.module}-{self.where}"

    @property
    def where(self) -> str:
        """Its layers in words: `3`, or `0-3`."""
        return ranges(self.layers).replace(", ", ",")

    def covers(self, canonical: str) -> bool:
        """Whether it holds a tensor of this canonical name."""
        return text_layer(canonical) in self.layers and canonical.split(".")[3] in MODULES[self.module]


def third_of(layers: Sequence[int], depth: int) -> str:
    """In which third of a tower the middle of some layers lies."""
    return THIRDS[3 * (layers[0] + layers[-1] + 1) // (2 * depth)]


def layers_in(third: str, depth: int) -> tuple[int, ...]:
    """The layers of a third; none of the middle of a tower of two."""
    return tuple(layer for layer in range(depth) if third_of((layer,), depth) == third)


def parse_layers(text: str, where: str, problems: list[PolymergeError]) -> list[tuple[int, ...]]:
    """Read `0-3,7` as the runs of layers that it lists; what is none goes to `problems`."""
    runs = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", word)
        if found is None:
            problems.append(RecipeError(f"{where}: '{word}' is no layer and no range of layers such as 0-5"))
            continue
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            problems.append(RecipeError(f"{where}: '{word}' ends before it starts"))
            continue
        runs.append(tuple(range(first, last + 1)))
    return runs


def parse_modules(text: str, problems: list[PolymergeError]) -> tuple[str, ...]:
    """Read `attention,mlp`, each once."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in MODULES:
            problems.append(RecipeError(f"--modules: there is no module '{word}'.{did_you_mean(word, MODULES)}"))
    return tuple(dict.fromkeys(word for word in words if word in MODULES))


def make_cells(
    modules: Sequence[str],
    layers: str | None,
    stride: int | None,
    group: int,
    depth: int | None,
    problems: list[PolymergeError],
) -> list[Cell]:
    """Every cell of a knockout, module by module.

    layers  which to knock out, as in `0-31`; None for all
    group   how many of them at a time
    stride  how far apart groups begin; None for one after the other. A rest that is shorter than a group is a cell of
            its own where no other has its last layer
    depth   of the text tower; None where the model could not be opened
    """
    for name, number in (("--stride", stride), ("--group", group)):
        if number is not None and number < 1:
            problems.append(RecipeError(f"{name}: {number} is not at least 1"))
    if layers is not None:
        chosen = [layer for run in parse_layers(layers, "--layers", problems) for layer in run]
    else:
        chosen = list(range(depth or 0))
    beyond = sorted({layer for layer in chosen if depth is not None and layer >= depth})
    if beyond:
        problems.append(
            RecipeError(f"--layers: there is no layer {ranges(beyond)}, the model has 0-{(depth or 0) - 1}")
        )
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1}) if len(chosen) < 10_000 else []
    if twice:
        problems.append(RecipeError(f"--layers: {ranges(twice)} said twice"))
    if problems:
        return []
    chosen = sorted(chosen)
    groups: list[tuple[int, ...]] = []
    for start in range(0, len(chosen), stride or group):
        one = tuple(chosen[start : start + group])
        if len(one) == group or not any(one[-1] in other for other in groups):
            groups.append(one)
    return [Cell(module, one) for module in modules for one in groups]
