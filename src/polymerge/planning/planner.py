"""Decide every tensor's fate: recipe and headers in, plan out; no values are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.folder import ADAPTER
from polymerge.dtypes import dtype_code
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.families.config import config_dtype
from polymerge.families.expressions import Ranges, names_read, rows_of
from polymerge.families.rules import PARTS, counterpart, without_branch
from polymerge.methods.own import MethodFiles, add_methods, check_methods, origins
from polymerge.methods.table import METHODS
from polymerge.planning.adapters import names_adapters, plan_adapters
from polymerge.planning.chat_template import chosen_chat_template
from polymerge.planning.companions import adapter_companions, files_left_out, tokenizer_companions, told_beside
from polymerge.planning.compatibility import config_warnings, merged_routers, other_lineages
from polymerge.planning.fit import (
    Misfits,
    common_parts,
    joinable,
    misnamed,
    needed_all_the_same,
    unmatched,
    unmatched_filters,
)
from polymerge.planning.inputs import Models, bases_among, labels_of, open_models
from polymerge.planning.matrix_costs import is_matrix
from polymerge.planning.model import EMBEDDING, HEAD, VOCABULARY, Model, own_name, part_of
from polymerge.planning.output_dtypes import stored_dtypes
from polymerge.planning.output_names import names_told
from polymerge.planning.plan import Companions, Fate, Piece, Plan, Step
from polymerge.planning.stage_plans import plan_stages
from polymerge.planning.tokenizer_source import output_vocabulary
from polymerge.planning.tokens import Tokens
from polymerge.planning.unused import UnusedTensors, notes, partly_kept
from polymerge.planning.vocabulary import Vocabularies
from polymerge.planning.written_plan import written_plan
from polymerge.recipe.overrides import Choice, choices_of, key_of, matches, rest_of, settings_of
from polymerge.recipe.parameters import Setting
from polymerge.recipe.parsing import as_recipe
from polymerge.recipe.recipe import ModelEntry, Recipe, recipe_dict
from polymerge.recipe.stages import sources_of

__all__ = ["make_plan"]


def make_plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    *,
    methods: MethodFiles = (),
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan a merge from a recipe and the headers of the checkpoints, or adapters, that it names.

    recipe   a file, mapping or `Recipe`; or a plan, also as JSON, which is returned as is
    methods  Python files with methods of the user's own, which are run; they stay known in this process
    opened   checkpoints that are already open, by their source in the recipe

    raises Refused with every problem of the recipe, of the models, and between them.
    """
    add_methods(methods)
    if isinstance(recipe, Plan):
        for one in (*recipe.stages, recipe):
            check_methods(one.methods, "this plan")
        return recipe
    if not isinstance(recipe, Recipe) and (written := written_plan(recipe)) is not None:
        return written
    with collecting(needed=True):
        plan = plan_stages(as_recipe(recipe), partial(_planned, opened or {}))
    if plan is None:  # with a recipe that was refused where it was parsed, for then that is no problem of its own
        raise RecipeError("recipe: no models could be read, so there is nothing to plan")
    return plan


def _planned(opened: Mapping[str, Checkpoint], recipe: Recipe, stages: Mapping[str, Checkpoint]) -> Plan | None:
    """Plan one recipe, without its earlier stages.

    stages  what these will write, by their names
    """
    of_adapters = not opened and names_adapters(recipe)
    with collecting() as problems:
        if of_adapters and (recipe.tokenizer_source is not None or recipe.chat_template is not None):
            refuse(
                RecipeError(
                    "recipe: tokenizer_source and chat_template are for checkpoints, and these models are adapters: "
                    "leave them out, or merge BASE+ADAPTER"
                )
            )
        plan = plan_adapters(recipe) if of_adapters else _plan_checkpoints(recipe, {**opened, **stages})
        if plan is not None and not (problems or plan.of_adapters or plan.changes or plan.renames):
            refuse(RecipeError("nothing would be merged: every tensor of the template would be copied"))
        return plan and replace(plan, methods=origins(setting.method for setting in plan.settings))
    return None


