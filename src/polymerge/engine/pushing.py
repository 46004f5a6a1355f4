"""Upload an output to the hub: checked, as it was written, and with a card that is complete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, field

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub_api import hub_errors, unreachable
from polymerge.checkpoints.identity import sampled_digest
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.tensor_info import listed
from polymerge.engine.licences import Stated, card_metadata, conflicts, licence_lines, stated_in
from polymerge.engine.model_card import read_card, with_section
from polymerge.engine.provenance import RECORD
from polymerge.engine.verify import verify
from polymerge.errors import OutputError, PolymergeError, RecipeError, collecting, refuse, refuse_if_any
from polymerge.paths import given_path

__all__ = ["Pushed", "push"]

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT: Final = re.compile(rf"({_ID.pattern})@([0-9a-f]{{40,64}})")
_CARD: Final = "README.md"
_NOT_COMPARED: Final = frozenset((_CARD, RECORD))
"""The card is its owner's to write, and the record is what all else is compared with."""


@dataclass(frozen=True)
class Pushed:
    """An output on the hub.

    files  how many were uploaded
    notes  what its owner should know
    """

    url: str
    commit: str
    private: bool
    files: int
    notes: tuple[str, ...]


class _Input(Struct):
    source: str
    pinned: str = ""


class _Output(Struct):
    sampled: dict[str, str] = field(default_factory=dict)


class _Stage(Struct):
    name: str = ""
    inputs: list[_Input] = field(default_factory=list)


class _Record(Struct):
    """What polymerge.json says that a card has to tell."""

    inputs: list[_Input] = field(default_factory=list)
    stages: list[_Stage] = field(default_factory=list)
    output: _Output = field(default_factory=_Output)


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    licence: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    force: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
) -> Pushed:
    """Upload an output to the hub in one commit, after `verify`.

    The card that is uploaded states the licences of all inputs, by their cards on the hub, and what was measured; the
    folder itself is left as it is.

    repository  owner/name, which is made if it does not exist
    private     whether it is to be private; one that exists and is public is refused then
    licence     the licence of the output, for its card
    measured    rows of results, such as those of `Results.rows()`
    force       upload what polymerge did not write, or what was changed since
    check, trust_remote_code   as for `merge`

    raises Refused with what is wrong with folder and repository, OutputError if the output does not pass its check or
    the hub does not take it.
    """
    path = given_path(folder)
    with collecting(needed=True):
        if not _ID.fullmatch(repository):
            refuse(RecipeError(f"{repository}: no hub repository can have that name. Write owner/name"))
        record = _record_in(path, force)
    if check:
        found = verify(path, trust_remote_code=trust_remote_code)
        if not found.passed:
            failed = "; ".join(f"{one.check}: {one.detail}" for one in found.findings if one.passed is False)
            raise OutputError(f"{path}: does not pass its check and was not uploaded: {failed}")
    stated = [_stated(entry) for entry in _inputs(record)]
    card, notes = _card(path, repository, stated, licence, measured)
    with _told(repository):
        return _upload(path, repository, private, card, notes)


def _record_in(path: Path, force: bool) -> _Record:
    """The record of an output that is as it was written; raises Refused with all that is not."""
    if not path.is_dir():
        raise RecipeError(f"{path}: is no folder. Name the folder of an output")
    file = path / RECORD
    if not file.is_file():
        if not force:
            raise RecipeError(
                f"{path}: has no {RECORD}, so polymerge did not write it. Name the folder of an output, or say `force`"
            )
        return _Record()
    record = read_json(file, _Record, most=RECORDS_BYTES, error=RecipeError, then="Only a whole one tells its inputs.")
    if not force:
        refuse_if_any(_changes(path, record.output.sampled))
    return record


def _changes(path: Path, known: Mapping[str, str]) -> Iterator[PolymergeError]:
    """An error for each way in which a folder is not as it was written."""
    if not known:
        yield RecipeError(
            f"{path}: its {RECORD} has no digests of the files that were written, as older ones and those in stores, "
            "so nothing tells whether they were changed. Merge again, or say `force`"
        )
        return
    written = known.keys() - _NOT_COMPARED
    here = {file.relative_to(path).as_posix() for file in _files(path)} - _NOT_COMPARED
    wrong = {
        "missing": written - here,
        "new": here - written,
        "changed": {name for name in here & written if sampled_digest(path / name) != known[name]},
    }
    for what, names in wrong.items():
        if names:
            are = "is" if len(names) == 1 else "are"
            yield RecipeError(
                f"{path}: {listed(sorted(names))} {are} {what} since it was written. Merge again, or say `force`"
            )


