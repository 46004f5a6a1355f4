"""Decide the fate of every tensor: recipe and headers in, plan out; nothing here reads a value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from polymerge.dtypes import MERGEABLE, dtype_code
from polymerge.errors import PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.mapping import Read, Rows
from polymerge.methods.table import COPY, METHODS
from polymerge.planning.data import LeftOut, Piece, Plan, Step
from polymerge.planning.fit import VOCABULARY, Misfits, joinable
from polymerge.planning.inputs import (
    EMBEDDING,
    HEAD,
    Model,
    Models,
    labels_of,
    open_models,
    own_name,
    part_of,
    sources_of,
)
from polymerge.planning.overrides import Choice, choices_of
from polymerge.recipe import Recipe, parse_recipe, recipe_dict

__all__ = ["make_plan"]


def make_plan(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Plan:
    """Plan a merge from a recipe and the headers of the checkpoints it names.

    source   a recipe file, a mapping of the same form, or a `Recipe`

    raises Refused with every problem of the recipe, of the checkpoints, and of how they fit together.
    """
    problems: list[PolymergeError] = []
    recipe = source if isinstance(source, Recipe) else parse_recipe(source, problems)
    models = open_models(recipe, problems)
    if models is not None:
        models = _without_base(recipe, models)
    own = models.own if models is not None else tuple(range(len(recipe.models)))
    named = labels_of(sources_of(recipe))
    labels = [named[entry.model] for entry in recipe.models]
    choices = choices_of(recipe, [labels[place] for place in own], [recipe.models[place] for place in own], problems)
    if models is None or not models.merged:
        refuse_if_any(problems or [RecipeError("recipe: models names nothing but the base")])
        raise AssertionError("unreachable: a recipe without models is a problem")
    plan = _Planner(recipe, models, choices, problems).plan()
    refuse_if_any(problems)
    return plan


def _without_base(recipe: Recipe, models: Models) -> Models:
    """Drop the base from models where it stands among them, as mergekit's recipes have it: its delta is zero."""
    if METHODS[recipe.merge_method].on != "deltas" or models.base is None:
        return models
    kept = [
        (place, model)
        for place, model in zip(models.own, models.merged, strict=True)
        if model is not models.base or "weight" in recipe.models[place].parameters
    ]
    return Models(
        models.inputs,
        models.template,
        tuple(model for _, model in kept),
        tuple(place for place, _ in kept),
        models.base,
    )


