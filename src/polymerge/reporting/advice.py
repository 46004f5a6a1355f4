"""Suggestions: a few rules, each triggered by numbers of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from polymerge.methods.table import METHODS
from polymerge.reporting.knockout_section import THIRDS
from polymerge.reporting.overlap_section import UNRELATED

__all__ = ["Suggestion", "advise"]

Section = Mapping[str, Any]

CUT = 0.2
"""Share of an update lost to the rank of a merged adapter above which a higher rank is suggested."""

CONFLICT, HOT, ALIKE, UNEQUAL, KEPT = 0.25, 1.5, 0.5, 2.0, 0.9
EVEN = 1 / 3


@dataclass(frozen=True)
class Suggestion:
    """A suggestion.

    about    the run it refers to
    title    the advice
    text     the reason
    numbers  the evidence, by name; never empty
    """

    about: str
    title: str
    text: str
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.numbers:
            raise ValueError(f"nothing is suggested without a number: {self.title}")


def advise(data: Section) -> list[Suggestion]:
    """All suggestions that follow from the numbers of a report, those from scores first.

    data  the JSON data of a report, without the advice
    """
    methods = {merge["plan_hash"]: merge["method"] for merge in data["merges"]}
    found: list[Suggestion] = []
    if data["scores"] is not None:
        found += _from_scores(data["scores"])
    for search in data["searches"]:
        found += _from_search(search)
    for overlap in data["overlaps"]:
        found += _from_overlap(overlap, methods.get(overlap["plan_hash"], ""))
    for ablation in data["ablations"]:
        found += _from_ablation(ablation)
    for knockout in data["knockouts"]:
        found += _from_knockout(knockout)
    for merge in data["merges"]:
        error = (merge.get("relative_error") or {}).get("most")
        if error is not None and error > CUT:
            text = f"At the output's rank up to {_percent(error, 1)} of a module's update has no room."
            told = {"relative error": error}
            found.append(Suggestion(merge["label"], "Give the merged adapter a higher rank", text, told))
    return found


def _from_scores(scores: Section) -> Iterator[Suggestion]:
    """Rules on the gains over each reference model."""
    for over in dict.fromkeys(tuple(gain["over"]) for gain in scores["gains"]):
        gains = [gain for gain in scores["gains"] if tuple(gain["over"]) == over and gain["low"] is not None]
        against = " and ".join(over)
        unsure = [gain for gain in gains if gain["low"] <= 0 <= gain["high"]]
        if unsure:
            one = max(unsure, key=lambda gain: abs(gain["gain"]))
            others = f" So it is with {len(unsure)} of {len(gains)} gains." if len(unsure) > 1 else ""
            yield Suggestion(
                "scores",
                "Ask more questions before believing a gain",
                f"{one['model']} differs from {against} on {one['column']} by {one['gain']:.2f} points, but the "
                f"interval from {one['low']:.2f} to {one['high']:.2f} holds 0.{others}",
                {**_ends(one), "in doubt": len(unsure), "gains": len(gains)},
            )
        lost = [gain for gain in gains if gain["high"] < 0]
        if lost:
            one = min(lost, key=lambda gain: float(gain["gain"]))
            yield Suggestion(
                "scores",
                f"Look at what {one['model']} loses on {one['column']}",
                f"It scores {-one['gain']:.2f} points less than {against}, and the interval from {one['low']:.2f} to "
                f"{one['high']:.2f} lies below 0. A smaller weight, or leaving out the layers that {one['column']} "
                "needs, may keep it.",
                _ends(one),
            )


def _ends(gain: Section) -> dict[str, float]:
    return {"gain": gain["gain"], "low": gain["low"], "high": gain["high"]}


def _from_search(search: Section) -> Iterator[Suggestion]:
    """Rules on the choice, on its neighbours, and on scores by labels."""
    by_criterion = search["criterion"] is not None and search["chosen_by"] == search["criterion"]
    if by_criterion:
        yield from _edge(search, search["candidates"], "of those that could be chosen", "the least change")
        yield from _close(search)
    elif len(search["vary"]) == 1 and "sampler" not in search and "tasks" not in search:
        yield from _edge(search, [point[0] for point in search["points"]], "of the grid", "the best score")
    if search.get("scores"):
        yield from _labels(search, search["scores"])


def _edge(search: Section, values: Sequence[Any], among: str, sought: str) -> Iterator[Suggestion]:
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


def _close(search: Section) -> Iterator[Suggestion]:
    """Other candidates are as good, or within chance."""
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


def _labels(search: Section, scores: Sequence[float]) -> Iterator[Suggestion]:
    """The best candidate by labels is another one, or no score stands out."""
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
    """The standard error of an accuracy in percent, for this number of prompts; None if it is not a share."""
    if not prompts or not 0 < score < 100:
        return None
    return 100 * sqrt(score / 100 * (1 - score / 100) / prompts)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _from_overlap(overlap: Section, method: str) -> Iterator[Suggestion]:
    """Rules on the deltas of a merge as a whole, and on single places that stand out.

    method  the method that the same plan was merged with, empty if unknown
    """
    total = next((row for row in overlap["totals"] if row["conflict_mass"] is not None), None)
    if total is not None:
        yield from _conflict(overlap, total["conflict_mass"], method)
        yield from _deltas(overlap, total)


def _conflict(overlap: Section, conflict: float, method: str) -> Iterator[Suggestion]:
    if conflict >= CONFLICT:
        trims = method in METHODS and METHODS[method].statistic == "cutoff"
        yield Suggestion(
            overlap["label"],
            f"Lower the density of {method}" if trims else "Try ties with a density of 0.2, or a lower one",
            f"{_percent(conflict, 1)} of the deltas' mass cancels when they are added up; two unrelated deltas of "
            f"one size lose {_percent(UNRELATED)}. Electing a sign for each entry keeps one side of it.",
            {"conflict by mass": conflict, "unrelated": UNRELATED},
        )
    large = [row for row in overlap["places"] if row["module"] != "norm" and row["conflict_mass"] is not None]
    hottest = max(large, key=lambda row: float(row["conflict_mass"]), default=None)
    if hottest is not None and hottest["conflict_mass"] > HOT * conflict:
        where = hottest["part"] if hottest["layer"] is None else f"layer {hottest['layer']}"
        yield Suggestion(
            overlap["label"],
            f"Give {where}, {hottest['module']}, an override of its own",
            f"There {_percent(hottest['conflict_mass'], 1)} of the mass cancels, against {_percent(conflict, 1)} in "
            "all. A smaller weight there costs the other layers nothing.",
            {"conflict there": hottest["conflict_mass"], "in all": conflict},
        )


def _deltas(overlap: Section, total: Section) -> Iterator[Suggestion]:
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
            f"The largest {_percent(density)} of the entries hold at least {_percent(min(kept), 1)} of every delta's "
            "squared norm, so methods that trim, such as ties, lose little.",
            {"density": density, "kept": min(kept)},
        )


def _from_ablation(ablation: Section) -> Iterator[Suggestion]:
    """For each task, a range that gains more than the full merge."""
    full = next((row for row in ablation["rows"] if row["name"] == "full"), None)
    if full is None:
        return
    for task in ablation["baseline"]:
        best = max(ablation["rows"], key=lambda row: float(row["tasks"][task]["gain"]))
        own, whole = best["tasks"][task], full["tasks"][task]
        if own["gain"] <= whole["gain"]:
            continue
        text = (
            f"On {task} merging layers {best['layers']} gains {own['gain']:.2f} points, the whole {whole['gain']:.2f}."
        )
        numbers = {"gain": own["gain"], "whole": whole["gain"]}
        if own["low"] is not None:
            text += f" Its interval is from {own['low']:.2f} to {own['high']:.2f}"
            doubtful = own["low"] <= whole["gain"]
            text += ", which holds that of the whole: ask more questions first." if doubtful else "."
            numbers |= {"low": own["low"], "high": own["high"]}
        named = f"the {best['name']} layers" if best["name"] in THIRDS else f"layers {best['layers']}"
        yield Suggestion(ablation["label"], f"Merge only {named}", text, numbers)


def _from_knockout(knockout: Section) -> Iterator[Suggestion]:
    """For each task and module, a third of the layers that significantly carries more than a third, or none that
    does.
    """
    for line in knockout["summary"]:
        third = max(THIRDS, key=lambda name: float(line[name]["share"] or 0))
        share, low, high = (line[third][name] for name in ("share", "low", "high"))
        if line["who"] != "model" or share is None or low is None:
            continue
        text = (
            f"Knocking out {line['module']} costs {line['task']} {line['drop']:.1f} points, {_percent(share)} of it in "
            f"the {third} third, with 95 % of the resamples from {_percent(low)} to {_percent(high)}."
        )
        numbers = {"share": share, "low": low, "high": high, "drop": line["drop"]}
        if low > EVEN:
            title = f"Weigh the {third} layers of {line['module']} with care for {line['task']}"
            text += " Ablate that range, or give it a weight of its own."
        elif high - low > EVEN:
            title = f"Ask more questions to see which layers of {line['module']} {line['task']} needs"
            text += " That tells no third from another."
        else:
            continue
        yield Suggestion(knockout["label"], title, text, numbers)


def _percent(share: float, digits: int = 0) -> str:
    """Format a share: `29 %`."""
    return f"{100 * share:.{digits}f} %"
