"""The full weights that travel with adapters, projectors above all: an ordinary plan over the files of the adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from polymerge.checkpoints import Entry
from polymerge.checkpoints.adapter import Adapter
from polymerge.dtypes import dtype_code
from polymerge.errors import PolymergeError, RecipeError, collecting_into
from polymerge.families.expressions import Read, shape_of
from polymerge.methods.table import METHODS
from polymerge.planning.model import VOCABULARY, Model
from polymerge.planning.plan import Input, LeftOut, Piece, Plan, Step
from polymerge.recipe.overrides import matches
from polymerge.recipe.parameters import Setting, resolve
from polymerge.recipe.recipe import Recipe, recipe_dict

__all__ = ["PREFIX", "plan_extras", "stored_name"]

PREFIX = "base_model.model."
"""What PEFT puts before the name of every parameter."""


def stored_name(parameter: str, adapted: bool) -> str:
    """The name that PEFT stores a full weight or bias under; a module with factors has its own in `base_layer`."""
    module, _, end = parameter.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{end}" if adapted else f"{PREFIX}{parameter}"


def plan_extras(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    inputs: Sequence[Input],
    template: int,
    key: Callable[[int, str], str],
    extra: str,
    base: Model | None,
    adapted: Collection[str],
    problems: list[PolymergeError],
) -> Plan | None:
    """Plan what becomes of the adapters' full weights; None where they have none.

    inputs what the plan records of the adapters
    extra  mean, released (the mean, rounded to the stored dtype after each step), first (the template's, or of the
           first adapter that has it), or a method, with the recipe's parameters
    adapted the modules that have factors in the output, by their canonical names
    base   the base model, for methods on deltas
    """
    labels = [entry.label for entry in inputs]
    held: dict[str, dict[int, tuple[str, Entry]]] = defaultdict(dict)
    for place in (template, *(n for n in range(len(adapters)) if n != template)):
        for parameter, entry in adapters[place].extras.items():
            module = key(place, f"{parameter.rpartition('.')[0]}.weight").removesuffix(".weight")
            held[key(place, parameter)][place] = (stored_name(parameter, module in adapted), entry)
        for parameter, (_, entry) in adapters[place].tokens.items():
            module = parameter.removesuffix(".weight")
            name = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
            held[f"{key(place, parameter)} (trained tokens)"][place] = (name, entry)
    _check_tokens(adapters, labels, problems)
    if not held:
        return None
    row = METHODS.get(extra)
    general = ("recipe: parameters", recipe.parameters)
    per_model = [entry.parameters for entry in recipe.models]
    setting = Setting("linear", {"weight": (1.0,) * len(adapters), "normalize": True})
    if row is not None:
        known = {parameter.name for parameter in row.parameters}
        own = [{name: value for name, value in given.items() if name in known} for given in per_model]
        said = {name: value for name, value in recipe.parameters.items() if name in known}
        with collecting_into(problems):
            setting = resolve(extra, [(general[0], said)], own, labels)
    settings: list[Setting] = []
    steps = []
    left_out: list[LeftOut] = []
    for canonical, found in held.items():
        places = sorted(found)
        first = template if template in found else places[0]
        name, entry = found[first]
        shapes = {found[n][1].shape for n in places}
        if len(shapes) > 1:
            listed = ", ".join(f"'{labels[n]}' is {list(found[n][1].shape)}" for n in places)
            way = (
                "Their vocabularies were resized apart: fold each into its base (BASE+ADAPTER), and merge the models "
                "with vocab: by-token"
                if canonical in VOCABULARY and len({shape[1:] for shape in shapes}) == 1
                else "These adapters are not of one base"
            )
            problems.append(RecipeError(f"{canonical}: {listed}. {way}"))
            continue
        some = "" if len(places) == len(adapters) else f"only {', '.join(labels[n] for n in places)} of the adapters"
        whole = ((0, entry.shape[0] if entry.shape else 1),)
        excluded = any(matches(canonical, glob) for glob in recipe.exclude)
        tokens = canonical.endswith("(trained tokens)")
        if excluded and template not in found:
            why = "excluded by the recipe, and the template has none"
            left_out += [LeftOut(n, found[n][1].name, why) for n in places]
            continue
        if excluded or extra == "first" or len(places) == 1 or (tokens and row is not None and row.on == "deltas"):
            piece = Piece(canonical, whole, reads=(Read(entry.name),), inputs=(first,))
            reason = f"of '{labels[first]}'" + (f": {some}" if some else "")
            steps.append(Step(name, canonical, "copied", entry.dtype, entry.dtype, entry.shape, reason, (piece,)))
            why = "excluded by the recipe" if excluded else f"extra: {extra}"
            left_out += [
                LeftOut(n, found[n][1].name, f"that of '{labels[first]}' is kept: {why}") for n in places if n != first
            ]
            continue
        own_setting = setting.of(places)
        if own_setting.divides_by_nothing and len(places) < len(adapters):
            problems.append(
                RecipeError(
                    f"{canonical}: {some}, and their weights add up to about 0: say normalize: false, or other weights"
                )
            )
            continue
        if extra == "released":
            own_setting = Setting("linear", {**own_setting.parameters, "stepwise": entry.dtype})
        if own_setting not in settings:
            settings.append(own_setting)
        origin = None
        if row is not None and row.on == "deltas" and base is not None:
            origin = base.whole(canonical)
            if origin is None or shape_of(origin, base.shapes) != entry.shape:
                problems.append(RecipeError(f"{canonical}: base_model '{base.label}' has no such tensor of this shape"))
                continue
        piece = Piece(
            canonical, whole, settings.index(own_setting), tuple(Read(found[n][1].name) for n in places), origin,
            tuple(places),
        )  # fmt: skip
        dtype = (dtype_code(recipe.dtype) if recipe.dtype else None) or entry.dtype
        steps.append(Step(name, canonical, "merged", dtype, entry.dtype, entry.shape, some, (piece,)))
    return Plan(
        recipe=recipe_dict(recipe),
        inputs=(*inputs, *([base.summary()] if base is not None else [])),
        template=template,
        models=tuple(range(len(adapters))),
        places=tuple(range(len(adapters))),
        base=None if base is None else len(adapters),
        seed=recipe.seed,
        settings=tuple(settings),
        steps=tuple(steps),
        left_out=tuple(left_out),
    )


def _check_tokens(adapters: Sequence[Adapter], labels: Sequence[str], problems: list[PolymergeError]) -> None:
    """Trained tokens are merged row by row, which has a meaning only where they are the same ones."""
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}
    for place, adapter in enumerate(adapters):
        for parameter, (indices, _) in adapter.tokens.items():
            first, before = seen.setdefault(parameter, (place, indices))
            if before != indices:
                problems.append(
                    RecipeError(
                        f"{parameter}: '{labels[first]}' trained tokens {list(before)[:5]}, '{labels[place]}' "
                        f"{list(indices)[:5]}: not the same ones. Fold the adapters and merge the models"
                    )
                )
