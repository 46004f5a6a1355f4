"""Threads that fetch, and that do not hold up the end of the process as those of a ThreadPoolExecutor do."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Final
from weakref import WeakSet

__all__ = ["Workers"]

_GRACE: Final = 2.0  # seconds that the end of the process waits for them all, so that most end as they should

_all: WeakSet[threading.Thread] = WeakSet()


class Workers:
    """Up to so many threads, which take what they are given in its order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._queue: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Have a task done; the future has what it raises."""
        future: Future[None] = Future()
        self._queue.put((future, task))
        if len(self._threads) < self._count:
            name = f"polymerge-fetch_{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
            self._threads.append(thread)
            _all.add(thread)
            thread.start()
        return future

    def close(self, wait: bool) -> None:
        """Nothing more is to come; with `wait`, return when all is done."""
        for _ in self._threads:
            self._queue.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _work(queue: SimpleQueue[tuple[Future[None], Callable[[], None]] | None]) -> None:
    while (taken := queue.get()) is not None:
        future, task = taken
        if future.set_running_or_notify_cancel():
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)


@atexit.register
def _let_end() -> None:
    end = time.monotonic() + _GRACE
    for thread in list(_all):
        thread.join(max(end - time.monotonic(), 0))
