"""From recipe to folder: plan, lay out, compute, describe and check; the folder gets its name last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from polymerge.checkpoints import Checkpoint, TensorInfo
from polymerge.checkpoints.identity import Identity, Stamps, stamps_of
from polymerge.checkpoints.output import journal_of
from polymerge.checkpoints.prefetch import Prefetch
from polymerge.checkpoints.stores import is_url
from polymerge.checkpoints.target import check_target, roomy_folder
from polymerge.checkpoints.upload import Upload
from polymerge.checkpoints.writer import parse_size
from polymerge.engine.ancestry import DeltaNorm, ancestry_warnings, delta_norms
from polymerge.engine.device import Device, open_device
from polymerge.engine.executor import Execution
from polymerge.engine.finished import Finished, Journal, what_decides
from polymerge.engine.in_stages import in_stages
from polymerge.engine.model_card import model_card
from polymerge.engine.norms import UpdateNorms, update_norms, zero_update
from polymerge.engine.on_ray import Carried, merge_shards, on_cluster
from polymerge.engine.opening import (
    beside_output,
    beside_template,
    entries_of,
    files_read,
    opened_inputs,
    refuse_changes,
)
from polymerge.engine.overflow import checked_while_written
from polymerge.engine.pool import Progress, Tally
from polymerge.engine.provenance import RECORD, command_line, digests_of, found_out, identities_of, provenance
from polymerge.engine.shard_tasks import Worked
from polymerge.engine.uploading import check_upload, state_now, upload_shards
from polymerge.engine.verify import Verification, verify
from polymerge.engine.writers import Writer, require, writer_of
from polymerge.errors import OutputError, RecipeError
from polymerge.methods.own import MethodFiles
from polymerge.paths import given_path
from polymerge.planning import Plan, make_plan
from polymerge.planning.estimate import BLOCK, default_threads
from polymerge.planning.folding import fold_recipe
from polymerge.planning.matrix_costs import work_of
from polymerge.recipe.recipe import Names, Recipe
from polymerge.tables import Table

__all__ = ["Merged", "fold", "merge"]


@dataclass(frozen=True)
class Merged(Table):
    """The result of `merge`: the folder or the URL, the executed plan, and the findings of the final check.

    norms    for adapters: the norm of the merged update relative to theirs
    deltas   for methods on deltas: each model's sampled distance from the base, by its label
    warnings warnings that only the values could give rise to
    resumed  the number of matrices, or of files by a cluster, that a run which was killed had finished, and that were
             taken from it; of several stages, those of the last one
    worked   what each task on a cluster has done
    resumed_stages  the number of whole stages before the last that were taken so
    """

    folder: Path | str
    plan: Plan = field(repr=False)
    verification: Verification | None
    norms: UpdateNorms | None = None
    deltas: Mapping[str, DeltaNorm] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    resumed: int = 0
    worked: tuple[Worked, ...] = field(default=(), repr=False)
    resumed_stages: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """One row: the folder, how many tensors have each fate, its size, and whether the check passed."""
        passed = None if self.verification is None else self.verification.passed
        return [{"folder": str(self.folder), **self.plan.counts(), "GB": self.plan.size / 1e9, "passed": passed}]

    @property
    def errors(self) -> Mapping[str, float]:
        """For adapters: for each merged module, the share of its norm lost by truncation to the output's rank."""
        return self.norms.lost if self.norms else {}


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    methods: MethodFiles = (),
    force: bool = False,
    shard_size: str = "5GB",
    file_format: Literal["safetensors", "torch"] = "safetensors",
    layout: Literal["peft", "llava"] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    ray: str | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    sha256: bool = False,
    block: int = BLOCK,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Merged:
    """Merge checkpoints into a new folder that loads as it is.

    recipe      a file, mapping or `Recipe`; or a plan (`Plan`, or its JSON file or mapping)
    out         the folder to create; it appears only once it is complete and checked. Or a URL that fsspec can write
                to, such as s3://bucket/merged: see `checkpoints.upload`
    methods     Python files with methods of your own, as for `plan`
    force       replace an existing `out`
    shard_size  of the output's weight files, such as 5GB
    file_format safetensors, or torch for loaders that only read pytorch_model-*.bin
    layout      for adapters: peft, or llava for LLaVA's own; by default the template's
    threads     maximum number of blocks computed at once; by default one per processor, up to 8
    device      cpu, or a torch device such as cuda through which blocks are streamed
    ray         the address of a Ray cluster that makes the weight files, each as a task with `threads` processors:
                host:port or ray://host:port, `auto` for the environment's, or `local` to start one on this machine.
                All of its machines see `out` and the inputs under the same paths, or fetch these from the hub
    check       load the output's structure with transformers at the end (`verify`), and check for NaN
    trust_remote_code  let the check run Python files from the checkpoint
    sha256      record the sha256 of every input file, and not only of those that the hub lists; reads all of them
    block       elements per block; does not affect the result
    progress    called with bytes done and total bytes, for the output and for downloads from the hub; its method
                `matrices`, if it has one, with whole matrices done, their number, and the share of their estimated cost

    raises Refused with every problem found before anything is written, CheckpointError if an input's values
    cannot be merged, OutputError if the output cannot be written or fails its check; in all of these cases nothing
    is left under `out`.
    """
    if block < 1:
        raise RecipeError(f"block: {block} is not a valid number of elements")
    if file_format not in ("safetensors", "torch"):
        raise RecipeError(f"format: '{file_format}' is neither safetensors nor torch")
    upload = Upload.to(os.fspath(out), force) if is_url(out) else None
    target = given_path(out) if upload is None else upload.folder
    how = _How(
        shard_size=parse_size(shard_size),
        machine=open_device("cpu" if ray else device),
        file_format=file_format,
        threads=threads,
        device=device,
        ray=ray,
        check=check,
        trust_remote_code=trust_remote_code,
        sha256=sha256,
        block=block,
        command=command or command_line(),
    )
    plan = make_plan(recipe, methods=methods)
    if layout is not None:
        if not plan.of_adapters:
            raise RecipeError("layout: is for adapters, and these models are checkpoints")
        plan = replace(plan, layout=layout)
    if check and not plan.of_adapters:
        require("transformers", "torch", to="check that the output loads", instead="say `check=False`")
    if upload is not None:
        check_upload(upload, plan, file_format)
        force = True  # of the folder in which it is put together
    if plan.stages:
        return _merged_in_stages(plan, target, how, force, progress)
    return _merged(plan, target, upload, how, force, progress)