class _Planner:
    """The state while a plan is made: what was decided, what is wrong, what was used."""

    def __init__(
        self, recipe: Recipe, models: Models, choices: Sequence[Choice], problems: list[PolymergeError]
    ) -> None:
        self.recipe, self.models, self.choices, self.problems = recipe, models, choices, problems
        self.template = models.template
        self.base = models.base if any(METHODS[choice.setting.method].on == "deltas" for choice in choices) else None
        self.readers = models.merged if self.base is None else (*models.merged, self.base)
        self.misfits = Misfits()
        self.warnings: list[str] = []
        self.reasons: dict[tuple[str, str], str] = {}
        self.settings = list(dict.fromkeys(choice.key for choice in choices if choice.setting.method != COPY))
        self.parts = self._parts()
        self.dtype = dtype_code(recipe.dtype) if recipe.dtype else None
        self.canonical_of = {
            expr.name: canonical
            for canonical, expr in self.template.tensors.items()
            if isinstance(expr, Read) and canonical not in self.template.borrowed
        }

    def plan(self) -> Plan:
        for model in dict.fromkeys(self.readers):
            if model is not self.template:
                warning = joinable(self.template, model, self.parts, self.misfits, self.problems)
                self.warnings += [warning] if warning else []
        self._check_globs()
        comparable = all(model.generic == self.template.generic for model in self.readers)
        steps = tuple(self._step(name) for name in self.template.entries) if comparable else ()
        if comparable:
            self._note_extras()
        for model in dict.fromkeys((self.template, *self.readers)):
            for name, why in model.checkpoint.skipped.items():
                self.warnings.append(f"'{model.label}': '{name}' in its file is left out: {why}")
        self.problems.extend(self.misfits.problems(self.template.label))
        if self.template.generic and (self.misfits.missing or self.misfits.extra):
            self.problems.append(
                RecipeError(
                    "these models' families are not known and their tensor names differ, so nothing says which belong "
                    "together: add a table for each to src/polymerge/families/, or say `family:` beside a model whose "
                    "names one of `polymerge families` has"
                )
            )
        if comparable and not self.problems and not any(step.fate == "merged" for step in steps):
            self.problems.append(RecipeError("nothing would be merged: every tensor of the template is a copy"))
        inputs = tuple(dict.fromkeys((self.template, *self.readers)))
        by_key = {choice.key: choice.setting for choice in self.choices}
        draws = any(METHODS[setting.method].random for setting in by_key.values())
        return Plan(
            recipe=recipe_dict(self.recipe),
            inputs=tuple(model.summary() for model in inputs),
            template=inputs.index(self.template),
            models=tuple(inputs.index(model) for model in self.models.merged),
            places=self.models.own if draws else tuple(range(len(self.models.own))),
            base=None if self.base is None else inputs.index(self.base),
            seed=self.recipe.seed,
            settings=tuple(by_key[key] for key in self.settings),
            steps=steps,
            left_out=self._left_out(inputs, steps),
            warnings=tuple(dict.fromkeys((*self.warnings, *self._notes()))),
        )

    def _parts(self) -> frozenset[str] | None:
        """The parts that are merged; None where names have no parts because the family is not known."""
        if self.template.generic:
            if self.recipe.parts is not None:
                self.problems.append(
                    RecipeError("parts: the template's family is not known, so its tensors have no parts; use exclude")
                )
            return None
        common = frozenset.intersection(self.template.parts, *(model.parts for model in self.readers))
        if self.recipe.parts is None:
            return common
        merged = set(self.recipe.parts)
        for part in self.recipe.parts:
            lacking = [model.label for model in (self.template, *self.readers) if part not in model.parts]
            for label in dict.fromkeys(lacking) if not any(model.generic for model in self.readers) else ():
                self.problems.append(RecipeError(f"parts: '{label}' has no part '{part}'"))
                merged.discard(part)  # said once, and not of each of its tensors
        return frozenset(merged)

    def _step(self, name: str) -> Step:
        """The fate of one tensor of the template, by its own name."""
        entry = self.template.entries[name]
        canonical = self.canonical_of.get(name, name)
        if canonical == HEAD and self.template.ties_head:
            canonical = EMBEDDING  # stored twice, one tensor once it is loaded: both have to come out the same

        def copy(reason: str) -> Step:
            return Step(name, canonical, "copied", entry.dtype, entry.dtype, entry.shape, reason)

        first = self.template.checkpoint.aliases.get(name)
        if first is not None and self.template.ties_head:
            return Step(
                name, canonical, "tied", entry.dtype, entry.dtype, entry.shape, f"tied to {first}", same_as=first
            )
        if name in self.template.buffers:
            return copy("a buffer that is computed from the config, never merged")
        if canonical not in self.template.tensors:
            return copy("no rule explains its name")  # a problem already, said by the mapping
        if self._excluded(canonical):
            return copy("excluded by the recipe")
        if self.parts is not None and part_of(canonical) not in self.parts:
            return copy(f"part {part_of(canonical)} is not merged")
        choice = next(choice for choice in self.choices if choice.covers(canonical))
        if choice.setting.method == COPY:
            return copy(f"copied by the recipe ({choice.where})")
        return self._merge(name, canonical, choice)

    def _merge(self, name: str, canonical: str, choice: Choice) -> Step:
        entry = self.template.entries[name]
        deltas = METHODS[choice.setting.method].on == "deltas"
        readers = self.readers if deltas else self.models.merged
        rows = total = entry.shape[0] if entry.shape else 1
        reason, fits = "", True
        for model in dict.fromkeys((self.template, *readers)):
            if canonical not in model.tensors:
                self.misfits.note_missing(model, canonical)
                fits = False
            elif model.entries[own_name(model.tensors[canonical])].dtype not in MERGEABLE:
                self.misfits.note_dtype(model, canonical)
                fits = False
            elif model.shape(canonical) != entry.shape:
                theirs = model.shape(canonical)
                if canonical not in VOCABULARY or theirs[1:] != entry.shape[1:]:
                    self.misfits.note_shape(model, self.template, canonical)
                    fits = False
                    continue
                rows = min(rows, theirs[0])
                reason = f"{canonical}: '{model.label}' has {theirs[0]} rows, template '{self.template.label}' {total}"
        if not fits or (reason and self.recipe.vocab == "template"):
            if reason:
                self.warnings.append(
                    f"{reason}: vocabularies differ, so the template's is kept (vocab: overlap merges)"
                )
            return Step(name, canonical, "copied", entry.dtype, entry.dtype, entry.shape, "vocabularies differ")
        pieces = [self._piece(canonical, (0, rows), choice, readers, deltas)]
        if rows < total:
            pieces.append(Piece(canonical, (rows, total)))
            reason = f"rows {rows} to {total} are the template's"
        return Step(
            name, canonical, "merged", self.dtype or entry.dtype, entry.dtype, entry.shape, reason, tuple(pieces)
        )

    def _piece(
        self, canonical: str, rows: tuple[int, int], choice: Choice, readers: Sequence[Model], deltas: bool
    ) -> Piece:
        exprs = []
        for model in readers:
            expr = model.tensors[canonical]
            shape = model.shape(canonical)
            exprs.append(expr if not shape or shape[0] == rows[1] else Rows(expr, *rows))
        base = exprs.pop() if deltas and self.base is not None else None  # without one it is refused already
        return Piece(canonical, rows, self.settings.index(choice.key), tuple(exprs), base)

    def _excluded(self, canonical: str) -> bool:
        return any(fnmatchcase(canonical, glob) for glob in self.recipe.exclude)

    def _check_globs(self) -> None:
        every = {name for model in (self.template, *self.readers) for name in model.tensors} | {EMBEDDING, HEAD}
        for where, glob in [
            *(("exclude", glob) for glob in self.recipe.exclude),
            *(("overrides", choice.match) for choice in self.choices if choice.match),
        ]:
            if not any(fnmatchcase(name, glob) for name in every):
                hint = did_you_mean(glob, every)
                self.problems.append(
                    RecipeError(
                        f"recipe: {where}: '{glob}' matches no tensor; globs are matched against whole canonical names"
                        f"{f'.{hint}' if hint.startswith(' Did') else f', such as {min(every)}'}"
                    )
                )
        for choice in self.choices:
            if choice.layers and choice.layers[1] >= self.template.depth:
                has = f"layers 0-{self.template.depth - 1}" if self.template.depth else "no text layers"
                self.problems.append(
                    RecipeError(
                        f"recipe: {choice.where}: layers {choice.layers[0]}-{choice.layers[1]}, but template "
                        f"'{self.template.label}' has {has}"
                    )
                )

    def _note_extras(self) -> None:
        """Find what a model has in a merged part and the template has not; it would be lost."""
        for model in dict.fromkeys(self.readers):
            for name in model.tensors:
                if name in self.template.tensors or name in model.borrowed:
                    continue
                if self.parts is not None and part_of(name) not in self.parts:
                    continue
                own = own_name(model.tensors[name])
                if self._excluded(name):
                    self.reasons[model.label, own] = "excluded by the recipe"
                elif model is self.base:
                    self.reasons[model.label, own] = "the template has no such tensor"
                else:
                    self.misfits.note_extra(model, name)

    def _left_out(self, inputs: Sequence[Model], steps: Sequence[Step]) -> tuple[LeftOut, ...]:
        """Every tensor of an input that no step reads, each with its reason."""
        used: set[tuple[int, str]] = {(inputs.index(self.template), step.name) for step in steps}
        why: dict[str, str] = {step.canonical: step.reason for step in steps if step.fate != "merged"}
        indexes = [inputs.index(model) for model in self.models.merged]
        for step in steps:
            for piece in step.pieces:
                if piece.setting is None:
                    continue
                reads = list(zip(indexes, piece.reads, strict=True))
                reads += [(inputs.index(self.base), piece.base)] if self.base and piece.base else []
                used.update((place, own_name(expr)) for place, expr in reads)
        left_out = []
        for place, model in enumerate(inputs):
            canonical = {own_name(expr): name for name, expr in model.tensors.items() if name not in model.borrowed}
            for own in model.entries:
                if (place, own) in used:
                    continue
                name = canonical.get(own, own)
                if own in model.buffers:
                    reason = "a buffer that is computed from the config, never merged"
                elif name in why:
                    reason = f"the template's is kept: {why[name]}"
                elif name == HEAD and self.template.ties_head:
                    reason = "the template ties its head to its embedding"
                elif self.parts is not None and part_of(name) not in self.parts:
                    reason = f"part {part_of(name)} is not merged"
                else:
                    reason = self.reasons.get((model.label, own), "the method does not read it")
                left_out.append(LeftOut(place, own, reason))
        return tuple(left_out)

    def _notes(self) -> list[str]:
        """What a person should know although nothing forbids it."""
        notes = []
        if self.template.generic:
            notes.append("family: generic (no table covers this model_type): tensors are joined by identical names")
        if self.models.base is not None and self.base is None:
            notes.append(f"base_model '{self.models.base.label}' is not read: {self.recipe.merge_method} needs none")
        said = [self.recipe.parameters, *(entry.parameters for entry in self.recipe.models)]
        said += [override.parameters for override in self.recipe.overrides]
        if any("int8_mask" in parameters for parameters in said):
            notes.append("int8_mask has no effect")
        for model in self.models.merged:
            if self.template.ties_head and HEAD in model.tensors and not model.ties_head:
                notes.append(f"'{model.label}' has a head of its own, which the tied template '{self.template.label}' "
                             "has no place for")  # fmt: skip
        if self.template.generic is False and self.template not in self.models.merged:
            notes.append(f"template '{self.template.label}' gives the layout only: it is not among models")
        return notes
