"""Read very many damaged and hostile inputs, and see that each is read or refused with a message that helps.

    python benchmarks/fuzz.py --inputs 1000000
    python benchmarks/fuzz.py --kinds 'config,recipe text' --seconds 600
    python benchmarks/fuzz.py --replay fuzz-failures/pickle-0-17.json
    python benchmarks/fuzz.py --keep fuzz-failures/*.json

What counts as a failure: an exception that is not polymerge's own, a warning of Python, more than 5 s of processor time
or 1 GB of memory for an input, code of the input that runs, a file written elsewhere, a message that a terminal cannot
show on one line, and values other than those that safetensors and torch read. Ends with 1 if there was one, and keeps
each input in a folder. `tests/properties/test_fuzz.py` does the same with 20,000 inputs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fuzz_judge import KEPT, from_text, judge, kept_inputs, to_text
from fuzz_kinds import KINDS
from fuzz_pool import Failure, Tally, input_of, run

MOST_KEPT = 5
"""Inputs of one cause that are kept."""


def table(tallies: dict[str, Tally]) -> str:
    """A row of Markdown for each kind, and one for all."""
    lines = [
        "| kind | inputs | accepted | refused | failures | slowest, s | most memory, MiB | inputs a second |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    whole = Tally()
    for kind, one in sorted(tallies.items(), key=lambda item: list(KINDS).index(item[0])):
        lines.append(_row(kind, one))
        whole.accepted += one.accepted
        whole.refused += one.refused
        whole.seconds += one.seconds
        whole.slowest, whole.peak = max(whole.slowest, one.slowest), max(whole.peak, one.peak)
        whole.failures += one.failures
    return "\n".join([*lines, _row("all", whole)])


def _row(kind: str, one: Tally) -> str:
    rate = one.inputs / one.seconds if one.seconds else 0
    return (
        f"| {kind} | {one.inputs:,} | {one.accepted:,} | {one.refused:,} | {len(one.failures):,} | {one.slowest:.2f} "
        f"| {one.peak / 2**20:.0f} | {rate:,.0f} |"
    )


def write_failures(tallies: dict[str, Tally], folder: Path) -> None:
    """Write the inputs that failed, a few of each cause, and print each cause with the number of its inputs."""
    causes: dict[str, list[Failure]] = {}
    for one in (failure for tally in tallies.values() for failure in tally.failures):
        words, _, line = one.what.rpartition(" at ")
        causes.setdefault(f"{one.kind}: {line or one.what[:60]} {words.partition(':')[0]}", []).append(one)
    for alike in sorted(causes.values(), key=len, reverse=True):
        print(f"{len(alike):7,}  {alike[0].kind}: {alike[0].what}", file=sys.stderr)
        for one in alike[:MOST_KEPT]:
            folder.mkdir(parents=True, exist_ok=True)
            text = to_text(one.kind, input_of(one.kind, one.seed, one.number), one.what)
            name = f"{one.kind.replace(' ', '-')}-{one.seed}-{one.number}.json"
            (folder / name).write_text(text, encoding="utf-8")


def keep_for_tests(files: list[Path]) -> int:
    """Add inputs to those that the tests read, each once."""
    lines = {*kept_inputs(), *(" ".join(file.read_text(encoding="utf-8").split()) for file in files)}
    KEPT.write_bytes(lzma.compress("".join(f"{line}\n" for line in sorted(lines)).encode(), preset=9))
    return 0


def replay(file: Path) -> int:
    """Judge one kept input again, and print what happens."""
    kind, files = from_text(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        verdict = judge(KINDS[kind], files, Path(scratch) / "input", Path(scratch))
    print(verdict)
    return 1 if verdict.failure else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="names, with commas between; default: all. Known: " + ", ".join(KINDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where failing inputs are kept")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--keep", type=Path, metavar="FILE", nargs="+", help="add inputs to those that the tests read")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="judge one kept input again")
    given = parser.parse_args()
    if given.keep:
        return keep_for_tests(given.keep)
    if given.replay:
        return replay(given.replay)
    kinds = [name.strip() for name in given.kinds.split(",")] if given.kinds else list(KINDS)
    if unknown := [name for name in kinds if name not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}. Known: {', '.join(KINDS)}")
    start, last = time.monotonic(), [0.0]

    def told(tallies: dict[str, Tally]) -> None:
        if time.monotonic() - last[0] > 60:
            last[0] = time.monotonic()
            done, bad = (
                sum(map(count, tallies.values())) for count in (lambda one: one.inputs, lambda one: len(one.failures))
            )
            print(f"{last[0] - start:6.0f} s: {done:,} inputs, {bad:,} failures", file=sys.stderr, flush=True)

    tallies = run(given.inputs, given.seed, kinds, given.jobs, given.seconds, told)
    print(f"seed {given.seed}, {time.monotonic() - start:.0f} s\n\n{table(tallies)}")
    write_failures(tallies, given.failures)
    if given.json:
        rows = {kind: {**vars(one), "failures": len(one.failures)} for kind, one in tallies.items()}
        given.json.write_text(json.dumps({"seed": given.seed, "kinds": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(one.failures for one in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
