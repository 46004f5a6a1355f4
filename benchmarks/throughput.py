"""The arithmetic of every method on numbers in memory: processor time for each parameter, scaled to a model of 7B.

    python benchmarks/throughput.py

Two models (one where the method takes one) and, for methods on deltas, their differences: a matrix of 4096 columns in
float32, in blocks as a merge has them, on one thread; statistics are included. Time is that of the processor, not of
the clock. What a merge takes besides is reading and writing, of which `passes` says how often each number is read.
Methods on adapters merge two adapters of rank 16 of every matrix of Qwen2-7B.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from polymerge.engine.lora_modules import merge_pairs
from polymerge.engine.statistics import STATISTICS, gram
from polymerge.methods import kernels
from polymerge.methods.lora import Factors
from polymerge.methods.method import READS, Method, method_function
from polymerge.methods.table import METHODS, SHARED
from polymerge.recipe.parameters import Setting

WIDTH, BLOCK = 4096, 1 << 19
PARAMETERS = 7.6e9
LAYERS, RANK = 28, 16
MODULES = [(18944, 3584)] * 2 + [(3584, 18944)] + [(3584, 3584)] * 2 + [(512, 3584)] * 2
"""The matrices of a layer of Qwen2-7B, and the rank of adapters of it."""
SAID = {"weight": (0.6, 0.4), "density": (0.4, 0.4), "t": 0.4, "select_topk": 0.2}


class Held:
    """Deltas in memory as a source of blocks; counts how often their numbers are read."""

    def __init__(self, rows: NDArray[Any], base: NDArray[Any]) -> None:
        self._rows, self._base, self.numbers = rows, base, 0
        self.count = rows.shape[1]
        self.sizes = [BLOCK] * (self.count // BLOCK)

    def read(self, index: int) -> Any:
        """A copy of a block, as a merge reads it into a buffer."""
        return self.read_block(index).models

    def read_block(self, index: int) -> Any:
        """The same with the base's numbers."""
        self.numbers += self.sizes[index]
        part = slice(index * BLOCK, (index + 1) * BLOCK)
        return type("Block", (), {"models": self._rows[:, part].copy(), "base": self._base[part]})


class AsPiece:
    """The same for what takes the blocks of a tensor in a plan."""

    def __init__(self, held: Held) -> None:
        self.sizes, self.read = held.sizes, held.read_block


def timed(row: Method, held: Held, models: int) -> None:
    """Do what a merge does by a method, from statistic to the last block."""
    said: dict[str, Any] = {}
    for one in row.parameters:
        value = SAID.get(one.name, one.default)
        if one.name not in SHARED:
            said[one.name] = (value if isinstance(value, tuple) else (value, value))[:models] if one.each else value
    by_row = row.by_row is True
    said |= ({"keys": (11, 22)[:models]} if row.random else {}) | ({"width": WIDTH} if by_row else {})
    if row.statistic == "gram":
        said["gram"] = gram([AsPiece(held)], lambda look, places: map(look, places))  # type: ignore[list-item]
    elif row.statistic is not None:
        wanted = {name: said[name] for name in READS[row.statistic]}
        said[row.statistic] = STATISTICS[row.statistic].compute(held, wanted, lambda look, places: map(look, places))
    function = method_function(row)
    for index in range(len(held.sizes)):
        block = held.read_block(index)
        more = ({"start": index * BLOCK} if row.random else {}) | ({"base": block.base} if row.sees_base else {})
        merged = function(block.models, **said, **more)
        if row.on == "deltas":
            kernels.add_scaled(block.base, merged, 1.0)


def lines(blocks: int) -> Iterator[str]:
    """A row of the table for each method on blocks."""
    draws = np.random.default_rng(0)
    base = draws.normal(0, 0.02, blocks * BLOCK).astype(np.float32)
    rows = draws.normal(0, 5e-4, (2, base.size)).astype(np.float32)
    yield "| method | ns a parameter | core minutes for 7.6e9 | passes |\n|---|---|---|---|"
    for row in METHODS.values():
        if not row.entrywise:
            continue
        models = row.models or 2
        first = Held(rows[:models, :BLOCK], base[:BLOCK].copy())
        timed(row, first, models)  # compiles what is not compiled yet
        taken = []
        for _ in range(4):  # the first brings the numbers into memory
            held = Held(rows[:models], base.copy())
            start = time.process_time()
            timed(row, held, models)
            taken.append(time.process_time() - start)
        each = min(taken[1:]) / base.size
        yield f"| `{row.name}` | {each * 1e9:.1f} | {each * PARAMETERS / 60:.1f} | {held.numbers / base.size:.1f} |"


def adapter_lines() -> Iterator[str]:
    """A row of the table for each method on the factors of adapters, or on matrices that it makes of them."""
    draws = np.random.default_rng(0)
    modules = [
        [
            Factors(*(draws.normal(size=shape).astype(np.float32) for shape in ((out, RANK), (RANK, width))))
            for _ in "ab"
        ]
        for out, width in MODULES
    ]
    yield "\n| method | core seconds for two adapters |\n|---|---|"
    for row in METHODS.values():
        if row.on not in ("factors", "matrices"):
            continue
        said = {one.name: (one.default or 1.0,) * 2 if one.each else one.default for one in row.parameters}
        setting = Setting(row.name, said)
        taken = []
        for _ in range(2):
            start = time.process_time()
            for pairs in modules:
                merge_pairs(setting, pairs, RANK * 2 if row.adds_ranks else RANK, lambda _: (11, 22))
            taken.append(time.process_time() - start)
        yield f"| `{row.name}` | {min(taken) * LAYERS:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 524288 numbers (default 32)")
    blocks = parser.parse_args().blocks
    with threadpool_limits(1):
        for line in chain(lines(blocks), adapter_lines()):
            print(line, flush=True)


if __name__ == "__main__":
    main()
