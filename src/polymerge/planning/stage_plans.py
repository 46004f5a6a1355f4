"""Plan several merges, one after the other, before any is carried out: a stage's output is known from its plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from polymerge.checkpoints import Checkpoint, TensorInfo
from polymerge.checkpoints.beside import copy_files
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.writer import lay_out
from polymerge.dtypes import byte_count
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse
from polymerge.planning.companions import files_taken
from polymerge.planning.output_dtypes import output_config, stored_dtypes
from polymerge.planning.plan import Plan
from polymerge.planning.tokenizer_files import chooses_files, with_ids, write_chosen
from polymerge.recipe.recipe import Recipe

__all__ = ["plan_stages", "with_paths"]

_ONE_FILE = 1 << 62


def plan_stages(recipe: Recipe, planning: Callable[[Recipe, Mapping[str, Checkpoint]], Plan | None]) -> Plan | None:
    """Plan the stages of a recipe, and then the recipe itself, with the stages' plans in it.

    planning  plans one recipe, given the checkpoints that are known already, by their source

    refuses the problems of each stage, with its name; returns None if a stage cannot be planned.
    """
    if not recipe.stages:
        return planning(recipe, {})
    known: dict[str, Checkpoint] = {}
    plans: list[Plan] = []
    with TemporaryDirectory(prefix="polymerge-stages-") as place:
        for stage in recipe.stages:
            try:  # in a context of its own, so that what is wrong comes here
                plan = Context().run(_alone, stage, known, planning)
                known[plan.name] = _written_by(plan, Path(place) / plan.name)
            except PolymergeError as error:
                refuse(*(RecipeError(f"stage '{stage.name}': {problem}") for problem in error.problems))
                return None
            plans.append(_without_paths(plan, known))
        last = planning(recipe, known)
    return None if last is None else replace(_without_paths(last, known), stages=tuple(plans))


def _alone(
    stage: Recipe,
    known: Mapping[str, Checkpoint],
    planning: Callable[[Recipe, Mapping[str, Checkpoint]], Plan | None],
) -> Plan:
    with collecting(needed=True) as problems:
        plan = planning(stage, known)
        if plan is not None and plan.of_adapters:
            refuse(RecipeError("stages merge checkpoints: merge adapters in a recipe of its own"))
        if plan is not None and not problems:
            return plan
        if not problems:
            raise RecipeError("no models could be read, so there is nothing to plan")
    raise AssertionError("what was refused is raised at the end of the block")


def _without_paths(plan: Plan, stages: Mapping[str, Checkpoint]) -> Plan:
    """A plan whose inputs that are outputs of stages, by their names, have no path and no headers: these come first.

    Files that it takes from such an output have the stage's name for their folder.
    """
    own = {one.path for one in plan.inputs if one.source not in stages}
    names = {str(made.folder): name for name, made in stages.items() if str(made.folder) not in own}
    inputs = [replace(one, path="", opened=None) if one.source in stages else one for one in plan.inputs]
    taken = [replace(one, folder=names.get(one.folder, one.folder)) for one in plan.companions]
    return replace(plan, inputs=tuple(inputs), companions=tuple(taken))


def with_paths(plan: Plan, made: Plan) -> Plan:
    """A plan whose inputs lie where those of an equal plan do, which was made once they were written."""
    inputs = zip(plan.inputs, made.inputs, strict=True)
    found = tuple(replace(one, source=own.source, label=own.label) for own, one in inputs)
    return replace(plan, inputs=found, companions=made.companions)


def _written_by(plan: Plan, place: Path) -> Checkpoint:
    """The checkpoint that a plan's merge will write, from its headers.

    place   a folder to make for what will lie beside its weights, if that is not what lies beside the template's
    """
    recorded = plan.inputs[plan.template]
    template = recorded.opened
    if template is None:
        raise AssertionError("a plan that is made has its headers")
    tensors = [(name, dtype, shape) for step in plan.steps for name, (dtype, shape) in step.stored.items()]
    shards, shapes = lay_out(tensors, _ONE_FILE), {name: (dtype, shape) for name, dtype, shape in tensors}
    file = template.folder / shards.names[0]
    entries = {
        name: TensorInfo(name, *shapes[name], file, place.start, byte_count(*shapes[name]))
        for name, place in shards.places.items()
    }
    config, folder = output_config(plan, template), template.folder
    if plan.companions or chooses_files(plan):
        folder = place
        beside = files_taken(template, plan.companions)
        for path in beside.values():
            fetched(path)
        folder.mkdir()
        copy_files(beside, folder)
        write_chosen(plan, folder)
    chosen = plan.vocabulary.ids if plan.vocabulary is not None else {}
    text = json.dumps(with_ids(config, chosen.get("config.json", {})))
    stored = stored_dtypes(plan.steps, template.config, plan.recipe.get("dtype") is not None)
    return Checkpoint(
        source=plan.name,
        folder=folder,
        config=MappingProxyType(json.loads(stored.written_in(text)) if config else {}),
        entries=MappingProxyType(entries),
        files=(file,),
        layout="safetensors",
        aliases=MappingProxyType({}),
        skipped=MappingProxyType({}),
    )
