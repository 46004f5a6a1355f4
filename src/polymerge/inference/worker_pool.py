"""Pools of workers: this process, local processes, or actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from polymerge.engine.ray_cluster import cause_of, check_room, connected, is_of_ray
from polymerge.errors import PolymergeError, RecipeError
from polymerge.inference.job import Job
from polymerge.inference.worker import Worker

__all__ = ["Call", "WorkerError", "WorkerPool", "own_device"]

T = TypeVar("T")

Call = Callable[[Worker], Any]
"""A picklable call for a worker, such as `functools.partial(Worker.take, plan=plan)`."""

_Submit = Callable[[int, Call], Future[Any]]


class WorkerError(PolymergeError):
    """A worker died without an error of its own."""


class WorkerPool:
    """Workers for a job, each of which handles one call at a time; a context manager that ends them.

    They start on the first call.

    count  number of workers
    ray    host:port or ray://host:port of a Ray cluster, `auto` for the environment's, or `local` to start one
           on this machine; None for this process, or several of this machine
    """

    def __init__(self, job: Job, count: int = 1, ray: str | None = None) -> None:
        if count < 1:
            raise RecipeError(f"workers: {count} are none")
        self.count = count
        self._job, self._ray = job, ray
        self._stack = ExitStack()
        self._submit: _Submit | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def submit(self, worker: int, call: Call) -> Future[Any]:
        """Submit a call to a worker, given by its number.

        raises MissingExtraError without Ray, RecipeError if its cluster cannot be reached or is too small.
        """
        if self._submit is None:
            self._submit = self._stack.enter_context(self._started())
        return _with_cause(self._submit(worker, call))

    def run(self, streams: Iterable[Iterator[tuple[T, Call]]]) -> Iterator[tuple[T, Any]]:
        """Carry out streams of calls: each worker takes a stream, makes its calls in order, and takes the next.

        streams  of calls, each with a tag; the next call is taken once the previous result was consumed
        returns  the tag and result of each call, in order of completion
        """
        waiting = iter(streams)
        busy: dict[Future[Any], tuple[int, Iterator[tuple[T, Call]], T]] = {}

        def go_on(worker: int, stream: Iterator[tuple[T, Call]] | None) -> None:
            while stream is not None:
                for purpose, call in stream:
                    busy[self.submit(worker, call)] = (worker, stream, purpose)
                    return
                stream = next(waiting, None)

        try:
            for worker in range(self.count):
                go_on(worker, next(waiting, None))
            while busy:
                finished, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in finished:
                    worker, stream, purpose = busy.pop(future)
                    yield purpose, future.result()
                    go_on(worker, stream)
        finally:
            for future in busy:
                future.cancel()

    @contextmanager
    def _started(self) -> Iterator[_Submit]:
        if self._ray is not None:
            with _actors(self._job, self.count, self._ray) as submit:
                yield submit
        elif self.count == 1:
            worker = Worker(self._job)
            try:
                yield lambda _, call: _done(lambda: call(worker))
            finally:
                worker.close()
        else:
            # started anew, not forked: torch's threads do not survive a fork
            with _apart():
                pools = [
                    ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(self._job, number))
                    for number in range(self.count)
                ]
            others = set(active_children())

            def submit(number: int, call: Call) -> Future[Any]:
                with _apart():  # the first call starts the process
                    return pools[number].submit(_do, call)

            try:
                yield submit
            except BaseException:
                for process in set(active_children()) - others:
                    process.terminate()  # nobody waits for its answer
                raise
            finally:
                for pool in pools:
                    pool.shutdown(wait=True, cancel_futures=True)


def own_device(device: str, number: int) -> str:
    """The device of one of several workers: GPUs are assigned round-robin unless a GPU index is given."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{number % max(torch.cuda.device_count(), 1)}"


@contextmanager
def _apart() -> Iterator[None]:
    """Let processes that start in the block find no modules in the current folder, and hear no ^C and no hang-up.

    A terminal sends them to all of its processes; this one ends the others.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    here = os.open(".", os.O_RDONLY)
    if sys.version_info < (3, 11):  # which has no such variable
        os.chdir("/")
    try:
        yield
    finally:
        os.chdir(here)
        os.close(here)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_worker: Worker | None = None
"""The worker of this process, in a process pool."""


def _begin(job: Job, number: int) -> None:
    global _worker
    tqdm.set_lock(threading.RLock())  # its own is of processes, and one that is ended would leave it to be cleared up
    _worker = Worker(replace(job, device=own_device(job.device, number)))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody is left to answer to, and a killed parent closes no pool


def _do(call: Call) -> Any:
    assert _worker is not None
    return call(_worker)


def _done(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future


def _with_cause(future: Future[Any]) -> Future[Any]:
    """The same future, with the error raised in the worker, or a WorkerError if the worker died."""
    told: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        if not told.set_running_or_notify_cancel():  # nobody waits for it any more
            return
        error = CancelledError() if done.cancelled() else cause_of(done.exception())
        if error is None:
            told.set_result(done.result())
        elif isinstance(error, BrokenExecutor) or is_of_ray(error):
            told.set_exception(
                WorkerError("a worker has died, perhaps for lack of memory. Answers are kept: run again to go on")
            )
        else:
            told.set_exception(error)

    future.add_done_callback(tell)
    return told


class _Actor:
    """A worker as a Ray actor."""

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def do(self, call: Call) -> Any:
        return call(self._worker)


@contextmanager
def _actors(job: Job, count: int, address: str) -> Iterator[_Submit]:
    """Actors for a job; checkpoints and images must have the same paths on every machine."""
    need = {"GPU": 1.0} if job.device.startswith("cuda") else {"CPU": float(job.torch_threads or 1)}
    with connected(address, int(count * need.get("CPU", 1))) as ray:
        check_room(ray, address, count, need)
        actor = ray.remote(num_cpus=need.get("CPU", 0), num_gpus=need.get("GPU", 0))(_Actor)
        actors = [actor.remote(job) for _ in range(count)]
        yield lambda worker, call: actors[worker].do.remote(call).future()
