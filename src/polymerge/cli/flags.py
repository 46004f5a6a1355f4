"""Translate errors of functions, which name parameters, into the flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from polymerge.cli.option_types import gathered
from polymerge.errors import PolymergeError, Refused

__all__ = ["FlagCommand", "findings_with_flags", "notes_with_flags"]


class FlagCommand(click.Command):
    """A command whose errors name flags: `max_new_tokens: 0 is too few` becomes `--max-new-tokens: 0 is too few`.

    A parameter is named at the start of a message, or between backticks, where it may have a value: `force=True`
    becomes `--force`. Those of a recipe's options are left alone: a message that begins with one of them speaks of the
    recipe. Between backticks `base` is a parameter, for a recipe calls it base_model.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; all values that are wrong are told at once."""
        rest = super().parse_args(ctx, args)
        gathered(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its errors are raised with flags in place of parameters."""
        try:
            return super().invoke(ctx)
        except PolymergeError as error:
            paths = {str(value) for value in ctx.params.values()}  # a folder may be called `out`
            said = _with_flags(error, {name: flag for name, flag in self._flags().items() if name not in paths})
            if said is error:
                raise
            raise said from error

    def _flags(self) -> Mapping[str, str]:
        flags = {}
        for option in self.params:
            longest = max(option.opts, key=len)
            if isinstance(option, click.Option) and longest.startswith("--"):
                flags[str(option.name)] = flags[longest[2:].replace("-", "_")] = longest
        return {name: flag for name, flag in flags.items() if name not in _OF_RECIPES - {"base"}}


_OF_RECIPES = frozenset(
    (
        "template", "others", "with", "base", "method", "weight", "parameters", "parameter", "parts", "exclude",
        "ignore", "overflow", "tokenizer_source", "chat_template", "names",
    )
)  # fmt: skip


def _with_flags(error: PolymergeError, flags: Mapping[str, str]) -> PolymergeError:
    if isinstance(error, Refused):
        return Refused(_with_flags(problem, flags) for problem in error.problems)
    names, first = ("|".join(map(re.escape, some)) for some in (flags, flags.keys() - _OF_RECIPES))
    said = re.sub(rf"^({first})(?=[: ])", lambda found: flags[found[1]], str(error))
    said = re.sub(rf"`({names})(?:=(?:True|False|'(.*?)'))?`", lambda found: _flag(flags[found[1]], found[2]), said)
    error.args = (said, *error.args[1:])
    return error


def findings_with_flags(text: str) -> str:
    """The findings of a verification with flags in place of the parameters that they name."""
    return re.sub(r"`(base|trust_remote_code)`", lambda found: f"`--{found[1].replace('_', '-')}`", text)


def notes_with_flags(text: str) -> str:
    """A note of an upload with flags in place of the parameters that it names."""
    return text.replace("`licence`", "`--license`")


def _flag(name: str, value: str | None) -> str:
    return f"`{name} {value}`" if value else f"`{name}`"
