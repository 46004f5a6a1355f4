"""Check that the inputs at hand are those that an output was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, field

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.identity import file_digest, sampled_digest
from polymerge.checkpoints.json_objects import checked, read_json
from polymerge.checkpoints.prefetch import fetch_all
from polymerge.checkpoints.tensor_info import listed
from polymerge.engine.findings import Finding, Verification
from polymerge.engine.provenance import RECORD
from polymerge.errors import PolymergeError, RecipeError
from polymerge.paths import given_path

__all__ = ["verify_inputs"]

_AGAIN: Final = "Only a whole one tells its inputs."
_ADAPTER: Final = "+"
"""Begins the names of files that lie in an input's adapter."""


class _Input(Struct):
    """What polymerge.json says of an input."""

    label: str
    source: str
    sha256: dict[str, str]
    sampled: dict[str, str] = field(default_factory=dict)
    pinned: str = ""


class _Record(Struct):
    inputs: list[_Input]
    stages: list[dict[str, Any]] = field(default_factory=list)


def verify_inputs(folder: str | Path, *, sha256: bool = False) -> Verification:
    """Check that the models at hand are those that an output's polymerge.json names, file by file.

    A file is the same if samples of its content are (`checkpoints.identity.sampled_digest`), which takes milliseconds.
    Models are looked for under the names that the recipe gave them, from the current folder; those of the hub at the
    commit that was merged, and they are downloaded where they are not here.

    sha256  compare the digests of whole files as well, where the record has them

    raises RecipeError if there is no polymerge.json, or it cannot be read; what is wrong with inputs are findings.
    """
    path = given_path(folder)
    record = path / RECORD
    if not record.is_file():
        raise RecipeError(f"{path}: has no {RECORD}, so nothing says what it was made of. Name the folder of an output")
    said = read_json(record, _Record, most=RECORDS_BYTES, error=RecipeError, then=_AGAIN)
    inputs = [entry for stage in said.stages for entry in _inputs_of(stage)] + said.inputs
    made = {str(stage.get("name")) for stage in said.stages}
    return Verification(path, tuple(_finding(entry, made, sha256) for entry in inputs))


def _inputs_of(stage: Mapping[str, Any]) -> list[_Input]:
    return checked(stage, _Record, f"{RECORD}: stages", error=RecipeError, then=_AGAIN).inputs


def _finding(entry: _Input, made: set[str], sha256: bool) -> Finding:
    """What is to be said of an input."""
    if entry.source in made:
        return Finding(entry.label, None, "the output of an earlier stage, which is not kept")
    wrong, files, compared = [], dict.fromkeys([*entry.sampled, *entry.sha256]), 0
    try:
        for name, file in _places(entry, files).items():
            told = [(sampled_digest, entry.sampled.get(name))]
            told += [(file_digest, entry.sha256.get(name))] if sha256 or not entry.sampled else []
            known = [(digest, said) for digest, said in told if said is not None]
            compared += bool(known)
            if any(digest(file) != said for digest, said in known):
                wrong.append(name)
    except PolymergeError as error:
        return Finding(entry.label, False, "; ".join(map(str, error.problems)))
    if wrong:
        return Finding(
            entry.label, False,
            f"{entry.source}: {listed(wrong)} {'is not what was' if len(wrong) == 1 else 'are not what were'} merged",
        )  # fmt: skip
    if not compared:
        return Finding(entry.label, None, f"{entry.source}: the record has no digests of its files")
    how = "sha256 of whole files" if sha256 and entry.sha256.keys() >= files.keys() else "samples of the content"
    return Finding(entry.label, True, f"{entry.source}: {compared} file(s), by {how}")


def _places(entry: _Input, names: Iterable[str]) -> dict[str, Path]:
    """Where the files of an input are now; raises CheckpointError or RecipeError where one cannot be had."""
    base, adapter = split_source(entry.pinned or entry.source)
    folders = {"": locate(base), _ADAPTER: locate(adapter) if adapter else Path()}
    found = {}
    for name in names:
        mark = _ADAPTER if name.startswith(_ADAPTER) else ""
        folder = folders[mark] if folders[mark].is_dir() else folders[mark].parent
        found[name] = folder / name.removeprefix(mark)
    fetch_all(found.values())
    return found
