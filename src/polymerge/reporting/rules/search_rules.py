"""What a search suggests: another grid where the choice lies at its end, more prompts where chance may have chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

from polymerge.reporting.suggestion import Suggestion

__all__ = ["suggest_from_search"]

Search = Mapping[str, Any]


def suggest_from_search(search: Search) -> Iterator[Suggestion]:
    """Rules on the choice, on what lies next to it, and on scores by labels."""
    by_criterion = search["criterion"] is not None and search["chosen_by"] == search["criterion"]
    if by_criterion:
        yield from _edge(search, search["candidates"], "of those that could be chosen", "the least change")
        yield from _close(search)
    elif len(search["vary"]) == 1 and "sampler" not in search:
        yield from _edge(search, [point[0] for point in search["points"]], "of the grid", "the best score")
    if search.get("scores"):
        yield from _labels(search, search["scores"])


def _edge(search: Search, values: Sequence[Any], among: str, sought: str) -> Iterator[Suggestion]:
    """The chosen value is the first or the last."""
    chosen = search["chosen"][0]
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return
    low, high = min(values), max(values)
    if chosen in (low, high):
        which = "smallest" if chosen == low else "largest"
        yield Suggestion(
            search["label"],
            f"Search {search['vary'][0]} with {'a finer grid of small' if chosen == low else 'larger'} values",
            f"The chosen value {chosen:g} is the {which} {among} ({low:g} to {high:g}), so {sought} may lie beyond it.",
            {"chosen": chosen, "smallest": low, "largest": high},
        )


def _close(search: Search) -> Iterator[Suggestion]:
    """Other candidates are as good, or within chance of it."""
    differences, minima, prompts = search["differences"], search["minima"], search["prompts"]
    told = {"prompts": prompts} if prompts else {}
    if len(minima) > 1:
        yield Suggestion(
            search["label"],
            "Draw more prompts",
            f"{len(minima)} values have the smallest difference, {min(differences):g}, and the smallest of them was "
            "taken for no other reason.",
            {"minima": len(minima), "difference": min(differences), **told},
        )
        return
    if len(differences) < 2 or search["compare"] != "exact" or search["smooth"]:
        return
    lowest, second = sorted(differences)[:2]
    # two counts of rare events; that they are of the same prompts makes their distance surer than this
    chance = sqrt(lowest + second)
    if second - lowest < chance:
        other = search["candidates"][differences.index(second)]
        yield Suggestion(
            search["label"],
            "Draw more prompts",
            f"Answers change at {lowest:g} prompts for {search['chosen'][0]:g} and at {second:g} for {other:g}. "
            f"Another draw may shift a distance of {second - lowest:g} (about {chance:.1f} by chance).",
            {"smallest difference": lowest, "next": second, "chance": chance, **told},
        )


def _labels(search: Search, scores: Sequence[float]) -> Iterator[Suggestion]:
    """The best by labels is another one, or no score stands out."""
    top, prompts = max(scores), search["prompts"]
    noise = _error(top, prompts)
    if search["best"] != search["chosen"] and search["chosen"] in search["points"]:
        own = scores[search["points"].index(search["chosen"])]
        best, chosen = (", ".join(map(_word, search[name])) for name in ("best", "chosen"))
        text = f"{best} scores {top:.1f}, the chosen {chosen} {own:.1f}: {top - own:.1f} points apart."
        numbers = {"best": top, "chosen": own, "apart": top - own}
        if noise is not None and top - own < noise:
            text += f" That is within the standard error of {noise:.1f} points of {prompts} prompts."
            numbers |= {"standard error": noise, "prompts": prompts}
        yield Suggestion(search["label"], "Hold the choice against the best by labels", text, numbers)
    span = top - min(scores)
    if len(scores) > 1 and noise is not None and span < 2 * noise:
        yield Suggestion(
            search["label"],
            "Do not choose by these scores alone",
            f"From worst to best they span {span:.1f} points, less than two standard errors ({noise:.1f} each) of "
            f"{prompts} prompts. Ask more of them.",
            {"span": span, "standard error": noise, "prompts": prompts},
        )


def _error(score: float, prompts: int | None) -> float | None:
    """The standard error of a share of right answers in percent, for so many prompts; None where it is no share."""
    if not prompts or not 0 < score < 100:
        return None
    return 100 * sqrt(score / 100 * (1 - score / 100) / prompts)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
