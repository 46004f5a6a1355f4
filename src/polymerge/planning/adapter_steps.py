"""The steps of a plan that merges adapters: one per LoRA module of any adapter, then one per full weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.pairs import Pair
from polymerge.dtypes import dtype_code
from polymerge.errors import RecipeError, refuse
from polymerge.families.expressions import Concat, Read, shape_of
from polymerge.families.rules import text_layer
from polymerge.methods.table import METHODS
from polymerge.planning.adapter_inputs import Opened
from polymerge.planning.adapter_places import Parameters
from polymerge.planning.model import VOCABULARY, Model
from polymerge.planning.module_steps import (
    divides_by_nothing,
    is_dense,
    is_identity,
    stem,
    step_of,
    swapped_in,
    wrapped,
)
from polymerge.planning.peft_config import alpha_of
from polymerge.planning.plan import PREFIX, LeftOut, Lora, Piece, Step
from polymerge.recipe.depth import first_value
from polymerge.recipe.overrides import Choice, matches
from polymerge.recipe.parameters import Setting, resolve
from polymerge.recipe.recipe import Recipe

__all__ = ["AdapterSteps"]

_TOKENS = " (trained tokens)"
"""Suffix of the canonical name of an embedding of which only some rows were trained."""

Held = Mapping[int, tuple[str, TensorInfo]]
"""A full weight by the index of each adapter that has it: its name in the output, and its location."""


class AdapterSteps:
    """Decides the fate of modules and full weights; refuses what does not fit.

    base  the base model, if full weights are merged as deltas from it

    Beside the steps there are `settings`, which their pieces point into, `left_out`, `warnings`, and `said`, what the
    output's config says otherwise than the template's.
    """

    def __init__(self, recipe: Recipe, opened: Opened, choices: Sequence[Choice], base: Model | None) -> None:
        self._recipe, self._opened, self._choices, self._base = recipe, opened, choices, base
        self.settings: list[Setting] = []
        self.left_out: list[LeftOut] = []
        self.warnings: list[str] = []
        self.said: dict[str, str] = {}
        self._swapped: dict[int, bool | None] = {}
        self._dtype = dtype_code(recipe.dtype) if recipe.dtype else None
        places = range(len(opened.adapters))
        self._order = [opened.template, *(place for place in places if place != opened.template)]

    # --- modules: factors

    def modules(self) -> list[Step]:
        """One step for each module that any adapter has factors for, the template's first."""
        held: dict[str, dict[int, Pair]] = defaultdict(dict)
        for place in self._order:
            for pair in self._opened.adapters[place].pairs.values():
                held[self._opened.module(place, pair.module)][place] = pair
        self._check_globs(held)
        self._depth = max((layer + 1 for key in held if (layer := text_layer(f"{key}.weight")) is not None), default=0)
        if self._base is not None:  # whose layers may be more than those that the adapters change
            self._depth = self._base.layers
        self._swapped = self._ways(held)
        steps = [step for key, pairs in held.items() if (step := self._module(key, dict(sorted(pairs.items()))))]
        self._check_overlap(held)
        return [*wrapped(steps)]

    def _ways(self, held: Mapping[str, Mapping[int, Pair]]) -> dict[int, bool | None]:
        """Whether the factors of experts in each adapter are to be swapped, so that all lie as PEFT has them today."""
        natural: dict[str, tuple[int, ...]] = {}
        if self._base is not None:
            parameters = Parameters(self._base)
            readings = [parameters.reading(adapter) for adapter in self._opened.adapters]
            for key, pairs in held.items():
                for place, pair in pairs.items():
                    if not pair.experts:
                        continue
                    if there := parameters.places_of_experts(pair.module, pair.experts, readings[place]):
                        lying = Concat(tuple(parameters.read(block) for block in there[0]))
                        natural[key] = shape_of(lying, self._base.shapes)[-2:]
        ways = swapped_in(held, natural)
        if ways and set(ways.values()) == {None}:
            self.warnings.append(
                "the factors of experts lie as PEFT before 0.19 has them, and so do the output's, which later ones "
                "cannot load. Say base_model, a local folder, to have them as PEFT has them today"
            )
            return dict.fromkeys(ways, False)
        if ways.get(self._opened.template):
            self.said = {"peft_version": "0.19.0"}
        return ways

    def _module(self, key: str, pairs: Mapping[int, Pair]) -> Step | None:
        template, name = self._opened.template, f"{key}.weight"
        choice = next(choice for choice in self._choices if choice.covers(name) or choice.covers(key))
        kept = ""
        if any(matches(name, glob) or matches(key, glob) for glob in self._recipe.exclude):
            kept = "excluded by the recipe"
        elif choice.setting.row.copies:
            kept = f"copied by the recipe ({choice.where})"
        if kept:
            others = {place: pair for place, pair in pairs.items() if place != template}
            why = f"the template's is kept: {kept}" if template in pairs else f"{kept}, and the template has none"
            for place, pair in others.items():
                self.left_out += [LeftOut(place, one.name, why) for one in (pair.a, pair.b, pair.bias) if one]
            return self._copied(key, template, pairs[template], kept) if template in pairs else None
        labels = self._opened.labels
        first = pairs.get(template) or next(iter(pairs.values()))
        swapped = {place: self._swapped[place] if pair.experts else False for place, pair in pairs.items()}
        if None in swapped.values():
            refuse(
                RecipeError(
                    f"{key}: PEFT before 0.19 stored factors of experts the other way round, and nothing tells whether "
                    f"those of '{labels[next(place for place, way in swapped.items() if way is None)]}' lie so. Say "
                    "base_model, a local folder, or write BASE+ADAPTER to merge full models"
                )
            )
            return None
        shapes = {pair.shape[:: -1 if swapped[place] else 1]: place for place, pair in pairs.items()}
        if len(shapes) > 1 or len({(pair.embedding, pair.experts) for pair in pairs.values()}) > 1:
            listed = ", ".join(f"'{labels[place]}' is {list(shape)}" for shape, place in shapes.items())
            refuse(RecipeError(f"{key}: {listed} (out, in). These adapters have different bases"))
            return None
        reason = ""
        if len(pairs) < len(labels):
            having = ", ".join(labels[place] for place in pairs)
            reason = f"only {len(pairs)} of {len(labels)} adapters have it: {having}"
        setting = choice.at(name, first.module, self._depth).of(list(pairs))
        if reason and setting.divides_by_nothing:
            refuse(divides_by_nothing(key, reason))
            return None
        if len(pairs) == 1 and is_identity(setting):
            ((place, pair),) = pairs.items()
            if pair.rank <= (setting.parameters.get("rank") or pair.rank):
                return self._copied(key, place, pair, reason or "one adapter at weight 1")
        rank = self._rank(key, pairs, setting)
        whole = rank == first.rank or float(first.scaling * rank).is_integer()
        scaling = first.scaling if first.scaling and alpha_of(first.scaling, rank) is not None and whole else 1.0
        lora = Lora(
            rank,
            scaling,
            (self._dtype or first.a.dtype, self._dtype or first.b.dtype),
            any(pair.bias for pair in pairs.values()),
            first.embedding,
            first.experts,
        )
        return step_of(first.module, key, lora, pairs, reason, self._number(setting), swapped)

    def _copied(self, key: str, place: int, pair: Pair, reason: str) -> Step:
        dtypes = (pair.a.dtype, pair.b.dtype)
        lora = Lora(pair.rank, pair.scaling, dtypes, pair.bias is not None, pair.embedding, pair.experts)
        return step_of(pair.module, key, lora, {place: pair}, reason, swapped={place: self._swapped.get(place)})

    def _rank(self, key: str, pairs: Mapping[int, Pair], setting: Setting) -> int:
        """The rank of a merged module: the recipe's, limited to the rank that the factors can fill."""
        ranks = [pair.rank for pair in pairs.values()]
        method, row, wanted = setting.method, setting.row, setting.parameters.get("rank")
        apart = setting.joins_factors
        if (apart or row.equal_ranks) and len(set(ranks)) > 1:
            listed = ", ".join(f"{pair.rank} '{self._opened.labels[place]}'" for place, pair in pairs.items())
            hint = "use another method" if row.equal_ranks else "say space: delta, knots or core"
            refuse(RecipeError(f"{key}: {method} joins factor with factor and the ranks differ: {listed}; {hint}"))
        whole = sum(ranks) if row.adds_ranks and not apart else max(ranks)
        if apart or row.adds_ranks:
            most = whole
        else:  # an update that was merged entry by entry may have any rank
            most = min(*next(iter(pairs.values())).shape, *([] if is_dense(setting) else [sum(ranks)]))
        if wanted and wanted > most:
            self.warnings.append(f"rank: {wanted} exceeds what some modules' factors can fill; these get a lower rank")
        return min(wanted or whole, most)

    def _number(self, setting: Setting) -> int:
        if setting not in self.settings:
            self.settings.append(setting)
        return self.settings.index(setting)

    def _check_globs(self, held: Mapping[str, object]) -> None:
        modules = [*held, *(f"{key}.weight" for key in held)]
        full = [
            self._opened.key(place, name) for place in self._order for name in self._opened.adapters[place].non_lora
        ]
        every = [*modules, *full]
        globs = [("exclude", glob, every, "module or weight") for glob in self._recipe.exclude]
        globs += [("overflow", glob, every, "module or weight") for glob in self._recipe.overflow]
        globs += [("overrides", choice.match, modules, "module") for choice in self._choices if choice.match]
        for where, glob, names, kind in globs:
            if not any(matches(name, glob) for name in names):
                found = f", such as {names[0]}" if names else ""
                hint = " (parameter extra says what becomes of full weights)" if where == "overrides" else ""
                refuse(RecipeError(f"recipe: {where}: '{glob}' matches no {kind} by its canonical name{found}{hint}"))
        depth = None if self._base is None else self._base.layers
        if self._recipe.layers is not None and depth not in (None, self._recipe.layers):
            refuse(
                RecipeError(
                    f"recipe: layers: it counts on {self._recipe.layers} layers, base_model has {depth}. Layers stay "
                    "in place here: none can be dropped or added"
                )
            )
        layers = {layer for key in held if (layer := text_layer(f"{key}.weight")) is not None}
        for choice in self._choices:
            if choice.schedule is not None and choice.schedule.graded and not layers:
                refuse(
                    RecipeError(
                        f"recipe: {choice.where}: numbers that change from layer to layer, and the names of the "
                        "adapters' modules are of no known family. Say base_model, a local folder, or give one number"
                    )
                )
            first, last = choice.layers or (0, 0)
            if choice.layers and not any(first <= layer <= last for layer in layers):
                has = "" if layers else ", whose names are of no known family; then say base_model, a local folder"
                where = f"recipe: {choice.where}: layers {first}-{last}"
                refuse(RecipeError(f"{where} hold no module of the adapters{has}"))

    def _check_overlap(self, held: Mapping[str, Mapping[int, Pair]]) -> None:
        """Refuse adapters whose layers are elsewhere than the others': another model, or other names.

        Adapters of different modules in the same layers belong together.
        """
        for place, label in enumerate(self._opened.labels):
            own = {stem(key): key for key, pairs in held.items() if place in pairs}
            others = {stem(key): key for key, pairs in held.items() if set(pairs) - {place}}
            for stems in (own, others):
                stems.pop("", None)
            if own and others and not set(own) & set(others):
                refuse(
                    RecipeError(
                        f"'{label}' has no module in common with the other adapters (it has "
                        f"{next(iter(own.values()))}, they have {next(iter(others.values()))}). They are of different "
                        "models, or named by different layouts: then say base_model, a local folder, so that its "
                        "family is known"
                    )
                )

    # --- full weights

    def full_weights(self, extra: str, adapted: Collection[str]) -> list[Step]:
        """One step for each full weight that any adapter has, such as a projector's.

        extra    mean, released (the mean, rounded to the stored dtype after each step), first (the template's, or of
                 the first adapter that has it), or a method, with the recipe's parameters
        adapted  the canonical names of the modules that have factors in the output
        """
        held: dict[str, dict[int, tuple[str, TensorInfo]]] = defaultdict(dict)
        for place in self._order:
            adapter = self._opened.adapters[place]
            for parameter, entry in adapter.non_lora.items():
                module, _, end = parameter.rpartition(".")
                # PEFT keeps what it adds factors to in `base_layer`
                name = f"{module}.base_layer.{end}" if self._opened.module(place, module) in adapted else parameter
                held[self._opened.key(place, parameter)][place] = f"{PREFIX}{name}", entry
            for parameter, (_, entry) in adapter.tokens.items():
                name = f"{PREFIX}{parameter.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
                held[f"{self._opened.key(place, parameter)}{_TOKENS}"][place] = name, entry
        self._check_tokens()
        if not held:
            return []
        setting = self._setting_of_full_weights(extra)
        return [step for key, found in held.items() if (step := self._full_weight(key, found, extra, setting))]

    def _setting_of_full_weights(self, extra: str) -> Setting:
        row, labels = METHODS.get(extra), self._opened.labels
        if row is None:
            return Setting("linear", {"weight": (1.0,) * len(labels), "normalize": True})
        known = {parameter.name for parameter in row.parameters}
        said, *own = (
            {name: first_value(value) for name, value in given.items() if name in known}
            for given in (self._recipe.parameters, *(entry.parameters for entry in self._recipe.models))
        )
        return resolve(extra, [("recipe: parameters", said)], own, labels)

    def _full_weight(self, key: str, found: Held, extra: str, setting: Setting) -> Step | None:
        labels, template, places = self._opened.labels, self._opened.template, sorted(found)
        first = template if template in found else places[0]
        name, entry = found[first]
        shapes = {held.shape for _, held in found.values()}
        if len(shapes) > 1:
            refuse(self._unequal(key, found))
            return None
        rows = ((0, entry.shape[0] if entry.shape else 1),)
        some = "" if len(places) == len(labels) else f"only {', '.join(labels[n] for n in places)} of the adapters"
        deltas = extra in METHODS and METHODS[extra].on == "deltas"
        excluded = any(matches(key, glob) for glob in self._recipe.exclude)
        if excluded and template not in found:
            why = "excluded by the recipe, and the template has none"
            self.left_out += [LeftOut(place, found[place][1].name, why) for place in places]
            return None
        if excluded or extra == "first" or len(places) == 1 or (key.endswith(_TOKENS) and deltas):
            why = f"that of '{labels[first]}' is kept: {'excluded by the recipe' if excluded else f'extra: {extra}'}"
            self.left_out += [LeftOut(place, found[place][1].name, why) for place in places if place != first]
            piece = Piece(key, rows, reads=(Read(entry.name),), inputs=(first,))
            reason = f"of '{labels[first]}'" + (f": {some}" if some else "")
            return Step(name, key, "copied", entry.dtype, entry.dtype, entry.shape, reason, (piece,))
        own = setting.of(places)
        if own.divides_by_nothing and some:
            refuse(divides_by_nothing(key, some))
            return None
        if extra == "released":
            own = Setting("linear", {**own.parameters, "stepwise": entry.dtype})
        number, origin = self._number(own), None
        if deltas and self._base is not None:
            origin = self._base.expr_of(key)
            if origin is None or shape_of(origin, self._base.shapes) != entry.shape:
                refuse(RecipeError(f"{key}: base_model '{self._base.label}' has no such tensor of this shape"))
                return None
        reads = tuple(Read(found[place][1].name) for place in places)
        piece = Piece(key, rows, number, reads, origin, tuple(places))
        return Step(name, key, "merged", self._dtype or entry.dtype, entry.dtype, entry.shape, some, (piece,))

    def _unequal(self, key: str, found: Held) -> RecipeError:
        shapes = {place: entry.shape for place, (_, entry) in sorted(found.items())}
        way = "These adapters have different bases"
        if key in VOCABULARY and len({shape[1:] for shape in shapes.values()}) == 1:
            way = (
                "Their vocabularies were resized apart: fold each into its base (BASE+ADAPTER), and merge the models "
                "with vocab: by-token"
            )
        listed = ", ".join(f"'{self._opened.labels[place]}' is {list(shape)}" for place, shape in shapes.items())
        return RecipeError(f"{key}: {listed}. {way}")

    def _check_tokens(self) -> None:
        """Refuse to merge trained token rows if the adapters trained different tokens."""
        seen: dict[str, tuple[str, tuple[int, ...]]] = {}
        for label, adapter in zip(self._opened.labels, self._opened.adapters, strict=True):
            for parameter, (indices, _) in adapter.tokens.items():
                first, before = seen.setdefault(parameter, (label, indices))
                if before != indices:
                    refuse(
                        RecipeError(
                            f"{parameter}: '{first}' trained tokens {list(before)[:5]}, '{label}' "
                            f"{list(indices)[:5]}, which differ. Fold the adapters and merge the models"
                        )
                    )