def _plan_checkpoints(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Plan | None:
    """Plan a merge of checkpoints; return None, with the problems refused, if there is nothing to plan."""
    recipe = _with_base(recipe)
    models = open_models(recipe, opened)
    named = labels_of(sources_of(recipe))
    labels = [named[entry.model] for entry in recipe.models]
    base = bases_among(recipe, models)
    choices = choices_of(recipe, labels, recipe.models, base)
    if models is None:
        return None
    models = _without_base(models, choices, base)
    if not models.merged:
        refuse(RecipeError("recipe: models lists only the base"))
        return None
    choices = [choice.of(models.own) for choice in choices]
    return _Planner(recipe, models, choices).plan()


def _with_base(recipe: Recipe) -> Recipe:
    """Add base_model as the second model to a recipe that names one model for a two-model method, as in mergekit."""
    wanted, base = METHODS[recipe.merge_method].models, recipe.base_model
    if base is None or wanted != len(recipe.models) + 1 or base in [entry.model for entry in recipe.models]:
        return recipe
    return replace(recipe, models=(*recipe.models, ModelEntry(base)))


def _without_base(models: Models, choices: Sequence[Choice], base: Collection[int]) -> Models:
    """Drop the base if it is listed among the models, as in mergekit's recipes: its delta is zero."""
    merging = [choice.setting for choice in choices if not choice.setting.row.copies]
    if not merging or not all(setting.on_deltas for setting in merging):
        return models
    own = tuple(place for place in models.own if place not in base)
    return replace(models, merged=tuple(models.merged[place] for place in own), own=own)


class _Planner:
    """The state of planning: decisions so far, misfits, and used tensors."""

    def __init__(self, recipe: Recipe, models: Models, choices: Sequence[Choice]) -> None:
        self.recipe, self.models, self.choices = recipe, models, choices
        self.template = models.template
        self.base = models.base if any(choice.setting.on_deltas for choice in choices) else None
        self.readers = models.merged if self.base is None else (*models.merged, self.base)
        self.inputs = tuple(dict.fromkeys((self.template, *self.readers)))
        self.misfits = Misfits()
        self.warnings = list(recipe.notes)
        self.settings = settings_of(choices, len(models.merged))
        self.parts = self._parts()
        self.dtype = dtype_code(recipe.dtype) if recipe.dtype else None
        # of a template in fp8, the rest of which is what its config says
        self.plain = "F16" if config_dtype(self.template.checkpoint.config) == "F16" else "BF16"
        tokens = Tokens()
        self.chosen = output_vocabulary(recipe, models, self.readers, tokens)
        self.keeper = (
            self.chosen.keeper if self.chosen is not None and self.chosen.brings(self.template) else self.template
        )
        self.vocabularies = Vocabularies(recipe.vocab, tokens, self.chosen, self.inputs, models.base)
        self.unused = UnusedTensors(self.template, self.parts)

    def plan(self) -> Plan:
        for model in dict.fromkeys(self.readers):
            if model is not self.template:
                joinable(self.template, model, self.parts, self.misfits)
        refuse(*unmatched(self.recipe, self.choices, self.template, self.readers))
        self.warnings += unmatched_filters(self.choices, self.template)
        refuse(*misnamed(self.template))
        refuse(*needed_all_the_same(self.template, self.readers))
        comparable = all(model.generic == self.template.generic for model in self.readers)
        # a head, say, that its adapter parts from the embedding has no tensor in the template, and one in the output
        names = [*self.template.written, *([self.template.parted_name] if self.template.parted_name else [])]
        steps = tuple(self._step(name) for name in names) if comparable else ()
        if comparable:
            self._note_extras()
            self._note_differences(steps)
        for model in self.inputs:
            self.warnings += files_left_out(model.label, model.checkpoint.folder, model.checkpoint.adapter)
        companions = self._companions()
        refuse(*self.misfits.problems(self.template.label))
        if self.template.generic and (self.misfits.missing or self.misfits.extra):
            refuse(
                RecipeError(
                    "these models' families are unknown and their tensor names differ, so they cannot be matched with "
                    "each other: set `missing: copy` to merge what they have in common and keep the template's rest, "
                    "or `family:` for a model whose names one of `polymerge families` has, or add a table for each to "
                    f"src/polymerge/families/tables/{self.template.why_generic}"
                )
            )
        config = self.template.checkpoint.config
        self.warnings += stored_dtypes(steps, config, self.dtype is not None).warnings(config, self.template.label)
        inputs = self.inputs
        settings = tuple(self.settings.values())
        draws = any(METHODS[setting.method].random for setting in settings)
        self.warnings += [] if self.chosen is None else self.chosen.warnings()
        chat_template, chat_label, unsaid = chosen_chat_template(self.recipe, self.models)
        self.warnings += unsaid
        beside, silent = told_beside(self.recipe, self.models, self.keeper, chat_label)
        self.warnings += silent
        self.warnings += names_told(self.template, self.recipe.names == "published")
        told = notes(self.recipe, self.models, self.base, settings, steps, inputs)
        return Plan(
            recipe=recipe_dict(self.recipe),
            inputs=tuple(model.summary() for model in inputs),
            template=inputs.index(self.template),
            models=tuple(inputs.index(model) for model in self.models.merged),
            places=self.models.own if draws else tuple(range(len(self.models.own))),
            base=None if self.base is None else inputs.index(self.base),
            seed=self.recipe.seed,
            settings=settings,
            steps=steps,
            left_out=self.unused.left_out(inputs, self.models.merged, self.base, steps),
            warnings=tuple(dict.fromkeys((*self.warnings, *told))),
            beside=beside,
            companions=companions,
            vocabulary=None if self.chosen is None else self.chosen.recorded(self.vocabularies.filled),
            chat_template=chat_template,
            unties=self.template.parted,
        )

    def _companions(self) -> tuple[Companions, ...]:
        """The files taken from the folder of the template's adapter, with warnings; unreadable files are refused."""
        with collecting():
            companions, said = adapter_companions(self.template.checkpoint)
            self.warnings += said
            if self.keeper is not self.template:
                companions = tokenizer_companions(self.template, self.keeper, companions)
            return companions
        return ()

    def _parts(self) -> frozenset[str] | None:
        """The parts to merge; None if the family is unknown and names have no parts."""
        if self.template.generic:
            # among models of known families that is the problem, and told as such
            if self.recipe.parts is not None and all(model.generic for model in self.readers):
                refuse(
                    RecipeError("parts: the template's family is unknown, so its tensors have no parts; use exclude")
                )
            return None
        if self.recipe.parts is None:
            return common_parts((self.template, *self.readers))
        merged = set(self.recipe.parts)
        for part in self.recipe.parts:
            lacking = [model.label for model in (self.template, *self.readers) if part not in model.parts]
            for label in dict.fromkeys(lacking) if not any(model.generic for model in self.readers) else ():
                refuse(RecipeError(f"parts: '{label}' has no part '{part}'"))
                merged.discard(part)  # said once, and not of each of its tensors
        return frozenset(merged)

    def _step(self, name: str) -> Step:
        """Decide the fate of one tensor of the template, by its own name."""
        entry = self.template.written[name if name in self.template.written else self._beside(name)]
        blocks = self.template.layout.get(name, ())
        if self.template.ties_head:  # one storage, whichever of its names is stored
            blocks = tuple((EMBEDDING if block == HEAD else block, rows) for block, rows in blocks)
        canonical = blocks[0][0] if blocks else name
        shape = self.template.shape(canonical) if canonical in VOCABULARY and len(blocks) == 1 else entry.shape
        if shape:
            shape = (self.vocabularies.rows(canonical, shape[0]), *shape[1:])
        whole = ((0, shape[0] if shape else 1),)
        kept = self.dtype or self.plain if name in self.template.fp8.scaled else entry.dtype

        def step(fate: Fate, reason: str, **more: Any) -> Step:
            dtype, view = more.pop("dtype", kept), self.template.view(name)
            return Step(name, canonical, fate, dtype, entry.dtype, shape, reason, view=view, **more)

        first = self.template.checkpoint.aliases.get(name)
        if first is not None and self.template.ties_head:
            return step("tied", f"tied to {first}", same_as=first)
        if name in self.template.buffers:
            return step("copied", self.template.family.why_unmerged(name))
        if not blocks:
            return step("copied", "no rule explains its name")  # a problem already, said by the mapping
        made = [self._block(name, block, rows or whole) for block, rows in blocks]
        pieces = tuple(piece for found, _ in made for piece in found)
        reason = "; ".join(dict.fromkeys(reason for _, reason in made if reason))
        if all(piece.setting is None for piece in pieces):
            read = {own for piece in pieces for expr in piece.reads for own in names_read(expr)}
            if name in self.template.fp8.scaled and not any(own.startswith(ADAPTER) for own in read):
                return step("dequantized", reason, pieces=pieces)
            if read and all(not piece.inputs for piece in pieces):
                return step("copied", reason, pieces=pieces)  # its bytes, from where the template has them
            if read:
                return step("folded", "" if METHODS[self.recipe.merge_method].copies else reason, pieces=pieces)
            return step("copied", reason)
        dtype = self.dtype or kept
        if len(made) > 1:
            left = {block: why for (block, _), (own, why) in zip(blocks, made, strict=True) if own[0].setting is None}
            reason = partly_kept(left, dtype if dtype != entry.dtype else "")
        return step("merged", reason, dtype=dtype, pieces=pieces)

    def _beside(self, name: str) -> str:
        """The stored tensor of the template that `name`, untied by its adapter, was tied to."""
        canonical = EMBEDDING if self.template.layout[name][0][0] == HEAD else HEAD
        return next(own for own, held in self.template.layout.items() if held == ((canonical, ()),))

    def _block(self, stored: str, canonical: str, rows: Ranges) -> tuple[list[Piece], str]:
        """The pieces of one canonical tensor in a stored one of the template, and the reason if it is not merged."""
        choice = next(choice for choice in self.choices if choice.covers(canonical))
        readers = self.readers if choice.setting.on_deltas else self.models.merged
        reason = self._why_copied(canonical, choice) or self._why_missing(canonical, readers)
        if not reason and not self._fits(canonical, readers):
            reason = "does not fit"  # a problem, said by the misfits
        pieces: list[Piece] = []
        if not reason:
            setting = choice.at(canonical, stored, self.template.layers)
            pieces, reason = self._pieces(canonical, rows, setting, readers)
        if not pieces:
            if self.vocabularies.changes(canonical) and reason != "does not fit":
                refuse(
                    RecipeError(
                        f"tokenizer_source: {self.recipe.tokenizer_source}: the output has other tokens than "
                        f"'{self.template.label}', whose {canonical} would be kept ({reason}). Merge it, or leave out "
                        "tokenizer_source"
                    )
                )
            self.unused.kept[canonical] = reason
            return [self._kept(canonical, rows)], reason
        return pieces, reason

    def _kept(self, canonical: str, rows: Ranges, of: Ranges | None = None) -> Piece:
        """A piece that keeps the template's rows: its bytes, or the expression that its adapter changes them to.

        of   the rows of the canonical tensor; all by default
        """
        expr = self.template.tensors.get(canonical)
        own = self.template.parted_name
        apart = bool(own) and self.template.layout[own][0][0] == canonical
        moved = canonical in self.template.moved
        if expr is None:
            return Piece(canonical, rows)
        plain = all(name in self.template.stored for name in names_read(expr))
        if plain and not (apart or moved):
            return Piece(canonical, rows)
        return Piece(
            canonical, rows, reads=(rows_of(expr, of) if of else expr,), inputs=() if plain and moved else (0,)
        )

    def _why_copied(self, canonical: str, choice: Choice) -> str:
        """Why the recipe keeps the template's tensor; empty if it does not."""
        if self._excluded(canonical):
            return "excluded by the recipe"
        if self.parts is not None and part_of(canonical) not in self.parts:
            return f"part {part_of(canonical)} is not merged"
        if choice.setting.row.copies:
            return f"copied by the recipe ({choice.where})"
        if self.recipe.branches == "retain" and canonical.endswith("@image"):
            for model in self.models.merged:  # a base has no branches: it is older than they are
                if model.find(canonical) not in (canonical, None):
                    return f"'{model.label}' has no branch @image of it, and branches: retain"
        return ""

    def _why_missing(self, canonical: str, readers: Sequence[Model]) -> str:
        """Why the recipe keeps a tensor that a model lacks; empty if none does, or it does not say so."""
        lacking = [f"'{model.label}'" for model in dict.fromkeys(readers) if model.find(canonical) is None]
        if self.recipe.missing != "copy" or not lacking:
            return ""
        return f"{' and '.join(lacking)} {'have' if lacking[1:] else 'has'} no such tensor, and missing: copy"

    def _fits(self, canonical: str, readers: Sequence[Model]) -> bool:
        """Return whether every model has the tensor in a mergeable dtype and shape; misfits are noted."""
        shape, fits = self.template.shape(canonical), True
        for model in dict.fromkeys((self.template, *readers)):
            found = model.find(canonical)
            if found is None:
                self.misfits.note_missing(model, canonical)
            elif not model.has_numbers(own_name(model.tensors[found])):
                self.misfits.note_dtype(model, found)
                if model is self.template:  # packed, its shape is no measure of the others'
                    return False
            elif model.shape(found) != shape and (canonical not in VOCABULARY or model.shape(found)[1:] != shape[1:]):
                self.misfits.note_shape(model, found, self.template, canonical)
            else:
                continue
            fits = False
        return fits

    def _pieces(
        self, canonical: str, rows: Ranges, setting: Setting, readers: Sequence[Model]
    ) -> tuple[list[Piece], str]:
        """The pieces of a merged tensor; empty, with the reason, if the vocabularies forbid it."""
        names = [model.find(canonical) or canonical for model in readers]
        exprs = [model.tensors[name] for model, name in zip(readers, names, strict=True)]
        keeper = self.template
        counts = [(model.shape(name) or (1,))[0] for model, name in zip(readers, names, strict=True)]
        total, reason = rows[-1][1], ""
        rest: Ranges = ()
        if canonical in VOCABULARY:
            taken = self.vocabularies.taken(canonical, total, readers, counts)
            if taken is None:
                return [], "vocabularies differ"
            rows, rest, keeper, reason = taken.rows, taken.rest, taken.keeper, taken.reason
            exprs = list(taken.reads)
        self.vocabularies.note(canonical, total, readers, counts)
        base = exprs.pop() if setting.on_deltas and self.base is not None else None  # without one it is refused already
        twin = EMBEDDING if canonical == HEAD and self.template.config_ties else ""
        if not rows:
            return [], "no token is in every vocabulary"
        if setting.whole and not is_matrix(canonical, self.template.shape(canonical)):
            setting = rest_of(setting, len(exprs))
        self.settings.setdefault(key_of(setting), setting)
        number = [*self.settings].index(key_of(setting))
        pieces = [Piece(canonical, rows, number, tuple(exprs), base, twin=twin)]
        if rest and keeper is self.template:
            pieces.append(self._kept(canonical, rest, rest))
        elif rest:
            own = rows_of(keeper.tensors[keeper.find(canonical) or canonical], rest)
            pieces.append(Piece(canonical, rest, reads=(own,), inputs=(self.inputs.index(keeper),)))
        return pieces, reason

    def _note_differences(self, steps: Sequence[Step]) -> None:
        """Warn once per cause if models give weights of equal shape different meanings."""
        others = [model for model in dict.fromkeys(self.readers) if model is not self.template]
        merged = {piece.canonical for step in steps for piece in step.pieces if piece.setting is not None}
        parts = PARTS if self.template.generic else {part_of(canonical) for canonical in merged}
        if not self.template.generic and (self.parts is None or "text" in self.parts):
            self.warnings += other_lineages(self.template, others)
        configs = [(model.label, model.checkpoint.config) for model in others]
        self.warnings += config_warnings((self.template.label, self.template.checkpoint.config), configs, parts)
        if len(set(self.readers)) > 1:
            self.warnings += merged_routers(merged, self.template.tensors)
        self.warnings += self.vocabularies.warnings()

    def _excluded(self, canonical: str) -> bool:
        return any(matches(canonical, glob) for glob in self.recipe.exclude)

    def _note_extras(self) -> None:
        """Find tensors in merged parts of a model that the template lacks and that would be lost."""
        for model in dict.fromkeys(self.readers):
            taken = {model.find(name) for name in self.template.tensors}
            for name in model.tensors:
                if name in taken or name in model.borrowed:
                    continue
                if self.parts is not None and part_of(name) not in self.parts:
                    continue
                if self._excluded(name):
                    reason = "excluded by the recipe"
                elif name != without_branch(name) and counterpart(without_branch(name), self.template.tensors):
                    reason = f"the template has no branch {name[name.index('@') :]} of it"
                elif model is self.base or self.recipe.missing == "copy":
                    reason = "the template has no such tensor"
                else:
                    self.misfits.note_extra(model, name)
                    continue
                self.unused.surplus[model.label, name] = reason
