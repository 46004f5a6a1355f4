"""What scores suggest: more questions where a gain is in doubt, a look at what was lost where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from polymerge.reporting.suggestion import Suggestion

__all__ = ["suggest_from_scores"]


def suggest_from_scores(scores: Mapping[str, Any]) -> Iterator[Suggestion]:
    """Rules on the gains over each of the models that they are told over."""
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


def _ends(gain: Mapping[str, Any]) -> dict[str, float]:
    return {"gain": gain["gain"], "low": gain["low"], "high": gain["high"]}
