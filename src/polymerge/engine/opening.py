"""Open and download a plan's inputs, and find the files beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final

from polymerge.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from polymerge.checkpoints.adapter import open_adapter
from polymerge.checkpoints.beside import companion_files
from polymerge.checkpoints.folder import adapter_alone, called, open_joined, renamed
from polymerge.checkpoints.hub import companions, restore
from polymerge.checkpoints.identity import Stamps, changed_since, stamps_of
from polymerge.checkpoints.prefetch import fetch_all
from polymerge.checkpoints.stores import bring_stored
from polymerge.checkpoints.tensor_info import listed
from polymerge.dtypes import FP8
from polymerge.errors import CheckpointError, RecipeError, refuse, refuse_if_any
from polymerge.families import quantization_method
from polymerge.families.expressions import Read, Shape, names_read, shape_of
from polymerge.families.lent import across
from polymerge.planning import Input, Plan, Step
from polymerge.planning.companions import files_taken
from polymerge.planning.model import digests_beside, headers_digest, settings_digest

__all__ = [
    "beside_output",
    "beside_template",
    "entries_of",
    "fetch",
    "files_read",
    "opened",
    "opened_inputs",
    "refuse_changes",
    "with_stamps",
]

_OF_MODELOPT: Final = "hf_quant_config.json"
"""A file in which ModelOpt says that the weights are quantized, beside config.json."""


def opened(recorded: Input) -> Checkpoint:
    """The headers of an input: those that the plan was made from, or, in another process, those of its files.

    raises CheckpointError if they, its config or the files of text beside its weights no longer match the plan.
    """
    path = restore(Path(recorded.path))
    if recorded.opened is not None and not any(changed_since(recorded.opened.stamps)):
        checkpoint = recorded.opened
    elif recorded.kind == "adapter":
        checkpoint = adapter_alone(open_adapter(recorded.source, path))
    elif recorded.adapter:
        checkpoint = open_joined(recorded.source, path, restore(Path(recorded.adapter)))
    else:
        checkpoint = open_checkpoint(recorded.source, path)
    if checkpoint is not recorded.opened:
        checkpoint = called(renamed(checkpoint, recorded.wrappers), recorded.renamed)
        if headers_digest(checkpoint) != recorded.headers:
            raise CheckpointError(f"{recorded.path}: its tensors have changed since it was planned. Plan again")
        if settings_digest(checkpoint) != recorded.settings:
            raise CheckpointError(f"{recorded.path}: its config has changed since it was planned. Plan again")
    beside = digests_beside(checkpoint)
    if changed := sorted(name for name, _ in beside.items() ^ recorded.beside.items()):
        raise CheckpointError(
            f"{recorded.path}: {listed([*dict.fromkeys(changed)])} beside its weights has changed since it was "
            "planned. Plan again"
        )
    return checkpoint


def opened_inputs(plan: Plan) -> list[Checkpoint]:
    """Every input of a plan, as `opened` gives it, and with it what the plan reads of it.

    raises CheckpointError as `opened` does, and Refused where a plan of another process reads what is not there, or not
    in the shape that it says.
    """
    if plan.stages:
        raise RecipeError("stages: their outputs are not there yet. Merge them into a folder first, and name that")
    found = [opened(recorded) for recorded in plan.inputs]
    if any(recorded.opened is None for recorded in plan.inputs):
        refuse_if_any(_unreadable(plan, entries_of(found)))
    return found


def entries_of(inputs: Sequence[Checkpoint]) -> list[Mapping[str, TensorInfo]]:
    """For each of a plan's inputs, the location of its tensors and of those that others lend to it."""
    return across([checkpoint.entries for checkpoint in inputs])


def _unreadable(plan: Plan, entries: Sequence[Mapping[str, TensorInfo]]) -> Iterator[CheckpointError]:
    """Errors for the steps that do not fit the tensors of the inputs."""
    shapes = across([{name: entry.shape for name, entry in held.items()} for held in entries])
    for entry in plan.left_out:
        if entry.name not in entries[entry.input]:
            yield CheckpointError(f"{plan.inputs[entry.input].path}: the plan leaves out '{entry.name}'. Plan again")
    for step in plan.steps:
        try:
            _fits(plan, step, entries[plan.template], shapes)
        except CheckpointError as error:
            yield CheckpointError(f"step '{step.name}' of the plan does not fit its inputs: {error}. Plan again")


