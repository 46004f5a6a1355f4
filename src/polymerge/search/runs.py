"""The folder of a search: what was asked, every answer that was given, and what was chosen."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, PolymergeError, RecipeError
from polymerge.generation.log import AnswerLog
from polymerge.generation.prompts import Prompt, materialise

__all__ = ["Run", "digest_of", "open_run"]

_SETTINGS = "run.json"
_CANDIDATES = "candidates"


@dataclass(frozen=True)
class Run:
    """A folder that keeps what a search generates, so that it can be stopped, resumed and judged again.

    run.json                        what the answers depend on
    prompts.jsonl                   the prompts that were drawn
    candidates/NAME/answers.jsonl   what each candidate answered, as it is generated
    search.json, search.png, search.svg   the outcome
    """

    folder: Path

    def log(self, candidate: str) -> AnswerLog:
        """The answers of a candidate, such as `weight-0.3`."""
        folder = self.folder / _CANDIDATES / candidate
        folder.mkdir(parents=True, exist_ok=True)
        return AnswerLog(folder / "answers.jsonl")

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


def open_run(folder: Path, settings: Mapping[str, Any], *, force: bool = False) -> Run:
    """Begin a run, or go on with one whose answers depend on the same settings.

    force  drop what a run with other settings left in the folder

    raises RecipeError where the folder holds a run with other settings, OutputError where it holds something else.
    """
    asked = json.loads(json.dumps(settings))
    path = folder / _SETTINGS
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not the folder of a search. Name another one")
    if path.is_file():
        try:
            _refuse_others(folder, path, asked)
        except PolymergeError:
            if not force:
                raise
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    run.write_json(_SETTINGS, asked)
    return run


def digest_of(prompts: Sequence[Prompt]) -> str:
    """sha256 of prompts; of an image that is in memory, where it is from."""
    text = json.dumps([[one.id, one.text, [str(image) for image in one.images], one.answer] for one in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_others(folder: Path, path: Path, asked: Mapping[str, Any]) -> None:
    try:
        had = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(had, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}. --force begins the run anew") from None
    differ = [
        f"{name} was {_short(had.get(name))}, now {_short(asked.get(name))}"
        for name in dict.fromkeys((*had, *asked))
        if had.get(name) != asked.get(name)
    ]
    if differ:
        raise RecipeError(
            f"{folder}: holds a search with other settings: {'; '.join(differ)}. Its answers are no answers to these: "
            "name another folder, or say --force to drop them"
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
