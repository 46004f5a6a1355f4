"""A file of predictions: a JSON object a line, as LLaVA's scripts write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.json_files import Broken, json_of, kind_of, shortened, text_of_file

__all__ = ["Line", "Predictions", "failures_note", "is_failure", "read_predictions", "some_of"]

# VLMEvalKit's begin so, whatever its API's name and the error behind; of lmms-eval, those of its API models, of Oryx
# and of models that go on from a video
_FAILURE: Final = re.compile(
    r"fail(?:ed)? to obtain answer\b.*|\[LMMS_EVAL_REQUEST_FAILED\b.*|video .* generate failed, check the source"
    r"|\[ERROR\] conditioning video not found .*",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Line:
    """A line: where it is, its question_id as written, its text or None for null, its prompt if it has one."""

    where: str
    number: int
    id: str | int
    text: str | None
    prompt: object = None
    has_prompt: bool = False

    @property
    def answer(self) -> str | None:
        """Its text; None where that is null or a tool's message that there is none."""
        return None if self.text is None or is_failure(self.text) else self.text


@dataclass(frozen=True)
class Predictions:
    """The lines in file order, and the numbers of the blank ones between them."""

    file: Path
    lines: tuple[Line, ...]
    blank: tuple[int, ...]

    def by_id(self) -> dict[str, Line]:
        """The line of each question_id, read as text; the last one where there are several."""
        return {str(line.id): line for line in self.lines}

    def notes(self, known: Sequence[str]) -> list[str]:
        """What is odd about the file, given the question_ids that are annotated."""
        annotated = set(known)
        by_id = self.by_id()
        repeated = [line for line in self.lines if by_id[str(line.id)] is not line]
        unknown = [line for line in self.lines if str(line.id) not in annotated]
        null = [line for line in by_id.values() if line.text is None and str(line.id) in annotated]
        failed = [line for line in by_id.values() if line.text is not None and line.answer is None]
        failed = [line for line in failed if str(line.id) in annotated]
        missing = [name for name in known if name not in by_id]
        found = [
            (self.blank, "blank, passed over"),
            (_numbers(repeated), "of a question_id that comes again below, where the last line counts"),
            (_numbers(unknown), "of a question_id that is not annotated, ignored"),
            (_numbers(null), "with null for a text: no answer, and wrong"),
            (_numbers(failed), "with a tool's message of a failure for a text: no answer, and wrong"),
        ]
        notes = [f"{self.file}: {_lines(lines)} {what}: {_numbered(lines)}" for lines, what in found if lines]
        if missing:
            notes.append(
                f"{self.file}: {len(missing)} of {len(known)} annotated questions have no line and count as wrong: "
                f"{some_of(missing)}"
            )
        return notes


def _numbers(lines: Sequence[Line]) -> list[int]:
    return [line.number for line in lines]


def _lines(numbers: Sequence[int]) -> str:
    return f"{len(numbers)} line{'s' if len(numbers) > 1 else ''}"


def _numbered(numbers: Sequence[int]) -> str:
    return some_of([str(number) for number in numbers])


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many are left out."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def is_failure(text: str) -> bool:
    """Whether a text is what VLMEvalKit or lmms-eval writes in an answer's place where a request has failed."""
    return _FAILURE.fullmatch(text.strip()) is not None


def failures_note(count: int) -> str:
    """What to say of answers that a tool scored although they are its own message of a failure."""
    verb = "is" if count == 1 else "are"
    return f"{count} of the answers {verb} a message of a failed request, and {verb} scored as if the model had said it"


def read_predictions(file: Path, problems: list[PolymergeError]) -> Predictions:
    """The lines of a file; every line that cannot be one is added to `problems`.

    A line must be an object with a question_id (text or whole number) and a text; null stands for no answer.
    """
    try:
        content = text_of_file(file)
    except RecipeError as error:
        problems.append(error)
        return Predictions(file, (), ())
    if content.lstrip().startswith("["):
        problems.append(
            RecipeError(f"{file}: is a JSON array, not a line of JSON for each prediction. Write one object a line.")
        )
        return Predictions(file, (), ())
    found: list[Line] = []
    blank: list[int] = []
    wrong: list[PolymergeError] = []
    rows = content.split("\n")
    for number, row in enumerate(rows[:-1] if rows[-1] == "" else rows, 1):
        if not row.strip():
            blank.append(number)
            continue
        try:
            found.append(_line(f"{file}:{number}", number, json_of(row)))
        except Broken as error:
            wrong.append(RecipeError(f"{file}:{number}: {error}{_CUT if number == len(rows) else ''}"))
    problems += shortened(wrong, file)
    return Predictions(file, tuple(found), tuple(blank))


_CUT = ". It is the last line and may have been cut off: remove it, or finish the run"


def _line(where: str, number: int, value: Any) -> Line:
    if not isinstance(value, dict):
        raise Broken(f"is {kind_of(value)}, not an object with question_id and text. Remove the line or correct it.")
    if "question_id" not in value or "text" not in value:
        lacking = " and ".join(f"'{key}'" for key in ("question_id", "text") if key not in value)
        raise Broken(f"has no {lacking}; its keys are {some_of(list(value)) or 'none'}. Each line needs both.")
    name, text = value["question_id"], value["text"]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise Broken(f"question_id is {kind_of(name)} ({name!r}), not a text or a whole number")
    if text is not None and not isinstance(text, str):
        raise Broken(f"text is {kind_of(text)} ({text!r:.60}), not a text; write null for no answer")
    return Line(where, number, name, text, value.get("prompt"), "prompt" in value)
