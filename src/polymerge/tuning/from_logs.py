"""Choose from existing answers: one folder per value, as evaluation tools write them."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polymerge.checkpoints.target import check_target
from polymerge.checkpoints.tensor_info import listed
from polymerge.durable import make_folder
from polymerge.engine.merge import merge
from polymerge.errors import OutputError, RecipeError, collecting, refuse, refuse_if_any
from polymerge.evaluation.harness.logs import read_logs
from polymerge.inference.prompts import sample
from polymerge.inference.run_folder import SETTINGS, Run, read_settings
from polymerge.paths import given_path
from polymerge.recipe.parsing import parse_recipe
from polymerge.recipe.recipe import Recipe
from polymerge.tuning.criterion import CRITERIA, Judging, judge
from polymerge.tuning.curve_plot import draw_search
from polymerge.tuning.knobs import Knob
from polymerge.tuning.outcome import Found
from polymerge.tuning.space import Space, make_space, refuse_idle

__all__ = ["ChosenMerge", "choose_from_logs", "plan_merge", "value_folders"]

_PERCEPTION = "mme_perception_score"
_OF_A_SEARCH = r"-(-?\d[\d.]*(?:e[+-]?\d+)?)$"  # how a candidate's folder of a search ends
_AT_THE_END = re.compile(r"(?:^|[-_=,\s])(?P<number>(?:\d*\.\d+|\d+)(?:e[-+]?\d+)?)$", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(\d+(?:\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_HINT = "Give each folder its value as VALUE=DIR, or say where names have it with `value_pattern`: 'alpha-([0-9.]+)'."


def choose_from_logs(
    source: str | os.PathLike[str] | Mapping[float, str | os.PathLike[str]],
    *,
    task: str | None = None,
    value_pattern: str | None = None,
    having: str | None = None,
    samples: int = 100,
    seed: int = 2,
    judging: Judging | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Found:
    """Choose a value from answers of lmms-eval, lm-eval, VLMEvalKit or a polymerge search.

    AdaMMS (Du et al. 2025), section 3.2 and its search scripts. The same documents of every candidate are compared,
    aligned by their ids.

    source         one folder per candidate, by value; or the folder that holds them, whose names end in the value; or a
                   run of `search`
    task           required if the folders hold several
    value_pattern  a regular expression whose only group matches the value in a folder's name
    having         only documents whose record has this field; `all` for every one. By default, for MME the perception
                   questions under a two-sided criterion, as in the script with that criterion, else every one
    samples, seed  number of documents to draw, 0 for all, and the seed of the draw
    out            a folder for search.json and the plot

    raises Refused or RecipeError with every problem: a folder without a value, a candidate without answers
    or with other documents.
    """
    judging = judging or Judging()
    problems = [*judging.problems()]
    if samples < 0:
        problems.append(RecipeError(f"samples: {samples} is no number of documents; 0 takes all"))
    if value_pattern is not None and isinstance(source, Mapping):
        problems.append(RecipeError("value_pattern: the folders are given by value. Leave it out"))
    if out is not None and (given_path(out) / SETTINGS).is_file():
        problems.append(OutputError(f"{out}: is the folder of a search, whose outcome stays. Name another one"))
    refuse_if_any(problems)
    searched, notes = None, list[str]()
    if isinstance(source, Mapping):
        by_value = {float(value): given_path(folder) for value, folder in sorted(source.items())}
    else:
        folder, searched = given_path(source), read_settings(given_path(source))
        if searched is not None:
            folder, value_pattern = folder / "candidates", value_pattern or _OF_A_SEARCH
        by_value, notes = value_folders(folder, value_pattern)
    folders = list(by_value.values())
    field = None if having == "all" else having
    logs = read_logs(folders, task=task, having=field)
    if logs.task == "mme" and having is None and CRITERIA[judging.criterion].two_sided:
        field = _PERCEPTION
        logs = read_logs(folders, task=task, having=field)
    ids = sample(list(logs.answers[0]), samples, seed)
    choice = judge(tuple(by_value), logs.answers, ids, judging)
    outcome: dict[str, Any] = {
        "polymerge": importlib.metadata.version("polymerge"),
        "vary": ", ".join(searched["vary"]) if searched else "value",
        "values": list(by_value),
        **judging.settings,
        **choice.to_json(),
        "chosen_by": judging.criterion,
        "prompts": len(ids),
        "samples": samples,
        "seed": seed,
        "task": logs.task,
        "having": field,
        "files": [str(file) for file in logs.files],
        "notes": [*notes, *logs.notes],
    }
    if any(one is not None for one in logs.scores):
        outcome["tool_scores"] = list(logs.scores)
    if out is not None:
        run = Run(given_path(out))
        make_folder(run.folder)
        run.write_json("search.json", outcome)
        draw_search(outcome, run.folder / "search")
    return Found(outcome)


def value_folders(directory: Path, pattern: str | None = None) -> tuple[dict[float, Path], list[str]]:
    """The folders in a directory by coefficient value, ascending; and notes on those without a value.

    The value is the number at the end of a name, after a dash, an underscore, a space or an equals sign: `weight-0.3`,
    `0.3`, `weight=-0.1`, `weight--0.1`.

    pattern  a regular expression instead, whose only group is the number; it may match anywhere in the name

    raises RecipeError if the pattern is invalid, a name is ambiguous, no name has a value, or
    two folders have the same value.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise RecipeError(f"{directory}: {error.strerror}. Give a directory with a folder for each value.") from None
    if not names:
        raise RecipeError(f"{directory}: holds no folders. Give a directory with a folder for each value.")
    texts = _at_the_end(names) if pattern is None else _by_pattern(names, pattern)
    if not texts:
        where = "the end of its name" if pattern is None else "its name"
        raise RecipeError(f"no folder has a value at {where}: {listed(names, 8)}. {_HINT}")
    by_value: dict[float, list[str]] = {}
    for name, text in texts.items():
        by_value.setdefault(float(text), []).append(name)
    if twice := {value: group for value, group in by_value.items() if len(group) > 1}:
        both = "; ".join(f"{value} in {listed(group, 8)}" for value, group in twice.items())
        raise RecipeError(f"several folders have the same value: {both}. Move one of them away. {_HINT}")
    without = [name for name in names if name not in texts]
    notes = [f"passed over {listed(without, 8)}: no value in the name"] if without else []
    return {value: directory / group[0] for value, group in sorted(by_value.items())}, notes


