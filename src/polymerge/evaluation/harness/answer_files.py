"""Find the files in a candidate's folder that hold answers to a task, and the newest of several runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any, Literal

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, RecipeError, did_you_mean

__all__ = ["OWN", "AnswerFile", "answer_files", "newest", "of_task", "tasks_there"]

Kind = Literal["own", "lines", "json", "table"]

OWN = "answers.jsonl"
"""The name of polymerge's own answer file."""

_SAMPLES = re.compile(
    r"(?:(?P<before>.+?)_)?samples_(?P<task>.+?)(?:_(?P<after>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+))?\.jsonl"
)
"""The time of the run stands before in lmms-eval's names, and after in lm-eval's."""
_NO_ANSWERS = re.compile(r"(?:.*_)?(?:results?|acc|score|rating|status)", re.IGNORECASE)
"""Files that the tools write beside answers: `mme_results.json`, `model_MME_score.json`, `status.json`."""

_RUN_FOLDER = re.compile(r"T(?P<day>\d{8})(?:_G[0-9A-Za-z]+|-(?P<time>\d{6}))")
_DATED = re.compile(r"(?P<day>\d{4}-?\d\d-?\d\d)[T_-](?P<time>\d\d[-:.]?\d\d(?:[-:.]?\d\d)?)(?!\d)")


@dataclass(frozen=True)
class AnswerFile:
    """A file that holds answers, judging by its name.

    tasks   the tasks that it certainly or probably answers; empty for polymerge's own, whose name does not tell
    others  further possible tasks: VLMEvalKit's `<model>_<dataset>` if the model is unknown
    stamp   its timestamp, as text that sorts by age; empty if neither its name nor its folder has one
    """

    path: Path
    kind: Kind
    tasks: tuple[str, ...]
    others: tuple[str, ...]
    stamp: str


def answer_files(folder: Path) -> Iterator[AnswerFile]:
    """Iterate over the files below a candidate's folder that may hold answers, sorted by path.

    raises OSError if a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "submissions")
        for name in sorted(names):
            path = Path(place, name)
            if (
                not name.startswith(".")
                and (path.is_file() or path.is_symlink())
                and (found := _recognised(folder, path))
            ):
                yield found


def _recognised(candidate: Path, path: Path) -> AnswerFile | None:
    above = [candidate.name, *path.parent.relative_to(candidate).parts][::-1]
    if path.name == OWN:
        return AnswerFile(path, "own", (), (), _stamp(above))
    if match := _SAMPLES.fullmatch(path.name):
        return AnswerFile(
            path, "lines", (match["task"],), (), _stamp([match["before"] or match["after"] or "", *above])
        )
    if path.suffix not in (".json", ".tsv", ".xlsx") or _NO_ANSWERS.fullmatch(path.stem):
        return None
    stem = path.stem
    model = next((name for name in above if stem.startswith(f"{name}_")), None)
    parts = stem.split("_")
    tasks = [stem] if path.suffix == ".json" or model is None else []
    tasks += [stem[len(model) + 1 :]] if model is not None else []
    others = [] if model is not None else ["_".join(parts[start:]) for start in range(1, len(parts))]
    kind: Kind = "json" if path.suffix == ".json" else "table"
    return AnswerFile(path, kind, tuple(tasks), tuple(others), _stamp(above))


def _stamp(names: Sequence[str]) -> str:
    """The timestamp in the first name that has one; empty if none has."""
    for name in names:
        if match := _RUN_FOLDER.fullmatch(name) or _DATED.match(name):
            return "".join(filter(str.isdigit, match["day"] + (match["time"] or "")))
    return ""


def of_task(candidates: Sequence[Sequence[AnswerFile]], task: str | None) -> tuple[str, list[list[AnswerFile]]]:
    """Return the name that the files use for a task, and each candidate's files for it.

    Exact names come first, then VLMEvalKit's files that end in it, then `<task>_val...`: the task
    ok_vqa was logged as ok_vqa_val2014. Polymerge's own files, which name no task, are used if there is nothing
    else, or by their name.

    raises RecipeError, listing the available tasks, if none or several match.
    """
    every = [file for files in candidates for file in files]
    if task is not None:
        if any(task in file.tasks for file in every):
            return task, _called(candidates, task)
        if any(task in file.others for file in every):
            return task, [[file for file in files if task in file.tasks + file.others] for files in candidates]
        longer = sorted({name for file in every for name in file.tasks if name.startswith(f"{task}_val")})
        if len(longer) > 1:
            raise RecipeError(f"task {task}: can mean {listed(longer, 8)}. Write out the one that you mean.")
        if longer:
            return longer[0], _called(candidates, longer[0])
    there = tasks_there(every)
    others = [name for name in there if name != OWN]
    if OWN in there and (not others or task == OWN):
        return "", [[file for file in files if file.kind == "own"] for files in candidates]
    if task is None and len(there) == 1:
        return there[0], _called(candidates, there[0])
    if task is None or not there:
        raise RecipeError(_which(there))
    raise RecipeError(f"task {task}: no candidate has answers to it.{did_you_mean(task, there)}")


def _called(candidates: Sequence[Sequence[AnswerFile]], task: str) -> list[list[AnswerFile]]:
    return [[file for file in files if task in file.tasks] for files in candidates]


def tasks_there(files: Iterable[AnswerFile]) -> list[str]:
    """The tasks that the files answer, for messages; JSON files with other content are ignored."""
    return sorted({file.tasks[-1] if file.tasks else OWN for file in files if _may_hold_answers(file)})


def _may_hold_answers(file: AnswerFile) -> bool:
    if file.kind != "json":
        return True
    try:
        value = read_json(file.path, Any, unique_keys=False, most=RECORDS_BYTES)
    except CheckpointError:
        return True  # reading it says what is wrong
    if isinstance(value, list):
        return any(isinstance(record, dict) and "prediction" in record for record in value)
    return isinstance(value, dict) and "logs" in value


def _which(there: Sequence[str]) -> str:
    if there:
        return (
            f"the folders hold answers to several tasks: {listed(there, 20)}. Name one with `task`; of VLMEvalKit's "
            "<model>_<dataset> it is the dataset."
        )
    return (
        "the folders hold no answers: neither lmms-eval's <stamp>_samples_<task>.jsonl or <task>.json (written with "
        f"its option log_samples) nor VLMEvalKit's <model>_<dataset>.xlsx, .tsv or .json, nor {OWN}."
    )


def newest(files: Sequence[AnswerFile]) -> tuple[AnswerFile, tuple[AnswerFile, ...]]:
    """Return the file of the newest run, and those of older runs.

    Files with several names and copies count once; broken links are skipped.

    raises RecipeError if the newest is ambiguous.
    """
    different: list[AnswerFile] = []
    for file in sorted(files, key=lambda one: one.stamp == ""):  # of two names, the one in a run's folder says more
        if file.path.exists() and not any(cmp(file.path, other.path, shallow=False) for other in different):
            different.append(file)
    if not different:
        return files[0], ()
    first, *older = sorted(different, key=lambda one: one.stamp, reverse=True)
    if older and (not older[-1].stamp or first.stamp.startswith(older[0].stamp)):
        raise RecipeError(
            f"{listed([str(one.path) for one in different], 8)} answer the same task, and their names do not say which "
            "is the newest. Move the others away."
        )
    return first, tuple(older)
