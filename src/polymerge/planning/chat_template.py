"""The output's chat template where the recipe chooses it: the most common of the models', or one that it holds."""

from __future__ import annotations

from collections import Counter

from polymerge.errors import PolymergeError, refuse
from polymerge.planning.companions import chat_template_of
from polymerge.planning.inputs import Models
from polymerge.recipe.recipe import Recipe

__all__ = ["chosen_chat_template"]

_OF_RECIPE = "the recipe"


def chosen_chat_template(recipe: Recipe, models: Models) -> tuple[str | None, str | None, list[str]]:
    """The chat template that a recipe chooses, whose it is, and notes; None, and nobody's, if it chooses none.

    `auto` is the most common one among the models and the base, as in mergekit without the white space around it; of
    two that are as common, the first model's (mergekit takes one that changes from run to run). For a multimodal
    template only multimodal models count, since a language model's template has no place for an image.

    Templates that cannot be read are refused.
    """
    if recipe.chat_template != "auto":
        return recipe.chat_template, _OF_RECIPE if recipe.chat_template is not None else None, []
    inputs = dict.fromkeys((*models.merged, *([] if models.base is None else [models.base])))
    alike = [model for model in inputs if model.multimodal or not models.template.multimodal]
    found: dict[str, list[str]] = {}
    try:
        for model in alike:
            if text := (chat_template_of(model.checkpoint) or "").strip():
                found.setdefault(text, []).append(model.label)
    except PolymergeError as error:
        refuse(error)
        return None, None, []
    if not found:
        what = "multimodal model" if models.template.multimodal else "model"
        return None, None, [f"chat_template: auto: no {what} has one, so the output has the template's, if any"]
    ((text, _),) = Counter({text: len(labels) for text, labels in found.items()}).most_common(1)
    return text, found[text][0], []
