"""Decide what becomes of every pair of factors and every full weight of some adapters, from their headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymerge.checkpoint.adapter import Adapter, Pair, is_adapter, open_adapter
from polymerge.checkpoint.hub import locate
from polymerge.checkpoint.joined import split_source
from polymerge.dtypes import dtype_code
from polymerge.errors import PolymergeError, RecipeError, Refused, refuse_if_any
from polymerge.families import family_of
from polymerge.families.generic import GENERIC
from polymerge.mapping import Family
from polymerge.methods.table import ADAPTERS, COPY, METHODS
from polymerge.planning.data import Input, LeftOut
from polymerge.planning.extras import plan_extras
from polymerge.planning.inputs import Model, labels_of, open_each, tensors_digest
from polymerge.planning.loraoutput import alpha_of, output_config
from polymerge.planning.overrides import Choice, matches
from polymerge.planning.pairs import AdapterPlan, PairRead, PairStep
from polymerge.recipe import Recipe, recipe_dict
from polymerge.settings import Setting, resolve

__all__ = ["names_adapters", "plan_adapters"]

_REFUSED = {"slerp": "on checkpoints", "metagpt": "on checkpoints, whose norms it weighs"}
_KEEPS_RANK = ("cat", "robustmerge")


def names_adapters(recipe: Recipe, problems: list[PolymergeError]) -> bool:
    """Whether the models of a recipe are adapters; some that are and some that are not is a problem."""
    kinds = {entry.model: _is_adapter(entry.model) for entry in recipe.models}
    if any(kinds.values()) and not all(kinds.values()):
        adapter, other = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        problems.append(
            RecipeError(
                f"models: '{adapter}' is an adapter, '{other}' is none. Write BASE+ADAPTER to merge it as a whole model"
            )
        )
        raise Refused(problems)
    return any(kinds.values())


def _is_adapter(source: str) -> bool:
    if split_source(source)[1] is not None:
        return False
    try:
        return is_adapter(locate(source))
    except PolymergeError:
        return False  # said when it is opened


@dataclass(frozen=True)
class Opened:
    """The adapters of a recipe in its order, their labels, and how their names become canonical."""

    adapters: tuple[Adapter, ...]
    labels: tuple[str, ...]
    template: int
    family: Family

    def key(self, parameter: str) -> str:
        """What joins the parameter `parameter` of one adapter with that of another: its canonical name."""
        return "+".join(self.family.canonical(parameter)) or parameter


def plan_adapters(recipe: Recipe, problems: list[PolymergeError]) -> AdapterPlan:
    """Plan a merge of adapters; raises Refused with every problem."""
    labels = labels_of(entry.model for entry in recipe.models)
    names = [labels[entry.model] for entry in recipe.models]
    if len(labels) < len(names):
        problems.append(RecipeError("models: an adapter is named twice"))
    choices = _choices(recipe, names, problems)
    _refuse_fields(recipe, problems)
    opened = _open(recipe, names, problems)
    if opened is None:
        refuse_if_any(problems)
        raise AssertionError("unreachable: adapters that cannot be opened are a problem")
    base = _base(recipe, problems)
    _check_bases(recipe, opened, problems)
    planner = _Planner(recipe, opened, choices, problems)
    pairs = planner.steps()
    extra = choices[-1].setting.parameters.get("extra", "mean")
    extras = plan_extras(recipe, opened.adapters, names, opened.template, opened.key, extra, base, problems)
    refuse_if_any(problems)
    template = opened.adapters[opened.template]
    warnings = [*planner.warnings, *(extras.warnings if extras else ())]
    if base is None and recipe.base_model is not None:
        warnings.append(f"base_model '{recipe.base_model}' is recorded, not read")
    return AdapterPlan(
        recipe=recipe_dict(recipe),
        inputs=(*_summaries(opened), *(extras.inputs[len(names) :] if extras else ())),
        template=opened.template,
        models=tuple(range(len(names))),
        seed=recipe.seed,
        settings=tuple(planner.settings),
        config=output_config(template, opened.adapters, pairs)
        | ({"base_model_name_or_path": recipe.base_model} if recipe.base_model else {}),
        pairs=tuple(pairs),
        extras=extras,
        left_out=tuple(planner.left_out),
        warnings=tuple(dict.fromkeys(warnings)),
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
        if method in _REFUSED:
            problems.append(RecipeError(f"{method} works {_REFUSED[method]}, not on adapters"))
        more = tuple(one for one in ADAPTERS if one.name != "space" or row.on in ("weights", "deltas"))
        extra = METHODS.get(str(recipe.parameters.get("extra")))
        beside = extra.parameters if extra else ()
        layers = [general] if override is None else [general, (f"recipe: {where}", override.parameters)]
        setting = resolve(method, layers, per_model, labels, problems, more, {parameter.name for parameter in beside})
        if setting.parameters.get("trim") == "model":
            problems.append(RecipeError(f"{method}: trim: model is for checkpoints; adapters are trimmed per module"))
        choices.append(
            Choice(setting, where, override.layers if override else None, override.match if override else None)
        )
    return choices


def _refuse_fields(recipe: Recipe, problems: list[PolymergeError]) -> None:
    for name, default in (("parts", None), ("vocab", "template"), ("branches", "fill")):
        if getattr(recipe, name) != default:
            problems.append(RecipeError(f"recipe: {name} is for checkpoints; name modules of adapters in exclude"))


def _open(recipe: Recipe, labels: Sequence[str], problems: list[PolymergeError]) -> Opened | None:
    adapters = []
    for entry in recipe.models:
        try:
            adapters.append(open_adapter(entry.model, locate(entry.model)))
        except Refused as refused:
            problems.extend(refused.problems)
        except PolymergeError as error:
            problems.append(error)
    sources = [entry.model for entry in recipe.models]
    template = 0
    if recipe.template is not None and recipe.template not in sources:
        problems.append(RecipeError(f"template '{recipe.template}' has to be one of the adapters in models"))
    elif recipe.template is not None:
        template = sources.index(recipe.template)
    if len(adapters) < len(sources) or not adapters:
        return None
    return Opened(tuple(adapters), tuple(labels), template, _family(recipe, adapters))


def _family(recipe: Recipe, adapters: Sequence[Adapter]) -> Family:
    """The family whose names the modules have: that of the base's config, as far as one is at hand."""
    for adapter in adapters:
        if adapter.model_config:
            return family_of(adapter.model_config)
    bases = [recipe.base_model, *(adapter.config.get("base_model_name_or_path") for adapter in adapters)]
    for base in bases:
        config = Path(str(base)).expanduser() / "config.json" if base else None
        if config is not None and config.is_file():
            from polymerge.checkpoint.jsontext import parse_object

            return family_of(parse_object(config.read_bytes(), str(config), unique_keys=False))
    return GENERIC


