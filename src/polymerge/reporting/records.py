"""Find what a folder or file holds: the records that merge, search, overlap, evaluate, knockout and ablate write."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.json_objects import read_json
from polymerge.errors import PolymergeError, RecipeError
from polymerge.reporting.fields import kind_of, not_finite

__all__ = ["KINDS", "Kind", "Source", "read_sources"]


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    name, file  what it is called, and its file in the folder of a run
    command     that writes it
    keys        members that no other kind has all of
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
"""Every kind, in the order in which the page shows them."""

_FEW = 5


@dataclass(frozen=True)
class Source:
    """One record that is shown: its kind, what it is called on the page, its file, and what that holds."""

    kind: str
    label: str
    file: Path
    data: Mapping[str, Any]


def read_sources(sources: Sequence[str | os.PathLike[str]], problems: list[PolymergeError]) -> list[Source]:
    """Read every record of some folders and files; one that is named twice is read once.

    What cannot be read is noted in `problems`.
    """
    files: dict[Path, tuple[Path, Kind | None]] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            held = [(path / kind.file, kind) for kind in KINDS if (path / kind.file).is_file()]
            if not held:
                problems.append(
                    RecipeError(f"{path}: holds none of {_looked_for()}. Name the folder of a run, or a file")
                )
            for file, its in held:
                files.setdefault(file.resolve(), (file, its))
        elif path.is_file():
            kind = next((kind for kind in KINDS if kind.file == path.name), None)
            files.setdefault(path.resolve(), (path, kind))
        else:
            problems.append(RecipeError(f"{path}: there is no such folder or file. Check the path"))
    found = [one for file, kind in files.values() if (one := _read(file, kind, problems)) is not None]
    return list(_labelled(found))


def _read(file: Path, expected: Kind | None, problems: list[PolymergeError]) -> Source | None:
    try:
        data = read_json(file, Any, encoding="utf-8-sig", error=RecipeError, then="Write it again, or leave it out")
    except RecipeError as error:
        problems.append(error)
        return None
    if not isinstance(data, dict):
        problems.append(RecipeError(f"{file}: holds {kind_of(data)}, not an object. Name what a run has written"))
        return None
    infinite = list(islice(not_finite(data), _FEW + 1))
    if infinite:
        more = " and more" if len(infinite) > _FEW else ""
        problems.append(RecipeError(f"{file}: not a finite number at {', '.join(infinite[:_FEW])}{more}"))
        return None
    kind = next((kind for kind in KINDS if kind.keys <= data.keys()), None)
    if kind is None or (expected is not None and kind != expected):
        wanted = expected or kind
        if wanted is not None:
            lacking = ", ".join(sorted(wanted.keys - data.keys()))
            problems.append(RecipeError(f"{file}: is not what {wanted.command} writes: it lacks {lacking}"))
        else:
            problems.append(RecipeError(f"{file}: is of no known kind. Known are {_looked_for()}"))
        return None
    return Source(kind.name, file.resolve().parent.name if file.name == kind.file else file.stem, file, data)


def _labelled(found: Sequence[Source]) -> Iterator[Source]:
    """Sources whose labels tell them apart within their kind."""
    times = Counter((one.kind, one.label) for one in found)
    for kind in KINDS:
        for one in found:
            if one.kind == kind.name:
                alike = times[one.kind, one.label] > 1
                label = str(one.file.parent if one.file.name == kind.file else one.file) if alike else one.label
                yield Source(one.kind, label, one.file, one.data)


def _looked_for() -> str:
    return ", ".join(f"{kind.file} ({kind.command})" for kind in KINDS)
