"""Measurements, and the page that sums them up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from contest import Likeness
from measure import Measured
from tools import Planned

__all__ = ["Report"]

MIB = 1 << 20
BLIND = 1.0  # seconds without a look at a run's memory, after which its peak is not trusted

INTRODUCTION = """
# Benchmarks

What a merge of two fine-tunes costs, beside `cp -r` of one of the checkpoints: a merge can hardly be faster than that.
The models have the shape of Llama-3.2-1B and are random numbers of the size that weights and their changes have. The
page is what this command has printed, and `benchmarks/README.md` says how to run it and what is measured:
"""

TIMES = """
## Time

Whole processes, from start to end, the interpreter's start and imports included: the median, with the least and the
most in brackets. Ratios are taken between runs that followed each other. A first merge is one of inputs of
which nothing is remembered.
"""

COLD = """
## Nothing in the page cache

A first merge of inputs that the system has dropped from the page cache, beside what it takes only to read the three
models then.
"""

MEMORY = """
## Memory

The most that there was at any one time. Anonymous memory is what has to be there; resident memory has the pages of
mapped files in it. The interpreter and the imports of polymerge alone have {imports:.0f} MiB of anonymous memory.
"""

LONG = """
## Methods that decompose matrices

Each ran once, beside what `polymerge plan` says of it: seconds of one core for decompositions and products, and the
memory of as many of the largest matrices at once as there are threads. Reading, writing and sha256 are in the times
too.
"""

LIKENESS = """
## Do both do the same?

A sample of the entries of mergekit's outputs beside those of polymerge's. mergekit rounds the operations on deltas to
bfloat16; of equal magnitudes at the thresholds of TIES and Breadcrumbs, of which deltas of bfloat16 have many,
polymerge keeps all and mergekit some, so that polymerge changes more; the random draws of DARE and DELLA are different
ones, which shows in single entries but not in the size of the change. arcee_fusion, multislerp and karcher rest on
sums over rows or tensors that polymerge takes in float64 and mergekit in float32: of the embedding's norm the latter
loses 9 % by multislerp and 1 % by karcher, so that it changes that much more.
"""


@dataclass
class Report:
    """Everything that was measured.

    command   the command line
    about     what was compared, on what
    imports   the interpreter and polymerge's imports alone
    compiled  by method: a run before all others, which compiled those of the method's kernels that were not yet
    turns     by method: for each round, what each contestant took ('cp', 'first', 'later', 'mergekit'; 'cat', 'cold')
    likeness  by method: how mergekit's output compares with polymerge's
    long      by method that decomposes matrices: what it took, and what was planned
    """

    command: str
    about: dict[str, str]
    imports: list[Measured] = field(default_factory=list)
    compiled: dict[str, Measured] = field(default_factory=dict)
    turns: dict[str, list[dict[str, Measured]]] = field(default_factory=dict)
    likeness: dict[str, Likeness] = field(default_factory=dict)
    long: dict[str, tuple[Measured, Planned]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Every measurement."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_markdown(self) -> str:
        """A page with tables."""
        lines = [INTRODUCTION.lstrip(), f"    {self.command}", ""]
        lines += _table(["", ""], self.about.items())
        if self.turns:
            lines += [TIMES, *self._times()]
            if any("cold" in turn for turns in self.turns.values() for turn in turns):
                lines += [COLD, *self._cold()]
            lines += [MEMORY.format(imports=self._imports() / MIB), *self._memory()]
        if self.long:
            lines += [LONG, *self._decomposed()]
        if self.likeness:
            lines += [LIKENESS, *self._likenesses()]
        return "\n".join(lines) + "\n"

    def _times(self) -> Iterable[str]:
        head = [
            "method",
            "cp, s",
            "polymerge, s",
            "polymerge / cp",
            "first merge, s",
            "mergekit, s",
            "mergekit / polymerge",
        ]
        rows = []
        for name, turns in self.turns.items():
            cells = [_seconds(turns, "cp"), _seconds(turns, "later"), _ratios(turns, "later", "cp")]
            cells += [_seconds(turns, "first"), _seconds(turns, "mergekit"), _ratios(turns, "mergekit", "later")]
            rows.append([name, *map(_spread, cells)])
        yield from _table(head, rows)

    def _cold(self) -> Iterable[str]:
        rows = [
            [name, *map(_spread, (_seconds(turns, "cat"), _seconds(turns, "cold"), _ratios(turns, "cold", "cat")))]
            for name, turns in self.turns.items()
        ]
        yield from _table(["method", "reading alone, s", "merge, s", "merge / reading"], rows)

    def _imports(self) -> int:
        return max(run.anonymous for run in self.imports)

    def _memory(self) -> Iterable[str]:
        head = [
            "method",
            "polymerge, anonymous, MiB",
            "above imports",
            "resident",
            "mergekit, anonymous, MiB",
            "resident",
        ]
        rows = []
        for name, turns in self.turns.items():
            anonymous, resident = _peaks(turns, "first", "later")
            sizes = [anonymous, anonymous - self._imports(), resident, *_peaks(turns, "mergekit")]
            rows.append([name, *(f"{size / MIB:.0f}" if size > 0 else "" for size in sizes)])
        yield from _table(head, rows)

    def _decomposed(self) -> Iterable[str]:
        head = ["method", "polymerge, s", "core s", "core s planned", "anonymous above imports, MiB", "planned, MiB"]
        rows = []
        for name, (run, planned) in self.long.items():
            sizes = run.anonymous - self._imports(), planned.memory
            numbers = run.seconds, run.cpu, planned.seconds, *(size / MIB for size in sizes)
            rows.append([name, *(f"{number:.0f}" for number in numbers)])
        yield from _table(head, rows)

    def _likenesses(self) -> Iterable[str]:
        head = ["method", "entries within a step of bfloat16 of mergekit's", "mean change, polymerge / mergekit"]
        rows = [[name, f"{100 * like.near:.2f} %", f"{like.size:.4f}"] for name, like in self.likeness.items()]
        yield from _table(head, rows)


def _seconds(turns: Sequence[dict[str, Measured]], who: str) -> list[float]:
    return [turn[who].seconds for turn in turns if who in turn]


def _ratios(turns: Sequence[dict[str, Measured]], who: str, by: str) -> list[float]:
    return [turn[who].seconds / turn[by].seconds for turn in turns if who in turn]


def _peaks(turns: Sequence[dict[str, Measured]], *who: str) -> tuple[int, int]:
    """The most anonymous and resident memory, over the runs that were looked at all the time; zeros without any."""
    runs = [turn[one] for turn in turns for one in who if one in turn and turn[one].blind < BLIND]
    return max((run.anonymous for run in runs), default=0), max((run.resident for run in runs), default=0)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 1 if median(values) >= 10 else 2
    return f"**{median(values):.{digits}f}** ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
