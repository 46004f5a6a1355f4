"""Two architectures, as AdaMMS merges them: what a choice without labels costs, and what cheaper ones would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polymerge
from course import SHOWN, Course
from interview import GENERATION, TEXT, Interview, prompt_file
from polymerge.tuning.from_logs import choose_from_logs, value_folders
from sizes import Size

__all__ = ["LABELS", "STEPS", "two_families"]

LABELS = "labels of the same prompts"
STEPS = (1, 2)  # of the grid: every value, every second one
JUDGINGS = {
    "union": polymerge.Judging(),
    "union, smooth 1": polymerge.Judging(smooth=1),
    "sum": polymerge.Judging(criterion="sum"),
    "backward": polymerge.Judging(criterion="backward"),
}
_VALUE = r"-(\d[\d.]*)$"  # how the folder of a candidate ends


def two_families(course: Course, size: Size, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Scores at every weight of the other model, and what each rule chooses.

    The first value of the grid, 0, is the template as it is. A rule sees prompts that no score is about.
    """
    each = max(size.prompts) // len(SHOWN) or 1
    prompts = prompt_file(course, dict.fromkeys(SHOWN, each), "choose", work / "choose")
    options = polymerge.SearchOptions(
        vary=[polymerge.Knob("weight", values=size.grid)],
        scoring=polymerge.Scoring("exact", choose=False),
        generation=GENERATION,
        force=True,
    )
    recipe = _recipe(folder, 0.0)
    found = polymerge.search(recipe, polymerge.PromptSource(prompts, samples=0), work / "search", options)
    rows = []
    with Interview(course, size, folder, recipe) as interview:
        norms = _norms(interview, folder)
        for value in size.grid:
            interview.merge(_recipe(folder, value))
            entropy = [interview.entropy(group, "choose", each) for group in SHOWN]
            rows.append(
                {"what": "scores", "weight": value, "exam": interview.exam(SHOWN), "entropy": sum(entropy) / len(SHOWN)}
            )
    by_value, _ = value_folders(found.folder / "candidates", _VALUE)
    for step in STEPS:
        values = size.grid[::step]
        some = {value: by_value[value] for value in values}
        for name, judging in JUDGINGS.items():
            rows += _without_labels(name, judging, some, step, size)
        rows += _other_rules(found, rows, values, norms, step)
    return rows


def _without_labels(
    name: str, judging: polymerge.Judging, folders: Mapping[float, Path], step: int, size: Size
) -> list[dict[str, Any]]:
    """What a criterion chooses from so many prompts, one choice for each draw of them."""
    rows = []
    for count in size.prompts:
        draws = range(1 if count == max(size.prompts) else size.draws)
        chosen = [
            choose_from_logs(folders, samples=count, seed=draw, judging=judging, having="all").outcome["chosen"]
            for draw in draws
        ]
        rows.append({"what": "choice", "rule": name, "step": step, "prompts": count, "chosen": chosen})
    return rows


def _other_rules(
    found: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float], norms: tuple[float, float], step: int
) -> list[dict[str, Any]]:
    """What would have been chosen otherwise, of the same grid."""
    entropy = {row["weight"]: row["entropy"] for row in rows if row["what"] == "scores"}
    scores = dict(zip(found.outcome["values"], found.outcome["scores"], strict=True))
    inside = values[1:-1]
    own, other = norms
    wanted = {
        LABELS: max(values, key=lambda value: scores[value]),
        "least entropy of the answers": min(inside, key=lambda value: entropy[value]),
        "shares of the deltas' norms": _nearest(inside, own / (own + other)),
        "half of each": _nearest(inside, 0.5),
        "a tenth": _nearest(inside, 0.1),
        "the template alone": values[0],
    }
    count = len(found.outcome["values"]) and found.outcome["prompts"]
    return [
        {"what": "choice", "rule": name, "step": step, "prompts": count, "chosen": [value]}
        for name, value in wanted.items()
    ]


def _nearest(values: Sequence[float], wanted: float) -> float:
    return min(values, key=lambda value: abs(value - wanted))


def _recipe(folder: Path, weight: float) -> dict[str, Any]:
    """Average the text towers, so much of the other one."""
    models = {folder / "vlm": 1 - weight, folder / "other": weight}
    listed = [{"model": str(model), "parameters": {"weight": own}} for model, own in models.items()]
    return {"merge_method": "linear", "template": str(folder / "vlm"), "models": listed, **TEXT}


def _norms(interview: Interview, folder: Path) -> tuple[float, float]:
    """How far both text towers are from the base, by putting the base, then the other, in the template's place."""

    def put(model: str) -> dict[str, Any]:
        one = [{"model": str(folder / model), "parameters": {"weight": 1.0}}]
        return {"merge_method": "linear", "template": str(folder / "vlm"), "models": one, **TEXT}

    own = interview.merge(put("base"))
    base = {name: tensor.clone() for name, tensor in interview.model.state_dict().items()}
    interview.merge(put("other"))
    return own, interview.distance(base)
