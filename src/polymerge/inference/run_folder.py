"""The folder of a search: what was asked, every answer that was given, and what was chosen."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, PolymergeError, RecipeError
from polymerge.inference.answer_log import AnswerLog
from polymerge.inference.prompts import Prompt, materialise

__all__ = ["SETTINGS", "Run", "alone_in", "open_run", "read_settings"]

SETTINGS = "run.json"
_CANDIDATES = "candidates"
_OWN = ("prompts.jsonl", "search.json", "search.png", "search.svg", "optuna.journal", "optuna.journal.lock")
_TOLD = 6


@dataclass(frozen=True)
class Run:
    """A folder that keeps what a search generates, so that it can be stopped, resumed and judged again.

    run.json                        what the answers depend on
    prompts.jsonl                   the prompts that were drawn
    candidates/NAME/answers.jsonl   what each candidate answered, as it is generated
    search.json, search.png, search.svg   the outcome

    An evaluation has its tasks in place of the candidates, in `parts`.
    """

    folder: Path
    parts: str = _CANDIDATES

    def log(self, name: str) -> AnswerLog:
        """The answers of a candidate, such as `weight-0.3`, or to a task."""
        return AnswerLog(self.part(name) / "answers.jsonl")

    def part(self, name: str) -> Path:
        """The folder of a candidate or task, made where it is not there."""
        folder = self.folder / self.parts / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a file of the run at once: what was there before, or all of the new."""
        path = self.folder / name
        beside = path.with_name(f".{name}.new")
        beside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path

    def keep_prompts(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """Write down the prompts, and the images of those that are in memory; the prompts with paths only."""
        placed = tuple(materialise(prompts, self.folder / "images"))
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in placed]
        (self.folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        return placed


def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    force: bool = False,
    what: str = "a search",
    parts: str = _CANDIDATES,
) -> Run:
    """Begin a run, or go on with one whose answers depend on the same settings.

    force  drop what a run with other settings left in the folder
    what   is run, as messages say it
    parts  the folder of its parts

    raises RecipeError where the folder holds a run with other settings, OutputError where it holds something else.
    """
    asked = json.loads(json.dumps(settings))
    path = folder / SETTINGS
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not the folder of {what}. Name another one")
    if path.is_file():
        try:
            _refuse_others(folder, asked, what)
        except PolymergeError:
            if any(folder.glob(f"{parts}/*/answers.jsonl")):
                if not force:
                    raise
                _drop(folder, parts)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, parts)
    run.write_json(SETTINGS, asked)
    return run


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a folder holds, None where it holds none; raises OutputError for a broken file."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        had = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(had, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}. --force begins the run anew") from None
    return had


def _drop(folder: Path, parts: str) -> None:
    """Remove what a run has left, and nothing else that may lie in its folder."""
    shutil.rmtree(folder / parts, ignore_errors=True)
    shutil.rmtree(folder / "images", ignore_errors=True)
    for name in _OWN:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def alone_in(run: Run) -> Iterator[None]:
    """Keep other processes out of a run's folder; raises OutputError where one is in it."""
    descriptor = os.open(run.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{run.folder}: another process is at work in it. Wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _refuse_others(folder: Path, asked: Mapping[str, Any], what: str) -> None:
    had = read_settings(folder)
    before, now = dict(_leaves(had)), dict(_leaves(asked))
    differ = [
        f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise RecipeError(
            f"{folder}: holds {what} with other settings: {'; '.join(differ[:_TOLD])}"
            f"{f' and {len(differ) - _TOLD} more' if len(differ) > _TOLD else ''}. Its answers are no answers to "
            "these: name another folder, or say --force to drop them"
        )


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every plain value inside some settings, with its path."""
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _leaves(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inside, dict | list) for inside in value):
        for place, inside in enumerate(value):
            yield from _leaves(inside, f"{name}[{place}]")
    else:
        yield name, value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
