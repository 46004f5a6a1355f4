"""Errors that name parameters name flags on the command line."""

from __future__ import annotations

import click
import pytest

from polymerge.cli.flags import FlagCommand
from polymerge.errors import OutputError, PolymergeError, RecipeError, Refused


def told(error: PolymergeError) -> PolymergeError:
    @click.command(cls=FlagCommand)
    @click.option("--max-new-tokens")
    @click.option("--dtype", "model_dtype")
    @click.option("--force", is_flag=True)
    @click.option("--weight")
    def command(**_: object) -> None:
        raise error

    with pytest.raises(PolymergeError) as raised:
        command.main([], standalone_mode=False)
    return raised.value


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("max_new_tokens: 0 is too few", "--max-new-tokens: 0 is too few"),
        ("dtype: 'x' is none", "--dtype: 'x' is none"),
        ("dtype x: is none", "--dtype x: is none"),
        ("run: drop it with `force`", "run: drop it with `--force`"),
        ("run: drop it with `force=True`", "run: drop it with `--force`"),
        ("weight: of the recipe", "weight: of the recipe"),
        ("run: dtype was auto, now float32", "run: dtype was auto, now float32"),
    ],
)
def test_parameters_become_flags(message: str, said: str) -> None:
    assert str(told(RecipeError(message))) == said


def test_the_errors_keep_their_kind() -> None:
    problems = told(Refused([RecipeError("dtype: x"), OutputError("dtype: y")])).problems
    assert list(map(type, problems)) == [RecipeError, OutputError]
    assert list(map(str, problems)) == ["--dtype: x", "--dtype: y"]


def test_a_folder_of_an_option_s_name_stays_a_folder() -> None:
    @click.command(cls=FlagCommand)
    @click.option("--out")
    @click.option("--force", is_flag=True)
    def command(out: str, **_: object) -> None:
        raise OutputError(f"{out}: exists already; say `force=True`")

    with pytest.raises(OutputError, match=r"^out: exists already; say `--force`$"):
        command.main(["--out", "out"], standalone_mode=False)
