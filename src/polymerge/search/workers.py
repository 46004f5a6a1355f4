"""Who generates: this process, processes beside it, or actors of a Ray cluster; all do the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

from polymerge.errors import MissingExtraError, RecipeError
from polymerge.generation.prompts import Prompt
from polymerge.planning import AdapterPlan, Plan

__all__ = ["Crew", "Job", "Worker", "hire"]


@dataclass(frozen=True)
class Job:
    """What every worker is told at the start.

    plan            of any candidate: the models to load
    torch_threads   of one worker; None for torch's own choice
    merge_threads   of one worker, for merging
    """

    plan: Plan | AdapterPlan
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 16
    torch_threads: int | None = None
    merge_threads: int | None = None
    trust_remote_code: bool = False


class Worker:
    """A loaded model that takes the weights of one candidate after the other, and answers."""

    def __init__(self, job: Job) -> None:
        import torch

        from polymerge.generation.answering import Answerer
        from polymerge.generation.models import load_processor
        from polymerge.run.live import LiveModel

        if job.torch_threads is not None:
            torch.set_num_threads(job.torch_threads)
        self._live = LiveModel(
            job.plan, device=job.device, dtype=job.dtype, threads=job.merge_threads,
            trust_remote_code=job.trust_remote_code,
        )  # fmt: skip
        processor = load_processor(self._live.folder, trust_remote_code=job.trust_remote_code)
        self._answerer = Answerer(self._live.model, processor, max_new_tokens=job.max_new_tokens)

    def take(self, plan: Plan | AdapterPlan) -> None:
        """Give the model the weights of a candidate."""
        self._live.set(plan)

    def answer(self, batch: Sequence[Prompt]) -> list[str]:
        """Answer a batch with the weights that it has."""
        return self._answerer.answer(batch)


class Crew(Protocol):
    """Workers, each of which does one thing after the other."""

    count: int

    def take(self, worker: int, plan: Plan | AdapterPlan, /) -> Future[None]:
        """Have a worker take the weights of a candidate."""

    def answer(self, worker: int, batch: Sequence[Prompt], /) -> Future[list[str]]:
        """Have a worker answer a batch."""


class _Alone:
    """This process."""

    count = 1

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def take(self, _worker: int, plan: Plan | AdapterPlan) -> Future[None]:
        return _done(lambda: self._worker.take(plan))

    def answer(self, _worker: int, batch: Sequence[Prompt]) -> Future[list[str]]:
        return _done(lambda: self._worker.answer(batch))


class _Processes:
    """Processes on this machine, each with a model of its own."""

    def __init__(self, job: Job, count: int) -> None:
        self.count = count
        # started anew, not forked: torch's threads do not survive a fork
        self._pools = [
            ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(job,)) for _ in range(count)
        ]

    def take(self, worker: int, plan: Plan | AdapterPlan) -> Future[None]:
        return self._pools[worker].submit(_take, plan)

    def answer(self, worker: int, batch: Sequence[Prompt]) -> Future[list[str]]:
        return self._pools[worker].submit(_answer, batch)

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None
_worker: Worker | None = None


def _begin(job: Job) -> None:
    """Keep the job; the model is loaded with the first candidate, where an error reaches the one who asked."""
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody is left to answer to, and a killed parent closes no pool


def _take(plan: Plan | AdapterPlan) -> None:
    global _worker
    if _worker is None:
        assert _job is not None
        _worker = Worker(_job)
    _worker.take(plan)


def _answer(batch: Sequence[Prompt]) -> list[str]:
    assert _worker is not None
    return _worker.answer(batch)


class _Actors:
    """Actors of a Ray cluster; checkpoints and images have to lie under the same paths on every machine."""

    def __init__(self, ray: Any, job: Job, count: int) -> None:
        self.count = count
        needs = {"num_gpus": 1} if job.device.startswith("cuda") else {"num_cpus": job.torch_threads or 1}
        actor = ray.remote(**needs)(Worker)
        self._actors = [actor.remote(job) for _ in range(count)]

    def take(self, worker: int, plan: Plan | AdapterPlan) -> Future[None]:
        future: Future[None] = self._actors[worker].take.remote(plan).future()
        return future

    def answer(self, worker: int, batch: Sequence[Prompt]) -> Future[list[str]]:
        future: Future[list[str]] = self._actors[worker].answer.remote(tuple(batch)).future()
        return future


@contextmanager
def hire(job: Job, workers: int = 1, ray: str | None = None) -> Iterator[Crew]:
    """Workers for a job, who leave at the end.

    workers  how many
    ray      address of a Ray cluster (`auto` for the one of the environment), or `local` to start one on this machine;
             None for processes of this machine without Ray

    raises MissingExtraError without Ray, RecipeError where its cluster cannot be reached.
    """
    if workers < 1:
        raise RecipeError(f"workers: {workers} are none")
    if ray is not None:
        with _cluster(ray, workers) as package:
            yield _Actors(package, job, workers)
    elif workers == 1:
        yield _Alone(job)
    else:
        crew = _Processes(job, workers)
        try:
            yield crew
        finally:
            crew.close()


@contextmanager
def _cluster(address: str, workers: int) -> Iterator[Any]:
    ray: Any
    try:
        ray = import_module("ray")
    except ImportError:
        raise MissingExtraError("--ray needs Ray: pip install 'polymerge[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    more = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RecipeError(f"--ray {address}: no cluster can be reached there: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _done(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future
