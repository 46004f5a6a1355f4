"""Extract a LoRA from a fine-tune: its difference from the base, one matrix at a time, as two factors for PEFT."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from polymerge.checkpoints.beside import copy_files
from polymerge.checkpoints.identity import stamps_of
from polymerge.checkpoints.output import journal_of
from polymerge.checkpoints.prefetch import Prefetch
from polymerge.checkpoints.target import check_target, roomy_folder
from polymerge.checkpoints.writer import lay_out
from polymerge.dtypes import byte_count, dtype_code
from polymerge.engine.differences import Differences, Found
from polymerge.engine.extracted import Extracted, Missed, adapter_config, card, settings_of
from polymerge.engine.finished import Journal, said_with, state_of
from polymerge.engine.opening import refuse_changes, with_stamps
from polymerge.engine.pool import Pool, Progress, Tally
from polymerge.engine.provenance import RECORD, command_line, digests_of, identities_of, record
from polymerge.engine.verify import verify
from polymerge.errors import CheckpointError, OutputError
from polymerge.families.expressions import names_read
from polymerge.methods.decompositions import one_thread
from polymerge.paths import given_path
from polymerge.planning.companions import of_tuned
from polymerge.planning.difference import Difference, Extraction, Wanted
from polymerge.planning.estimate import default_threads
from polymerge.planning.extraction import plan_extraction
from polymerge.planning.model import EMBEDDING
from polymerge.planning.plan import PREFIX

__all__ = ["carry_out", "extract"]

_SCRATCH = "factors"
"""Name of the file beside the output in which factors wait until all ranks are known."""


def extract(
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    ignore: Sequence[str] = (),
    force: bool = False,
    threads: int | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    sha256: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
    **wanted: Any,
) -> Extracted:
    """Extract a LoRA adapter from a fine-tune and its base: each module's difference, truncated by SVD.

    Eckart and Young 1936: no adapter of these ranks is closer to the fine-tune in the Frobenius norm. `fold` of the
    adapter into the base gives the fine-tune back as far as its ranks allow.

    tuned, base  checkpoints as in a recipe; tensor names may be of other generations
    out          the adapter's folder, which appears only once it is complete and checked
    rank         of every module, and of each expert (at most its shorter side)
    energy       instead: each module gets the smallest rank that holds this share of its difference's squared norm;
                 the experts of a parameter get one rank, by the norms of all of them together
    ignore       globs on stored names that are left out of both
    wanted       the other fields of `planning.extraction.Wanted`: max_rank, parts, match, exclude, save, dtype
    threads      matrices decomposed at once, each on one core; by default one per processor, up to 8
    force, check, trust_remote_code, sha256, progress   as for `merge`; each module, and each expert, counts as a matrix

    raises Refused with every problem found before anything is written, CheckpointError if values are NaN or infinite,
    or nothing differs; OutputError if the output cannot be written or fails its check.
    """
    made = plan_extraction(tuned, base, Wanted(rank=rank, energy=energy, **wanted), ignore)
    how: dict[str, Any] = {"force": force, "threads": threads, "check": check, "sha256": sha256}
    return carry_out(made, out, **how, trust_remote_code=trust_remote_code, progress=progress, command=command)


def carry_out(
    plan: Extraction,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    threads: int | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    sha256: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Extracted:
    """Carry out a planned extraction; arguments and errors as in `extract`."""
    target, inputs = given_path(out), (plan.tuned.checkpoint, plan.base.checkpoint)
    code = str(dtype_code(plan.wanted.dtype))
    beside = of_tuned(plan.tuned, plan.base)
    stamps = stamps_of(beside.values())
    check_target(target, (one.folder for one in inputs), force)
    whole = sum(byte_count(one.dtype, one.shape) for one in plan.differences if one.fate == "whole")
    work = plan.matrices, sum((one.experts or 1) * _cost(one) for one in plan.low_rank)
    tally = Tally(sum(byte_count(one.dtype, one.shape) for one in plan.differences), progress, work)
    files = _files(plan, plan.differences)
    prefetch = Prefetch([*beside.values(), *files], tally.advance)
    tally.total += prefetch.size
    # factors of ranks that the values decide lie there twice until their layout is known
    differing = hashlib.sha256(repr(plan.differences).encode()).hexdigest()
    run = said_with(extract=settings_of(plan), differences=differing)
    room = roomy_folder(target, force, 2 * plan.size + whole, prefetch.size, run)
    with room as folder, prefetch, identities_of(files, prefetch, sha256) as identities, prefetch.wanted():
        journal = Journal(journal_of(folder))
        with Differences(plan, folder.with_name(_SCRATCH), code) as differences:
            found = _measured(plan, differences, journal, threads, prefetch, tally)
            modules = {one.key: found[one.name] for one in plan.low_rank if found[one.name].rank}
            saved = _saved(plan, found, modules)
            _refuse_nothing(plan, found, modules)
            sizes = _write(plan, folder, differences, modules, saved, code)
        prefetch.finish()
        # what is new is told apart from what training left once all of it is here
        copy_files(beside, folder)
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config(plan, modules, saved), indent=2) + "\n")
        wait(identities.values())  # as in a merge: every file has been read by now
        refuse_changes(
            [with_stamps(one) for one in inputs],
            stamps,
            {file: stamp for file, (stamp, _) in prefetch.delivered.items()},
        )
        left_out = {
            one.canonical: Missed(found[one.name].norm, one.why)
            for one in plan.differences
            if one.fate == "left out" and found[one.name].energy
        }
        result = Extracted(target, modules, left_out, tuple(one.name for one in saved), None, plan.warnings)
        known = {file: identity.result() for file, identity in identities.items()}
        said = record(
            {"extract": settings_of(plan)},
            [(plan.tuned.summary(), ["tuned"]), (plan.base.summary(), ["base"])],
            known, command or command_line(),
            {"files": sizes, **result.to_json(), "sampled": digests_of(folder)}, blas=True,
        )  # fmt: skip
        (folder / RECORD).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(plan, target.resolve().name, result), encoding="utf-8")
        verification = verify(folder, trust_remote_code=trust_remote_code) if check else None
        if verification is not None and not verification.passed:
            failed = "; ".join(f"{one.check}: {one.detail}" for one in verification.findings if one.passed is False)
            raise OutputError(f"{target}: the adapter did not pass its check and was removed: {failed}")
    if verification is not None:
        verification = replace(verification, folder=target)
    return replace(result, verification=verification, resumed=journal.taken)


def _files(plan: Extraction, differences: Sequence[Difference]) -> list[Path]:
    """The weight files that differences are read from, each once, in the order in which they are needed."""
    reads = [
        model.entries[name].file
        for one in differences
        for model, expr in ((plan.tuned, one.tuned), (plan.base, one.base))
        for name in names_read(expr)
    ]
    return list(dict.fromkeys(reads))


def _measured(
    plan: Extraction,
    differences: Differences,
    journal: Journal,
    threads: int | None,
    prefetch: Prefetch,
    tally: Tally,
) -> dict[str, Found]:
    """Decompose or measure every difference; a matrix on one thread, whose linear algebra has no threads of its own."""
    parts: dict[tuple[str, int], Found] = {}

    def run(one: Difference, number: int) -> None:
        if one.fate == "low rank":
            parts[one.name, number], kept = _decomposed(plan, differences, journal, one, number)
            tally.matrix(_cost(one), kept=kept)
        else:
            parts[one.name, number] = differences.measured(one)

    pool = Pool(max(1, threads or default_threads()))
    pool.advance = tally.advance
    try:
        with prefetch.wanted(), one_thread():
            for one in plan.differences:
                each = one.experts if one.fate == "low rank" and one.experts else 1
                for number in range(each):
                    pool.submit(byte_count(one.dtype, one.shape) // each, run, one, number, long=True)
            pool.finish()
    finally:
        pool.close()
    found = {name: one for (name, number), one in parts.items() if number == 0}
    for one in plan.low_rank:
        if one.experts:
            energies = [parts[one.name, number].energy for number in range(one.experts)]
            found[one.name] = differences.together(one, energies)
    return found


def _decomposed(
    plan: Extraction, differences: Differences, journal: Journal, one: Difference, number: int
) -> tuple[Found, bool]:
    """Decompose a difference, unless a killed run has, of files that are as they were then; returns whether it had."""
    files = _files(plan, (one.matrix(number),))
    before = state_of(files)
    state, digest, *said = journal.said(one.name, number) or ("", "")
    if before and state == before:
        found = Found(*said)
        if differences.digest(one, number, found.rank) == digest:
            journal.take()
            return found, True
    found = differences.decomposed(one, number)
    if before and before == state_of(files):
        digest = differences.digest(one, number, found.rank)
        journal.note((one.name, number), before, digest, found.energy, found.lost, found.rank)
    return found, False


def _cost(one: Difference) -> float:
    """What a decomposition costs beside others; that of one expert."""
    return float(min(one.sides) * prod(one.sides))


def _saved(plan: Extraction, found: Mapping[str, Found], modules: Mapping[str, Found]) -> list[Difference]:
    """The tensors to keep in full: those that differ, and the others of their modules, which PEFT saves with them."""
    whole = [one for one in plan.differences if one.fate == "whole"]
    changed = {one.module for one in whole if found[one.name].energy}
    return [one for one in whole if (found[one.name].energy if one.module in modules else one.module in changed)]


def _refuse_nothing(plan: Extraction, found: Mapping[str, Found], modules: Mapping[str, Found]) -> None:
    """Raise CheckpointError where no module differs, with what does instead."""
    if modules:
        return
    one, other = plan.tuned, plan.base
    others = [name.canonical for name in plan.differences if found[name.name].energy]
    instead = f". What differs: {', '.join(others[:3])}{', ...' if others[3:] else ''}" if others else ""
    raise CheckpointError(
        f"{one.path}: '{one.label}' does not differ from its base '{other.label}' in any of the {len(plan.low_rank)} "
        f"linear layers that are asked for{instead}. An adapter without a module cannot be loaded: name other `parts`, "
        "or another base"
    )


def _write(
    plan: Extraction,
    folder: Path,
    differences: Differences,
    modules: Mapping[str, Found],
    saved: Sequence[Difference],
    code: str,
) -> dict[str, int]:
    """Write the factors and the tensors kept in full in one file for PEFT; return its size by name."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    adapted = {f"{PREFIX}{plan.stored_name(one, modules)}": one for one in plan.adapted(modules)}
    for name, one in adapted.items():
        rank, (out, width) = modules[one.key].rank * (one.experts or 1), one.sides
        tensors.append((f"{name}.lora_A.weight", code, (rank, width)))
        tensors.append((f"{name}.lora_B.weight", code, (out, rank)))
    names = {one.name: [_name_in_file(one, modules)] for one in saved}
    for one in saved:
        if plan.tied and one.canonical == EMBEDDING:
            names[one.name].append(f"{PREFIX}{plan.tied}")  # PEFT looks for a tied head beside its embedding
    tensors += [(name, one.dtype, one.shape) for one in saved for name in names[one.name]]
    shards = lay_out(tensors, 1 << 62, "adapter_model")
    with shards.create(folder) as write:
        for name, one in adapted.items():
            for side, start, raw in differences.factors(one, modules[one.key].rank):
                write(f"{name}.lora_{side}.weight", memoryview(raw), start)
        for one in saved:
            for start, raw in differences.whole(one):
                for name in names[one.name]:
                    write(name, memoryview(raw), start)
    return dict(zip(shards.names, shards.sizes, strict=True))


def _name_in_file(one: Difference, modules: Mapping[str, Found]) -> str:
    """The name of a full weight in PEFT's file: under `base_layer` if its module has factors."""
    end = one.name.rpartition(".")[2]
    return f"{PREFIX}{one.module}.base_layer.{end}" if one.module in modules else f"{PREFIX}{one.name}"
