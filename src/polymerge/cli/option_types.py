"""Options and arguments whose wrong values are all told at once, and the kinds of values that click does not know."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from polymerge.errors import PolymergeError
from polymerge.paths import because, given_path

__all__ = [
    "FINITE", "FOLDER", "JSON_FILE", "METHOD", "MODEL", "NUMBERS", "PATH", "SETTING", "SIZE", "argument", "gathered",
    "option",
]  # fmt: skip

_WRONG: Final = "polymerge.wrong"

if TYPE_CHECKING:
    _Parameter = click.Parameter
    _Type = click.ParamType[Any]
else:
    _Parameter, _Type = object, click.ParamType


class _Gathering(_Parameter):
    """A parameter whose wrong value is kept, so that the others are looked at, too."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        """Convert the value; `gathered` raises what is wrong with it."""
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.BadParameter as error:
            ctx.meta.setdefault(_WRONG, []).append(error)
            return None, args


class _Option(_Gathering, click.Option):
    pass


class _Argument(_Gathering, click.Argument):
    pass


option = partial(click.option, cls=_Option)
"""Like `click.option`."""

argument = partial(click.argument, cls=_Argument)
"""Like `click.argument`."""


def gathered(context: click.Context) -> None:
    """Raise what is wrong with the values of a command line, in one error."""
    wrong: list[click.BadParameter] = context.meta.pop(_WRONG, [])
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        lines = [f"  {number}. {error.format_message()}" for number, error in enumerate(wrong, 1)]
        raise click.UsageError("\n".join([f"{len(wrong)} problems:", *lines]), context)


class _Path(_Type):
    """A path, which need not exist; kept as it was written."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the path; fails as `given_path` does."""
        try:
            given_path(value)
        except PolymergeError as error:
            self.fail(str(error), param, ctx)
        return value

    def shell_complete(self, _context: click.Context, _of: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave the names of files to the shell."""
        return [CompletionItem(incomplete, type="file")]


class _Folder(_Path):
    """A path of a folder."""

    def shell_complete(self, _context: click.Context, _of: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave the names of folders to the shell."""
        return [CompletionItem(incomplete, type="dir")]


class _Model(_Type):
    """A model: a folder, a file, or a hub id; kept as it was written."""

    name = "model"

    def shell_complete(self, _context: click.Context, _of: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave the names of folders and files to the shell."""
        return [CompletionItem(incomplete, type="file")]


class _Method(_Type):
    """The name of a merge method; kept as it was written."""

    name = "method"

    def shell_complete(self, _context: click.Context, _of: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The methods that begin so, each with what it does."""
        from polymerge.methods.table import METHODS

        rows = [row for row in METHODS.values() if row.name.startswith(incomplete)]
        return [CompletionItem(row.name, help=row.title) for row in rows]


class _JSONFile(_Path):
    """A file to write JSON to, or - for standard output; what is no JSON, such as the recipe, is not replaced."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the path, and what is there already."""
        if value == "-":
            return value
        path = given_path(super().convert(value, param, ctx))
        if path.is_dir() or not path.parent.is_dir():
            why = "is a folder. Name a file" if path.is_dir() else f"there is no folder {path.parent}. Make it first"
            self.fail(f"{value}: {why}", param, ctx)
        try:
            if path.is_file():
                with path.open("rb") as file:
                    if file.read(1) not in (b"", b"{"):
                        self.fail(f"{value}: exists and is no JSON file. Name another one", param, ctx)
        except OSError as error:
            self.fail(f"{value}: {because(error)}", param, ctx)
        return value


class _Size(_Type):
    """A size such as 5GB; kept as it was written."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the size; fails as `parse_size` does."""
        from polymerge.checkpoints.writer import parse_size

        try:
            parse_size(value)
        except PolymergeError as error:
            self.fail(str(error), param, ctx)
        return value


class _Finite(_Type):
    """A number, neither infinite nor NaN."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse the number."""
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


class _Numbers(_Type):
    """Finite numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Parse the list."""
        try:
            return [FINITE.convert(number, None, None) for number in value.split(",")]
        except click.BadParameter:
            self.fail(f"'{value}' is not a list of numbers such as 0.9,0.1", param, ctx)


class _Setting(_Type):
    """A parameter and its value in YAML: `density=0.4`."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Parse name and value."""
        from polymerge.recipe.yaml_values import parse_yaml

        name, equals, said = value.partition("=")
        if not equals:
            self.fail(f"'{value}' is not NAME=VALUE", param, ctx)
        try:
            return name, parse_yaml(said, name)
        except PolymergeError as error:
            self.fail(str(error), param, ctx)


PATH: Final = _Path()
FOLDER: Final = _Folder()
MODEL: Final = _Model()
METHOD: Final = _Method()
JSON_FILE: Final = _JSONFile()
SIZE: Final = _Size()
FINITE: Final = _Finite()
NUMBERS: Final = _Numbers()
SETTING: Final = _Setting()
