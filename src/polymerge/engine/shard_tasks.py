"""What a task on a machine of a cluster does: make one shard of an output, or look through what is merged into it.

A task writes to a folder of its own, of a name that nobody else has. So neither an earlier attempt, whose machine was
taken for lost and is not, nor a task of a run that was killed can write to what is complete.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple, TypeAlias

from polymerge.checkpoints.hub import remote_of
from polymerge.checkpoints.identity import sha256_of
from polymerge.checkpoints.stores import filesystem, view_of
from polymerge.checkpoints.upload import Upload
from polymerge.checkpoints.writer import Shards
from polymerge.durable import reason_of, sync
from polymerge.engine.cutoffs import Found, Window, look_through
from polymerge.engine.device import open_device
from polymerge.engine.executor import Execution
from polymerge.engine.finished import version_of
from polymerge.engine.norms import ModuleNorms
from polymerge.engine.opening import entries_of, opened_inputs
from polymerge.engine.statistics import Deltas, dot_products
from polymerge.engine.uploading import folder_for_one, send, steps_of
from polymerge.engine.whole_models import Wholes
from polymerge.errors import OutputError
from polymerge.methods.own import MethodsFile
from polymerge.planning import Plan
from polymerge.planning.matrix_costs import decomposed

__all__ = ["Call", "Job", "Made", "ShardMaker", "Worked", "carry_out", "looked_at", "packages_of"]


@dataclass(frozen=True)
class Job:
    """What every task of a merge has to know.

    shards   the files of the output
    parts    the folder in which each task makes one of its own; all machines see it under this path
    folder   the folder that complete files lie in
    methods  files of the user's own methods
    upload   of an output in an object store; then only the driver needs the folders
    """

    plan: Plan
    shards: Shards
    parts: Path
    folder: Path
    device: str
    threads: int
    block: int
    methods: tuple[MethodsFile, ...]
    upload: Upload | None = None

    def unseen(self) -> list[Path]:
        """What this machine would have to see and does not."""
        places = [Path(path) for one in self.plan.inputs for path in (one.path, one.adapter) if path]
        own = () if self.upload is not None else (self.parts,)
        near = (path for path in places if remote_of(path) is None and view_of(path) is None)
        return [path for path in (*own, *near) if not path.exists()]


class Worked(NamedTuple):
    """What a task has done, for a count.

    machine        Ray's name of it
    began, ended   by the clock of that machine, in seconds
    read, written  bytes of files, as the system counts them; 0 where it does not
    """

    machine: str
    began: float
    ended: float
    read: int
    written: int


class Made(NamedTuple):
    """A shard that is complete on the disk.

    file     where it is; None if it had been made before, or is uploaded
    digest   its sha256, or its tag in the store
    norms    the measured norms of each module merged by its factors
    counted  the counts of what overflows
    """

    file: Path | None
    digest: str
    norms: list[ModuleNorms]
    counted: tuple[Counter[str], Counter[tuple[str, str]]]
    again: bool = False
    """Whether it had been made before."""


class ShardMaker:
    """Does the tasks of one merge in this process."""

    def __init__(self, job: Job) -> None:
        if unseen := job.unseen():
            raise OutputError(f"there is no {unseen[0]} here, which every machine has to see under the same path")
        for file in job.methods:
            file.add()
        self._job = job
        self._entries = entries_of(opened_inputs(job.plan))

    def look(self, names: Container[str], windows: Sequence[Window]) -> list[Found]:
        """One pass over merged pieces, by canonical name."""
        with self._begun() as execution:
            source = Deltas(execution.whole_models.named(names, in_cells=False))
            return look_through(source, windows, execution.pool.run_all)

    def dots(self, names: Container[str]) -> list[Any]:
        """Terms of the dot products over merged pieces, by canonical name."""
        with self._begun() as execution:
            return dot_products(execution.whole_models.named(names, in_cells=True), execution.pool.run_all)

    def make(self, shard: int, wholes: Wholes, digest: str | None) -> Made:
        """Make a shard, unless the file with this digest is there already."""
        job, name = self._job, self._job.shards.names[shard]
        if job.upload is not None:
            return self._uploaded(job.upload, shard, wholes, digest)
        if digest is not None and (job.folder / name).is_file() and sha256_of(job.folder / name) == digest:
            return Made(None, digest, [], (Counter(), Counter()), again=True)
        for earlier in job.parts.glob(f"{shard}-*"):
            shutil.rmtree(earlier, ignore_errors=True)
        own = job.parts / f"{shard}-{token_hex(8)}"
        own.mkdir()
        with job.shards.only(shard).create(own) as write, self._begun(write) as execution:
            norms = execution.carry_out(steps_of(job.plan, job.shards, shard), wholes)
        sync(own / name)
        return Made(own / name, sha256_of(own / name), norms, execution.overflow.counts())

    def _uploaded(self, upload: Upload, shard: int, wholes: Wholes, digest: str | None) -> Made:
        job, name = self._job, self._job.shards.names[shard]
        if digest and upload.tag(name) == digest:
            return Made(None, digest, [], (Counter(), Counter()), again=True)
        with folder_for_one() as own:
            with job.shards.only(shard).create(own) as write, self._begun(write) as execution:
                norms = execution.carry_out(steps_of(job.plan, job.shards, shard), wholes)
            counted = execution.overflow.counts()
            tag = "" if counted[1] else send(upload, job.plan, job.shards, shard, own, execution.overflow)
        return Made(None, tag, norms, counted)

    def _begun(self, write: Callable[[str, memoryview, int], None] | None = None) -> Execution:
        job = self._job
        execution = Execution(self._entries, device=open_device(job.device), threads=job.threads, block=job.block)
        execution.begin(job.plan, write or (lambda *_: None))  # what only looks writes nothing
        return execution


Call: TypeAlias = Callable[[ShardMaker], Any]
"""A picklable call, such as `functools.partial(ShardMaker.look, names=..., windows=...)`."""

_makers: dict[str, ShardMaker] = {}
"""The maker of the merge that this process works for, by the merge's own token."""


