"""new: a recipe to start from, for given models."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import METHOD, MODEL, PATH, argument, option
from polymerge.cli.shared_options import AS_JSON
from polymerge.cli.streams import paint_for, say, show
from polymerge.durable import write_file
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.paths import given_path

if TYPE_CHECKING:
    from polymerge.planning.first_recipe import Candidates, NewRecipe

__all__ = ["new"]


@click.command(cls=FlagCommand)
@argument("models", metavar="[MODEL...]", nargs=-1, type=MODEL)
@option("--base", metavar="MODEL", type=MODEL, help="Take deltas from this common ancestor, if there is one.")
@option(
    "--template", metavar="MODEL", type=MODEL,
    help="Take the output's layout from this one of them; default: the first multimodal one, or the first.",
)  # fmt: skip
@option("--method", metavar="NAME", type=METHOD, help="Take another of the methods that people start from.")
@option(
    "-o", "--out", metavar="FILE", type=PATH, default="recipe.yaml", show_default=True, help="Write the recipe to FILE."
)  # fmt: skip
@option("--force", is_flag=True, help="Replace FILE if it exists.")
@AS_JSON
def new(
    models: tuple[str, ...],
    base: str | None,
    template: str | None,
    method: str | None,
    out: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write a recipe for MODELs, with comments, by what people start from for that kind of merge; then show its plan.

    Only headers are read. Without MODELs it asks for them, if it is on a terminal.
    """
    from polymerge.planning.first_recipe import candidates, new_recipe

    asking = not models and sys.stdin.isatty()
    if not models and not asking:
        raise RecipeError("say which models to merge: polymerge new MODEL MODEL [--base MODEL]")
    with collecting(needed=True):
        if not asking:
            _refuse_existing(out, force)
        if asking:
            models, base = _asked_models(base)
        found = candidates(models, base, template)
    if asking:
        method = method or _asked_method(found)
        out = _asked_file(out, force)
    made = new_recipe(found, method=method)
    write_file(given_path(out), made.text)
    if as_json:
        show(json.dumps({"file": out, **made.to_json()}, indent=1, default=str))
        return
    _show(made, out)


def _refuse_existing(out: str, force: bool) -> None:
    path = given_path(out)
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder. Name a file" if path.is_dir() else f"there is no folder {path.parent}. Make it first"
        refuse(RecipeError(f"{out}: {why}"))
    elif path.exists() and not force:
        refuse(RecipeError(f"{out}: exists. Name another file with --out, or replace it with --force"))


def _asked_models(base: str | None) -> tuple[tuple[str, ...], str | None]:
    """The models, and their common base, as typed."""
    say("Which models are to be merged? A folder, or owner/name on the hub; the vision-language model first.")
    models: list[str] = []
    while len(models) < 2 or models[-1]:
        ends = " (empty: no more)" if len(models) >= 2 else ""
        models.append(_typed(f"model {len(models) + 1}{ends}", needed=len(models) < 2))
    if base is None:
        say("From which model were all of them tuned? Methods on deltas need it; leave it empty if there is none.")
        base = _typed("base", needed=False) or None
    return tuple(filter(None, models)), base


def _asked_method(found: Candidates) -> str:
    """The method, of those that people start from."""
    say(f"This is {found.title}. People start from:")
    for number, one in enumerate(found.starts, 1):
        say(f"  {number}. {paint_for(sys.stderr)('head', one.method)}: {one.why}")
    number = click.prompt("number", type=click.IntRange(1, len(found.starts)), default=1, err=True)
    return found.starts[number - 1].method


def _asked_file(out: str, force: bool) -> str:
    """The file to write, which does not exist yet."""
    while True:
        typed = str(click.prompt("write the recipe to", default=out, err=True)).strip()
        try:
            _refuse_existing(typed, force)
        except RecipeError as error:
            say(str(error))
        else:
            return typed


def _typed(what: str, needed: bool) -> str:
    said = click.prompt(what, default=None if needed else "", show_default=False, err=True)
    return str(said).strip()


def _show(made: NewRecipe, out: str) -> None:
    from polymerge.planning.text import describe

    paint = paint_for(sys.stdout)
    show(made.text)
    show(paint("head", f"its plan ({out})"))
    show(describe(made.plan, paint=paint))
    kept = " --keep-template-weight" if made.varied == "weight" and made.plan.base is not None else ""
    show(f"\n{paint('head', 'next')}")
    show(f"  polymerge merge {out} -o merged")
    show(f"  polymerge search {out} --prompts prompts.jsonl -o run --vary {made.varied}{kept}")
