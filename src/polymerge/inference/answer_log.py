"""The answers so far, in a file that only grows: what was answered before a crash is not asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from polymerge.errors import OutputError, PolymergeError, RecipeError, refuse_if_any
from polymerge.inference.json_lines import parse, split_lines

__all__ = ["AnswerLog"]


class AnswerLog:
    """Answers by prompt id, a line each: `{"id": 7, "answer": "two"}`; 7 and "7" are two prompts.

    One process at a time may append to a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> dict[int | str, str]:
        """The answers of all complete lines; none where there is no file.

        The last line is dropped where no line feed ends it: writing it was cut short.

        raises RecipeError, all of them at once: a broken line, an id with two answers.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{self.path}: the answers cannot be read: {error.strerror or error}") from None
        answers: dict[int | str, str] = {}
        first: dict[int | str, int] = {}
        problems: list[PolymergeError] = []
        for number, line in split_lines(data[: data.rfind(b"\n") + 1]):
            try:
                name, answer = self._pair(line, number)
            except RecipeError as problem:
                problems.append(problem)
                continue
            if answers.setdefault(name, answer) != answer:
                problems.append(
                    RecipeError(
                        f"{self.path}: line {number}: {name!r} is answered {answer!r}, and {answers[name]!r} in line "
                        f"{first[name]}. Take one of the two out."
                    )
                )
            first.setdefault(name, number)
        refuse_if_any(problems)
        return answers

    def append(self, pairs: Iterable[tuple[int | str, str]]) -> None:
        """Add answers, all in one write, and wait until they are on the disk; what a cut-short write left goes first.

        raises OutputError where the file cannot be written.
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

    def _pair(self, line: bytes, number: int) -> tuple[int | str, str]:
        value = parse(line, str(self.path), number)
        where = f"{self.path}: line {number}"
        if not isinstance(value, dict) or set(value) != {"id", "answer"}:
            raise RecipeError(f'{where}: not an answer: a line is {{"id": ..., "answer": "..."}}. Is it another file?')
        name, answer = value["id"], value["answer"]
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise RecipeError(f"{where}: id: {name!r} is neither a whole number nor a text")
        if not isinstance(answer, str):
            raise RecipeError(f"{where}: answer: {answer!r} is not a text")
        return name, answer
