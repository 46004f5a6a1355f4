"""From a recipe to a folder: plan, lay out, compute, describe, check, and only then give it its name."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.identity import file_digest
from polymerge.checkpoints.prefetch import Prefetch, fetched, fetches_to
from polymerge.checkpoints.writer import Write, as_torch_files, check_target, lay_out, output_folder, parse_size
from polymerge.engine.adapter_merge import AdapterLayout, reopen_adapters, write_adapter, zero_update
from polymerge.engine.ancestry import DeltaNorm, ancestry_warnings, delta_norms
from polymerge.engine.device import Device, open_device
from polymerge.engine.executor import Execution
from polymerge.engine.model_card import adapter_card, model_card
from polymerge.engine.norms import UpdateNorms
from polymerge.engine.opening import beside_template, copy_beside, fetch, files_read, reopen
from polymerge.engine.provenance import RECORD, adapter_outcome, command_line, outcome, provenance
from polymerge.engine.verify import Verification, verify
from polymerge.errors import MissingExtraError, OutputError, RecipeError
from polymerge.families import untied, with_rows
from polymerge.families.quantization import quantization_method, without_quantization
from polymerge.planning import AdapterPlan, Plan, make_plan
from polymerge.planning.estimate import BLOCK, default_threads
from polymerge.planning.model import EMBEDDING, HEAD
from polymerge.planning.storage import Stored, stored_dtypes
from polymerge.recipe.recipe import Recipe

__all__ = ["Merged", "merge"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What `merge` made: the folder, the plan that was carried out, and what the check at the end found.

    errors   of adapters: for each merged module the share of its norm that the output's rank has no room for
    norms    of adapters: how large the merged update is beside theirs
    deltas   of methods on deltas: how far each model is from the base, by its label, in a sample of what is merged
    warnings what the values made plain and no plan could foresee
    """

    folder: Path
    plan: Plan | AdapterPlan
    verification: Verification | None
    errors: Mapping[str, float] = field(default_factory=dict)
    norms: UpdateNorms | None = None
    deltas: Mapping[str, DeltaNorm] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan | AdapterPlan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    shard_size: str = "5GB",
    file_format: Literal["safetensors", "torch"] = "safetensors",
    layout: AdapterLayout | None = None,
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
    file_format safetensors, or torch for loaders that know only pytorch_model-*.bin
    layout      of an adapter: peft, or llava for LLaVA's own; the template's unless it is said
    threads     blocks computed at once, at most; by default as many as processors, up to 8. No bit depends on it
    device      cpu, or a torch device such as cuda through which blocks are streamed
    check       load the output's structure with transformers at the end (`verify`), and look for NaN
    trust_remote_code  let the check run Python files that lie in the checkpoint
    block       elements per block; the bits do not depend on it
    progress    called with bytes done and bytes in all: those of the output, and those fetched from the hub

    raises Refused with everything that is wrong before anything is written, CheckpointError where an input's values
    cannot be merged, OutputError where the output cannot be written or does not pass its check; in all of these nothing
    is left under `out`.
    """
    if block < 1:
        raise RecipeError(f"block: {block} elements are no block")
    if file_format not in ("safetensors", "torch"):
        raise RecipeError(f"format: '{file_format}' is neither safetensors nor torch")
    target = Path(out)
    size = parse_size(shard_size)
    machine = open_device(device)
    plan = source if isinstance(source, Plan | AdapterPlan) else make_plan(source)
    if check and isinstance(plan, Plan):
        _require("transformers", "torch", to="check that the output loads", instead="--no-verify")
    if file_format == "torch":
        _require("safetensors", "torch", to="write pytorch_model.bin files", instead="--format safetensors")
    check_target(target, (Path(path) for entry in plan.inputs for path in (entry.path, entry.adapter) if path), force)
    workers = max(1, threads or default_threads())
    total, done, one_at_a_time = plan.size, 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with one_at_a_time:
            done += count
            if progress is not None:
                progress(done, total)

    if isinstance(plan, AdapterPlan):
        fetch(plan, progress)  # they are small: all that is on the hub first
        return _merge_adapters(
            plan, target, file_format, layout, workers, machine, check, trust_remote_code, block, advance, command
        )
    if layout is not None:
        raise RecipeError("layout: is for adapters, and these models are checkpoints")
    checkpoints = [reopen(plan.inputs[place]) for place in range(len(plan.inputs))]
    shards = lay_out(((step.name, step.dtype, step.shape) for step in plan.steps if step.fate != "tied"), size)
    entries = [checkpoint.entries for checkpoint in checkpoints]
    files = files_read(plan, entries)
    prefetch = Prefetch([*beside_template(plan), *files], advance)
    _check_room(target, sum(shards.sizes), prefetch.size)
    total += prefetch.size
    with output_folder(target) as folder, prefetch, _digests(files) as digests, prefetch.wanted():
        with shards.create(folder) as write:
            running = Execution(entries, device=machine, threads=workers, block=block)
            execute(running, prefetch, plan, write, advance)
        shards.write_index(folder)
        prefetch.finish()
        deltas = delta_norms(plan, entries)
        warnings = _zero_updates(plan, [checkpoint.adapter for checkpoint in checkpoints])
        if plan.base is not None:
            warnings += tuple(ancestry_warnings(deltas, plan.inputs[plan.base].label))
        template = checkpoints[plan.template]
        stored = stored_dtypes(plan.steps, template.config, plan.recipe.get("dtype") is not None)
        if template.config:
            copy_beside(plan, template.folder, folder)
            _write_config(plan, template, stored, folder / "config.json")
        if file_format == "torch":
            as_torch_files(folder, {step.name: step.same_as for step in plan.steps if step.fate == "tied"})
        pattern = "pytorch_model*.bin" if file_format == "torch" else "model*.safetensors"
        written = {path.name: path.stat().st_size for path in sorted(folder.glob(pattern))}
        digest_of = {str(file): digest.result() for file, digest in digests.items()}
        record = provenance(
            plan, digest_of, command or command_line(), outcome(plan, written, stored, deltas, warnings)
        )
        (folder / RECORD).write_text(record, encoding="utf-8")
        (folder / "README.md").write_text(model_card(plan, target.resolve().name, template.config), encoding="utf-8")
        verification = verify(folder, trust_remote_code=trust_remote_code) if check else None
        _refuse_failed(target, verification)
    return Merged(target, plan, verification, deltas=deltas, warnings=warnings)


def execute(running: Execution, prefetch: Prefetch, plan: Plan, write: Write, advance: Callable[[int], None]) -> None:
    """Carry out the steps; where one fails, threads that wait for a file are let go before they are waited for."""
    with running, prefetch.wanted():
        running.run(plan, write, advance)


def _config(plan: Plan, template: Checkpoint) -> Mapping[str, Any]:
    """The template's config as the output is: rows of the vocabulary, a head of its own, plain weights."""
    config = untied(template.config) if plan.unties else template.config
    if quantization_method(config) is not None:  # the plan has found that the weights are not
        config = without_quantization(config)
    for step in plan.steps:
        stored = template.entries.get(step.name)
        if step.canonical in (EMBEDDING, HEAD) and stored is not None and stored.shape != step.shape:
            return with_rows(config, stored.shape[0], step.shape[0])
    return config