def _at_the_end(names: Iterable[str]) -> dict[str, str]:
    """The plain number at the end of each name, with its sign; other names are left out."""
    found, unclear = {}, []
    for name in names:
        match = _AT_THE_END.search(name)
        if match is None or not math.isfinite(float(match["number"])):
            continue
        number, before = match["number"], name[: match.start("number")]
        minus = before.endswith("-") and (before[:-1] == "" or before[-2] in "-=")
        if re.search(r"[_,\s]-$", before) or (number.isdigit() and re.search(r"\d[_,]$", before)):
            unclear.append(name)  # a sign or a dash; a whole number or decimals
        found[name] = f"-{number}" if minus else number
    if unclear:
        raise RecipeError(f"the value can be read in more than one way from the names {listed(unclear, 8)}. {_HINT}")
    return found


def _by_pattern(names: Iterable[str], pattern: str) -> dict[str, str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"value_pattern {pattern}: is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise RecipeError(
            f"value_pattern {pattern}: has {compiled.groups} groups, it needs exactly one, around the number, such as "
            "'alpha-([0-9.]+)'. Write (?:...) for groups that only hold things together."
        )
    matches = {name: compiled.search(name) for name in names}
    texts = {name: match[1] for name, match in matches.items() if match and match[1] is not None}
    if wrong := [name for name, text in texts.items() if not _is_number(text)]:
        raise RecipeError(
            f"value_pattern {pattern}: what it finds is no finite number: "
            + ", ".join(f"'{texts[name]}' in '{name}'" for name in wrong[:8])
            + "."
        )
    return texts


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


@dataclass(frozen=True)
class ChosenMerge:
    """The merge of a recipe whose value is still to be chosen."""

    recipe: Recipe
    space: Space
    out: Path
    force: bool = False

    def merge(self, value: float) -> None:
        """Merge with the chosen value."""
        merge(self.space.turned(self.recipe, (value,)), self.out, force=self.force)


def plan_merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    source: str | os.PathLike[str] | Mapping[float, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vary: Sequence[Knob] = (),
    keep_template_weight: bool = False,
    force: bool = False,
) -> ChosenMerge:
    """Read a recipe whose varied value `choose_from_logs` chooses, and check that it can be merged at any value.

    source  of the answers; if it is the run of a search, `vary` and `keep_template_weight` are taken from it

    raises Refused with every problem.
    """
    read, space = Recipe("copy", ()), Space()
    with collecting() as wrong:
        searched = None if isinstance(source, Mapping) else read_settings(given_path(source))
        keep_template_weight = searched["keep_template_weight"] if searched else keep_template_weight
        with collecting():
            read = parse_recipe(recipe)
            knobs = [replace(knob, values=(0.0, 1.0)) for knob in vary or (Knob(),)]  # it may be any
            space = make_space(read, knobs, keep_template_weight=keep_template_weight)
        names = [axis.name for axis in space.axes]
        if searched and names and names != searched["vary"]:
            refuse(RecipeError(f"vary {', '.join(names)}: {source} varied {', '.join(searched['vary'])}"))
        with collecting():
            check_target(given_path(out), (), force)
        if not wrong:
            refuse_idle(read, space)
    return ChosenMerge(read, space, given_path(out), force)
