"""A thread pool for a merge, whose queue stays at most a few blocks ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Final, TypeAlias, TypeVar

__all__ = ["Pool", "Progress", "Tally", "silent", "tell_matrices"]

ERRAND: Final = 1 << 18
"""Bytes of output from which waking a thread pays off."""
T = TypeVar("T")

Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and total bytes, from one thread at a time.

Where whole matrices are merged, a method `matrices` of it is called as well, if it has one: with the number of those
that are done, that of all, and the share of their estimated cost that has been paid, from which the time left follows.
"""


class Pool:
    """Threads with a bounded queue, so that memory does not grow with the plan.

    room  bytes of memory that large calls may take at once
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "polymerge")
        self.room = 0
        self._large: dict[Future[Any], tuple[int, int]] = {}
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._gathered: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._size = 0
        self._threads, self._most = threads, 4 * threads
        self.advance: Callable[[int], None] = silent

    def submit(self, size: int, function: Callable[..., object], *arguments: object, long: bool = False) -> None:
        """Queue a call that produces `size` bytes of output; blocks while the queue is full.

        Small calls are handed to a thread in batches: waking one takes longer than merging a norm.

        long   whether the call takes long although its output is small
        """
        self._gathered.append((function, arguments))
        self._size += size
        if self._size >= ERRAND or long:
            self._hand_over()

    def submit_large(self, size: int, room: int, function: Callable[..., object], *arguments: object) -> None:
        """Queue a call that takes `room` bytes of memory, once that much is left, or no other large one is running."""
        while self._large and (len(self._large) >= self._threads or self._taken() + room > self.room):
            self._finish_large()
        self._large[self._executor.submit(function, *arguments)] = size, room

    def run_all(self, function: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
        """Call a function for every index, in any order and on any thread; return the results in index order."""
        waiting: deque[Future[T]] = deque()
        for index in indices:
            if len(waiting) >= self._most:
                yield waiting.popleft().result()
            waiting.append(self._executor.submit(function, index))
        while waiting:
            yield waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all queued calls."""
        if self._gathered:
            self._hand_over()
        while self._waiting:
            self._finish_one()
        while self._large:
            self._finish_large()

    def close(self) -> None:
        """Drop calls that have not started, and wait for the others."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _hand_over(self) -> None:
        while len(self._waiting) >= self._most:
            self._finish_one()
        self._waiting.append((self._executor.submit(_call_each, self._gathered), self._size))
        self._gathered, self._size = [], 0

    def _finish_one(self) -> None:
        future, size = self._waiting.popleft()
        future.result()
        self.advance(size)

    def _taken(self) -> int:
        return sum(room for _, room in self._large.values())

    def _finish_large(self) -> None:
        done, _ = wait(self._large, return_when=FIRST_COMPLETED)
        for future in done:
            size, _ = self._large.pop(future)
            future.result()
            self.advance(size)


def _call_each(calls: Sequence[tuple[Callable[..., object], tuple[object, ...]]]) -> None:
    for function, arguments in calls:
        function(*arguments)


def silent(_: int) -> None:
    """Ignore progress."""


class Tally:
    """Adds up what is done, from any thread, and tells a progress.

    total     of bytes; it may grow while work is added
    matrices  number of whole matrices to merge, if any, and what they cost together, in any unit
    """

    def __init__(self, total: int, progress: Progress | None, matrices: tuple[int, float] = (0, 0.0)) -> None:
        self.total, self._done, self._progress = total, 0, progress
        self._matrices, self._cost = matrices
        self._ended, self._paid = 0, 0.0
        self._one_at_a_time = threading.Lock()
        if self._matrices:
            tell_matrices(progress, 0, self._matrices, 0.0)

    def advance(self, count: int) -> None:
        """Count more bytes as done."""
        with self._one_at_a_time:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self.total)

    def matrix(self, cost: float, *, kept: bool = False) -> None:
        """Count a matrix as merged; one that an earlier run had finished (`kept`) tells nothing of the time left."""
        with self._one_at_a_time:
            self._ended += 1
            if kept:
                self._cost -= cost
            else:
                self._paid += cost
            share = min(self._paid / self._cost, 1.0) if self._paid and self._cost > 0 else 0.0
            tell_matrices(self._progress, self._ended, self._matrices, share)


def tell_matrices(progress: Progress | None, done: int, total: int, share: float) -> None:
    """Tell a progress how many matrices are done, if it wants to know: see `Progress`."""
    tell = getattr(progress, "matrices", None)
    if tell is not None:
        tell(done, total, share)
