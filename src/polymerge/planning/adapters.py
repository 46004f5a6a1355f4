"""Plan a merge of adapters: the fate of every module and full weight, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polymerge.checkpoints.adapter import is_adapter, open_adapter
from polymerge.checkpoints.beside import companion_files
from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import PolymergeError, RecipeError, Refused, refuse
from polymerge.methods.table import METHODS
from polymerge.planning.adapter_inputs import (
    Opened,
    check_against_base,
    check_bases,
    check_beside,
    check_both_kinds,
    check_convolutions,
    open_adapters,
    open_base,
    skipped,
    summaries,
)
from polymerge.planning.adapter_steps import AdapterSteps
from polymerge.planning.companions import files_beside, files_left_out, has_tokenizer
from polymerge.planning.compatibility import config_warnings, merged_routers
from polymerge.planning.inputs import labels_of
from polymerge.planning.model import Model
from polymerge.planning.peft_config import base_said, foreign_names, output_config
from polymerge.planning.plan import Plan, Step
from polymerge.planning.unused import left_out_of_files
from polymerge.recipe.overrides import choices_of_adapters
from polymerge.recipe.parameters import Setting
from polymerge.recipe.recipe import Recipe, recipe_dict

__all__ = ["names_adapters", "plan_adapters"]


def names_adapters(recipe: Recipe) -> bool:
    """Return whether the models of a recipe are adapters; raises Refused where some are and some are not."""
    kinds = {entry.model: _is_adapter(entry.model) for entry in recipe.models}
    if not any(kinds.values()) or all(kinds.values()):
        return any(kinds.values())
    adapter = next(name for name, kind in kinds.items() if kind)
    problems: list[PolymergeError] = []
    for name in (name for name, kind in kinds.items() if not kind):
        try:
            path = locate(name)
            if any(path.glob("adapter_model*")):
                open_adapter(name, path)  # says what it lacks
        except PolymergeError as error:
            problems += error.problems
            continue
        problems.append(
            RecipeError(
                f"models: '{adapter}' is an adapter, '{name}' is not. Write BASE+ADAPTER to merge it as a full model"
            )
        )
    raise Refused(problems)


def _is_adapter(source: str) -> bool:
    if split_source(source)[1] is not None:
        return False
    try:
        return is_adapter(locate(source))
    except PolymergeError:
        return False  # said when it is opened


def plan_adapters(recipe: Recipe) -> Plan | None:
    """Plan a merge of adapters; return None, with the problems refused, if they cannot all be opened."""
    named = labels_of(entry.model for entry in recipe.models)
    labels = [named[entry.model] for entry in recipe.models]
    if len(named) < len(labels):
        refuse(RecipeError("models: an adapter is named twice"))
    choices = choices_of_adapters(recipe, labels)
    _refuse_fields(recipe)
    opened = open_adapters(recipe, labels)
    if opened is None:
        return None
    renamed = ""
    if recipe.template is None:
        opened, renamed = opened.with_names_of_today()
    base = open_base(recipe)
    check_bases(recipe, opened)
    if base is not None:
        check_against_base(base, opened)
    check_convolutions(opened)
    steps = AdapterSteps(recipe, opened, choices, base)
    modules = steps.modules()
    check_both_kinds(opened)
    check_beside(opened)
    extra = choices[-1].setting.parameters.get("extra", "mean")
    full = steps.full_weights(extra, {step.canonical for step in modules})
    refuse(*foreign_names(opened.adapters, labels, opened.template, opened.key, [*modules, *full]))
    _check_ties(opened, modules, full, steps.settings)
    inputs = summaries(opened)
    reads_base = base is not None and any(piece.base is not None for step in full for piece in step.pieces)
    template = opened.adapters[opened.template]
    companion_files(template.folder, deep=False)
    config = output_config(template, opened.adapters, modules, full) | steps.said
    return Plan(
        recipe=recipe_dict(recipe),
        inputs=(*inputs, base.summary()) if base is not None and reads_base else tuple(inputs),
        template=opened.template,
        models=tuple(range(len(labels))),
        places=tuple(range(len(labels))),
        base=len(labels) if reads_base else None,
        seed=recipe.seed,
        settings=tuple(steps.settings),
        steps=(*modules, *full),
        left_out=(*steps.left_out, *skipped(opened)),
        warnings=tuple(filter(None, dict.fromkeys([renamed, *steps.warnings, *_notes(recipe, opened, base, modules)]))),
        beside=files_beside(
            template.folder,
            labels[opened.template],
            "template" if recipe.template else "first adapter, as the recipe names no template",
            "adapter_config.json",
        ),
        layout=template.layout,
        config=config | (base_said(recipe.base_model, template.config) if recipe.base_model else {}),
    )


def _notes(recipe: Recipe, opened: Opened, base: Model | None, modules: Sequence[Step]) -> list[str]:
    """Notes on a merge of adapters that are not errors."""
    labelled, template = list(zip(opened.labels, opened.adapters, strict=True)), opened.labels[opened.template]
    notes = left_out_of_files((label, adapter.skipped) for label, adapter in labelled)
    for label, adapter in labelled:
        notes += files_left_out(label, adapter.folder, adapter)
    with_tokenizer = [label for label, adapter in labelled if has_tokenizer(adapter.folder)]
    if with_tokenizer and template not in with_tokenizer:
        notes.append(
            f"the output has no tokenizer because the template '{template}' has none; "
            f"{listed(with_tokenizer)} has one: name it as template to include it"
        )
    configs = [(label, adapter.model_config) for label, adapter in labelled]
    notes += config_warnings(configs[opened.template], configs, ("text",))
    if len(labelled) > 1:
        notes += merged_routers(f"{step.canonical}.weight" for step in modules if step.fate == "merged")
    if recipe.base_model is not None and base is None:
        notes.append(f"base_model '{recipe.base_model}' is recorded, not read")
    return notes


def _check_ties(opened: Opened, modules: Sequence[Step], full: Sequence[Step], settings: Sequence[Setting]) -> None:
    """Require equal head and embedding in an adapter that keeps them tied: it stores both, and PEFT loads one."""

    def held(names: Iterable[str], *modules: str) -> list[str]:
        return [name for name in names if name.removesuffix(".weight").rpartition(".")[2] in modules]

    both = []
    for steps in (modules, full):
        numbers = {step.canonical.removesuffix(".weight"): step.pieces[0].setting for step in steps}
        merged = {name: None if number is None else settings[number] for name, number in numbers.items()}
        embedding, head = held(merged, "embed_tokens"), held(merged, "lm_head")
        both += [(merged[embedding[0]], merged[head[0]])] if embedding and head else []
    touching = {
        label: adapter.config.get("ensure_weight_tying") is True
        for label, adapter in zip(opened.labels, opened.adapters, strict=True)
        if held((*adapter.pairs, *adapter.non_lora, *adapter.tokens), "embed_tokens", "lm_head")
    }
    if not both or not any(touching.values()):
        return
    whole = "write BASE+ADAPTER to merge them as full models"
    if not all(touching.values()):
        tied, apart = (next(label for label, kept in touching.items() if kept is wanted) for wanted in (True, False))
        refuse(
            RecipeError(
                f"'{tied}' keeps head and embedding tied (ensure_weight_tying), '{apart}' does not: one adapter cannot "
                f"do both; {whole}"
            )
        )
        return
    random = [one.method for one, _ in both if one is not None and METHODS[one.method].random]
    if random or any(one != other for one, other in both):
        what = f"{random[0]} draws for each module anew" if random else "the recipe does not treat the two alike"
        refuse(
            RecipeError(
                "these adapters keep head and embedding tied (ensure_weight_tying), so the two have to come out equal, "
                f"and {what}. Give both one setting that draws nothing, or {whole}"
            )
        )


def _refuse_fields(recipe: Recipe) -> None:
    if recipe.ignore or any(entry.ignore for entry in recipe.models):
        refuse(RecipeError("recipe: ignore is for checkpoints; name what adapters leave out in exclude"))
    for name, default in (("parts", None), ("vocab", "template"), ("branches", "fill"), ("missing", "error")):
        if getattr(recipe, name) != default:
            refuse(RecipeError(f"recipe: {name} is for checkpoints; name modules of adapters in exclude"))
    if recipe.names != "template":
        refuse(RecipeError("recipe: names is for checkpoints: adapters name modules of a class, not stored tensors"))
