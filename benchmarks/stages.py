"""Show where the time of merges goes: processor seconds by stage, over all threads.

    python benchmarks/stages.py

The models of merge.py are merged in processes of their own, with clocks around the calls of each stage; what a stage
calls of another counts there. Every method runs twice, once to compile its kernels.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any, ClassVar

import polymerge
from contest import CASES
from dataset import SHAPES, make_models
from tools import Bench

STAGES = ("start", "reading", "decoding", "statistic", "method", "encoding", "writing", "handing over")
CLOCKED = {"finite": "decoding", "decode": "decoding", "subtract": "decoding", "encode": "encoding"}
METHODS = ("linear", "task_arithmetic", "slerp", "ties", "ties, trim: model", "dare_ties", "della", "sce")


class Clocks(threading.local):
    """The stages that a thread is in, and since when its processor time belongs to the innermost."""

    spent: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def __init__(self) -> None:
        self.stages, self.since = ["handing over"], time.thread_time()

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Count what the block takes for a stage."""
        self._switch()
        self.stages.append(stage)
        try:
            yield
        finally:
            self._switch()
            self.stages.pop()

    def _switch(self) -> None:
        now = time.thread_time()
        with self.lock:
            self.spent[self.stages[-1]] += now - self.since
        self.since = now

    def around(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, with a clock around its calls."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.within(stage):
                return function(*arguments, **named)

        return call


def profile(recipe: Path, out: Path) -> dict[str, float]:
    """Merge in this process: seconds by stage, and under `wall` from the process's start to its end."""
    began = time.time() - time.process_time()
    from polymerge.checkpoints.writer import Shards
    from polymerge.engine import pool
    from polymerge.engine.extents import Files
    from polymerge.methods import kernels

    clocks = Clocks()
    Files.read = clocks.around(Files.read, "reading")  # type: ignore[method-assign]
    for name, stage in CLOCKED.items():
        setattr(kernels, name, clocks.around(getattr(kernels, name), stage))
    pool._call_each = clocks.around(pool._call_each, "method")  # type: ignore[assignment]
    run_all, create = pool.Pool.run_all, Shards.create

    def over_blocks(self: pool.Pool, function: Callable[[int], Any], indices: Any) -> Any:
        return run_all(self, clocks.around(function, "statistic"), indices)

    @contextmanager
    def created(self: Shards, folder: Path) -> Iterator[Any]:
        with create(self, folder) as write:
            yield clocks.around(write, "writing")

    pool.Pool.run_all = over_blocks  # type: ignore[method-assign,assignment]
    Shards.create = created  # type: ignore[method-assign,assignment]
    with clocks.within("start"):
        plan = polymerge.plan(recipe)
    Clocks.spent["start"] = time.process_time()
    with clocks.within("handing over"):
        polymerge.merge(plan, out, check=False, shard_size="500MB")
    return {**Clocks.spent, "wall": time.time() - began}


def main() -> None:
    options = _options()
    if options.recipe:
        print(json.dumps(profile(*options.recipe)))
        return
    bench = Bench(make_models(options.size, options.data.resolve()), options.data.resolve() / "scratch")
    bench.scratch.mkdir(exist_ok=True)
    print(f"| method | {' | '.join(STAGES)} | processor | wall |\n|---|{'---|' * (len(STAGES) + 2)}")
    for name in options.methods:
        bench.read_inputs()
        for _ in range(2):
            with bench.prepared(CASES[name]) as (recipe, out):
                command = [sys.executable, __file__, "--recipe", str(recipe), str(out)]
                told = subprocess.run(command, stdout=PIPE, text=True, check=True, env=os.environ | bench.caches).stdout
        spent = json.loads(told)
        cells = [*(spent.get(stage, 0.0) for stage in STAGES), sum(spent.values()) - spent["wall"], spent["wall"]]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).parent / "data"
    parser.add_argument("--size", choices=SHAPES, default="1.2B", help="parameters (default 1.2B)")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=METHODS, metavar="NAME", help="which")
    parser.add_argument("--data", type=Path, default=data, help="folder of the models (default benchmarks/data)")
    parser.add_argument("--recipe", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
