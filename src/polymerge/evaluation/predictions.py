"""Files of predictions: one JSON object per line, as LLaVA's scripts write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import parse_json, read_text
from polymerge.errors import PolymergeError, RecipeError, collecting

__all__ = [
    "MOST_SHOWN",
    "Line",
    "Predictions",
    "at_most_shown",
    "failures_note",
    "is_failure",
    "read_predictions",
    "some_of",
]

MOST_SHOWN = 20
"""Maximum number of problems listed for a file; a file of the wrong kind has one on every line."""

# VLMEvalKit's begin so, whatever its API's name and the error behind; of lmms-eval, those of its API models, of Oryx
# and of models that go on from a video
_FAILURE: Final = re.compile(
    r"fail(?:ed)? to obtain answer\b.*|\[LMMS_EVAL_REQUEST_FAILED\b.*|video .* generate failed, check the source"
    r"|\[ERROR\] conditioning video not found .*",
    re.IGNORECASE | re.DOTALL,
)


class _Fields(msgspec.Struct):
    """The keys of a line that are read."""

    question_id: str | int
    text: str | None
    prompt: Any = msgspec.UNSET


@dataclass(frozen=True)
class Line:
    """A line: its location, its question_id as written, its text or None for null, its prompt or UNSET."""

    where: str
    number: int
    id: str | int
    text: str | None
    prompt: object = msgspec.UNSET

    @property
    def answer(self) -> str | None:
        """Its text; None if that is null or a tool's message that there is no answer."""
        return None if self.text is None or is_failure(self.text) else self.text


@dataclass(frozen=True)
class Predictions:
    """The lines in file order, and the numbers of blank ones in between."""

    file: Path
    lines: tuple[Line, ...]
    blank: tuple[int, ...]

    def by_id(self) -> dict[str, Line]:
        """Map question_ids, as text, to lines; the last line of an id counts."""
        return {str(line.id): line for line in self.lines}

    def notes(self, known: Sequence[str]) -> list[str]:
        """Notes on oddities of the file, given the annotated question_ids."""
        annotated, by_id = set(known), self.by_id()
        counted = [line for name, line in by_id.items() if name in annotated]
        found: list[tuple[Sequence[int], str]] = [
            (self.blank, "blank, passed over"),
            (
                [line.number for line in self.lines if by_id[str(line.id)] is not line],
                "of a question_id that comes again below, where the last line counts",
            ),
            (
                [line.number for line in self.lines if str(line.id) not in annotated],
                "of a question_id that is not annotated, ignored",
            ),
            (
                [line.number for line in counted if line.text is None],
                "with null for a text: no answer, and wrong",
            ),
            (
                [line.number for line in counted if line.text is not None and line.answer is None],
                "with a tool's message of a failure for a text: no answer, and wrong",
            ),
        ]
        notes = [
            f"{self.file}: {len(numbers)} line{'s' if len(numbers) > 1 else ''} {what}: {some_of([*map(str, numbers)])}"
            for numbers, what in found
            if numbers
        ]
        if missing := [name for name in known if name not in by_id]:
            notes.append(
                f"{self.file}: {len(missing)} of {len(known)} annotated questions have no line and count as wrong: "
                f"{some_of(missing)}"
            )
        return notes


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and the number of others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def is_failure(text: str) -> bool:
    """Return whether a text is the message that VLMEvalKit or lmms-eval writes for a failed request."""
    return _FAILURE.fullmatch(text.strip()) is not None


def failures_note(count: int) -> str:
    """A note on failure messages that a tool scored as answers."""
    verb = "is" if count == 1 else "are"
    return f"{count} of the answers {verb} a message of a failed request, and {verb} scored as if the model had said it"


@contextmanager
def at_most_shown(file: Path) -> Iterator[list[PolymergeError]]:
    """Collect the problems of one file like `collecting`, and report at most MOST_SHOWN of them."""
    with collecting() as found:
        try:
            yield found
        except PolymergeError as error:
            found.extend(error.problems)
        if more := len(found[MOST_SHOWN:]):
            found[MOST_SHOWN:] = [RecipeError(f"{file}: {more} more problems like these")]


_UTF8 = "Save it as UTF-8."
_WRONG = "Remove the line or correct it; null stands for no answer."
_CUT = "It is the last line and may have been cut off: remove it, or finish the run."


def read_predictions(file: Path) -> Predictions:
    """Read a file of predictions; broken lines are refused.

    A line must be an object with a question_id (text or whole number) and a text; null stands for no answer.
    """
    found: list[Line] = []
    blank: list[int] = []
    with at_most_shown(file):
        text = read_text(file, encoding="utf-8-sig", most=RECORDS_BYTES, error=RecipeError, then=_UTF8)
        if text.lstrip().startswith("["):
            raise RecipeError(
                f"{file}: is a JSON array, not a line of JSON for each prediction. Write one object a line."
            )
        lines = text.split("\n")  # the last of which is empty, but for a file that was cut off
        for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
            if not line.strip():
                blank.append(number)
                continue
            with collecting():
                where, then = f"{file}:{number}", _CUT if number == len(lines) else _WRONG
                fields = parse_json(line, where, _Fields, error=RecipeError, then=then)
                found.append(Line(where, number, fields.question_id, fields.text, fields.prompt))
    return Predictions(file, tuple(found), tuple(blank))
