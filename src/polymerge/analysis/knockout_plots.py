"""The pictures of a knockout and of an ablation, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polymerge.errors import MissingExtraError
from polymerge.planning.text_words import ranges

__all__ = ["draw_curves", "draw_gains", "draw_maps", "where"]

Outcome = Mapping[str, Any]
_TITLES = {"model": "model", "against": "original", "difference": "model less original"}
_COLOURS = {"attention": "#1f5fa8", "mlp": "#c2571a", "both": "#555555"}
_NUMBERED = 12  # columns that leave room for a number in each


def where(layers: Sequence[int]) -> str:
    """Layers in words: `3`, or `0-3`."""
    return ranges(layers).replace(", ", ",")


def draw_maps(outcome: Outcome, stem: Path) -> None:
    """Draw the drops as a heat map, layer by task: a panel for each module, a row of them for each model.

    outcome  what knockout.json holds

    raises MissingExtraError without matplotlib.
    """
    shown = _shown(outcome)
    tasks, modules = list(outcome["tasks"]), outcome["modules"]
    top = max((abs(cell[who]["drop"]) for cell in outcome["cells"] for who in shown), default=0.0) or 1.0
    columns = [where(layers) for layers in _layers(outcome, modules[0])]
    with _figure((1.6 + len(modules) * max(3.0, 0.45 * len(columns)), 1.1 + len(shown) * (0.9 + 0.4 * len(tasks)))) as (
        figure,
        save,
    ):
        panels = figure.subplots(len(shown), len(modules), squeeze=False)
        for row, who in zip(panels, shown, strict=True):
            for axes, module in zip(row, modules, strict=True):
                values = [[cell[who]["drop"] for cell in _cells(outcome, task, module)] for task in tasks]
                image = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
                axes.set_title(f"{_TITLES[who]}: {module}", loc="left", fontsize=9)
                axes.set_yticks(range(len(tasks)), tasks)
                step = -(-len(columns) // 16)
                axes.set_xticks(range(0, len(columns), step), columns[::step])
                for y, line in enumerate(values) if len(columns) <= _NUMBERED else ():
                    for x, value in enumerate(line):
                        shade = "white" if abs(value) > 0.6 * top else "black"
                        axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("layers knocked out")
        figure.colorbar(image, ax=panels, label=f"drop of {outcome['scorer']}, points")
        save(stem)


def draw_curves(outcome: Outcome, stem: Path) -> None:
    """Draw the drops over the layers, a panel for each task: solid the model, dashed the original.

    Beside it their difference where there is an original. Shades hold 95 % of the resamples.
    """
    shown = _shown(outcome)
    tasks, modules = list(outcome["tasks"]), outcome["modules"]
    columns = 2 if "difference" in shown else 1
    with _figure((1.0 + 4.6 * columns, 0.6 + 2.6 * len(tasks))) as (figure, save):
        panels = figure.subplots(len(tasks), columns, squeeze=False, sharex=True)
        for row, task in zip(panels, tasks, strict=True):
            for module in modules:
                cells = _cells(outcome, task, module)
                places = [sum(cell["layers"]) / len(cell["layers"]) for cell in cells]
                for who in shown:
                    axes = row[1] if who == "difference" else row[0]
                    style = "o--" if who == "against" else "o-"
                    name = f"{module}, original" if who == "against" else module
                    heights = [cell[who]["drop"] for cell in cells]
                    axes.plot(places, heights, style, color=_COLOURS[module], markersize=3, linewidth=1.2, label=name)
                    ends = [cell[who]["interval"] for cell in cells]
                    if who != "against" and all(ends):
                        low, high = zip(*ends, strict=True)
                        axes.fill_between(places, low, high, color=_COLOURS[module], alpha=0.15, linewidth=0)
            for axes, title in zip(row, ("drop, points", "model less original"), strict=False):
                axes.axhline(0, color="0.6", linewidth=0.8)
                axes.spines[["top", "right"]].set_visible(False)
                axes.set_title(f"{task}: {title}", loc="left", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("layer (middle of those knocked out)")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0, 0].legend(fontsize=7)
        save(stem)


def draw_gains(outcome: Outcome, stem: Path) -> None:
    """Draw what merging each range of layers gains over the template, with 95 % of the resamples.

    outcome  what ablation.json holds
    """
    names = [entry["name"] for entry in outcome["ranges"]]
    with _figure((1.6 + max(3.5, 0.6 * len(names)), 0.6 + 2.4 * len(outcome["tasks"]))) as (figure, save):
        panels = figure.subplots(len(outcome["tasks"]), 1, squeeze=False, sharex=True)
        for axes, task in zip(panels[:, 0], outcome["tasks"], strict=True):
            for place, entry in enumerate(outcome["ranges"]):
                found = entry["tasks"][task]
                gain, ends = found["gain"], found["interval"]
                if ends is not None:
                    axes.plot([place, place], ends, color="#1f5fa8", linewidth=1.2)
                axes.plot(place, gain, "o", color="#1f5fa8", markersize=5)
            axes.axhline(0, color="0.6", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{task}: gain over the template, points", loc="left", fontsize=9)
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
        panels[-1, 0].set_xlabel("layers merged")
        save(stem)


def _shown(outcome: Outcome) -> list[str]:
    return ["model"] if outcome["against"] is None else ["model", "against", "difference"]


def _cells(outcome: Outcome, task: str, module: str) -> list[Mapping[str, Any]]:
    return [cell for cell in outcome["cells"] if cell["task"] == task and cell["module"] == module]


def _layers(outcome: Outcome, module: str) -> list[Sequence[int]]:
    return [cell["layers"] for cell in _cells(outcome, next(iter(outcome["tasks"])), module)]


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[Path], None]]]:
    """A figure, and what writes it under a name."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'polymerge[search]'") from None
    with mpl.rc_context({"svg.hashsalt": "polymerge", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")

        def save(stem: Path) -> None:
            figure.savefig(stem.with_suffix(".png"), dpi=130)
            figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})

        yield figure, save
