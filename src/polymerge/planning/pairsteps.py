"""Decide what becomes of every pair of factors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from polymerge.checkpoints.adapter import Pair
from polymerge.dtypes import dtype_code
from polymerge.errors import PolymergeError, RecipeError
from polymerge.families.rules import text_layer
from polymerge.planning.adapter_inputs import Opened
from polymerge.planning.adapter_output import alpha_of
from polymerge.planning.pairs import PairRead, PairStep
from polymerge.planning.plan import LeftOut
from polymerge.recipe.overrides import Choice, matches
from polymerge.recipe.parameters import Setting
from polymerge.recipe.recipe import Recipe

__all__ = ["PairPlanner"]


class PairPlanner:
    """The state while pairs are planned: what was decided, what is wrong, what was left out."""

    def __init__(
        self, recipe: Recipe, opened: Opened, choices: Sequence[Choice], problems: list[PolymergeError]
    ) -> None:
        self.recipe, self.opened, self.choices, self.problems = recipe, opened, choices, problems
        self.settings: list[Setting] = []
        self.left_out: list[LeftOut] = []
        self.warnings: list[str] = []
        self.dtype = dtype_code(recipe.dtype) if recipe.dtype else None

    def steps(self) -> list[PairStep]:
        """A step for every module that any adapter has, those of the template first."""
        held: dict[str, dict[int, Pair]] = defaultdict(dict)
        order = [self.opened.template, *(n for n in range(len(self.opened.adapters)) if n != self.opened.template)]
        for place in order:
            for pair in self.opened.adapters[place].pairs.values():
                held[self.opened.key(place, f"{pair.module}.weight").removesuffix(".weight")][place] = pair
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
        elif choice.setting.row.copies:
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
        if reason and setting.divides_by_nothing:
            self.problems.append(
                RecipeError(
                    f"{key}: {reason}, and their weights add up to about 0: say normalize: false, or other weights"
                )
            )
            return None
        if len(pairs) == 1 and _is_identity(setting):
            place, pair = next(iter(pairs.items()))
            if pair.rank <= (setting.parameters.get("rank") or pair.rank):
                return self._copied(key, place, pair, reason or "one adapter at weight 1")
        return self._merged(key, pairs, setting, reason)

    def _merged(self, key: str, pairs: Mapping[int, Pair], setting: Setting, reason: str) -> PairStep:
        first = pairs.get(self.opened.template) or next(iter(pairs.values()))
        ranks = [pair.rank for pair in pairs.values()]
        method, row, wanted = setting.method, setting.row, setting.parameters.get("rank")
        apart = setting.joins_factors
        if (apart or row.equal_ranks) and len(set(ranks)) > 1:
            listed = ", ".join(f"{pair.rank} '{self.opened.labels[n]}'" for n, pair in pairs.items())
            hint = "use another method" if row.equal_ranks else "say space: delta, knots or core"
            self.problems.append(
                RecipeError(f"{key}: {method} joins factor with factor and the ranks differ: {listed}; {hint}")
            )
        whole = sum(ranks) if row.adds_ranks and not apart else max(ranks)
        dense = setting.parameters.get("space") == "delta" and not row.additive
        most = whole if apart or row.adds_ranks else min(*first.shape, *([] if dense else [sum(ranks)]))
        rank = min(wanted or whole, most)
        if wanted and rank < wanted:
            self.warnings.append(f"rank: {wanted} is more than there is to fill in some modules, which get less")
        scaling = first.scaling
        if (
            not scaling
            or alpha_of(scaling, rank) is None
            or (rank != first.rank and not float(scaling * rank).is_integer())
        ):
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
        modules = [*held, *(f"{key}.weight" for key in held)]
        adapters = enumerate(self.opened.adapters)
        full = [self.opened.key(place, name) for place, adapter in adapters for name in adapter.extras]
        globs = [("exclude", glob, [*modules, *full], "module or weight") for glob in self.recipe.exclude]
        globs += [("overrides", choice.match, modules, "module") for choice in self.choices if choice.match]
        for where, glob, names, kind in globs:
            if not any(matches(name, glob) for name in names):
                found = f", such as {names[0]}" if names else ""
                hint = " (parameter extra says what becomes of full weights)" if where == "overrides" else ""
                self.problems.append(
                    RecipeError(f"recipe: {where}: '{glob}' matches no {kind} by its canonical name{found}{hint}")
                )
        layers = {text_layer(f"{key}.weight") for key in held} - {None}
        for choice in self.choices:
            if choice.layers and not any(
                choice.layers[0] <= layer <= choice.layers[1] for layer in layers if layer is not None
            ):
                first, last = choice.layers
                has = "" if layers else ", whose names are of no known family; then say base_model, a local folder"
                self.problems.append(
                    RecipeError(f"recipe: {choice.where}: layers {first}-{last} hold no module of the adapters{has}")
                )

    def _check_overlap(self, held: Mapping[str, Mapping[int, Pair]]) -> None:
        """Adapters whose layers lie elsewhere than the others' are of another model, or named by another layout.

        Two that adapt different modules of the same layers belong together.
        """
        for place, label in enumerate(self.opened.labels):
            own = {_stem(key): key for key, pairs in held.items() if place in pairs}
            others = {_stem(key): key for key, pairs in held.items() if set(pairs) - {place}}
            for stems in (own, others):
                stems.pop("", None)
            if own and others and not set(own) & set(others):
                self.problems.append(
                    RecipeError(
                        f"'{label}' has no module in common with the other adapters (it has "
                        f"{next(iter(own.values()))}, they have {next(iter(others.values()))}). They are of different "
                        "models, or named by different layouts: then say base_model, a local folder, so that its "
                        "family is known"
                    )
                )


def _stem(module: str) -> str:
    """Where the layers lie that a module is in: its name up to the first number, nothing where it has none."""
    found = re.match(r"(.+?)\.[0-9]+(?:\.|$)", module)
    return found[1] if found else ""


def _read(place: int, pair: Pair) -> PairRead:
    return PairRead(place, pair.a.name, pair.b.name, pair.bias.name if pair.bias else "", pair.rank, pair.scaling)


def _is_identity(setting: Setting) -> bool:
    """Whether a method, given a single model, gives it back."""
    said = setting.parameters
    if "weight" not in said:
        return False
    (weight,) = said["weight"]
    (density,) = said.get("density", (1.0,))
    normalized = said.get("normalize") in (True, "weight") and weight > 0
    return (weight == 1 or normalized) and density == 1 and said.get("scale", 1.0) == 1
