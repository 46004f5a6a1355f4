"""Every option of every command with values that nobody should give: a word comes back, and no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from polymerge import cli as commands
from polymerge.errors import CheckpointError
from polymerge.inference.worker import Worker
from running import Ran, cli, linear, recipe_file, two_llamas

NAMES = [
    "",
    " ",
    "-",
    "x" * 256,
    "x/" * 2200,
    "~nosuchuser/x",
    "\udcff",
    "bad\udcffname",
    "a\0b",
    "\n",
    "\x1b[31m",
    "%s",
]
PLACES = ["/dev/null", "circle", "circle/x", "empty", "emptyfile", "one", "recipe.yaml", "recipe.yaml/x", ".", "gone/x"]
NUMBERS = [
    "0",
    "-1",
    "10" * 200,
    "1" * 5000,
    "1e400",
    "nan",
    "-inf",
    "0.5",
    "1e-300",
    "9" * 400 + "GB",
    "0GB",
    "\u0661",
]
WORDS = ["cuda:99", "meta", "mps", "0-99999999999", "3-1", "2024-13-01", "true", "null", "@", "a@b@c", "+", "one+gone",
         "a/b@" + "x" * 300, "all", "text,,vision", ":", ":exact", "prompts.jsonl:nosuch", "(.*",
         "((a+)+)+$"]  # fmt: skip
SETTINGS = ["normalize=[", "=", "density=1e400", "density=.nan", "weight=!!bool maybe", "density=" + "[" * 500,
            "density=&a [*a]", "density=2024-13-01", "0:1:1e-300", "0:1e12:1", "1e400:1:1", "weight[999999999999]",
            "weight@layers:0-99999999999", "scale=0:1:1e-9"]  # fmt: skip
ODD = [*NAMES, *PLACES, *NUMBERS, *WORDS, *SETTINGS]

FLAGS = ["--template", "one", "--with", "other", "--method", "ties", "--base", "one"]
ASKED = ["--prompts", "prompts.jsonl", "--scorer", "exact", "-o", "run"]
USUAL: dict[str, list[list[str]]] = {
    "plan": [["recipe.yaml"], FLAGS],
    "merge": [["recipe.yaml", "-o", "run", "--no-verify"], [*FLAGS, "-o", "run", "--no-verify"]],
    "inspect": [["one", "other"]],
    "fold": [["one", "-o", "run"]],
    "extract": [["one", "--base", "other", "--rank", "2", "-o", "run", "--no-verify"]],
    "verify": [["gone"]],
    "search": [["recipe.yaml", "--prompts", "prompts.jsonl", "-o", "run"]],
    "evaluate": [["one", "--tasks", "prompts.jsonl:exact", "-o", "run"]],
    "score": [["--scorer", "exact", "--predictions", "predictions.jsonl", "--annotations", "prompts.jsonl"]],
    "compare": [["results.json"]],
    "overlap": [["recipe.yaml"], FLAGS],
    "knockout": [["one", *ASKED]],
    "ablate": [["recipe.yaml", *ASKED]],
    "report": [["gone"]],
    "methods": [[]],
    "families": [["gone"]],
    "new": [["one", "other", "-o", "new.yaml"]],
    "doctor": [[]],
    "push": [["one", "owner/name"]],
    "demo": [],
}
"""The words of each command that is about to do something; the demo, which trains, is left alone."""

SKIPPED = {"--ray"}
"""It starts a cluster."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two models, a recipe, prompts, and things that are not what they seem."""

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointError("a model would be loaded now")

    monkeypatch.setattr(Worker, "take", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "recipe.yaml")
    question = {"id": 1, "text": "x?", "answer": "y"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    (tmp_path / "predictions.jsonl").write_text('{"question_id": 1, "text": "y"}\n', encoding="utf-8")
    task = {"score": 50.0, "total": 2, "samples": {"1": 1.0, "2": 0.0}}
    result = {"format": "polymerge results", "version": 1, "tool": "polymerge", "model": {"name": "a"}}
    (tmp_path / "results.json").write_text(json.dumps({**result, "tasks": {"t": task}}), encoding="utf-8")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "emptyfile").touch()
    return tmp_path


def odd_lines(name: str) -> Iterator[list[str]]:
    """The usual words of a command, with one odd value."""
    for usual in USUAL[name]:
        for parameter in commands.polymerge.commands[name].params:
            flag = parameter.opts[-1]
            if isinstance(parameter, click.Argument):
                if usual and not usual[0].startswith("-"):
                    yield from ([name, *usual[1:], "--", value] for value in ODD)
            elif not getattr(parameter, "is_flag", False) and flag not in SKIPPED:
                yield from ([name, *usual, f"{flag}={value}"] for value in ODD if flag.startswith("--"))


def files(folder: Path) -> dict[str, bytes | None]:
    """The content of every file of a folder, None for folders."""
    found = (Path(place, name) for place, names, others in os.walk(folder) for name in (*names, *others))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def judged(ran: Ran, words: list[str]) -> None:
    """A command has ended as commands do."""
    shown = [word[:80] for word in words]
    assert ran.status in (0, 1, 2), (shown, ran.err)
    assert "Traceback" not in ran.err, (shown, ran.err)
    assert "[Errno" not in ran.err, (shown, ran.err)
    if ran.status and not (words[0] == "verify" and ran.out):
        assert ran.err.strip(), shown
    assert len(ran.err) < 12_000, (shown, ran.err[:500])


