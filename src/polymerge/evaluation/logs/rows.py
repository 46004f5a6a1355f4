"""Rows of a file of answers, and the documents that they make; what is wrong with them is gathered, not raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymerge.errors import RecipeError

__all__ = ["BROKEN", "Complaints", "Documents", "Row", "documents", "json_lines", "json_value", "kept"]

Row = tuple[str, Mapping[str, Any]]
"""Where it stands in the file, as in `line 3`, and its fields."""

BROKEN = object()
"""Stands for what could not be read."""

_SAME_FIELD = frozenset({"mme_percetion_score", "mme_perception_score"})
"""lmms-eval wrote the first spelling for years."""


@dataclass(frozen=True)
class Complaints:
    """What is wrong with one file, gathered by kind, so that one broken run does not fill the screen."""

    file: Path
    places: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, what: str, place: str, then: str) -> None:
        """Note one thing that is wrong, where in the file, and what to do."""
        self.places.setdefault((what, then), []).append(place)

    def errors(self) -> Iterator[RecipeError]:
        """One error per kind, with the first few places."""
        for (what, then), places in self.places.items():
            shown = ", ".join(place for place in places[:3] if place)
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            yield RecipeError(f"{self.file}: {f'{shown}{more}: ' if shown else ''}{what}. {then}")


@dataclass(frozen=True)
class Documents:
    """What one candidate answered."""

    answers: Mapping[int | str, str]
    score: float | None = None
    """Mean of the tool's own score per document, where it has exactly one."""
    notes: tuple[str, ...] = ()


def json_value(text: bytes, place: str, complaints: Complaints) -> Any:
    """What a JSON text says; BROKEN, and a complaint, where it is none."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        what = f"not UTF-8, byte {error.start} is 0x{text[error.start]:02x}"
    except json.JSONDecodeError as error:
        what = "not JSON" if place else f"not JSON, {error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        what = "JSON that is nested too deeply to be read"
    except ValueError as error:  # numbers with thousands of digits
        what = f"not readable, {error}"
    complaints.add(what, place, "Generate these answers again, or mend the file.")
    return BROKEN


def json_lines(complaints: Complaints) -> Iterator[Row]:
    """The objects of a file that has one on each line."""
    with complaints.file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                value = json_value(line.rstrip(b"\r\n"), f"line {number}", complaints)
                if isinstance(value, dict):
                    yield f"line {number}", value
                elif value is not BROKEN:
                    complaints.add("no JSON object", f"line {number}", "Each line is one object.")


def kept(rows: Iterable[Row], keep: str | None, complaints: Complaints) -> list[Row]:
    """The rows that have a field; all where none is asked for."""
    every = list(rows)
    if not every and not complaints.places:
        complaints.add("holds no documents", "", "Generate these answers again.")
    if keep is None:
        return every
    spellings = _SAME_FIELD if keep in _SAME_FIELD else {keep}
    found = [row for row in every if spellings & row[1].keys()]
    if every and not found:
        there = ", ".join(sorted({str(name) for _, fields in every for name in fields}))
        complaints.add(
            f"none of {len(every)} documents has '{keep}'", "", f"Its fields: {there}. Is it the task that you mean?"
        )
    return found


def documents(
    rows: Iterable[Row],
    identity: str,
    answer: Callable[[Mapping[str, Any]], str],
    complaints: Complaints,
    *,
    repeats: bool = False,
) -> dict[int | str, str]:
    """The answer of each document.

    identity  the field that tells documents apart, a whole number or a text; no two may have the same
    answer    takes a row's fields and gives its answer, or raises ValueError that says why there is none
    repeats   two may have the same identity after all where their answers are the same
    """
    found: dict[int | str, str] = {}
    places: dict[str, str] = {}
    for place, fields in rows:
        number = fields.get(identity)
        if not isinstance(number, int | str) or isinstance(number, bool) or number == "":
            complaints.add(f"no '{identity}' that is a whole number or a text", place, "Documents are aligned by it.")
            continue
        try:
            text = answer(fields)
            text.encode()
        except UnicodeEncodeError:
            complaints.add("half a surrogate pair in the answer", f"{identity} {number} ({place})", "Mend the file.")
        except ValueError as error:
            complaints.add(str(error), f"{identity} {number} ({place})", "Generate these answers again.")
        else:
            before = places.setdefault(str(number), place)
            if before is place or (repeats and found.get(number) == text):
                found[number] = text
                continue
            complaints.add(
                f"the same '{identity}' twice",
                f"{identity} {number} ({before} and {place})",
                "Did two runs write into one file? Keep the lines of one.",
            )
    return found
