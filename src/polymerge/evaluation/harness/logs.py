"""Read the answers of all candidates, and check that they cover the same documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.bounds import RECORDS_BYTES, read_bounded
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import RecipeError, collecting
from polymerge.evaluation.harness import lmms_eval, vlmevalkit
from polymerge.evaluation.harness.answer_files import OWN, AnswerFile, answer_files, newest, of_task, tasks_there
from polymerge.evaluation.harness.rows import Complaints, Documents, documents, json_lines, json_value, kept
from polymerge.evaluation.predictions import is_failure

__all__ = ["Logs", "read_logs"]

# as models of reasoning write them; where the prompt opens them, only their end is in the answer
_THOUGHTS: Final = re.compile(r".*</(?:think|analysis)>\s*(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Logs:
    """The answers of all candidates.

    answers  for each candidate the answer to each document, by its id, ascending; the ids are the same for all. A
             document to which one of them has a tool's message of a failure is left out of all, and of an answer in a
             tool's log the thoughts before it are
    scores   for each candidate the mean of the score that the tool gave each document, None where there is not just one
    files    the files read for each candidate
    task     the task; empty for answers of a search
    notes    remarks: older runs that were skipped, requests that failed
    """

    answers: tuple[Mapping[int | str, str], ...]
    scores: tuple[float | None, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    task: str = ""


def read_logs(folders: Sequence[Path], *, task: str | None = None, having: str | None = None) -> Logs:
    """Read the answers in folders, one per candidate.

    task  its name in lmms-eval or VLMEvalKit; optional if there is only one
    having  only documents that have this field, such as `mme_percetion_score` (in either spelling)

    raises RecipeError if tasks are ambiguous, and Refused with every problem of the files.
    """
    notes: list[str] = []
    try:
        found = [list(answer_files(folder)) for folder in folders]
    except OSError as error:
        raise RecipeError(f"{error.filename}: {error.strerror}. Make the folder readable.") from None
    called, candidates = of_task(found, task)
    read: list[tuple[Path, Documents]] = []
    thinking: list[str] = []
    with collecting():
        for folder, files, every in zip(folders, candidates, found, strict=True):
            with collecting():
                if not files:
                    raise _absent(folder, called, every)
                chosen, older = newest(files)
                one, thoughts = _documents(chosen, having)
                read.append((chosen.path, one))
                thinking += [f"{folder.name} {thoughts}"] if thoughts else []
                notes += _passed_over(folder, chosen, older)
    answers = _alike([documents.answers for _, documents in read])
    _check_alignment(folders, answers)
    answers, failures = _without_failures(folders, answers)
    notes += failures
    if thinking:
        notes.append(
            f"answers begin with a model's thoughts, and what follows these is compared: {'; '.join(thinking)}"
        )
    return Logs(
        answers=answers,
        scores=tuple(documents.score for _, documents in read),
        files=tuple(path for path, _ in read),
        notes=(*notes, *(note for _, documents in read for note in documents.notes)),
        task=called,
    )


def _documents(file: AnswerFile, having: str | None) -> tuple[Documents, int]:
    """Read a file of answers, and count those that follow a model's thoughts; broken files are refused."""
    complaints = Complaints(file.path)
    found = Documents({})
    try:
        found = _read(file, having, complaints)
    except OSError as error:
        complaints.add(f"cannot be read, {error.strerror}", "", "Is it a link to where the file no longer is?")
    complaints.refuse()
    return (found, 0) if file.kind == "own" else _without_thoughts(found)


def _read(file: AnswerFile, having: str | None, complaints: Complaints) -> Documents:
    if file.kind == "own":
        rows = kept(json_lines(complaints), having, complaints)
        return Documents(documents(rows, "id", _own_answer, complaints, repeats=True))
    if file.kind == "lines":
        return lmms_eval.read_answers(None, having, complaints)
    if file.kind == "table":
        return vlmevalkit.read_answers(vlmevalkit.read_rows(complaints), having, complaints)
    value = json_value(read_bounded(file.path, RECORDS_BYTES), "", complaints)
    if isinstance(value, dict) and "logs" in value:
        return lmms_eval.read_answers(lmms_eval.log_rows(value, complaints), having, complaints)
    return vlmevalkit.read_answers(vlmevalkit.json_rows(value, complaints), having, complaints)


