"""Read mergekit's fields for the output's tokenizer: `tokenizer_source`, `tokenizer` and `chat_template`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.bounds import RECIPE_BYTES
from polymerge.checkpoints.json_objects import read_text
from polymerge.errors import PolymergeError, RecipeError, refuse, shown
from polymerge.paths import given_path
from polymerge.recipe.mergekit_forms import source_of

__all__ = ["TOKENIZER_FIELDS", "chat_template_of", "tokenizer_source_of"]

TOKENIZER_FIELDS: Final = ("tokenizer_source", "tokenizer", "chat_template")

_PARTS_OF_TOKENIZER: Final = {
    "tokens": (
        "A token that a model lacks gets the base's row, or the mean of those that others have; no row is made of "
        "another one's. Add such tokens to one of the models before merging"
    ),
    "pad_to_multiple_of": (
        "The output has as many rows as the model whose tokenizer it takes, those that pad it included. Resize the "
        "output's embeddings afterwards"
    ),
}
"""What mergekit's `tokenizer` can hold beside `source`, and what to do instead."""

_NAMED_TEMPLATES: Final = ("alpaca", "chatml", "exaone", "llama3", "mistral")


def tokenizer_source_of(data: Mapping[str, Any]) -> str | None:
    """The model whose tokenizer a recipe chooses, `base` or `union`; None if it chooses none.

    mergekit's `tokenizer: {source: ...}` is the same; what else that may hold is refused by name.
    """
    value, where = data.get("tokenizer_source"), "recipe: tokenizer_source"
    inside = data.get("tokenizer")
    if inside is not None:
        if value is not None:
            refuse(RecipeError("recipe: tokenizer_source and tokenizer say the same thing. Leave out one of them"))
            return None
        if (problems := [*_problems_of(inside)]) or not isinstance(inside, Mapping):
            refuse(*problems)
            return None
        value, where = inside.get("source", "union"), "recipe: tokenizer: source"
    if value is None:
        return None
    if (source := source_of(value, where)) is None:
        refuse(RecipeError(f"{where} has to be base, union or one of the models, got '{shown(value)}'"))
        return None
    if data.get("vocab") not in (None, "template"):
        refuse(
            RecipeError(
                f"{where} and vocab: {shown(data['vocab'])} say different things of the same rows. Leave out one of "
                "them"
            )
        )
    return source


def _problems_of(tokenizer: object) -> Iterator[RecipeError]:
    """What of mergekit's `tokenizer` cannot be had."""
    if not isinstance(tokenizer, Mapping):
        yield RecipeError(f"recipe: tokenizer has to be a mapping with `source`, got '{shown(tokenizer)}'")
        return
    for name, value in tokenizer.items():
        if name in _PARTS_OF_TOKENIZER and value is not None:
            yield RecipeError(
                f"recipe: tokenizer: mergekit's field '{name}' is not supported. {_PARTS_OF_TOKENIZER[name]}."
            )
        elif name not in ("source", *_PARTS_OF_TOKENIZER):
            yield RecipeError(f"recipe: tokenizer: unknown field '{shown(name)}'. It holds `source`.")


def chat_template_of(data: Mapping[str, Any], folder: Path) -> str | None:
    """The chat template of a recipe: `auto`, or the template itself, which it may name a file of.

    folder   which such a file is looked for in: that of the recipe
    """
    value = data.get("chat_template")
    if value is None or value == "auto":
        return value
    if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip():
        refuse(
            RecipeError(f"recipe: chat_template has to be auto, a file, or a template in Jinja, got '{shown(value)}'")
        )
        return None
    text = os.fspath(value)
    if "{" in text or "\n" in text:
        where = "recipe: chat_template"
    else:
        try:
            file = folder / given_path(text)
        except RecipeError as error:
            refuse(error)
            return None
        if text in _NAMED_TEMPLATES and not file.is_file():
            refuse(
                RecipeError(
                    f"recipe: chat_template: mergekit's named template '{text}' is not supported: it knows nothing but "
                    "text. Name a file of a template, or say auto"
                )
            )
            return None
        where = str(file)
        try:
            text = read_text(file, most=RECIPE_BYTES, error=RecipeError, then="Write it as UTF-8")
        except PolymergeError as error:
            refuse(error)
            return None
    if why := _why_invalid(text):
        refuse(RecipeError(f"{where}: is no chat template in Jinja: {why}"))
        return None
    return text


def _why_invalid(text: str) -> str:
    """Why a text is no template; empty if it is one. Its syntax is checked if jinja2, which torch brings, is there."""
    if "{" not in text:
        return "nothing in it stands for the messages"
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return ""

    class Generation(Extension):
        """transformers' block `generation`, which marks what the model said."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "it is nested too deeply"
    return ""