def _fits(plan: Plan, step: Step, template: Mapping[str, TensorInfo], shapes: Sequence[Mapping[str, Shape]]) -> None:
    """Raise CheckpointError unless what a step reads has the shape of its rows."""
    kept = [piece for piece in step.pieces if piece.setting is None and not piece.reads]
    if kept or (step.fate == "copied" and not step.pieces):
        whole = shape_of(step.view or Read(step.name), shapes[plan.template])
        last = max((stop for piece in kept for _, stop in piece.rows), default=0)
        alike = whole[1:] == step.row_shape if kept else template[step.name].shape == step.shape
        if not alike or (whole[0] if whole else 1) < last or template[step.name].dtype != step.source_dtype:
            raise CheckpointError(f"the template has no such tensor of {step.source_dtype} {list(step.shape)}")
    for piece in step.pieces:
        places = piece.inputs or (plan.models if piece.setting is not None else (plan.template,))
        reads = [*zip(places, piece.reads, strict=False)]
        reads += [] if piece.base is None or plan.base is None else [(plan.base, piece.base)]
        wanted = sum(stop - start for start, stop in piece.rows) * prod(step.row_shape)
        for place, expr in reads:
            found = shape_of(expr, shapes[place])
            if missing := [name for name in names_read(expr) if name not in shapes[place]]:
                raise CheckpointError(f"{missing[0]}: there is no such tensor in the checkpoint")
            if prod(found) != wanted:
                raise CheckpointError(f"'{names_read(expr)[0]}' is {list(found)}, {wanted} elements are wanted")


def fetch(plan: Plan, progress: Callable[[int, int], None] | None = None, *, merged_only: bool = False) -> None:
    """Download everything that a plan needs of models on the hub; nothing happens for local ones.

    Afterwards the path of each input is a folder with the files that are read; the template's is complete, with
    its tokenizer, processor and remote code, and can be loaded.

    progress     called with bytes done and total bytes; by default a progress bar on a terminal
    merged_only  download only the tensors that are merged; the template then cannot be loaded

    raises CheckpointError or RecipeError if something cannot be downloaded.
    """
    stored = entries_of(opened_inputs(plan))
    files = _files_merged(plan, stored) if merged_only else files_read(plan, stored)
    fetch_all([*([] if merged_only else beside_template(plan)), *files], progress)
    if not merged_only:
        bring_stored(files)


def beside_template(plan: Plan) -> list[Path]:
    """Files on the hub that accompany the weights of the template, and of its adapter if it has one."""
    found = companions(Path(plan.inputs[plan.template].path))
    for taken in plan.companions:
        found += companions(restore(Path(taken.folder)), taken.files)
    return found


def beside_output(plan: Plan, template: Checkpoint) -> dict[str, Path]:
    """The files that an output takes over beside its weights, by their paths there; refuses what cannot be copied."""
    if plan.of_adapters:
        return companion_files(template.folder, deep=False)
    taken = files_taken(template, plan.companions)
    if quantization_method(template.config) is not None or any(step.source_dtype in FP8 for step in plan.steps):
        taken.pop(_OF_MODELOPT, None)
    return taken


def with_stamps(checkpoint: Checkpoint) -> Checkpoint:
    """An input whose files have been downloaded since it was opened, with the stamps that they have now."""
    come = stamps_of(file for file, stamp in checkpoint.stamps.items() if stamp is None)
    return replace(checkpoint, stamps=MappingProxyType({**checkpoint.stamps, **come})) if come else checkpoint


def refuse_changes(inputs: Iterable[Checkpoint], *more: Stamps) -> None:
    """Refuse files of inputs, and of `more`, that are not as they were when they were first read."""
    every = {file: stamp for stamps in (*(one.stamps for one in inputs), *more) for file, stamp in stamps.items()}
    refuse(*changed_since(every))


def files_read(plan: Plan, entries: Sequence[Mapping[str, TensorInfo]]) -> list[Path]:
    """Every weight file that a merge reads, each once, in the order in which the plan's steps need them.

    entries  for each of the plan's inputs, the location of its tensors
    """
    reads = [entries[place][name].file for step in plan.steps for place, name in _reads(plan, step)]
    for place, stored in enumerate(entries):
        if plan.of_adapters and place == plan.base:
            continue  # of which only full weights are read
        left_out = {entry.name for entry in plan.left_out if entry.input == place}
        reads += [entry.file for name, entry in stored.items() if name not in left_out]
    return list(dict.fromkeys(reads))


def _files_merged(plan: Plan, entries: Sequence[Mapping[str, TensorInfo]]) -> list[Path]:
    """The weight files of merged tensors, and of the template's tensors that they replace."""
    steps = dict.fromkeys(step for step, _, _ in plan.merged_pieces())
    reads = [place for step in steps for place in (*_reads(plan, step), (plan.template, step.name))]
    # a tensor that the template does not store has no file of its own
    return list(dict.fromkeys(entries[place][name].file for place, name in reads if name in entries[place]))


def _reads(plan: Plan, step: Step) -> Iterator[tuple[int, str]]:
    """The tensors that a step reads: indices of inputs, each with a tensor name."""
    if step.fate == "copied" and not step.pieces:
        yield plan.template, step.name
    for piece in step.pieces:
        if piece.setting is None and not piece.reads:
            yield plan.template, step.name
        places = piece.inputs or (plan.models if piece.setting is not None else (plan.template,))
        for place, expr in zip(places, piece.reads, strict=False):
            yield from ((place, name) for name in names_read(expr))
        if piece.base is not None and plan.base is not None:
            yield from ((plan.base, name) for name in names_read(piece.base))
