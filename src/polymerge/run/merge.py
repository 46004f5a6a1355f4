"""From a recipe to a folder: plan, lay out, compute, describe, check, and only then give it its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from polymerge.checkpoint import Checkpoint, open_checkpoint
from polymerge.checkpoint.digests import file_digest
from polymerge.checkpoint.output import check_target, copy_companions, output_folder
from polymerge.checkpoint.shards import lay_out, parse_size
from polymerge.errors import CheckpointError, MissingExtraError, OutputError, RecipeError
from polymerge.planning import Plan, make_plan
from polymerge.planning.estimate import BLOCK, default_threads
from polymerge.planning.inputs import headers_digest
from polymerge.recipe import Recipe
from polymerge.run.device import open_device
from polymerge.run.execute import execute
from polymerge.run.record import RECORD, command_line, model_card, provenance
from polymerge.verification import Verification, verify

__all__ = ["Merged", "merge"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What `merge` made: the folder, the plan that was carried out, and what the check at the end found."""

    folder: Path
    plan: Plan
    verification: Verification | None


def merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    shard_size: str = "5GB",
    layout: Literal["safetensors", "torch"] = "safetensors",
    threads: int | None = None,
    device: str = "cpu",
    check: bool = True,
    trust_remote_code: bool = False,
    block: int = BLOCK,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Merged:
    """Merge checkpoints into a new folder that loads as it is.

    source      a recipe (file, mapping or `Recipe`), or a `Plan` made of one
    out         the folder to make; it appears when it is complete and checked, never before
    force       replace what is at `out`
    shard_size  of the output's weight files, such as 5GB
    layout      safetensors, or torch for loaders that know only pytorch_model-*.bin
    threads     blocks computed at once, at most; by default as many as processors, up to 8. No bit depends on it
    device      cpu, or a torch device such as cuda through which blocks are streamed
    check       load the output's structure with transformers at the end (`verify`), and look for NaN
    trust_remote_code  let the check run Python files that lie in the checkpoint
    block       elements per block; the bits do not depend on it
    progress    called with bytes done and bytes in all

    raises Refused with everything that is wrong before anything is written, CheckpointError where an input's values
    cannot be merged, OutputError where the output cannot be written or does not pass its check; in all of these nothing
    is left under `out`.
    """
    if block < 1:
        raise RecipeError(f"block: {block} elements are no block")
    if layout not in ("safetensors", "torch"):
        raise RecipeError(f"layout: '{layout}' is neither safetensors nor torch")
    target = Path(out)
    size = parse_size(shard_size)
    machine = open_device(device)
    if check:
        _require("transformers", "torch", to="check that the output loads", instead="--no-verify")
    if layout == "torch":
        _require("safetensors", "torch", to="write pytorch_model.bin files", instead="--format safetensors")
    plan = source if isinstance(source, Plan) else make_plan(source)
    check_target(target, (Path(entry.path) for entry in plan.inputs), force)
    checkpoints = [_reopen(plan, place) for place in range(len(plan.inputs))]
    shards = lay_out(((step.name, step.dtype, step.shape) for step in plan.steps if step.fate != "tied"), size)
    _check_room(target, sum(shards.sizes))
    workers = max(1, threads or default_threads())
    files = _files_read(plan, checkpoints)
    with output_folder(target) as folder, _digests(files) as digests:
        descriptors = shards.create(folder)
        total, done = plan.size, 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        try:
            entries = [checkpoint.entries for checkpoint in checkpoints]
            execute(plan, entries, shards, descriptors, device=machine, threads=workers, block=block, advance=advance)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        shards.write_index(folder)
        template = checkpoints[plan.template]
        if template.config:
            copy_companions(template.folder, folder)
        if layout == "torch":
            from polymerge.checkpoint.torchwrite import as_torch_files  # needs torch, which a merge does not

            as_torch_files(folder, {step.name: step.same_as for step in plan.steps if step.fate == "tied"})
        pattern = "pytorch_model*.bin" if layout == "torch" else "model*.safetensors"
        written = {path.name: path.stat().st_size for path in sorted(folder.glob(pattern))}
        digest_of = {str(file): digest.result() for file, digest in digests.items()}
        record = provenance(plan, digest_of, command or command_line(), written)
        (folder / RECORD).write_text(record, encoding="utf-8")
        (folder / "README.md").write_text(model_card(plan, target.resolve().name, template.config), encoding="utf-8")
        verification = verify(folder, trust_remote_code=trust_remote_code) if check else None
        if verification is not None and not verification.passed:
            raise OutputError(
                f"{target}: the merged checkpoint did not pass its check, so it is removed:\n{verification}"
            )
    return Merged(target, plan, verification)


@contextmanager
def _digests(files: Sequence[Path]) -> Iterator[dict[Path, Future[str]]]:
    """The digests of files, computed beside the merge; those that have not begun are dropped when it fails."""
    clerk = ThreadPoolExecutor(1, "polymerge-digest")
    try:
        yield {file: clerk.submit(file_digest, file) for file in files}
    finally:
        clerk.shutdown(wait=True, cancel_futures=True)


def _reopen(plan: Plan, place: int) -> Checkpoint:
    """An input's headers, refused where they are no longer what was planned with."""
    recorded = plan.inputs[place]
    checkpoint = open_checkpoint(recorded.source, Path(recorded.path))
    if headers_digest(checkpoint) != recorded.headers:
        raise CheckpointError(f"{recorded.path}: its tensors have changed since it was planned. Plan again")
    return checkpoint


def _files_read(plan: Plan, checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Every weight file that the merge reads from, each once."""
    reads: list[Path] = []
    for place, checkpoint in enumerate(checkpoints):
        left_out = {entry.name for entry in plan.left_out if entry.input == place}
        reads += [entry.file for name, entry in checkpoint.entries.items() if name not in left_out]
    return list(dict.fromkeys(reads))


def _check_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.resolve().parent).free
    if size > free:
        raise OutputError(f"{out}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")


def _require(*packages: str, to: str, instead: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{' and '.join(missing)} needed to {to}: pip install 'polymerge[transformers]', or say {instead}"
        )
