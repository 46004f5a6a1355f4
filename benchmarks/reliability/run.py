"""Break merges in every way a machine can, and count what is left: kills, failing calls, power cuts, full disks.

    python benchmarks/reliability/run.py
    python benchmarks/reliability/run.py --only kills disks --kills 100 --json counts.json

The parts are listed by --help. Every row of the table says how often a command was disturbed and what stood under its
output's name then: nothing, the earlier output or the new one, each whole; anything else is a failure, as is a next run
that does not put everything right by itself. See docs/reliability.md for what is promised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a pool are not there in a fork

import disks
import kills
import powercuts
import runs
import shared
from measure import machine
from scenarios import SCENARIOS, Scenario, make_inputs
from verdicts import HarnessError, Tally, settle

COLUMNS = ("nothing", "earlier", "new", "broken", "kept elsewhere")


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    return [SCENARIOS[name] for name in options.scenarios]


def killed(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """Random kills, shared out over the scenarios, then one at every call that changes files."""
    inputs = make_inputs(folder / "inputs")
    for number, scenario in enumerate(_scenarios(options)):
        place, known = settle(inputs, folder / f"{number}", scenario)
        yield kills.at_random(place, known, -(-options.kills // len(options.scenarios)), options.seed)
        if not kills.why_not():
            yield kills.at_every_call(place, known, errors=False)


def failed(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """An error of the system at every call that changes files."""
    if why := kills.why_not():
        yield Tally("faults", "errors", note=f"not run: {why}")
        return
    inputs = make_inputs(folder / "inputs")
    for number, scenario in enumerate(_scenarios(options)):
        place, known = settle(inputs, folder / f"{number}", scenario)
        yield kills.at_every_call(place, known, errors=True)


def cut(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """Power cuts at random writes, on every file system that can be made here."""
    yield from powercuts.power_cuts(folder, _scenarios(options), options.power_cuts, options.seed)


def filled(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """Disks with room for 0, 5, 10 ... 95 percent of an output."""
    yield from disks.too_small(folder, _scenarios(options))


def continued(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """Searches and evaluations that are stopped and continued."""
    yield from runs.stopped(folder, options.kills // 10, options.seed)


def accompanied(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """Folders that others use, too."""
    yield from shared.in_company(folder, _scenarios(options))


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Tally]]] = {
    "kills": killed,
    "faults": failed,
    "cuts": cut,
    "disks": filled,
    "runs": continued,
    "shared": accompanied,
}


def main() -> None:
    options = _options()
    start, host = time.monotonic(), machine()
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="reliability-") as scratch:
        os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = scratch
        for part in options.only:
            folder = Path(scratch).resolve() / part
            folder.mkdir()
            for tally in PARTS[part](folder, options):
                tallies.append(tally)
                print(_row(tally), flush=True)
                if options.json:
                    _write(options.json, tallies, host, time.monotonic() - start)
    print(f"\n{table(tallies)}")
    runs, seconds = sum(tally.runs for tally in tallies), time.monotonic() - start
    print(f"\n{runs} runs in {seconds:.0f} s on {host['cores']} cores, {host['processor']}, {host['system']}")
    if any(tally.wrong for tally in tallies):
        sys.exit(f"{sum(tally.wrong.total() for tally in tallies)} failures")


def _write(file: Path, tallies: list[Tally], host: dict[str, str], seconds: float) -> None:
    rows = [tally.to_json() for tally in tallies]
    report = {"command": sys.argv, "date": date.today().isoformat(), "machine": host, "seconds": seconds, "rows": rows}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _row(tally: Tally) -> str:
    counts = "  ".join(f"{tally.outcomes[name]:4} {name}" for name in COLUMNS)
    what = f"{tally.what}: {tally.scenario}" if tally.scenario else tally.what
    lines = [f"{tally.part:6} {what:44} {tally.runs:5} runs  {counts}  {tally.wrong.total():4} wrong"]
    lines += [f"       {tally.note}"] if tally.note else []
    lines += [f"       {count} x {wrong}" for wrong, count in tally.wrong.most_common(8)]
    return "\n".join(lines)


def table(tallies: list[Tally]) -> str:
    """The counts as Markdown, a row for each kind of fault over all scenarios."""
    lines = [f"| part | fault | scenarios | runs | {' | '.join(COLUMNS)} | wrong |",
             f"|---|---|{'---:|' * (len(COLUMNS) + 3)}"]  # fmt: skip
    for part, what in dict.fromkeys((tally.part, tally.what) for tally in tallies):
        own = [tally for tally in tallies if (tally.part, tally.what) == (part, what)]
        counts = [sum(tally.outcomes[name] for tally in own) for name in COLUMNS]
        numbers = [len(own), sum(tally.runs for tally in own), *counts, sum(tally.wrong.total() for tally in own)]
        lines.append(f"| {part} | {what} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts (default: all)")
    parser.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME",
        help=f"these merges (default: all): {'; '.join(SCENARIOS)}",
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=400, help="kills at random moments (default 400)")
    parser.add_argument("--power-cuts", type=int, default=1000, help="power cuts at random writes (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where to work (default: the system's /tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count here")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except HarnessError as error:
        sys.exit(str(error))
