"""From recipe to folder: plan, lay out, compute, describe and check; the folder gets its name last."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from polymerge.checkpoints.hub import listed_sha256
from polymerge.checkpoints.identity import Identity, file_digest, sampled_digest, stamps_of
from polymerge.checkpoints.output import journal_of, output_folder, written
from polymerge.checkpoints.prefetch import Prefetch, fetched, fetches_to
from polymerge.checkpoints.stores import is_url, view_of
from polymerge.checkpoints.target import check_target
from polymerge.checkpoints.upload import Upload
from polymerge.checkpoints.writer import Write, parse_size
from polymerge.engine.ancestry import DeltaNorm, ancestry_warnings, delta_norms
from polymerge.engine.device import open_device
from polymerge.engine.executor import Execution
from polymerge.engine.finished import Finished, Journal, what_decides
from polymerge.engine.in_stages import in_stages
from polymerge.engine.model_card import model_card
from polymerge.engine.norms import ModuleNorms, UpdateNorms, update_norms, zero_update
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
from polymerge.engine.provenance import RECORD, command_line, digests_of, found_out, provenance
from polymerge.engine.shard_tasks import Worked
from polymerge.engine.uploading import state_now, upload_shards
from polymerge.engine.verify import Verification, verify
from polymerge.engine.writers import require, writer_of
from polymerge.errors import OutputError, RecipeError, human_size
from polymerge.methods.own import MethodFiles
from polymerge.paths import given_path
from polymerge.planning import Plan, make_plan
from polymerge.planning.estimate import BLOCK, default_threads
from polymerge.planning.folding import fold_recipe
from polymerge.planning.matrix_costs import work_of
from polymerge.recipe.recipe import Names, Recipe
from polymerge.tables import Table

__all__ = ["Merged", "fold", "identities_of", "merge", "roomy_folder"]


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
    size = parse_size(shard_size)
    machine = open_device("cpu" if ray else device)
    plan = make_plan(recipe, methods=methods)
    if layout is not None:
        if not plan.of_adapters:
            raise RecipeError("layout: is for adapters, and these models are checkpoints")
        plan = replace(plan, layout=layout)
    if check and not plan.of_adapters:
        require("transformers", "torch", to="check that the output loads", instead="say `check=False`")
    if upload is not None:
        _check_upload(upload, plan, file_format)
        force = True  # of the folder in which it is put together
    if plan.stages:
        places = [Path(entry.path) for one in (*plan.stages, plan) for entry in one.inputs if entry.path]
        check_target(target, places, force)

        def carry(stage: Plan, folder: Path, last: bool, report: Progress) -> Merged:
            # what is read again needs no check beyond that, and no format of another loader
            return merge(
                stage, folder, shard_size=shard_size, file_format=file_format if last else "safetensors",
                threads=threads, device=device, ray=ray, check=check and last, trust_remote_code=trust_remote_code,
                sha256=sha256, block=block, progress=report, command=command,
            )  # fmt: skip

        how = (shard_size, file_format, str(sha256))
        with on_cluster(ray):
            made, taken = in_stages(plan, target, carry, force=force, progress=progress, device=machine.name, how=how)
        found = made.verification and replace(made.verification, folder=target)
        return replace(made, folder=target, plan=plan, verification=found, resumed_stages=taken)
    inputs = opened_inputs(plan)
    beside = beside_output(plan, inputs[plan.template])
    stamps = stamps_of(beside.values())
    writer = writer_of(plan, inputs, size, as_torch=file_format == "torch")
    check_target(target, (Path(path) for entry in plan.inputs for path in (entry.path, entry.adapter) if path), force)
    tally = Tally(plan.size, progress, (0, 0.0) if ray else work_of(plan))  # tasks tell of whole shards
    entries = entries_of(inputs)
    files = files_read(plan, entries)
    prefetch = Prefetch([*beside_template(plan), *files], tally.advance)
    tally.total += prefetch.size
    apart = ray is not None or upload is not None
    run = what_decides(plan, writer.shards, device if ray else machine.name, always=apart)
    # of an upload, one file is being made while another is sent
    needed = writer.room if upload is None else 2 * max(writer.shards.sizes, default=0)
    room = roomy_folder(target, force, needed, prefetch.size, run)
    with (
        on_cluster(ray) as cluster,
        room as folder,
        prefetch,
        identities_of(files, prefetch, sha256) as identities,
        prefetch.wanted(),
        nullcontext() if upload is None else upload.discarded_if_failed(),
    ):
        finished = Finished(Journal(journal_of(folder)), folder, writer.shards) if run else None
        stamped = {**stamps, **{file: stamp for one in inputs for file, stamp in one.stamps.items()}}
        if upload is not None and finished is not None:
            upload.begin(anew=not finished.journal)
        if cluster is not None and finished is not None:
            done = merge_shards(
                cluster, plan, writer.shards, folder, entries, finished.journal, files, stamped, tally.advance,
                device=device, threads=threads, block=block, upload=upload,
            )  # fmt: skip
        elif upload is not None and finished is not None:
            running = Execution(entries, device=machine, threads=threads or default_threads(), block=block)
            with running, prefetch.wanted():
                modules = upload_shards(
                    running, plan, writer.shards, folder, upload, finished.journal, partial(state_now, files, stamped),
                    tally,
                )  # fmt: skip
            done = Carried(modules, running.overflow, finished.journal.taken)
        else:
            with writer.shards.create(folder) as write:
                running = Execution(
                    entries, device=machine, threads=threads or default_threads(), block=block, finished=finished
                )
                modules = execute(running, prefetch, plan, write, tally)
            done = Carried(modules, running.overflow, finished.journal.taken if finished else 0)
        prefetch.finish()
        norms = update_norms(done.norms, plan.settings)
        deltas = {} if plan.of_adapters else delta_norms(plan, entries)
        warnings = (*norms.warnings, *done.overflow.warnings())
        for recorded, checkpoint in zip(plan.inputs, inputs, strict=True):
            if checkpoint.adapter is not None and (zero := zero_update(recorded.label, checkpoint.adapter)):
                warnings += (zero,)
        if plan.base is not None:
            warnings += tuple(ancestry_warnings(deltas, plan.inputs[plan.base].label))
        written = {
            "files": writer.finish(folder, beside),
            **writer.counted(),
            **({"overflow": dict(done.overflow.allowed)} if done.overflow.allowed else {}),
            **found_out(plan, norms, deltas, warnings),
            **({"sampled": digests_of(folder)} if upload is None else {}),  # of a store only headers are here
        }
        wait(identities.values())  # so that every file has been read by now, and all that have changed are named
        refuse_changes(inputs, stamps, {file: stamp for file, (stamp, _) in prefetch.delivered.items()})
        known = {file: identity.result() for file, identity in identities.items()}
        record = provenance(plan, known, command or command_line(), written)
        (folder / RECORD).write_text(record, encoding="utf-8")
        card = model_card(plan, target.resolve().name, inputs[plan.template].config, norms.lost)
        (folder / "README.md").write_text(card, encoding="utf-8")
        checked = checked_while_written(plan) if upload is None else frozenset(writer.shards.places)
        verification = verify(folder, trust_remote_code=trust_remote_code, checked=checked) if check else None
        if verification is not None and not verification.passed:
            failed = "; ".join(f"{one.check}: {one.detail}" for one in verification.findings if one.passed is False)
            raise OutputError(f"{target}: the merged output did not pass its check and was removed: {failed}")
        if upload is not None:
            upload.publish(folder, writer.shards.names)
    if upload is not None:
        shutil.rmtree(target, ignore_errors=True)
    if verification is not None:
        verification = replace(verification, folder=target)
    own = norms if plan.of_adapters else None
    return Merged(
        target if upload is None else upload.url, plan, verification, own, deltas, warnings, done.taken, done.worked
    )


def _check_upload(upload: Upload, plan: Plan, file_format: str) -> None:
    """Refuse what cannot be put together file by file, and what is at the URL already."""
    if plan.stages:
        raise RecipeError("stages: the outputs of stages need a disk. Merge into a folder, and copy that to the store")
    if file_format == "torch" or plan.layout == "llava":
        raise RecipeError(
            f"{upload.url}: torch files are converted from whole safetensors files. Merge into a folder, and copy that"
        )
    read = [of[1] for one in plan.inputs for path in (one.path, one.adapter) if path and (of := view_of(Path(path)))]
    for url in read:
        if f"{url}/".startswith(f"{upload.url}/") or f"{upload.url}/".startswith(f"{url}/"):
            raise OutputError(f"{upload.url}: is, holds or lies in the input {url}. Choose another place")
    upload.check()


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


def execute(running: Execution, prefetch: Prefetch, plan: Plan, write: Write, tally: Tally) -> list[ModuleNorms]:
    """Carry out the steps; if one fails, release threads that wait for a file before joining them."""
    with running, prefetch.wanted():
        return running.run(plan, write, tally)


@contextmanager
def identities_of(files: Sequence[Path], prefetch: Prefetch, sha256: bool) -> Iterator[dict[Path, Future[Identity]]]:
    """What files are known by, found out during the merge; those not yet begun are dropped if it fails.

    sha256  compute the digests of whole files, on whatever cores the merge leaves idle
    """
    clerks = ThreadPoolExecutor(default_threads() if sha256 else 1, "polymerge-identity", initializer=_give_way)
    try:
        yield {file: clerks.submit(_identity, file, prefetch, sha256) for file in files}
    finally:
        clerks.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    """Let every other thread go before this one, where a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _identity(file: Path, prefetch: Prefetch, sha256: bool) -> Identity:
    fetched(file)
    _, checked = prefetch.delivered.get(file, (None, None))
    return Identity(sampled_digest(file), checked or (file_digest(file) if sha256 else listed_sha256(file)))


@contextmanager
def roomy_folder(out: Path, force: bool, size: int, to_come: int, run: str = "") -> Iterator[Path]:
    """The folder to write an output to, which gets its name if the block succeeds.

    size     of the output, in bytes
    to_come  bytes of downloads
    run      as for `output_folder`

    raises OutputError if the disk lacks room for it, including downloads that go to the same disk.
    """
    with output_folder(out, force=force, run=run) as folder:
        size -= min(size, written(folder))
        free, beside = shutil.disk_usage(folder).free, to_come if to_come and fetches_to(folder) else 0
        if size + beside > free:
            more = f" and {human_size(beside)} for what is fetched to the same disk" if beside else ""
            raise OutputError(
                f"{out}: needs {human_size(size)}{more}, the disk has {human_size(free)} free. Make room on it, or "
                "choose another place"
            )
        yield folder
