"""Carry out a plan on the machines of a Ray cluster: each shard of the output is a task.

All machines see the inputs and the folder of the output under the same paths. The process that the user started, the
driver, holds the lock of the folder of unfinished work; it looks at all machines first, has the statistics over whole
models put together from tasks of their own, and takes every shard that a task has completed to its place. Tasks lock
nothing, and write to folders that only they know (`shard_tasks`).

A task whose machine is lost is begun again on another. A driver that is killed has noted the sha256 of every shard that
was complete, and the next run takes those that still have it: it is compared by tasks, too.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, TypeVar

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.identity import Stamps
from polymerge.checkpoints.upload import Upload
from polymerge.checkpoints.writer import Shards
from polymerge.engine.cutoffs import Found, Window, joined
from polymerge.engine.device import open_device
from polymerge.engine.executor import Execution
from polymerge.engine.finished import Journal
from polymerge.engine.norms import ModuleNorms
from polymerge.engine.overflow import Overflow
from polymerge.engine.ray_cluster import alive, cause_of, connected
from polymerge.engine.shard_tasks import Call, Job, Made, ShardMaker, Worked, carry_out, looked_at, packages_of
from polymerge.engine.uploading import state_now, steps_of
from polymerge.engine.whole_models import Merged
from polymerge.errors import OutputError, PolymergeError, RecipeError, StoppedError, refuse_if_any
from polymerge.methods.own import added
from polymerge.planning import Plan
from polymerge.planning.estimate import default_threads

__all__ = ["Carried", "merge_shards", "on_cluster"]

K = TypeVar("K", bound=Hashable)

_TRIES: Final = 5
"""How often a task is begun again whose machine is lost."""

_LOOK: Final = 10.0
"""Seconds after which it is looked whether a machine is left, when no task ends."""


@dataclass(frozen=True)
class Carried:
    """What came of carrying out a plan.

    norms   the measured norms of each module merged by its factors
    taken   the number of matrices or shards that an earlier run had completed
    worked  what each task has done, if there were any
    """

    norms: list[ModuleNorms]
    overflow: Overflow
    taken: int
    worked: tuple[Worked, ...] = ()


def on_cluster(address: str | None) -> AbstractContextManager[Any]:
    """Connect to a cluster, as `connected` does; None without an address."""
    return nullcontext() if address is None else connected(address)


def merge_shards(
    ray: Any,
    plan: Plan,
    shards: Shards,
    folder: Path,
    entries: Sequence[Mapping[str, TensorInfo]],
    journal: Journal,
    files: Sequence[Path],
    stamps: Stamps,
    advance: Callable[[int], None],
    *,
    device: str,
    threads: int | None,
    block: int,
    upload: Upload | None = None,
) -> Carried:
    """Make all shards of an output.

    folder    that they are to lie in, in the folder of unfinished work
    journal   what is finished
    files     that the merge reads, and the `stamps` of inputs when they were opened
    advance   called with the number of output bytes completed
    device, threads, block   of a task; by default as many threads as the smallest machine has processors, up to 8
    upload    of an output in an object store, to which each task uploads its shard; `folder` gets hollow files

    raises what the same merge on one machine does; StoppedError if no machine is left, or a task fails too often.
    """
    threads = _threads(ray, threads, device)
    parts = folder.with_name(f"parts-{token_hex(8)}")
    job = Job(plan, shards, parts, folder, device, threads, block, added(), upload)
    execution = Execution(entries, device=open_device("cpu"), threads=default_threads(), block=block)

    state = partial(state_now, files, stamps)
    shards.clear(folder)
    parts.mkdir()
    try:
        with execution:
            tasks = _Tasks(ray, job)
            tasks.look_at_machines()
            execution.begin(plan, lambda *_: None)
            wholes = execution.whole_models.found(tasks)
            calls: dict[int, Call] = {}
            before = state()
            for shard in sorted(range(len(shards.names)), key=lambda shard: -shards.sizes[shard]):  # the longest first
                known = (shards.names[shard], "", shard)
                digest = journal.digest(known, before)
                calls[shard] = partial(ShardMaker.make, shard=shard, wholes=wholes, digest=digest)
            norms: dict[int, list[ModuleNorms]] = {}
            for shard, made in tasks.run(calls):
                _put_away(job, shard, made, journal, state)
                execution.overflow.add(*made.counted)
                norms[shard] = made.norms
                advance(sum(step.size for step in steps_of(plan, shards, shard)))
            execution.overflow.refuse()
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    every = [one for shard in sorted(norms) for one in norms[shard]]
    return Carried(every, execution.overflow, journal.taken, tuple(tasks.worked))


def _threads(ray: Any, threads: int | None, device: str) -> int:
    """The threads of a task; raises RecipeError if no machine has room for one."""
    machines = [node["Resources"] for node in alive(ray)]
    processors = [int(one["CPU"]) for one in machines if one.get("CPU", 0) >= 1]
    if device.startswith("cuda") and not any(one.get("GPU", 0) >= 1 for one in machines):
        raise RecipeError(f"device: {device}, and none of the {len(machines)} machines of the cluster has a GPU")
    if (threads or 1) > max(processors, default=0):
        raise RecipeError(
            f"threads: {threads or 1} for a task, and no machine of the cluster has more than "
            f"{max(processors, default=0)} processors"
        )
    return threads or min(8, *processors)


def _put_away(job: Job, shard: int, made: Made, journal: Journal, state: Callable[[], str]) -> None:
    """Take a shard to its place, and note it in the journal if it is all that its task has found."""
    if job.upload is not None:
        job.shards.hollow(shard, job.folder)
    if made.again:
        journal.take()
        return
    if made.file is not None:
        made.file.replace(job.folder / made.file.name)
        with suppress(OSError):  # a network filesystem may keep a name in it for a while
            made.file.parent.rmdir()
    if not made.norms and not any(made.counted) and (of := state()):
        journal.note((job.shards.names[shard], "", shard), made.digest, of)


class _Tasks:
    """The tasks of one merge.

    worked  what each has done
    """

    def __init__(self, ray: Any, job: Job) -> None:
        self._ray, self._job = ray, job
        self._token, self._held = token_hex(8), [ray.put(job)]
        self._need = {"GPU": 1.0} if job.device.startswith("cuda") else {"CPU": float(job.threads)}
        self._task = ray.remote(carry_out).options(
            num_cpus=self._need.get("CPU", 0),
            num_gpus=self._need.get("GPU", 0),
            max_retries=_TRIES,
            scheduling_strategy="SPREAD",
        )
        self.worked: list[Worked] = []

    def look_at_machines(self) -> None:
        """Refuse machines that do not see the folders, or on which the bits could be others; all of them at once."""
        near = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        packages = packages_of(self._job.plan)
        look, (_, own) = self._ray.remote(looked_at), looked_at(self._job, packages)

        def asked_of(node: Mapping[str, Any]) -> Any:
            there = look.options(num_cpus=0, scheduling_strategy=near(node["NodeID"], soft=False))
            return there.remote(self._held[0], packages)

        asked = [(node, asked_of(node)) for node in alive(self._ray)]
        problems: list[PolymergeError] = []
        for node, answer in asked:
            machine = f"machine {node['NodeManagerHostname']} ({node['NodeName']})"
            try:
                unseen, versions = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:
                said = str(cause_of(error)).strip().splitlines()
                problems.append(
                    RecipeError(f"{machine}: cannot run polymerge: {said[-1] if said else error}. Install it")
                )
                continue
            except self._ray.exceptions.RayError:
                continue  # it is gone
            problems += [
                OutputError(f"{machine}: there is no {path} there, which every machine has to see under the same path")
                for path in unseen
            ]
            problems += [
                RecipeError(f"{machine}: has {package} {versions[package]}, here is {there}. Install the same on all")
                for package, there in own.items()
                if versions[package] != there
            ]
        refuse_if_any(problems)

    def run(self, calls: Mapping[K, Call]) -> Iterator[tuple[K, Any]]:
        """Carry out calls, each as a task; yields the results as they come. If one fails, all others are ended."""
        waiting = {self._task.remote(self._token, self._held, call): key for key, call in calls.items()}
        try:
            while waiting:
                done, _ = self._ray.wait(list(waiting), timeout=_LOOK)
                if not done and not self._room():
                    raise StoppedError(
                        f"{self._job.folder}: no machine of the cluster is left that has room for a task"
                    )
                for task in done:
                    found, worked = self._result(task)
                    self.worked.append(worked)
                    yield waiting.pop(task), found
        finally:
            for task in waiting:
                self._ray.cancel(task, force=True)
            if waiting:
                with suppress(self._ray.exceptions.RayError):  # so that none writes any more
                    self._ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK)

    def look(self, merged: Sequence[Merged], windows: Sequence[Window]) -> Sequence[Found]:
        """One pass over pieces."""
        found = self._apart(merged, lambda names: partial(ShardMaker.look, names=names, windows=windows))
        return [joined(parts) for parts in zip(*found, strict=True)]

    def dots(self, merged: Sequence[Merged]) -> Sequence[Any]:
        """Terms of the dot products over pieces."""
        found = self._apart(merged, lambda names: partial(ShardMaker.dots, names=names))
        return [term for terms in found for term in terms]

    def _apart(self, merged: Sequence[Merged], call: Callable[[frozenset[str]], Call]) -> list[Any]:
        """The results of a call for the pieces of each shard."""
        names = defaultdict[int, set[str]](set)
        for step, piece in merged:
            names[self._job.shards.places[step.name].shard].add(piece.canonical)
        found = dict(self.run({shard: call(frozenset(of)) for shard, of in names.items()}))
        return [found[shard] for shard in sorted(found)]

    def _room(self) -> bool:
        ((what, each),) = self._need.items()
        return any(node["Resources"].get(what, 0) >= each for node in alive(self._ray))

    def _result(self, task: Any) -> tuple[Any, Worked]:
        try:
            found: tuple[Any, Worked] = self._ray.get(task)
            return found
        except self._ray.exceptions.RayTaskError as error:
            cause = cause_of(error)
            assert cause is not None
            raise cause from None
        except self._ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()
            raise StoppedError(
                f"{self._job.folder}: a task was lost {_TRIES + 1} times with its machine or its process, perhaps for "
                f"lack of memory: {said[0] if said else type(error).__name__}"
            ) from error
