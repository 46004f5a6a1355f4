"""Which layers an ablation merges together: thirds, windows that slide, or runs that are listed."""

from __future__ import annotations

from polymerge.analysis.cells import THIRDS, layers_in, parse_layers
from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.planning.text_words import ranges

__all__ = ["FULL", "RANGES", "read_ranges"]

FULL = "full"
"""All that the recipe merges, in a layer or in none."""

RANGES = (*THIRDS, FULL)


def read_ranges(
    said: str | None,
    window: int | None,
    stride: int | None,
    layers: str | None,
    depth: int | None,
    problems: list[PolymergeError],
) -> dict[str, tuple[int, ...]]:
    """The layers that are merged together, by the name of each range; what cannot be goes to `problems`.

    said    a list out of `RANGES`; all of them where nothing else is said
    window  how many layers one that slides holds, and `stride` how far it slides
    layers  further runs, such as `0-3,7`
    depth   of the text tower; None where the template could not be opened
    """
    found: dict[str, tuple[int, ...]] = {}
    if said is None and window is None and layers is None:
        said = ",".join(RANGES)
    for word in said.split(",") if said is not None else ():
        name = word.strip()
        if name not in RANGES:
            problems.append(RecipeError(f"--ranges: there is no range '{name}'.{did_you_mean(name, RANGES)}"))
        elif depth:
            own = tuple(range(depth)) if name == FULL else layers_in(name, depth)
            if own:
                found[name] = own
            else:
                problems.append(RecipeError(f"--ranges: a tower of {depth} layers has none in the {name} third"))
    if stride is not None and window is None:
        problems.append(RecipeError("--stride says how far a window slides; say --window"))
    for name, number in (("--window", window), ("--stride", stride)):
        if number is not None and number < 1:
            problems.append(RecipeError(f"{name}: {number} is not at least 1"))
            window = None
    runs = parse_layers(layers, "--layers", problems) if layers is not None else []
    beyond = [run for run in runs if depth and run[-1] >= depth]
    for run in beyond:
        problems.append(RecipeError(f"--layers: there is no layer {run[-1]}, the model has 0-{(depth or 0) - 1}"))
    runs = [run for run in runs if run not in beyond]
    if window is not None and depth:
        if window > depth:
            problems.append(RecipeError(f"--window: {window} layers of {depth} that there are"))
        runs += [tuple(range(start, start + window)) for start in range(0, depth - window + 1, stride or 1)]
    return found | {ranges(run): run for run in runs}