def carry_out(token: str, held: Sequence[Any], call: Call) -> tuple[Any, Worked]:
    """Carry out a call in a worker's process, and count what it does.

    token  of the merge
    held   a reference to the `Job`, in a list so that only the first task of a process takes it from Ray's store

    raises OutputError, with this machine's name, if its disk is full or it does not see the folders.
    """
    ray: Any = import_module("ray")
    began, before = time.time(), _counts()
    try:
        if token not in _makers:
            _makers.clear()
            _makers[token] = ShardMaker(ray.get(held[0]))
        found = call(_makers[token])
    except OSError as error:
        raise OutputError(f"{machine(ray)}: not completed: {reason_of(error)}") from error
    except OutputError as error:
        raise OutputError(f"{machine(ray)}: {error}") from error
    read, written = (now - then for now, then in zip(_counts(), before, strict=True))
    name = ray.get_runtime_context().get_node_id()
    return found, Worked(name, began, time.time(), read, written)


def packages_of(plan: Plan) -> tuple[str, ...]:
    """The packages whose versions the bits of an output follow from."""
    linear_algebra = any(decomposed(plan)) or plan.of_adapters
    return ("polymerge", "numpy", *(("scipy",) if linear_algebra else ()))


def looked_at(job: Job, packages: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """What a machine would have to see and does not, and the versions of packages that it has.

    raises MissingExtraError if it cannot open the stores that the merge reads and writes.
    """
    views = [of[1] for entry in job.plan.inputs for path in (entry.path, entry.adapter) if (of := view_of(Path(path)))]
    for url in dict.fromkeys((*views, *((job.upload.url,) if job.upload else ()))):
        filesystem(url)
    return job.unseen(), {package: version_of(package) for package in packages}


def machine(ray: Any) -> str:
    """The name of this machine, for messages."""
    return f"machine {socket.gethostname()} ({ray.util.get_node_ip_address()})"


def _counts() -> tuple[int, int]:
    """Bytes that this process has read and written so far."""
    fields: Mapping[str, str] = {}
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(": ", 1) for line in lines)
    return int(fields.get("rchar", 0)), int(fields.get("wchar", 0))
