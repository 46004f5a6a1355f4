"""Run merges in processes of their own and report how much memory each takes: `python merge_and_measure.py FILE`.

FILE is JSON, {"warm up": [job, ...], "measure": [job, ...]}; a job is the arguments of `polymerge.merge`. After all
that warms up (compiled loops, imports) every job is measured in a fork of the process, so that none profits from what
another one has left behind. Prints the peaks of anonymous memory over what the fork began with, in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import polymerge


def anonymous() -> int:
    """Bytes that the process holds beside what files give back: pages of the file cache are not counted."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Watch(threading.Thread):
    """Looks every few milliseconds how much memory there is."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = anonymous()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.003):
            self.peak = max(self.peak, anonymous())


def merge(job: dict[str, Any]) -> None:
    polymerge.merge(job["source"], job["out"], check=False, threads=2)
    shutil.rmtree(job["out"])


def peak_of(job: dict[str, Any]) -> int:
    before = anonymous()
    watch = Watch()
    watch.start()
    merge(job)
    watch.over.set()
    watch.join()
    return watch.peak - before


def in_a_fork(job: dict[str, Any]) -> int:
    answer, question = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(question, str(peak_of(job)).encode())
        os._exit(0)
    os.close(question)
    with os.fdopen(answer) as file:
        told = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(told)


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for warming in jobs["warm up"]:
        merge(warming)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what warming up has left, or the forks would live on it unseen
    print(json.dumps([in_a_fork(job) for job in jobs["measure"]]))
