"""The options that say what to merge: a recipe file, or the same on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import yaml

from polymerge.errors import RecipeError

__all__ = ["output_options", "recipe_of", "recipe_options", "recipe_options_without"]

F = TypeVar("F", bound=Callable[..., Any])

_RECIPE = click.argument("recipe", required=False, type=click.Path())

_OPTIONS = {
    "template": click.option(
        "--template", metavar="MODEL", help="The model whose layout the output takes; the first to merge."
    ),
    "others": click.option(
        "--with", "others", metavar="MODEL", multiple=True, help="Another model to merge; repeatable."
    ),
    "base": click.option("--base", metavar="MODEL", help="The common ancestor, for methods on deltas."),
    "method": click.option("--method", metavar="NAME", help="A merge method; see `polymerge methods`."),
    "weight": click.option("--weight", metavar="W,W,...", help="Each model's weight, the template's first."),
    "parameters": click.option(
        "-p", "--parameter", "parameters", metavar="NAME=VALUE", multiple=True, help="Any other parameter."
    ),
    "parts": click.option("--parts", metavar="PART,...", help="Parts to merge: text, vision, projector, audio."),
    "exclude": click.option(
        "--exclude", metavar="GLOB", multiple=True, help="Canonical names to keep; may be repeated."
    ),
    "ignore": click.option(
        "--ignore", metavar="GLOB", multiple=True, help="Names as stored to leave out of every input; may be repeated."
    ),
    "vocab": click.option("--vocab", metavar="HOW", help="template or overlap: what becomes of unequal vocabularies."),
    "dtype": click.option("--dtype", metavar="DTYPE", help="dtype of the merged tensors."),
    "seed": click.option("--seed", type=int, help="For methods that draw random numbers."),
}

_OUTPUT = (
    click.option("-o", "--out", metavar="OUT", help="The folder to make."),
    click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device to stream blocks through."),
    click.option("--shard-size", default="5GB", show_default=True, help="Largest weight file."),
    click.option(
        "--threads", type=click.IntRange(min=1), help="Blocks at once; default: as many as processors, up to 8."
    ),
    click.option(
        "--format", "file_format", type=click.Choice(["safetensors", "torch"]), default="safetensors", show_default=True
    ),
    click.option("--dry-run", is_flag=True, help="Only plan."),
    click.option("--force", is_flag=True, help="Replace an existing OUT."),
    click.option("--no-verify", is_flag=True, help="Do not check at the end that the output loads."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Let the check run Python files that lie in the checkpoint."
    ),
    click.option("--json", "as_json", is_flag=True, help="Report as JSON."),
)


def recipe_options(command: F) -> F:
    """Give a command the recipe argument and the options that stand in for a recipe."""
    return recipe_options_without()(command)


def recipe_options_without(*names: str) -> Callable[[F], F]:
    """Give a command the recipe argument and those options, without some that mean something else to it."""

    def give(command: F) -> F:
        for name, option in reversed(_OPTIONS.items()):
            if name not in names:
                command = option(command)
        return _RECIPE(command)

    return give


def output_options(command: F) -> F:
    """Give a command the options that say where and how a merge is written."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def recipe_of(options: dict[str, Any]) -> str | dict[str, Any]:
    """The recipe file that was named, or a recipe made of the options; takes them out of `options`.

    raises RecipeError where neither or both are given.
    """
    recipe: str | None = options.pop("recipe")
    given = {name: options.pop(name, None) for name in _OPTIONS}
    said = [name for name, value in given.items() if value not in (None, ())]
    if recipe is not None:
        if said:
            raise RecipeError(f"a recipe file and --{said[0].replace('others', 'with')} together: say it in the recipe")
        return recipe
    if not given["template"] or not given["others"] or not given["method"]:
        raise RecipeError("say what to merge: a recipe file, or --template MODEL --with MODEL --method NAME")
    models = [given["template"], *given["others"]]
    weights = _numbers(given["weight"], len(models)) if given["weight"] else None
    data: dict[str, Any] = {
        "merge_method": given["method"],
        "template": given["template"],
        "base_model": given["base"],
        "models": [
            {"model": model} | ({"parameters": {"weight": weights[place]}} if weights else {})
            for place, model in enumerate(models)
        ],
        "parameters": dict(_pair(text) for text in given["parameters"]),
        "parts": given["parts"].split(",") if given["parts"] else None,
        "exclude": list(given["exclude"]),
        "ignore": list(given["ignore"] or ()),
        "vocab": given["vocab"],
        "dtype": given["dtype"],
        "seed": given["seed"],
    }
    return {name: value for name, value in data.items() if value not in (None, [], {})}


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weight: '{text}' is not a list of numbers such as 0.9,0.1") from None
    if len(numbers) != count:
        raise RecipeError(f"--weight: {len(numbers)} numbers for {count} models")
    return numbers


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--parameter: '{text}' is not NAME=VALUE")
    return name, yaml.safe_load(value)
