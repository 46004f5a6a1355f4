"""What an overlap suggests: a method that resolves conflicts, or none; care where one delta outweighs the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from polymerge.methods.table import METHODS
from polymerge.reporting.suggestion import Suggestion, percent

__all__ = ["UNRELATED", "suggest_from_overlap"]

UNRELATED: Final = 0.29
"""Share of mass that cancels between two unrelated deltas of one size with normal entries: 1 - 1/sqrt(2)."""

CONFLICT, HOT, ALIKE, UNEQUAL, KEPT = 0.25, 1.5, 0.5, 2.0, 0.9


def suggest_from_overlap(overlap: Mapping[str, Any], method: str) -> Iterator[Suggestion]:
    """Rules on the deltas of a whole merge, and on single places that stand out.

    method  that the same plan was merged with, empty where that is not known
    """
    total = next((row for row in overlap["totals"] if row["conflict_mass"] is not None), None)
    if total is not None:
        yield from _conflict(overlap, total["conflict_mass"], method)
        yield from _deltas(overlap, total)


def _conflict(overlap: Mapping[str, Any], conflict: float, method: str) -> Iterator[Suggestion]:
    if conflict >= CONFLICT:
        trims = method in METHODS and METHODS[method].statistic == "cutoff"
        yield Suggestion(
            overlap["label"],
            f"Lower the density of {method}" if trims else "Try ties with a density of 0.2, or a lower one",
            f"{percent(conflict, 1)} of the deltas' mass cancels when they are added up; two unrelated deltas of "
            f"one size lose {percent(UNRELATED)}. Electing a sign for each entry keeps one side of it.",
            {"conflict by mass": conflict, "unrelated": UNRELATED},
        )
    large = [row for row in overlap["places"] if row["module"] != "norm" and row["conflict_mass"] is not None]
    hottest = max(large, key=lambda row: float(row["conflict_mass"]), default=None)
    if hottest is not None and hottest["conflict_mass"] > HOT * conflict:
        where = hottest["part"] if hottest["layer"] is None else f"layer {hottest['layer']}"
        yield Suggestion(
            overlap["label"],
            f"Give {where}, {hottest['module']}, an override of its own",
            f"There {percent(hottest['conflict_mass'], 1)} of the mass cancels, against {percent(conflict, 1)} in all. "
            "A smaller weight there costs the other layers nothing.",
            {"conflict there": hottest["conflict_mass"], "in all": conflict},
        )


def _deltas(overlap: Mapping[str, Any], total: Mapping[str, Any]) -> Iterator[Suggestion]:
    cosine, density = total["cosine"], overlap["density"]
    if cosine is not None and cosine >= ALIKE:
        yield Suggestion(
            overlap["label"],
            "A plain average may be enough",
            f"The deltas point the same way (cosine {cosine:.2f}), so methods that resolve conflicts can do little.",
            {"cosine": cosine},
        )
    norms = {delta["model"]: delta["norm"] for delta in total["deltas"] if delta["norm"]}
    if len(norms) > 1:
        large, small = max(norms, key=lambda name: norms[name]), min(norms, key=lambda name: norms[name])
        ratio = norms[large] / norms[small]
        if ratio >= UNEQUAL:
            yield Suggestion(
                overlap["label"],
                f"Weigh {large} with care",
                f"Its delta is {ratio:.1f} times as large as that of {small} ({norms[large]:.3g} against "
                f"{norms[small]:.3g}), so at equal weights it decides most entries.",
                {"ratio": ratio, f"norm of {large}": norms[large], f"norm of {small}": norms[small]},
            )
    kept = [delta["kept"] for delta in total["deltas"] if delta["kept"] is not None]
    if kept and min(kept) >= KEPT and density < 1:
        yield Suggestion(
            overlap["label"],
            "Trimming costs little here",
            f"The largest {percent(density)} of the entries hold at least {percent(min(kept), 1)} of every delta's "
            "squared norm, so methods that trim, such as ties, lose little.",
            {"density": density, "kept": min(kept)},
        )
