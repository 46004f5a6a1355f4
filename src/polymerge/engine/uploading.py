"""Make an output in an object store one weight file at a time, so that little of it lies on this machine's disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.hub import missing_remote
from polymerge.checkpoints.identity import Stamps, changed_since
from polymerge.checkpoints.stores import view_of
from polymerge.checkpoints.upload import Upload
from polymerge.checkpoints.writer import Shards, Write
from polymerge.dtypes import byte_count
from polymerge.durable import make_folder
from polymerge.engine.executor import Execution
from polymerge.engine.findings import finite
from polymerge.engine.finished import Journal, state_of
from polymerge.engine.norms import ModuleNorms
from polymerge.engine.overflow import Overflow, checked_while_written
from polymerge.engine.pool import Tally
from polymerge.errors import OutputError, RecipeError
from polymerge.paths import own_cache
from polymerge.planning import Plan, Step

__all__ = ["check_upload", "folder_for_one", "send", "state_now", "steps_of", "upload_shards"]


def steps_of(plan: Plan, shards: Shards, shard: int) -> list[Step]:
    """The steps of a plan that write to a shard."""
    return [step for step in plan.steps if any(shards.places[name].shard == shard for name in step.stored)]


def state_now(files: Sequence[Path], stamps: Stamps) -> str:
    """What tells the state of the files that a merge reads, as `state_of` does; empty if one is on the hub, or changed.

    stamps  of inputs when they were opened
    """
    return "" if any(map(missing_remote, files)) or any(changed_since(stamps)) else state_of(files)


def check_upload(upload: Upload, plan: Plan, file_format: str) -> None:
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


@contextmanager
def folder_for_one() -> Iterator[Path]:
    """A folder of this machine for a weight file until it is uploaded."""
    with TemporaryDirectory(prefix="file-", dir=make_folder(own_cache("uploads"))) as folder:
        yield Path(folder)


def send(upload: Upload, plan: Plan, shards: Shards, shard: int, folder: Path, overflow: Overflow) -> str:
    """Upload a shard that is complete in a folder; returns its tag in the store.

    Its numbers were looked at while they were written, but for those of tensors that are copied, which are looked at
    now: later, there is only the object.

    raises OutputError if one of these is NaN or infinite.
    """
    name, checked = shards.names[shard], checked_while_written(plan) | overflow.counts()[0].keys()
    copied = [
        TensorInfo(stored, dtype, shape, folder / name, shards.places[stored].start, byte_count(dtype, shape))
        for step in steps_of(plan, shards, shard)
        for stored, (dtype, shape) in step.stored.items()
        if stored not in checked
    ]
    found = finite(copied, folder)
    if found.passed is False:
        raise OutputError(f"{upload.url}: {name} did not pass its check and was removed: {found.detail}")
    return upload.put(folder / name, name)


def upload_shards(
    running: Execution,
    plan: Plan,
    shards: Shards,
    folder: Path,
    upload: Upload,
    journal: Journal,
    state: Callable[[], str],
    tally: Tally,
) -> list[ModuleNorms]:
    """Make all shards of an output, each on this machine's disk until it is uploaded, while the next one is made.

    folder   gets a hollow file for each shard: its header, and nothing that takes room
    state    of the files that the merge reads (`state_now`)
    tally    counts the output's bytes
    """
    current: list[Write] = []
    running.begin(plan, lambda name, view, start: current[0](name, view, start), tally)
    wholes, before, norms = running.whole_models.found(), state(), list[ModuleNorms]()
    shards.clear(folder)

    def sent(shard: int, place: Path, note: bool) -> None:
        tag = send(upload, plan, shards, shard, place, running.overflow)
        (place / shards.names[shard]).unlink()
        if note and (of := state()):
            journal.note((shards.names[shard], "", shard), tag, of)

    with ThreadPoolExecutor(1, "polymerge-upload") as clerk, folder_for_one() as place:
        last: Future[None] | None = None
        for shard, name in enumerate(shards.names):
            known = journal.digest((name, "", shard), before)
            steps = steps_of(plan, shards, shard)
            if known and upload.tag(name) == known:
                journal.take()
                tally.advance(sum(step.size for step in steps))
            else:
                with shards.only(shard).create(own := make_folder(place / str(shard))) as write:
                    current[:] = [write]
                    counted = [counter.total() for counter in running.overflow.counts()]
                    found = running.carry_out(steps, wholes)
                running.overflow.refuse()
                norms += found
                plain = not found and counted == [counter.total() for counter in running.overflow.counts()]
                if last is not None:
                    last.result()
                last = clerk.submit(sent, shard, own, plain)
            shards.hollow(shard, folder)
        if last is not None:
            last.result()
    return norms
