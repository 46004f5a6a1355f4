"""Choose from answers that exist already: one folder per candidate, as evaluation tools leave them."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, RecipeError, refuse_if_any
from polymerge.evaluation.logs import read_logs
from polymerge.inference.prompts import sample
from polymerge.inference.run_folder import SETTINGS, Run, read_settings
from polymerge.tuning.criterion import CRITERIA
from polymerge.tuning.curve_plot import draw_search
from polymerge.tuning.judging import Judging, judge

__all__ = ["choose_from_logs"]

_PERCEPTION = "mme_perception_score"
_OWN = r"-(-?\d[\d.]*(?:e[+-]?\d+)?)$"  # how a candidate's folder of our own ends


def choose_from_logs(
    directory: str | os.PathLike[str],
    *,
    task: str | None = None,
    value_pattern: str | None = None,
    keep: str | None = None,
    samples: int = 100,
    seed: int = 2,
    judging: Judging | None = None,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Choose a value from the answers that lmms-eval, VLMEvalKit or a search of polymerge has left.

    AdaMMS (Du et al. 2025), section 3.2 and its search scripts. The same documents of every candidate are compared,
    aligned by their ids.

    directory      one folder per candidate, whose name holds the value; or a run of `search`
    task           needed where the folders hold several
    value_pattern  a regular expression with one group that finds the value in a name
    keep           only documents whose record has this field; `all` for every one. Without it: of MME the perception
                   questions under a two-sided criterion, as in the script whose criterion that is, else every one
    samples, seed  of the documents that are drawn; 0 for all
    out            a folder for search.json and the plot

    returns  what search.json holds

    raises Refused or RecipeError with everything that is wrong: a candidate without answers or with other documents.
    """
    judging = judging or Judging()
    problems = [*judging.problems()]
    if samples < 0:
        problems.append(RecipeError(f"--samples: {samples} is no number of documents; 0 takes all"))
    if out is not None and (Path(out) / SETTINGS).is_file():
        problems.append(OutputError(f"{out}: is the folder of a search, whose outcome stays. Name another one"))
    refuse_if_any(problems)
    folder = Path(directory)
    searched = read_settings(folder)
    if searched is not None:
        folder, value_pattern = folder / "candidates", value_pattern or _OWN
    two_sided = CRITERIA[judging.criterion].two_sided
    field = None if keep == "all" else keep
    logs = read_logs(folder, task=task, value_pattern=value_pattern, keep=field)
    if logs.task == "mme" and keep is None and two_sided:
        field = _PERCEPTION
        logs = read_logs(folder, task=task, value_pattern=value_pattern, keep=field)
    ids = sample(list(logs.answers[0]), samples, seed)
    choice = judge(logs.values, logs.answers, ids, judging)
    outcome: dict[str, Any] = {
        "polymerge": importlib.metadata.version("polymerge"),
        "vary": ", ".join(searched["vary"]) if searched else "value",
        "values": list(logs.values),
        **judging.settings,
        **choice.to_json(),
        "chosen_by": judging.criterion,
        "prompts": len(ids),
        "samples": samples,
        "seed": seed,
        "task": logs.task,
        "keep": field,
        "files": [str(file) for file in logs.files],
        "notes": list(logs.notes),
    }
    if any(one is not None for one in logs.scores):
        outcome["tool_scores"] = list(logs.scores)
    if out is not None:
        run = Run(Path(out))
        run.folder.mkdir(parents=True, exist_ok=True)
        run.write_json("search.json", outcome)
        draw_search(outcome, run.folder / "search")
    return outcome