def _files(path: Path) -> list[Path]:
    """Every file of a folder but hidden ones, which are no part of an output."""
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _inputs(record: _Record) -> list[_Input]:
    """The inputs of a record and of its stages, each once, without the outputs of stages."""
    made = {stage.name for stage in record.stages}
    every = [entry for stage in record.stages for entry in stage.inputs] + record.inputs
    return list({entry.pinned or entry.source: entry for entry in every if entry.source not in made}.values())


def _stated(entry: _Input) -> Stated:
    """What the card of an input says of its licence, from its folder or from the hub at the commit that was merged."""
    base, _ = split_source(entry.pinned or entry.source)
    if found := _COMMIT.fullmatch(base):
        return stated_in(entry.source, _card_on_the_hub(found[1], found[2]))
    folder = given_path(base)
    return stated_in(entry.source, read_card((folder if folder.is_dir() else folder.parent) / _CARD, of=base))


def _card_on_the_hub(repository: str, commit: str) -> str | None:
    """A card on the hub; empty if the repository has none, None if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with hub_errors(repository, commit, _CARD):
            try:
                return read_card(Path(hf_hub_download(repository, _CARD, revision=commit)))
            except RemoteEntryNotFoundError:
                return ""
    except PolymergeError:
        return None  # which the card says


def _card(
    path: Path, repository: str, stated: Sequence[Stated], licence: str | None, measured: Sequence[Mapping[str, Any]]
) -> tuple[str, tuple[str, ...]]:
    """The card to upload, and what to tell its owner."""
    notes = list[str]()
    text = read_card(path / _CARD) or f"---\ntags:\n- polymerge\n---\n\n# {repository.partition('/')[2]}\n"
    sections = {
        "licences": licence_lines(stated) if stated else [],
        "measured": _measured(measured) if measured else [],
    }
    for name, lines in sections.items():
        changed = with_section(text, name, lines) if lines else text
        if changed is None:
            notes.append(f"{_CARD} has no place for {name} any more, and is uploaded without what is known of them")
        text = changed or text
    if licence is not None:
        text = _with_licence(text, licence)
    elif "license" not in card_metadata(text):
        notes.append("the card states no licence: say `licence` if you know which one the merge may have")
    notes += dict.fromkeys(conflicts(stated))
    notes += [f"{one.model}: its card could not be read" for one in stated if not one.seen]
    return text, tuple(notes)


def _with_licence(card: str, licence: str) -> str:
    """A card whose metadata name a licence."""
    if not card_metadata(card):
        return f"---\nlicense: {licence}\n---\n\n{card}"
    front, end, rest = card.removeprefix("---").partition("\n---")
    kept = [line for line in front.split("\n") if not line.startswith("license:")]
    return "---" + "\n".join([*kept, f"license: {licence}"]) + end + rest


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of results; of other models, too, if rows of theirs are given to compare with."""
    lines = ["| model | task | score | questions |", "|---|---|---:|---:|"]
    for row in rows:
        score = "none" if row["score"] is None else f"{row['score']:.2f}{' %' if row['unit'] == '%' else ''}"
        cells = (str(row["model"]), str(row["task"]), score, str(row["questions"]))
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |")
    return [*lines, "", "Measured by `polymerge evaluate`."]


def _upload(path: Path, repository: str, private: bool, card: str, notes: tuple[str, ...]) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        there = api.repo_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.repo_info(repository)
    if private and not there.private:
        raise RecipeError(f"{repository}: exists and is public. Name another one, or say `public` if that is meant")
    files = [file for file in _files(path) if file != path / _CARD]
    operations = [CommitOperationAdd(file.relative_to(path).as_posix(), str(file)) for file in files]
    operations.append(CommitOperationAdd(_CARD, card.encode()))
    made = api.create_commit(repository, operations, commit_message="Upload a merge made with polymerge")
    return Pushed(f"{api.endpoint}/{repository}", str(made.oid), bool(there.private), len(operations), notes)


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Raise errors of the hub while something is uploaded as ours."""
    from huggingface_hub import constants, errors

    try:
        yield
    except PolymergeError:
        raise
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RecipeError(
                f"{repository}: the hub does not let you write there. Log in with `hf auth login`, or set HF_TOKEN, "
                "with a token that may write"
            ) from None
        raise OutputError(f"{repository}: the hub did not take it: {_line(error)}. Try again") from None
    except (errors.OfflineModeIsEnabled, *unreachable()) as error:
        if constants.HF_HUB_OFFLINE:
            raise RecipeError(f"{repository}: HF_HUB_OFFLINE is set. Unset it to upload") from None
        raise OutputError(f"{repository}: the hub cannot be reached ({_line(error)}). Try again") from None
    except (ValueError, OSError, RuntimeError) as error:  # of metadata, of a file, or of the storage for large ones
        raise OutputError(f"{repository}: was not uploaded: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
