"""The folder of a run: settings that its answers depend on, prompts, and all answers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymerge.checkpoints.bounds import IMAGE_BYTES, RECORDS_BYTES, lines_of, open_regular, read_bounded
from polymerge.checkpoints.identity import content_digest
from polymerge.checkpoints.json_objects import parse_json
from polymerge.errors import OutputError, PolymergeError, RecipeError, collecting, refuse
from polymerge.inference.images import ImageSource, StoredImage, encode_png
from polymerge.inference.json_lines import json_lines
from polymerge.inference.prompts import Prompt, materialise
from polymerge.planning import Plan

__all__ = [
    "SETTINGS",
    "AnswerLog",
    "Run",
    "alone_in",
    "identity_of_inputs",
    "identity_of_prompts",
    "open_run",
    "read_settings",
]

SETTINGS = "run.json"
_CANDIDATES = "candidates"
_TOLD = 6
_ANEW = "Begin the run anew with `force`."


@dataclass(frozen=True)
class Run:
    """A folder that stores models' answers, so that a run can be interrupted, resumed and judged again.

    run.json                        the settings that answers depend on
    prompts.jsonl                   the sampled prompts
    candidates/NAME/answers.jsonl   each plan's answers, as they are generated
    search.json and others          the outcome

    An evaluation has tasks instead of candidates, in `parts`.
    """

    folder: Path
    parts: str = _CANDIDATES

    def log(self, name: str) -> AnswerLog:
        """The answers of a candidate, such as `weight-0.3`, or to a task."""
        return AnswerLog(self.part(name) / "answers.jsonl")

    def part(self, name: str) -> Path:
        """The folder of a candidate or task, created if it does not exist."""
        folder = self.folder / self.parts / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a file of the run atomically."""
        path = self.folder / name
        beside = path.with_name(f".{name}.new")
        beside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path

    def keep_prompts(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """Save the prompts, and their images that are in memory; returns the prompts with paths only."""
        placed = tuple(materialise(prompts, self.folder / "images"))
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in placed]
        (self.folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        return placed


class AnswerLog:
    """Answers by prompt id in an append-only file: answers from before a crash are not generated again.

    One per line: `{"id": 7, "answer": "two"}`; 7 and "7" are different prompts. Only one process at a time may append.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> dict[int | str, str]:
        """The answers of all complete lines; empty if there is no file.

        A last line without a line feed is dropped: writing it was interrupted.

        raises RecipeError, or Refused for several: a broken line, an id with two answers.
        """
        try:
            with open_regular(self.path) as stream:
                return self._answers(line for line in lines_of(stream) if line.endswith(b"\n"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{self.path}: the answers cannot be read: {error.strerror or error}") from None

    def _answers(self, lines: Iterable[bytes]) -> dict[int | str, str]:
        answers: dict[int | str, str] = {}
        first: dict[int | str, int] = {}
        with collecting():
            for number, value in json_lines(lines, str(self.path)):
                with collecting() as wrong:
                    name, answer = _pair(value, f"{self.path}: line {number}")
                if wrong:
                    continue
                if answers.setdefault(name, answer) != answer:
                    refuse(
                        RecipeError(
                            f"{self.path}: line {number}: {name!r} is answered {answer!r}, and {answers[name]!r} in "
                            f"line {first[name]}. Take one of the two out."
                        )
                    )
                first.setdefault(name, number)
        return answers

    def append(self, pairs: Iterable[tuple[int | str, str]]) -> None:
        """Append answers in a single write and flush them to disk, after removing an incomplete last line.

        raises OutputError if the file cannot be written.
        """
        lines = [json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n" for name, answer in pairs]
        if not lines:
            return
        data = "".join(lines).encode("utf-8")
        try:
            self._drop_torn_line()
            with self.path.open("ab", buffering=0) as file:
                written = file.write(data)
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: answers cannot be written: {error.strerror or error}") from None
        if written != len(data):
            raise OutputError(f"{self.path}: {written} of {len(data)} bytes of answers were written: is the disk full?")

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def _pair(value: object, where: str) -> tuple[int | str, str]:
    """Parse the id and the answer of a line."""
    if not isinstance(value, dict) or set(value) != {"id", "answer"}:
        raise RecipeError(f'{where}: not an answer: a line is {{"id": ..., "answer": "..."}}. Is it another file?')
    name, answer = value["id"], value["answer"]
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise RecipeError(f"{where}: id: {name!r} is neither a whole number nor a text")
    if not isinstance(answer, str):
        raise RecipeError(f"{where}: answer: {answer!r} is not a text")
    return name, answer


def identity_of_prompts(prompts: Sequence[Prompt]) -> str:
    """sha256 of prompts and their images, without the correct answers."""
    told = hashlib.sha256()
    for prompt in prompts:
        images = [hashlib.sha256(_bytes_of(image)).hexdigest() for image in prompt.images]
        told.update(json.dumps([prompt.id, prompt.text, images]).encode())
    return told.hexdigest()


def _bytes_of(image: ImageSource) -> bytes:
    return encode_png(image) if isinstance(image, StoredImage) else read_bounded(Path(image), IMAGE_BYTES)


def identity_of_inputs(plan: Plan) -> list[dict[str, str]]:
    """The properties of a plan's inputs that answers depend on: location, headers, content."""
    return [
        {
            "path": one.path,
            "headers": one.headers,
            "content": content_digest([Path(place) for place in (one.path, one.adapter) if place]),
        }
        for one in plan.inputs
    ]


def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    force: bool = False,
    what: str = "a run",
    parts: str = _CANDIDATES,
    outcome: Sequence[str] = (),
) -> Run:
    """Start a run, or resume one with the same settings.

    force    discard an earlier run with other settings in the folder
    what     the kind of run, as messages call it
    parts    name of the folder of its parts
    outcome  files that it writes at the end

    raises RecipeError if the folder holds a run with other settings, OutputError if it holds something else.
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
                _drop(folder, parts, outcome)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, parts)
    run.write_json(SETTINGS, asked)
    return run


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, None if it holds none; raises OutputError for a broken file."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        had = parse_json(read_bounded(path, RECORDS_BYTES), str(path), object, error=OutputError, then=_ANEW)
        if not isinstance(had, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}. {_ANEW}") from None
    return had


@contextmanager
def alone_in(run: Run) -> Iterator[None]:
    """Lock a run's folder; raises OutputError if another process uses it."""
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


def _drop(folder: Path, parts: str, outcome: Sequence[str]) -> None:
    """Remove the files of a run, and nothing else in its folder."""
    shutil.rmtree(folder / parts, ignore_errors=True)
    shutil.rmtree(folder / "images", ignore_errors=True)
    for name in ("prompts.jsonl", *outcome):
        (folder / name).unlink(missing_ok=True)


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
            "these: name another folder, or drop them with `force`"
        )


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested settings, with its path."""
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
