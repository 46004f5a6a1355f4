"""The outcome of a knockout, or of an ablation, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.analysis.cells import THIRDS
from polymerge.analysis.knockout_plots import where

__all__ = ["describe_ablation", "describe_knockout"]

_NAMES = {"model": "model", "against": "original", "difference": "difference"}


def describe_knockout(outcome: Mapping[str, Any]) -> str:
    """For each task the drop of every cell, and where the drops are.

    outcome  what knockout.json holds
    """
    shown = ["model"] if outcome["against"] is None else list(_NAMES)
    lines = []
    for task, about in outcome["tasks"].items():
        scores = ", ".join(f"{_NAMES[who]} {found[task]['score']:.1f}" for who, found in outcome["baseline"].items())
        lines.append(f"{task}: {about['prompts']} prompts, {outcome['scorer']}: {scores}")
        lines.append(f"Drop in points where weights are replaced ({outcome['replace']}), with 95 % of the resamples:")
        for module in outcome["modules"]:
            cells = [cell for cell in outcome["cells"] if (cell["task"], cell["module"]) == (task, module)]
            rows = [[module, *(_NAMES[who] for who in shown)]]
            rows += [
                [_layers(cell["layers"])]
                + [_points(cell[who]["drop"], cell[who]["interval"], signed=who == "difference") for who in shown]
                for cell in cells
            ]
            (found,) = [line for line in outcome["summary"] if (line["task"], line["module"]) == (task, module)]
            for third in THIRDS:
                count = found["model"][third]["cells"]
                rows.append(
                    [f"{third} third, {count} of {len(cells)}: mean"]
                    + [
                        _points(found[who][third]["mean"], found[who][third]["mean_interval"], who == "difference")
                        for who in shown
                    ]
                )
                rows.append(
                    ["  share of the drop"]
                    + ["" if who == "difference" else _share(found[who], third) for who in shown]
                )
            lines += _table(rows)
        lines.append("")
    return "\n".join(lines[:-1])


def describe_ablation(outcome: Mapping[str, Any]) -> str:
    """For each range of layers its score on every task, and what it gains over the template.

    outcome  what ablation.json holds
    """
    tasks = list(outcome["tasks"])
    rows = [["merged", *(word for task in tasks for word in (task, "gain"))]]
    rows.append(["nothing", *(word for task in tasks for word in (f"{outcome['baseline'][task]['score']:.1f}", ""))])
    for entry in outcome["ranges"]:
        row = [_range(entry)]
        for task in tasks:
            found = entry["tasks"][task]
            row += [f"{found['score']:.1f}", _points(found["gain"], found["interval"], signed=True)]
        rows.append(row)
    counts = ", ".join(f"{name} {about['prompts']}" for name, about in outcome["tasks"].items())
    told = f"{outcome['scorer']} in percent ({counts} prompts); gain over the template in points, 95 % of the resamples"
    return "\n".join([told, *_table(rows)])


def _range(entry: Mapping[str, Any]) -> str:
    if entry["name"] == "full":
        return "full (all that the recipe merges)"
    layers = _layers(entry["layers"])
    return layers if entry["name"] == where(entry["layers"]) else f"{entry['name']} ({layers})"


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {where(layers)}"


def _points(value: float | None, ends: Sequence[float] | None, signed: bool = False) -> str:
    if value is None:
        return "none"
    told = f"{value:+.1f}" if signed else f"{value:.1f}"
    return told + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def _share(found: Mapping[str, Any], third: str) -> str:
    told = found[third]
    if told["share"] is None:
        return "none"
    if found["undefined"] and told["share_interval"] is None:
        return "unsure"  # a share of a drop that may be none
    ends = told["share_interval"]
    return f"{100 * told['share']:.0f} %" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
