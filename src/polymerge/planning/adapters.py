"""Decide what becomes of every pair of factors and every full weight of some adapters, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polymerge.checkpoints.adapter import is_adapter, open_adapter
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.joined import split_source
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import PolymergeError, RecipeError, Refused, collecting_into, refuse_if_any
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.planning.adapter_inputs import (
    Opened,
    base_of,
    check_bases,
    check_beside,
    check_both_kinds,
    check_local_base,
    open_adapters,
    skipped,
    summaries,
)
from polymerge.planning.adapter_output import base_said, foreign_names, output_config
from polymerge.planning.companions import files_beside, files_left_out, has_tokenizer
from polymerge.planning.compatibility import config_warnings, merged_routers
from polymerge.planning.inputs import labels_of
from polymerge.planning.non_lora import plan_extras
from polymerge.planning.pairs import AdapterPlan
from polymerge.planning.pairsteps import PairPlanner
from polymerge.planning.unused import left_out_of_files
from polymerge.recipe.overrides import Choice
from polymerge.recipe.parameters import Setting, resolve
from polymerge.recipe.recipe import Recipe, recipe_dict

__all__ = ["names_adapters", "plan_adapters"]


def names_adapters(recipe: Recipe, problems: list[PolymergeError]) -> bool:
    """Whether the models of a recipe are adapters; some that are and some that are not is a problem."""
    kinds = {entry.model: _is_adapter(entry.model) for entry in recipe.models}
    if not any(kinds.values()) or all(kinds.values()):
        return any(kinds.values())
    adapter = next(name for name, kind in kinds.items() if kind)
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
                f"models: '{adapter}' is an adapter, '{name}' is none. Write BASE+ADAPTER to merge it as a whole model"
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


def plan_adapters(recipe: Recipe, problems: list[PolymergeError]) -> AdapterPlan:
    """Plan a merge of adapters; raises Refused with every problem."""
    labels = labels_of(entry.model for entry in recipe.models)
    names = [labels[entry.model] for entry in recipe.models]
    if len(labels) < len(names):
        problems.append(RecipeError("models: an adapter is named twice"))
    choices = _choices(recipe, names, problems)
    _refuse_fields(recipe, problems)
    opened = open_adapters(recipe, names, problems)
    if opened is None:
        refuse_if_any(problems)
        raise AssertionError("unreachable: adapters that cannot be opened are a problem")
    renamed = ""
    if recipe.template is None:
        opened, renamed = opened.with_names_of_today()
    base = base_of(recipe, problems)
    check_bases(recipe, opened, problems)
    local = check_local_base(recipe, opened, problems)
    planner = PairPlanner(recipe, opened, choices, problems)
    pairs = planner.steps()
    adapted = {step.canonical for step in pairs}
    check_both_kinds(opened, problems)
    check_beside(opened, problems)
    extra = choices[-1].setting.parameters.get("extra", "mean")
    inputs = summaries(opened)
    extras = plan_extras(recipe, opened.adapters, inputs, opened.template, opened.key, extra, base, adapted, problems)
    full = extras.steps if extras else ()
    problems.extend(foreign_names(opened.adapters, names, opened.template, opened.key, pairs, full))
    _check_ties(
        opened,
        [
            {step.canonical: None if step.setting is None else planner.settings[step.setting] for step in pairs},
            {
                step.canonical.removesuffix(".weight"): None if place is None else extras.settings[place]
                for step in full
                for place in [step.pieces[0].setting]
                if extras
            },
        ],
        problems,
    )
    refuse_if_any(problems)
    template = opened.adapters[opened.template]
    labelled = list(zip(names, opened.adapters, strict=True))
    warnings = [*([renamed] if renamed else []), *planner.warnings]
    warnings += left_out_of_files((label, adapter.skipped) for label, adapter in labelled)
    for label, adapter in labelled:
        warnings += files_left_out(label, adapter.folder, adapter)
    with_tokenizer = [label for label, adapter in labelled if has_tokenizer(adapter.folder)]
    if with_tokenizer and names[opened.template] not in with_tokenizer:
        warnings.append(
            f"the output has no tokenizer, for the template '{names[opened.template]}' has none; "
            f"{listed(with_tokenizer)} has one: name it as template to have that"
        )
    configs = [(label, adapter.model_config) for label, adapter in labelled]
    warnings += config_warnings(configs[opened.template], configs, ("text",))
    if len(names) > 1:
        warnings += merged_routers(f"{step.canonical}.weight" for step in pairs if step.fate == "merged")
    if recipe.base_model is not None and base is None and not local:
        warnings.append(f"base_model '{recipe.base_model}' is recorded, not read")
    return AdapterPlan(
        recipe=recipe_dict(recipe),
        inputs=(*inputs, *(extras.inputs[len(names) :] if extras else ())),
        template=opened.template,
        models=tuple(range(len(names))),
        seed=recipe.seed,
        settings=tuple(planner.settings),
        config=output_config(template, opened.adapters, pairs, full)
        | (base_said(recipe.base_model, template.config) if recipe.base_model else {}),
        pairs=tuple(pairs),
        extras=extras,
        left_out=(*planner.left_out, *(extras.left_out if extras else ()), *skipped(opened)),
        warnings=tuple(dict.fromkeys(warnings)),
        beside=files_beside(
            template.folder,
            names[opened.template],
            "template" if recipe.template else "first adapter, as the recipe names no template",
            "adapter_config.json",
        ),
    )


def _check_ties(opened: Opened, merged: Sequence[Mapping[str, Setting | None]], problems: list[PolymergeError]) -> None:
    """An adapter that keeps head and embedding tied has each twice; PEFT loads one of them, so they have to be equal.

    merged  the setting of each module with factors by its canonical name, and that of each full weight; None for a copy
    """

    def held(names: Iterable[str], *modules: str) -> list[str]:
        return [name for name in names if name.removesuffix(".weight").rpartition(".")[2] in modules]

    pairs = [(held(found, "embed_tokens"), held(found, "lm_head"), found) for found in merged]
    both = [(found[one[0]], found[other[0]]) for one, other, found in pairs if one and other]
    touching = {
        label: adapter.config.get("ensure_weight_tying") is True
        for label, adapter in zip(opened.labels, opened.adapters, strict=True)
        if held((*adapter.pairs, *adapter.extras, *adapter.tokens), "embed_tokens", "lm_head")
    }
    if not both or not any(touching.values()):
        return
    whole = "write BASE+ADAPTER to merge them as whole models"
    if not all(touching.values()):
        tied, apart = (next(label for label, kept in touching.items() if kept is wanted) for wanted in (True, False))
        problems.append(
            RecipeError(
                f"'{tied}' keeps head and embedding tied (ensure_weight_tying), '{apart}' does not: one adapter cannot "
                f"do both; {whole}"
            )
        )
        return
    random = [one.method for one, _ in both if one is not None and METHODS[one.method].random]
    if random or any(one != other for one, other in both):
        what = f"{random[0]} draws for each module anew" if random else "the recipe does not treat the two alike"
        problems.append(
            RecipeError(
                "these adapters keep head and embedding tied (ensure_weight_tying), so the two have to come out equal, "
                f"and {what}. Give both one setting that draws nothing, or {whole}"
            )
        )


def _choices(recipe: Recipe, labels: Sequence[str], problems: list[PolymergeError]) -> list[Choice]:
    """Every setting of the recipe, in the order in which they are tried; the last covers everything."""
    per_model = [entry.parameters for entry in recipe.models]
    general = ("recipe: parameters", recipe.parameters)
    said = [(f"overrides[{place}]", override) for place, override in enumerate(recipe.overrides)]
    rows = [(override.merge_method or recipe.merge_method, where, override) for where, override in said]
    choices = []
    for method, where, override in [*rows, (recipe.merge_method, "merge_method", None)]:
        row = METHODS[method]
        if not row.takes_adapters:
            problems.append(RecipeError(f"{method} works on checkpoints, not on adapters"))
        more = tuple(one for one in ADAPTERS if one.name != "space" or row.entrywise)
        said_here = override.parameters if override else recipe.parameters
        if row.on == "factors" and any("space" in given for given in (said_here, *per_model)):
            problems.append(
                RecipeError(f"recipe: {where}: {method} has a way of its own with factors and takes no space")
            )
        extra = METHODS.get(str(recipe.parameters.get("extra")))
        beside = extra.parameters if extra else ()
        layers = [general] if override is None else [general, (f"recipe: {where}", override.parameters)]
        with collecting_into(problems):
            setting = resolve(
                method, layers, per_model, labels, more, {"space", *(parameter.name for parameter in beside)}
            )
        if setting.parameters.get("trim") == "model":
            problems.append(RecipeError(f"{method}: trim: model is for checkpoints; adapters are trimmed per module"))
        choices.append(
            Choice(setting, where, override.layers if override else None, override.match if override else None)
        )
    return choices


def _refuse_fields(recipe: Recipe, problems: list[PolymergeError]) -> None:
    if recipe.ignore or any(entry.ignore for entry in recipe.models):
        problems.append(RecipeError("recipe: ignore is for checkpoints; name what adapters leave out in exclude"))
    for name, default in (("parts", None), ("vocab", "template"), ("branches", "fill")):
        if getattr(recipe, name) != default:
            problems.append(RecipeError(f"recipe: {name} is for checkpoints; name modules of adapters in exclude"))