@dataclass(frozen=True)
class _How:
    """What `merge` was told of the way to an output; `machine` is the device of this process."""

    shard_size: int
    machine: Device
    file_format: Literal["safetensors", "torch"]
    threads: int | None
    device: str
    ray: str | None
    check: bool
    trust_remote_code: bool
    sha256: bool
    block: int
    command: Sequence[str]


@dataclass(frozen=True)
class _Output:
    """What is being made, where, and of what.

    target   the folder that it will be, or is put together in to be uploaded
    inputs   opened, and the weights of each (`entries`) in these `files`
    beside   what it takes over beside weights, by paths in the output
    stamps   of these when they were opened
    """

    plan: Plan
    target: Path
    upload: Upload | None
    writer: Writer
    inputs: Sequence[Checkpoint]
    entries: Sequence[Mapping[str, TensorInfo]]
    files: Sequence[Path]
    beside: Mapping[str, Path]
    stamps: Stamps
    prefetch: Prefetch
    tally: Tally

    @property
    def every_stamp(self) -> Stamps:
        """Of all that is read, when it was opened."""
        return {**self.stamps, **{file: stamp for one in self.inputs for file, stamp in one.stamps.items()}}


def _merged_in_stages(plan: Plan, target: Path, how: _How, force: bool, progress: Progress | None) -> Merged:
    """Merge stage after stage, each from the folders of those before it."""
    places = [Path(entry.path) for one in (*plan.stages, plan) for entry in one.inputs if entry.path]
    check_target(target, places, force)

    def carry(stage: Plan, folder: Path, last: bool, report: Progress) -> Merged:
        # what is read again needs no check beyond that, and no format of another loader
        own = how if last else replace(how, file_format="safetensors", check=False)
        return _merged(make_plan(stage), folder, None, own, False, report)

    kept_by = str(how.shard_size), how.file_format, str(how.sha256)
    with on_cluster(how.ray):
        made, taken = in_stages(
            plan, target, carry, force=force, progress=progress, device=how.machine.name, how=kept_by
        )
    found = made.verification and replace(made.verification, folder=target)
    return replace(made, folder=target, plan=plan, verification=found, resumed_stages=taken)


def _merged(
    plan: Plan, target: Path, upload: Upload | None, how: _How, force: bool, progress: Progress | None
) -> Merged:
    """Open, lay out, compute, describe, check; then the folder gets its name, or what is uploaded is published."""
    inputs = opened_inputs(plan)
    beside = beside_output(plan, inputs[plan.template])
    stamps = stamps_of(beside.values())
    writer = writer_of(plan, inputs, how.shard_size, as_torch=how.file_format == "torch")
    check_target(target, (Path(path) for entry in plan.inputs for path in (entry.path, entry.adapter) if path), force)
    tally = Tally(plan.size, progress, (0, 0.0) if how.ray else work_of(plan))  # tasks tell of whole shards
    entries = entries_of(inputs)
    files = files_read(plan, entries)
    prefetch = Prefetch([*beside_template(plan), *files], tally.advance)
    tally.total += prefetch.size
    output = _Output(plan, target, upload, writer, inputs, entries, files, beside, stamps, prefetch, tally)
    apart = how.ray is not None or upload is not None
    run = what_decides(plan, writer.shards, how.device if how.ray else how.machine.name, always=apart)
    # of an upload, one file is being made while another is sent
    needed = writer.room if upload is None else 2 * max(writer.shards.sizes, default=0)
    room = roomy_folder(target, force, needed, prefetch.size, run)
    with (
        on_cluster(how.ray) as cluster,
        room as folder,
        prefetch,
        identities_of(files, prefetch, how.sha256) as identities,
        prefetch.wanted(),
        nullcontext() if upload is None else upload.discarded_if_failed(),
    ):
        finished = Finished(Journal(journal_of(folder)), folder, writer.shards) if run else None
        done = _carried(output, folder, finished, cluster, how)
        prefetch.finish()
        made = _described(output, folder, done, identities, how.command)
        verification = _checked(output, folder, how.trust_remote_code) if how.check else None
        if upload is not None:
            upload.publish(folder, writer.shards.names)
    if upload is not None:
        shutil.rmtree(target, ignore_errors=True)
    return replace(made, verification=verification)