def test_every_command_is_tried() -> None:
    assert set(USUAL) == set(commands.polymerge.commands)


@pytest.mark.parametrize("name", [name for name, usual in USUAL.items() if usual])
def test_odd_values_end_in_a_word(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unforeseen: list[BaseException] = []
    tell = commands._told

    def told(error: BaseException, command: str) -> int:
        if not isinstance(error, commands.PolymergeError):
            unforeseen.append(error)
        return tell(error, command)

    monkeypatch.setattr(commands, "_told", told)
    before = files(here)
    lines = list(odd_lines(name))
    step = max(1, len(lines) // 200)  # evenly spaced, so that each option and each value has its turn
    for words in lines[::step]:
        ran = cli(*words)
        judged(ran, words)
        assert not unforeseen, (words, unforeseen)
        if ran.status == 2:
            assert files(here) == before, words
        for path in sorted(set(files(here)) - set(before), reverse=True):
            (Path.rmdir if Path(path).is_dir() else Path.unlink)(Path(path))
        for path, content in before.items():
            if content is not None:
                Path(path).write_bytes(content)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", *FLAGS, "-p", "normalize=["], "normalize: invalid YAML"),
        (["plan", *FLAGS, "-p", "weight=!!bool maybe"], "invalid YAML"),
        (["inspect", "~nosuchuser/x"], "~nosuchuser/x: nobody here has this home folder"),
        (["inspect", "x" * 256], "File name too long. Take a shorter one"),
        (["plan", "circle"], "Its links lead in a circle"),
        (["plan", "a\0b"], "a\\x00b: is not UTF-8, or has a NUL character"),
        (["plan", "\udcff.yaml"], "\\udcff.yaml: is not UTF-8"),
        (["plan", ""], "a path is empty. Is a variable of the shell not set?"),
        (["merge", "recipe.yaml", "-o", "run", "--shard-size", "9" * 400 + "GB"], "is not a size such as 5GB"),
        (["merge", "recipe.yaml", "-o", "run", "--device", "meta"], "--device 'meta': torch cannot use it"),
        (["merge", "recipe.yaml", "-o", "circle"], "circle"),
        (["merge", "recipe.yaml", "-o", "run", "--threads", str(10**9)], "is not in the range"),
        (["evaluate", "one", "--tasks", "prompts.jsonl:exact", "-o", "run", "--batch-size", "0"], "--batch-size: 0"),
        (["compare", "results.json", "--resamples", str(10**12)], "--resamples: 1000000000000 is not from 1 to"),
        (["search", "recipe.yaml", "--prompts", "empty", "-o", "run"], "empty"),
        (["report", "results.json", "-o", "."], "is a folder"),
    ],
)  # fmt: skip
def test_what_the_word_is(words: list[str], said: str, here: Path) -> None:
    before = files(here)
    ran = cli(*words)
    judged(ran, words)
    assert ran.status in (1, 2)
    assert said in ran.err
    assert files(here) == before


def test_all_that_is_wrong_is_told_at_once(here: Path) -> None:
    ran = cli(
        "merge", *FLAGS, "-p", "normalize=[", "--weight", "a,b", "--threads", 0, "--shard-size", "5XB",
        "-o", "~nosuchuser/x",
    )  # fmt: skip
    assert ran.status == 2
    for told in ("5 problems", "normalize: invalid YAML", "'a,b' is not a list", "0 is not", "'5XB' is not a size",
                 "nobody here"):  # fmt: skip
        assert told in ran.err
    flags = ["--template", "one", "--with", "gone", "--method", "tiez", "--weight", "0.1"]
    ran = cli("merge", *flags, "-o", "one", "--device", "cuda:99")
    for told in ("'tiez'", "gone", "--weight: 1 numbers for 2 models", "one: exists already", "--device 'cuda:99'"):
        assert told in ran.err
    ran = cli("overlap", *flags[:4], "--method", "tiez", "--density", 7, "--rank", 0)
    for told in ("'tiez'", "gone", "--density: 7.0", "--rank: 0"):
        assert told in ran.err
    assert files(here).keys() >= {str(here / "one")}


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (IndexError("list index\nout of range"), 1, "mistake in polymerge: IndexError: list index out of range\n"),
        (RecursionError("too deep"), 1, "mistake in polymerge: RecursionError: too deep\n"),
        (MemoryError(), 1, "plan: memory is full"),
        (OSError(28, "No space left on device", "/x/y"), 1, "polymerge: /x/y: No space left on device. Make room"),
        (OSError(5, "Input/output error"), 1, "polymerge: plan: Input/output error. Check the disk"),
    ],
)  # fmt: skip
def test_what_nobody_foresaw_is_a_message(
    error: Exception, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polymerge.planning.make_plan", failing(error))
    ran = cli("plan", "recipe.yaml")
    assert (ran.status, ran.out) == (status, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ("polymerge --debug plan" in ran.err) == ("mistake in polymerge" in said)
    ran = cli("--debug", "plan", "recipe.yaml")
    assert ran.status == status
    assert "Traceback (most recent call last)" in ran.err
    assert said in ran.err
