"""One name is one thing over all commands, each that reports can do so as JSON, and the shell completes words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from polymerge.cli import polymerge
from polymerge.cli.option_types import FOLDER, MODEL, PATH
from polymerge.methods.table import METHODS
from running import cli, linear, recipe_file, two_llamas

COMMANDS = polymerge.commands

WITHOUT_A_REPORT = {"demo"}
"""The demo tells a story, and writes its numbers to its folder."""

SEVERAL_MEANINGS = {
    "--with": {"MODEL", None},  # in a merge another model; of verify and evaluate another program
    "--out": {"OUT", "RUN", "DIR", "ADAPTER", "FILE"},  # the word says what is written
    "--json": {None, "[FILE]", "FILE"},  # a flag, or a file too; of a report, whose page is the text, a file only
    "--against": {"ADAPTER...", "TEMPLATE"},
    "--dtype": {"DTYPE", None},  # of weights that are written; of a model that runs
    "--prompts": {"[NAME=]FILE", "FILE"},  # verify has no tasks, which would have names
    "--tasks": {"TASK,...", "FILE:SCORER,..."},
    "--task": {"TASK", "T"},
    "--rank": {"R", None},
    "--template": {"MODEL", "A"},  # of a comparison, by the name in its table
}
"""Names whose value is called otherwise in some command, and what it is called."""


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command in COMMANDS.items():
        for one in command.params:
            if isinstance(one, click.Option):
                yield name, one


def long(option: click.Option) -> str:
    return max(option.opts, key=len)


def test_the_value_of_an_option_has_one_name() -> None:
    found = defaultdict(set)
    for _, option in options():
        found[long(option)].add(option.metavar)
    differing = {name: words for name, words in found.items() if len(words) > 1}
    assert {name: words - SEVERAL_MEANINGS.get(name, set()) for name, words in differing.items() if
            words - SEVERAL_MEANINGS.get(name, set())} == {}  # fmt: skip


def test_an_option_of_one_value_name_has_one_type() -> None:
    found = defaultdict(set)
    for _, option in options():
        if option.metavar:
            kind = "path" if option.type in (PATH, FOLDER) else type(option.type).__name__
            found[long(option), option.metavar].add(kind)
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


def test_names_are_words_with_one_short_form_each() -> None:
    short = defaultdict(set)
    for _, option in options():
        for name in option.opts:
            assert re.fullmatch(r"-[a-z]|--[a-z][a-z0-9]*(-[a-z0-9]+)*", name), name
            if not name.startswith("--"):
                short[name].add(long(option))
        assert long(option) == f"--{long(option)[2:].lower()}"
    assert short == {"-o": {"--out"}, "-p": {"--parameter"}}


def test_every_option_says_what_it_does() -> None:
    for command, option in options():
        assert option.help, f"{command} {long(option)}"
        assert option.help[0].isupper(), f"{command} {long(option)}: {option.help}"
        assert option.help.endswith("."), f"{command} {long(option)}: {option.help}"
        if option.multiple and option.metavar and "repeatable" not in option.help:
            assert (command, long(option)) in {
                ("inspect", "--against"), ("search", "--prompts"), ("search", "--from-logs"),
            }  # fmt: skip


def test_every_command_that_reports_has_json() -> None:
    having = {command for command, option in options() if "--json" in option.opts}
    assert set(COMMANDS) - having == WITHOUT_A_REPORT


@pytest.mark.parametrize("command", ["plan", "overlap"])
def test_json_without_a_file_is_printed(command: str, tmp_path: Path) -> None:
    recipe = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "recipe.yaml")
    alone, named = cli(command, recipe, "--json"), cli(command, recipe, "--json", "-")
    assert (alone.status, named.status) == (0, 0), (alone.err, named.err)
    assert json.loads(alone.out).keys() == json.loads(named.out).keys()
    beside = cli(command, recipe, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(alone.out)
    assert not beside.out.startswith("{")
    taken = cli(command, "--json", recipe)  # the word after it is its value
    assert taken.status == 2
    assert "is no JSON file" in taken.err
    assert recipe.read_text().startswith("merge_method")


# --- completion


def completed(words: str, place: int, shell: str = "bash") -> list[str]:
    """What a shell is told of the word at a place, as `type,value` lines."""
    asked = {"_POLYMERGE_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    ran = subprocess.run(
        [sys.executable, "-m", "polymerge"], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "polymerge"],
        env={**os.environ, "_POLYMERGE_COMPLETE": f"{shell}_source"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "_POLYMERGE_COMPLETE" in ran.stdout, ran.stderr
    assert "polymerge" in ran.stdout


def test_commands_options_choices_methods_and_files_are_completed() -> None:
    assert {"plain,merge", "plain,methods"} == set(completed("polymerge me", 1))
    assert set(completed("polymerge merge --sh", 2)) == {"plain,--shard-size", "plain,--sha256"}
    assert set(completed("polymerge merge --format ", 3)) == {"plain,safetensors", "plain,torch"}
    begun = {f"plain,{name}" for name in METHODS if name.startswith("dare")}
    assert set(completed("polymerge merge --method dare", 3)) == begun
    assert completed("polymerge plan rec", 2) == ["file,rec"]
    assert completed("polymerge merge --template mod", 3) == ["file,mod"]
    assert completed("polymerge merge r.yaml -o ou", 4) == ["dir,ou"]


def test_every_model_is_completed_as_one() -> None:
    for command, option in options():
        if option.metavar == "MODEL" and (command, long(option)) != ("search", "--embedding-model"):
            assert option.type is MODEL, f"{command} {long(option)}"