def _carried(output: _Output, folder: Path, finished: Finished | None, cluster: Any, how: _How) -> Carried:
    """Make the weight files: by a cluster, one by one to be uploaded, or all of them in the folder."""
    plan, shards = output.plan, output.writer.shards
    if output.upload is not None and finished is not None:
        output.upload.begin(anew=not finished.journal)
    if cluster is not None and finished is not None:
        return merge_shards(
            cluster, plan, shards, folder, output.entries, finished.journal, output.files, output.every_stamp,
            output.tally.advance, device=how.device, threads=how.threads, block=how.block, upload=output.upload,
        )  # fmt: skip
    matrices = finished if output.upload is None else None  # what is uploaded goes on by whole files
    threads = how.threads or default_threads()
    running = Execution(output.entries, device=how.machine, threads=threads, block=how.block, finished=matrices)
    if output.upload is not None and finished is not None:
        state = partial(state_now, output.files, output.every_stamp)
        with running, output.prefetch.wanted():
            modules = upload_shards(running, plan, shards, folder, output.upload, finished.journal, state, output.tally)
    else:
        with shards.create(folder) as write, running, output.prefetch.wanted():
            modules = running.run(plan, write, output.tally)
    return Carried(modules, running.overflow, finished.journal.taken if finished else 0)


def _described(
    output: _Output,
    folder: Path,
    done: Carried,
    identities: Mapping[Path, Future[Identity]],
    command: Sequence[str],
) -> Merged:
    """Write what lies beside the weights, the record and the card last; refuse the output if an input has changed."""
    plan, inputs = output.plan, output.inputs
    norms = update_norms(done.norms, plan.settings)
    deltas = {} if plan.of_adapters else delta_norms(plan, output.entries)
    warnings = (*norms.warnings, *done.overflow.warnings())
    for recorded, checkpoint in zip(plan.inputs, inputs, strict=True):
        if checkpoint.adapter is not None and (zero := zero_update(recorded.label, checkpoint.adapter)):
            warnings += (zero,)
    if plan.base is not None:
        warnings += tuple(ancestry_warnings(deltas, plan.inputs[plan.base].label))
    written = {
        "files": output.writer.finish(folder, output.beside),
        **output.writer.counted(),
        **({"overflow": dict(done.overflow.allowed)} if done.overflow.allowed else {}),
        **found_out(plan, norms, deltas, warnings),
        **({"sampled": digests_of(folder)} if output.upload is None else {}),  # of a store only headers are here
    }
    wait(identities.values())  # so that every file has been read by now, and all that have changed are named
    delivered = {file: stamp for file, (stamp, _) in output.prefetch.delivered.items()}
    refuse_changes(inputs, output.stamps, delivered)
    known = {file: identity.result() for file, identity in identities.items()}
    (folder / RECORD).write_text(provenance(plan, known, command, written), encoding="utf-8")
    card = model_card(plan, output.target.resolve().name, inputs[plan.template].config, norms.lost)
    (folder / "README.md").write_text(card, encoding="utf-8")
    place = output.target if output.upload is None else output.upload.url
    return Merged(place, plan, None, norms if plan.of_adapters else None, deltas, warnings, done.taken, done.worked)


def _checked(output: _Output, folder: Path, trust_remote_code: bool) -> Verification:
    """What `verify` finds; raises OutputError if the output does not pass."""
    seen = checked_while_written(output.plan) if output.upload is None else frozenset(output.writer.shards.places)
    found = verify(folder, trust_remote_code=trust_remote_code, checked=seen)
    if not found.passed:
        failed = "; ".join(f"{one.check}: {one.detail}" for one in found.findings if one.passed is False)
        raise OutputError(f"{output.target}: the merged output did not pass its check and was removed: {failed}")
    return replace(found, folder=output.target)


def fold(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    names: Names = "template",
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Fold an adapter into its base: write an ordinary checkpoint folder that loads without PEFT.

    base    by default the model that the adapter's config names
    ignore  globs on stored tensor names, in base or adapter, that are left out
    names   published, for those that the base's family is published with
    force, check, progress   as for `merge`; merge BASE+ADAPTER with the method `copy` for more control over the output

    raises as `merge` does, and RecipeError if the adapter names no base.
    """
    recipe = fold_recipe(os.fspath(adapter), None if base is None else os.fspath(base), ignore, names)
    return merge(recipe, out, force=force, check=check, progress=progress)