def _own_answer(fields: Mapping[str, Any]) -> str:
    answer = fields.get("answer")
    if not isinstance(answer, str):
        raise ValueError("no 'answer' that is a text")
    return answer


def _without_thoughts(documents: Documents) -> tuple[Documents, int]:
    """Strip thoughts from the answers; returns the documents, and how many of them had any.

    Thoughts that are unterminated, or that nothing follows, are kept as the answer.
    """
    after = {number: found[1] for number, text in documents.answers.items() if (found := _THOUGHTS.fullmatch(text))}
    return replace(documents, answers={**documents.answers, **after}), len(after)


def _passed_over(folder: Path, chosen: AnswerFile, older: Sequence[AnswerFile]) -> list[str]:
    paths = [str(file.path.relative_to(folder)) for file in older]
    return [f"{folder}: read {chosen.path.relative_to(folder)}, passed over {listed(paths)}"] if paths else []


def _absent(folder: Path, task: str, every: Sequence[AnswerFile]) -> RecipeError:
    there = tasks_there(every)
    holds = f"it has {listed(there, 8)}" if there else "it has no answers at all"
    wanted = f"no answers to '{task}'" if task else f"no {OWN}"
    return RecipeError(f"{folder}: {wanted}, {holds}. Generate them, or move the folder away.")


def _alike(answers: Sequence[Mapping[int | str, str]]) -> tuple[dict[int | str, str], ...]:
    """Sort answers by id, with ids of one type, since one file may have 7 where another has "7"."""
    if all(isinstance(number, int) for one in answers for number in one):
        return tuple({number: one[number] for number in sorted(one, key=int)} for one in answers)
    texts = [{str(number): text for number, text in one.items()} for one in answers]
    return tuple({number: one[number] for number in sorted(one)} for one in texts)


def _check_alignment(folders: Sequence[Path], answers: Sequence[Mapping[int | str, str]]) -> None:
    usual = Counter(frozenset(one) for one in answers).most_common(1)[0][0]
    odd = []
    for folder, one in zip(folders, answers, strict=True):
        lacks = [str(number) for other in answers for number in other if number in usual and number not in one]
        more = [str(number) for number in one if number not in usual]
        said = [f"lacks {_some(list(dict.fromkeys(lacks)))}"] if lacks else []
        said += [f"has {_some(more)} more"] if more else []
        if said:
            odd.append(f"{folder.name} {' and '.join(said)}")
    if odd:
        raise RecipeError(
            f"the candidates do not answer the same {len(usual)} documents: {'; '.join(odd)}. "
            "Generate the answers that are missing, or move the folder away."
        )


def _without_failures(
    folders: Sequence[Path], answers: Sequence[Mapping[int | str, str]]
) -> tuple[tuple[dict[int | str, str], ...], list[str]]:
    """Keep the documents that all candidates have an answer to; returns their answers, and a note on the others."""
    failed = [[number for number, text in one.items() if is_failure(text)] for one in answers]
    lost = {number for numbers in failed for number in numbers}
    if not lost:
        return tuple(map(dict, answers)), []
    said = "; ".join(
        f"{folder.name} {_some(list(map(str, numbers)))}"
        for folder, numbers in zip(folders, failed, strict=True)
        if numbers
    )
    if len(lost) == len(answers[0]):
        raise RecipeError(
            f"of {len(lost)} documents there is none that every candidate has an answer to; the others hold a tool's "
            f"message of a failed request: {said}. Generate these answers again."
        )
    note = (
        f"{len(lost)} of {len(answers[0])} documents are left out, for a tool's message of a failed request is no "
        f"answer: {said}"
    )
    return tuple({number: text for number, text in one.items() if number not in lost} for one in answers), [note]


def _some(ids: Sequence[str]) -> str:
    return f"{len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
