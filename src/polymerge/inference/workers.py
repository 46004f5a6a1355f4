"""Who generates: this process, processes beside it, or actors of a Ray cluster; all do the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.inference.attempts import Attempt
from polymerge.inference.prompts import Prompt
from polymerge.planning import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from polymerge.inference.answering import Answerer
    from polymerge.inference.live import LiveModel

__all__ = ["Crew", "How", "Job", "LazyWorker", "Worker", "WorkerError", "hire", "own_device"]


@dataclass(frozen=True)
class How:
    """How prompts are asked.

    square  images are made square first, with the processor's mean colour around them
    """

    max_new_tokens: int
    square: bool = False


@dataclass(frozen=True)
class Job:
    """What every worker is told at the start.

    plan            of any candidate: the models to load; None where `folder` is asked as it is
    torch_threads   of one worker; None for torch's own choice
    merge_threads   of one worker, for merging
    folder          of a checkpoint, where there is no plan
    """

    plan: Plan | None
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 16
    torch_threads: int | None = None
    merge_threads: int | None = None
    trust_remote_code: bool = False
    folder: str = ""


class Worker:
    """A loaded model that takes the weights of one candidate after the other, and answers."""

    def __init__(self, job: Job) -> None:
        import torch

        from polymerge.checkpoints.loading import load_model, load_processor

        if job.torch_threads is not None:
            torch.set_num_threads(job.torch_threads)
        trusted = job.trust_remote_code
        self._live: LiveModel | None = None
        if job.plan is None:
            folder: str | Path = job.folder
            self._model = load_model(folder, device=job.device, dtype=job.dtype, trust_remote_code=trusted)
        else:
            from polymerge.inference.live import LiveModel

            self._live = LiveModel(
                job.plan, device=job.device, dtype=job.dtype, threads=job.merge_threads, trust_remote_code=trusted
            )
            folder, self._model = self._live.processor_folder, self._live.model
        self._processor = load_processor(folder, trust_remote_code=trusted)
        self._usual = How(job.max_new_tokens)
        self._answerers: dict[How, Answerer] = {}
        self._asking(self._usual)  # so that a model that cannot be asked is found out now

    def take(self, plan: Plan | None) -> None:
        """Give the model the weights of a candidate; None leaves them as they were loaded."""
        if plan is not None:
            assert self._live is not None
            self._live.set(plan)

    def answer(self, batch: Sequence[Prompt]) -> list[str]:
        """Answer a batch with the weights that it has."""
        return self._asking(self._usual).answer(batch)

    def attempt(self, batch: Sequence[Prompt], how: How) -> list[Attempt]:
        """Answer a batch in some way; what fails is told in the answer's place."""
        from polymerge.inference.attempts import attempted

        return attempted(self._asking(how), batch)

    def _asking(self, how: How) -> Answerer:
        from polymerge.inference.answering import Answerer
        from polymerge.inference.squares import Squares

        if how not in self._answerers:
            processor = Squares(self._processor) if how.square else self._processor
            self._answerers[how] = Answerer(self._model, processor, max_new_tokens=how.max_new_tokens)
        return self._answerers[how]


class LazyWorker:
    """A worker that loads its model with the first thing it is asked, where an error reaches the one who asked."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._made: Worker | None = None

    def do(self, what: str, *given: object) -> Any:
        """Call a method of the worker."""
        if self._made is None:
            self._made = Worker(self._job)
        return getattr(self._made, what)(*given)


class Crew:
    """Workers, each of which does one thing after the other.

    submit  hands a worker the name of a method of `Worker` and its arguments
    """

    def __init__(self, count: int, submit: Callable[..., Future[Any]]) -> None:
        self.count = count
        self._submit = submit

    def take(self, worker: int, plan: Plan | None) -> Future[None]:
        """Have a worker take the weights of a candidate."""
        return _plain(self._submit(worker, "take", plan))

    def answer(self, worker: int, batch: Sequence[Prompt]) -> Future[list[str]]:
        """Have a worker answer a batch."""
        return _plain(self._submit(worker, "answer", tuple(batch)))

    def attempt(self, worker: int, batch: Sequence[Prompt], how: How) -> Future[list[Attempt]]:
        """Have a worker answer a batch, and tell what fails."""
        return _plain(self._submit(worker, "attempt", tuple(batch), how))


@contextmanager
def hire(job: Job, workers: int = 1, ray: str | None = None) -> Iterator[Crew]:
    """Workers for a job, who leave at the end.

    workers  how many
    ray      address of a Ray cluster (`auto` for the one of the environment), or `local` to start one on this machine;
             None for processes of this machine without Ray

    raises MissingExtraError without Ray, RecipeError where its cluster cannot be reached or is too small.
    """
    if workers < 1:
        raise RecipeError(f"workers: {workers} are none")
    if ray is not None:
        from polymerge.inference.ray import actors

        with actors(job, workers, ray) as submit:
            yield Crew(workers, submit)
    elif workers == 1:
        worker = Worker(job)
        yield Crew(1, lambda _, what, *given: _done(lambda: getattr(worker, what)(*given)))
    else:
        # started anew, not forked: torch's threads do not survive a fork
        pools = [
            ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(job, number))
            for number in range(workers)
        ]
        try:
            yield Crew(workers, lambda worker, what, *given: pools[worker].submit(_do, what, *given))
        finally:
            for pool in pools:
                pool.shutdown(wait=True, cancel_futures=True)


def own_device(device: str, number: int) -> str:
    """The device of one of several workers: each has the next GPU in turn, where no GPU is named by its number."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{number % max(torch.cuda.device_count(), 1)}"


_lazy: LazyWorker | None = None


def _begin(job: Job, number: int) -> None:
    global _lazy
    _lazy = LazyWorker(replace(job, device=own_device(job.device, number)))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody is left to answer to, and a killed parent closes no pool


def _do(what: str, *given: object) -> Any:
    assert _lazy is not None
    return _lazy.do(what, *given)


def _done(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future


def _plain(future: Future[Any]) -> Future[Any]:
    """The same, where an error is the one that was raised in the worker, or says that the worker is gone."""
    told: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        cause = getattr(error, "cause", None)  # what Ray wraps in an error of its own
        if isinstance(cause, Exception):
            error = cause
        if error is None:
            told.set_result(done.result())
        elif isinstance(error, BrokenExecutor) or type(error).__name__ in ("ActorDiedError", "RayActorError"):
            told.set_exception(
                WorkerError("a worker has died, perhaps for lack of memory. Answers are kept: run again to go on")
            )
        else:
            told.set_exception(error)

    future.add_done_callback(tell)
    return told


class WorkerError(PolymergeError):
    """A worker is gone; nobody knows more than that."""
