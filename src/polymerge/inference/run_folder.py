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
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from polymerge.checkpoints.bounds import IMAGE_BYTES, RECORDS_BYTES, lines_of, open_regular, read_bounded
from polymerge.checkpoints.identity import content_digest
from polymerge.checkpoints.json_objects import parse_json
from polymerge.durable import UNFINISHED, flush, make_folder, sync, write_file, writing
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
_TAIL = 1 << 20
"""Bytes at the end of a file in which all lies that was not on the disk yet: far more than is appended at once."""
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
        return make_folder(self.folder / self.parts / name)

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a file of the run; raises OutputError if it cannot be written."""
        return write_file(self.folder / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def write_part(self, name: str, file: str, data: Mapping[str, Any]) -> Path:
        """Write a file of a candidate or task."""
        return write_file(self.part(name) / file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def keep_prompts(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """Save the prompts, and their images that are in memory; returns the prompts with paths only."""
        placed = tuple(materialise(prompts, self.folder / "images"))
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in placed]
        write_file(self.folder / "prompts.jsonl", "".join(lines))
        return placed


class AnswerLog:
    """Answers by prompt id in an append-only file: answers from before a crash are not generated again.

    One per line: `{"id": 7, "answer": "two"}`; 7 and "7" are different prompts. Only one process at a time may append.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> dict[int | str, str]:
        """The answers of all complete lines; empty if there is no file.

        Lines that a kill or a power cut broke off are dropped.

        raises RecipeError, or Refused for several: a broken line, an id with two answers.
        """
        try:
            with open_regular(self.path) as stream:
                return self._answers(_whole_lines(stream))
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
        """Append answers and flush them to the disk, after removing lines that were broken off.

        raises OutputError if the file cannot be written.
        """
        lines = [json.dumps({"id": name, "answer": answer}, ensure_ascii=False) + "\n" for name, answer in pairs]
        if not lines:
            return
        data = "".join(lines).encode("utf-8", "replace")  # half a surrogate pair says nothing
        with writing(self.path):
            new = not self.path.exists()
            with self.path.open("x+b" if new else "r+b", buffering=0) as file:
                file.truncate(file.seek(_end_of_whole_lines(file)))
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                flush(file.fileno())
            if new:
                sync(self.path.parent)


def _whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file but for what was broken off at its end."""
    left = _end_of_whole_lines(stream)
    stream.seek(0)
    for line in lines_of(stream):
        left -= len(line)
        if left < 0:
            return
        yield line


def _end_of_whole_lines(stream: BinaryIO | RawIOBase) -> int:
    """Where the whole lines of a file end.

    The last ones can lack their end, or be zeros where a power cut came before the disk had them: no line holds a zero.
    """
    size = stream.seek(0, os.SEEK_END)
    for start in (max(0, size - _TAIL), 0):
        stream.seek(start)
        tail = stream.read() or b""
        zero = tail.find(b"\0", max(0, len(tail) - _TAIL))
        if end := tail.rfind(b"\n", 0, len(tail) if zero < 0 else zero) + 1:
            return start + end
    return 0


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
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise OutputError(f"{folder}: exists and is not the folder of {what}. Name another one")
    if path.is_file():
        try:
            _refuse_others(folder, asked, what)
        except PolymergeError:
            if any(path.is_file() for path in (folder / parts).rglob("*")):
                if not force:
                    raise
                _drop(folder, parts, outcome)
    run = Run(make_folder(folder), parts)
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
    """Lock a run's folder, and remove what a killed process left; raises OutputError if another process uses it."""
    descriptor = os.open(run.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{run.folder}: another process is at work in it. Wait for it, or name another folder"
            ) from None
        with writing(run.folder):
            for unfinished in run.folder.rglob(f".*{UNFINISHED}"):
                unfinished.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _drop(folder: Path, parts: str, outcome: Sequence[str]) -> None:
    """Remove the files of a run, and nothing else in its folder."""
    with writing(folder):
        for name in (parts, "images"):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
        for name in ("prompts.jsonl", *outcome):
            (folder / name).unlink(missing_ok=True)
        sync(folder)


def _is_foreign(path: Path) -> bool:
    """Whether it is anything but what a run leaves that was killed before it had its settings."""
    return not path.name.endswith(UNFINISHED)


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
