"""The outcome of a knockout, or of layer-wise merging, as text."""

from __future__ import annotations

from collections.abc import Sequence

from polymerge.analysis.baseline import THIRDS, layer_words
from polymerge.analysis.drops import Drop, Third, Thirds
from polymerge.analysis.knockout import Knockout
from polymerge.analysis.layerwise import FULL, LayerRange, Layerwise
from polymerge.analysis.task_scores import Interval

__all__ = ["describe_knockout", "describe_layerwise"]

_NAMES = {"model": "model", "against": "original", "difference": "difference"}


def describe_knockout(outcome: Knockout) -> str:
    """Format, for each task, the drop of every cell, and the thirds of the layers in which the drops are."""
    shown = ["model"] if outcome.against is None else list(_NAMES)
    lines = []
    for task, asked in outcome.tasks.items():
        scores = ", ".join(f"{_NAMES[who]} {found[task].score:.1f}" for who, found in outcome.baseline.items())
        lines.append(f"{task}: {asked.prompts} prompts, {outcome.scorer}: {scores}")
        lines.append(f"Drop in points where weights are replaced ({outcome.replace}), with 95 % of the resamples:")
        for module in outcome.modules:
            cells = [cell for cell in outcome.cells if (cell.task, cell.module) == (task, module)]
            rows = [[module, *(_NAMES[who] for who in shown)]]
            for cell in cells:
                drops: list[Drop] = [getattr(cell, who) for who in shown]
                row = [
                    _points(one.drop, one.interval, who == "difference") for who, one in zip(shown, drops, strict=True)
                ]
                rows.append([_layers(cell.layers), *row])
            (summary,) = [line for line in outcome.summary if (line.task, line.module) == (task, module)]
            found: list[Thirds] = [getattr(summary, who) for who in shown]
            for third in THIRDS:
                of: list[Third] = [getattr(one, third) for one in found]
                rows.append(
                    [f"{third} third, {of[0].cells} of {len(cells)}: mean"]
                    + [
                        _points(one.mean, one.mean_interval, who == "difference")
                        for who, one in zip(shown, of, strict=True)
                    ]
                )
                rows.append(
                    ["  share of the drop"]
                    + [
                        "" if who == "difference" else _share(one, bool(whole.undefined))
                        for who, one, whole in zip(shown, of, found, strict=True)
                    ]
                )
            lines += _table(rows)
        lines.append("")
    return "\n".join(lines[:-1])


def describe_layerwise(outcome: Layerwise) -> str:
    """Format, for each range of layers, its score on every task and its gain over the template."""
    tasks = list(outcome.tasks)
    rows = [["merged", *(word for task in tasks for word in (task, "gain"))]]
    rows.append(["nothing", *(word for task in tasks for word in (f"{outcome.baseline[task].score:.1f}", ""))])
    for one in outcome.ranges:
        row = [_range(one)]
        for task in tasks:
            found = one.tasks[task]
            row += [f"{found.score:.1f}", _points(found.gain, found.interval, signed=True)]
        rows.append(row)
    counts = ", ".join(f"{task} {asked.prompts}" for task, asked in outcome.tasks.items())
    title = f"{outcome.scorer} in percent ({counts} prompts); gain over the template in points, 95 % of the resamples"
    return "\n".join([title, *_table(rows)])


def _range(one: LayerRange) -> str:
    if one.name == FULL:
        return "full (all that the recipe merges)"
    layers = _layers(one.layers)
    return layers if one.name == layer_words(one.layers) else f"{one.name} ({layers})"


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {layer_words(layers)}"


def _points(value: float | None, ends: Interval | None, signed: bool = False) -> str:
    if value is None:
        return "none"
    told = f"{value:+.1f}" if signed else f"{value:.1f}"
    return told + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def _share(third: Third, at_times_undefined: bool) -> str:
    if third.share is None:
        return "none"
    ends = third.share_interval
    if at_times_undefined and ends is None:
        return "unsure"  # a share of a drop that may be none
    return f"{100 * third.share:.0f} %" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