def _base(recipe: Recipe, problems: list[PolymergeError]) -> Model | None:
    """The base, where full weights are merged as deltas to it."""
    extra = METHODS.get(str(recipe.parameters.get("extra")))
    if extra is None or extra.on != "deltas":
        return None
    if recipe.base_model is None:
        problems.append(RecipeError(f"extra: {extra.name} works on deltas of the full weights and needs base_model"))
        return None
    return next(iter(open_each([recipe.base_model], problems)), None)


def _check_bases(recipe: Recipe, opened: Opened, problems: list[PolymergeError]) -> None:
    """Adapters of different bases do not belong together; their configs say of which they are."""
    labelled = list(zip(opened.labels, opened.adapters, strict=True))
    if recipe.base_model is None:
        named = {label: str(adapter.config.get("base_model_name_or_path") or "") for label, adapter in labelled}
        if len({Path(base).name.casefold() for base in named.values() if base}) > 1:
            listed = ", ".join(f"'{label}' of {base}" for label, base in named.items() if base)
            problems.append(
                RecipeError(f"the adapters are of different bases: {listed}. If these are one model, say base_model")
            )
    kinds = {label: one.model_config.get("model_type") for label, one in labelled if one.model_config}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"'{label}' is for a {kind}" for label, kind in kinds.items())
        problems.append(RecipeError(f"the adapters are of different families: {listed}"))


