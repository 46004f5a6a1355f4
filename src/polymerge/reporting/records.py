"""Find and read the records written by merge, search, overlap, evaluate, knockout and ablate."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from msgspec import Meta

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import checked, parse_json, read_text
from polymerge.errors import PolymergeError, RecipeError, refuse
from polymerge.paths import given_path

__all__ = ["AGAIN", "KINDS", "Count", "Ends", "Kind", "Number", "Source", "read_sources"]

T = TypeVar("T")

Number = int | float
Count = Annotated[int, Meta(ge=0)]
Ends = tuple[Number, Number] | None
"""The ends of an interval, null if there is none."""

AGAIN: Final = "Write the file again, or leave it out."


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    name, file  its name, and its file in the folder of a run
    command     the command that writes it
    keys        members that together identify it
    """

    name: str
    file: str
    command: str
    keys: frozenset[str]


KINDS: Final = (
    Kind("merge", "polymerge.json", "polymerge merge", frozenset({"plan_hash", "recipe", "inputs", "output"})),
    Kind("search", "search.json", "polymerge search", frozenset({"vary", "values", "chosen"})),
    Kind("overlap", "overlap.json", "polymerge overlap --json", frozenset({"density", "tensors", "places", "totals"})),
    Kind("scores", "results.json", "polymerge evaluate", frozenset({"format", "tool", "model", "tasks"})),
    Kind("knockout", "knockout.json", "polymerge knockout", frozenset({"replace", "baseline", "cells", "summary"})),
    Kind("ablation", "ablation.json", "polymerge ablate", frozenset({"template", "baseline", "ranges"})),
)
"""Every kind, in the order of the page."""

_FEW = 5
_LARGEST: Final = 1e300
"""The largest number that is shown: sums and squares of such are numbers, too."""


@dataclass(frozen=True)
class Source:
    """A record to show: its kind, its label on the page, its file, and its JSON object."""

    kind: str
    label: str
    file: Path
    data: Mapping[str, Any]

    def read(self, type: type[T]) -> T:  # noqa: A002 (as msgspec names it)
        """Convert the record to a struct.

        raises RecipeError with the file and the missing or invalid member, Refused for several.
        """
        return checked(self.data, type, str(self.file), error=RecipeError, then=AGAIN)

    def wrong(self, said: str) -> RecipeError:
        """An error about this record, with its file."""
        return RecipeError(f"{self.file}: {said}. {AGAIN}")


def read_sources(sources: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Read every record in the given folders and files, without duplicates.

    Refuses paths that do not exist, and files that are not JSON objects of finite numbers or not of a known kind.
    """
    files: dict[Path, tuple[Path, Kind | None]] = {}
    for source in sources:
        path = given_path(source)
        if path.is_dir():
            held = [(path / kind.file, kind) for kind in KINDS if (path / kind.file).is_file()]
            if not held:
                refuse(RecipeError(f"{path}: holds none of {_looked_for()}. Name the folder of a run, or a file"))
            for file, its in held:
                files.setdefault(file.resolve(), (file, its))
        elif path.is_file():
            kind = next((kind for kind in KINDS if kind.file == path.name), None)
            files.setdefault(path.resolve(), (path, kind))
        else:
            refuse(RecipeError(f"{path}: there is no such folder or file. Check the path"))
    found = []
    for file, kind in files.values():
        try:
            found.append(_read(file, kind))
        except PolymergeError as error:
            refuse(error)
    return list(_labelled(found))


def _read(file: Path, expected: Kind | None) -> Source:
    text = read_text(file, encoding="utf-8-sig", most=RECORDS_BYTES, error=RecipeError, then=AGAIN)
    data = parse_json(text, str(file), dict[str, Any], error=RecipeError, then=AGAIN)
    infinite = list(islice(_not_finite(data), _FEW + 1))
    if infinite:
        more = " and more" if len(infinite) > _FEW else ""
        raise RecipeError(f"{file}: not a finite number at {', '.join(infinite[:_FEW])}{more}. {AGAIN}")
    kind = next((kind for kind in KINDS if kind.keys <= data.keys()), None)
    wanted = expected or kind
    if wanted is None:
        raise RecipeError(f"{file}: is of no known kind. Known are {_looked_for()}")
    if kind != wanted:
        lacking = ", ".join(sorted(wanted.keys - data.keys()))
        raise RecipeError(f"{file}: is not what {wanted.command} writes: it lacks {lacking}. {AGAIN}")
    return Source(kind.name, file.resolve().parent.name if file.name == kind.file else file.stem, file, data)


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    """The locations of NaN, infinity and what is too large to be added up."""
    if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        yield where
    elif isinstance(value, dict):
        for name, member in value.items():
            yield from _not_finite(member, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for place, member in enumerate(value):
            yield from _not_finite(member, f"{where}[{place}]")


def _labelled(found: Sequence[Source]) -> Iterator[Source]:
    """Sources in the order of their kinds, with labels that are unique within a kind."""
    times = Counter((one.kind, one.label) for one in found)
    for kind in KINDS:
        for one in found:
            if one.kind == kind.name:
                alike = times[one.kind, one.label] > 1
                label = str(one.file.parent if one.file.name == kind.file else one.file) if alike else one.label
                yield Source(one.kind, label, one.file, one.data)


def _looked_for() -> str:
    return ", ".join(f"{kind.file} ({kind.command})" for kind in KINDS)