def _write_config(plan: Plan, template: Checkpoint, stored: Stored, file: Path) -> None:
    """Write the config.json of the output over a copy of the template's; not a byte of it changes that need not."""
    before, config = file.read_bytes() if file.exists() else b"", _config(plan, template)
    text = before.decode("utf-8")
    if template.brought or config != template.config:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    after = stored.written_in(text).encode("utf-8")
    if after != before:
        file.write_bytes(after)


def _merge_adapters(
    plan: AdapterPlan,
    target: Path,
    file_format: str,
    layout: AdapterLayout | None,
    threads: int,
    device: Device,
    check: bool,
    trust_remote_code: bool,
    block: int,
    advance: Callable[[int], None],
    command: Sequence[str] | None,
) -> Merged:
    adapters = reopen_adapters(plan)
    bases = [reopen(plan.inputs[place]) for place in range(len(adapters), len(plan.inputs))]
    layout = layout or adapters[plan.template].layout
    if layout == "llava":
        _require("safetensors", "torch", to="write LLaVA's .bin files", instead="--layout peft")
    _check_room(target, plan.size)
    files = list(dict.fromkeys([file for adapter in adapters for file in adapter.files]))
    with output_folder(target) as folder, _digests(files) as digests:
        errors, norms = write_adapter(
            plan, adapters, bases[0].entries if bases else None, folder, layout=layout,
            as_torch=file_format == "torch", threads=threads, device=device, block=block, advance=advance,
        )  # fmt: skip
        written = {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".bin")
        }
        digest_of = {str(file): digest.result() for file, digest in digests.items()}
        warnings = (*norms.warnings, *_zero_updates(plan, adapters))
        made = {**adapter_outcome(plan, written, errors, norms), "warnings": warnings}
        record = provenance(plan, digest_of, command or command_line(), made)
        (folder / RECORD).write_text(record, encoding="utf-8")
        (folder / "README.md").write_text(adapter_card(plan, target.resolve().name, errors), encoding="utf-8")
        verification = verify(folder, trust_remote_code=trust_remote_code) if check else None
        _refuse_failed(target, verification)
    return Merged(target, plan, verification, errors, norms, warnings=warnings)


def _zero_updates(plan: Plan | AdapterPlan, adapters: Sequence[Adapter | None]) -> tuple[str, ...]:
    """What to say of the adapters among a plan's inputs whose update is all zeros."""
    labelled = zip(plan.inputs, adapters, strict=False)
    said = (zero_update(entry.label, adapter) for entry, adapter in labelled if adapter is not None)
    return tuple(filter(None, said))


def _refuse_failed(target: Path, verification: Verification | None) -> None:
    if verification is not None and not verification.passed:
        raise OutputError(f"{target}: what was merged did not pass its check, so it is removed:\n{verification}")


@contextmanager
def _digests(files: Sequence[Path]) -> Iterator[dict[Path, Future[str]]]:
    """The digests of files, computed beside the merge; those that have not begun are dropped when it fails."""
    clerk = ThreadPoolExecutor(1, "polymerge-digest")
    try:
        yield {file: clerk.submit(_digest, file) for file in files}
    finally:
        clerk.shutdown(wait=True, cancel_futures=True)


def _digest(file: Path) -> str:
    fetched(file)
    return file_digest(file)


def _check_room(out: Path, size: int, to_come: int = 0) -> None:
    """Raise OutputError where the disk has no room for an output, and for what is fetched if that goes there too."""
    place = out.resolve().parent
    free, beside = shutil.disk_usage(place).free, to_come if to_come and fetches_to(place) else 0
    if size + beside > free:
        more = f" and {beside / 1e9:.1f} GB for what is fetched to the same disk" if beside else ""
        raise OutputError(f"{out}: needs {size / 1e9:.1f} GB{more}, the disk has {free / 1e9:.1f} GB free")


def _require(*packages: str, to: str, instead: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{' and '.join(missing)} needed to {to}: pip install 'polymerge[transformers]', or say {instead}"
        )