def _summaries(opened: Opened) -> list[Input]:
    return [
        Input(
            label=label,
            source=adapter.source,
            path=str(adapter.folder),
            family=opened.family.name,
            tensors=len(adapter.entries),
            size=sum(entry.nbytes for entry in adapter.entries),
            headers=tensors_digest(adapter.entries),
        )
        for label, adapter in zip(opened.labels, opened.adapters, strict=True)
    ]


class _Planner:
    """The state while pairs are planned."""

    def __init__(
        self, recipe: Recipe, opened: Opened, choices: Sequence[Choice], problems: list[PolymergeError]
    ) -> None:
        self.recipe, self.opened, self.choices, self.problems = recipe, opened, choices, problems
        self.settings: list[Setting] = []
        self.left_out: list[LeftOut] = []
        self.warnings: list[str] = []
        self.dtype = dtype_code(recipe.dtype) if recipe.dtype else None

    def steps(self) -> list[PairStep]:
        held: dict[str, dict[int, Pair]] = defaultdict(dict)
        order = [self.opened.template, *(n for n in range(len(self.opened.adapters)) if n != self.opened.template)]
        for place in order:
            for pair in self.opened.adapters[place].pairs.values():
                held[self.opened.key(f"{pair.module}.weight").removesuffix(".weight")][place] = pair
        self._check_globs(held)
        steps = [step for key, pairs in held.items() if (step := self._step(key, dict(sorted(pairs.items()))))]
        self._check_overlap(held)
        return steps

    def _step(self, key: str, pairs: Mapping[int, Pair]) -> PairStep | None:
        template, name = self.opened.template, f"{key}.weight"
        choice = next(choice for choice in self.choices if choice.covers(name) or choice.covers(key))
        kept = ""
        if any(matches(name, glob) or matches(key, glob) for glob in self.recipe.exclude):
            kept = "excluded by the recipe"
        elif choice.setting.method == COPY:
            kept = f"copied by the recipe ({choice.where})"
        if kept and template not in pairs:
            self._leave_out(pairs, f"{kept}, and the template has none")
            return None
        if kept:
            self._leave_out({n: pair for n, pair in pairs.items() if n != template}, f"the template's is kept: {kept}")
            return self._copied(key, template, pairs[template], kept)
        shapes = {pair.shape: n for n, pair in pairs.items()}
        if len(shapes) > 1 or len({(pair.embedding, pair.transposed) for pair in pairs.values()}) > 1:
            listed = ", ".join(f"'{self.opened.labels[n]}' is {list(shape)}" for shape, n in shapes.items())
            self.problems.append(RecipeError(f"{key}: {listed} (out, in). These adapters are not of one base"))
            return None
        reason = (
            ""
            if len(pairs) == len(self.opened.adapters)
            else (
                f"only {len(pairs)} of {len(self.opened.adapters)} adapters have it: "
                + ", ".join(self.opened.labels[n] for n in pairs)
            )
        )
        setting = choice.setting.of(list(pairs))
        if len(pairs) == 1 and _is_identity(setting):
            place, pair = next(iter(pairs.items()))
            if pair.rank <= (setting.parameters.get("rank") or pair.rank):
                return self._copied(key, place, pair, reason or "one adapter at weight 1")
        return self._merged(key, pairs, setting, reason)

    def _merged(self, key: str, pairs: Mapping[int, Pair], setting: Setting, reason: str) -> PairStep:
        first = pairs.get(self.opened.template) or next(iter(pairs.values()))
        ranks = [pair.rank for pair in pairs.values()]
        method, wanted = setting.method, setting.parameters.get("rank")
        apart = setting.parameters.get("space") == "factors" or (
            method == "robustmerge" and setting.parameters["compose"] == "factors"
        )
        if (apart or method == "robustmerge") and len(set(ranks)) > 1:
            listed = ", ".join(f"{pair.rank} '{self.opened.labels[n]}'" for n, pair in pairs.items())
            hint = "use another method" if method == "robustmerge" else "say space: delta, knots or core"
            self.problems.append(
                RecipeError(f"{key}: {method} joins factor with factor and the ranks differ: {listed}; {hint}")
            )
        whole = sum(ranks) if method in _KEEPS_RANK and not apart else max(ranks)
        most = min(sum(ranks), *first.shape) if not apart and method not in _KEEPS_RANK else whole
        rank = min(wanted, most) if wanted else min(whole, most) if method not in _KEEPS_RANK else whole
        scaling = first.scaling
        if alpha_of(scaling, rank) is None or (rank != first.rank and not float(scaling * rank).is_integer()):
            scaling = 1.0
        dtypes = (self.dtype or first.a.dtype, self.dtype or first.b.dtype)
        if setting not in self.settings:
            self.settings.append(setting)
        reads = tuple(_read(n, pair) for n, pair in pairs.items())
        number = self.settings.index(setting)
        return PairStep(
            first.module, key, "merged", number, reads, first.shape, rank, scaling, dtypes, first.embedding, reason
        )

    def _copied(self, key: str, place: int, pair: Pair, reason: str) -> PairStep:
        dtypes = (pair.a.dtype, pair.b.dtype)
        return PairStep(
            pair.module, key, "copied", None, (_read(place, pair),), pair.shape, pair.rank, pair.scaling, dtypes,
            pair.embedding, reason,
        )  # fmt: skip

    def _leave_out(self, pairs: Mapping[int, Pair], reason: str) -> None:
        for place, pair in pairs.items():
            self.left_out += [LeftOut(place, entry.name, reason) for entry in (pair.a, pair.b, pair.bias) if entry]

    def _check_globs(self, held: Mapping[str, object]) -> None:
        names = [*held, *(f"{key}.weight" for key in held)]
        names += [self.opened.key(name) for adapter in self.opened.adapters for name in adapter.extras]
        globs = [("exclude", glob) for glob in self.recipe.exclude]
        globs += [("overrides", choice.match) for choice in self.choices if choice.match]
        for where, glob in globs:
            if names and not any(matches(name, glob) for name in names):
                self.problems.append(
                    RecipeError(
                        f"recipe: {where}: '{glob}' matches no module or weight of the adapters, such as {names[0]}"
                    )
                )

    def _check_overlap(self, held: Mapping[str, Mapping[int, Pair]]) -> None:
        """Adapters that share no module with the others are of another model, or named by another layout."""
        count = len(self.opened.adapters)
        for place in range(count):
            own = [key for key, pairs in held.items() if place in pairs]
            if count > 1 and own and all(len(held[key]) == 1 for key in own):
                other = next((key for key, pairs in held.items() if place not in pairs), None)
                if other is not None:
                    self.problems.append(
                        RecipeError(
                            f"'{self.opened.labels[place]}' has no module in common with the other adapters (it has "
                            f"{own[0]}, they have {other}). They are of different models, or named by different "
                            "layouts: then say base_model, a local folder, so that its family is known"
                        )
                    )


def _read(place: int, pair: Pair) -> PairRead:
    return PairRead(place, pair.a.name, pair.b.name, pair.bias.name if pair.bias else "", pair.rank, pair.scaling)


def _is_identity(setting: Setting) -> bool:
    """Whether a method, given a single model, gives it back."""
    said = setting.parameters
    if setting.method == "robustmerge" or "weight" not in said:
        return False
    (weight,) = said["weight"]
    (density,) = said.get("density", (1.0,))
    normalized = said.get("normalize") in (True, "weight") and weight > 0
    return (weight == 1 or normalized) and density == 1 and said.get("scale", 1.0) == 1
