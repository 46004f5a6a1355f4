"""Train models anew for each of several seeds, run every experiment on them, and write what holds over seeds.

    python benchmarks/evidence/run.py --seeds 5
    python benchmarks/evidence/run.py --seeds 1 --quick

The first writes docs/evidence.md; its results are kept in benchmarks/evidence/results, and what is there is not run
again, so that a run that was cut short goes on. The second is a trial of a quarter of an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
os.environ["OMP_NUM_THREADS"] = "1"  # of this process and of those that it starts

from jobs import EXPERIMENTS, Rows, needed, read_results, run_all
from measure import machine
from polymerge.charts import draw
from scorepage import table, wrapped
from sections import SECTIONS, Section
from sizes import FULL, Size, sized

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIRST_SEED = 101  # what was tried out was tried on others

INTRODUCTION = """
# What merging does, over training runs

Small models, trained from nothing for each seed, merged by polymerge in every way, and asked questions that are right
or wrong to the word. benchmarks/evidence/README.md says how the world is made. The page is what this command has
printed:
"""

READING = """
± is half of a 95 % t-interval over seeds: training runs of one world, each with its own data, models and questions.
Where it is missing there was one seed. Differences are taken within a seed. A method is called better or worse where
its interval does not hold 0, with no correction for how many are compared: of forty that are all alike about one is
called better, and one worse. Models this small say how a method behaves, not how many points it is worth on large ones.
"""


def page(
    found: Mapping[str, Mapping[int, Rows]],
    parts: Mapping[str, Sequence[float]],
    commits: Iterable[str],
    size: Size,
    figures: Path,
    at: Path,
) -> str:
    """The page, with its figures drawn; the conclusion comes from the numbers of the sections."""
    host = machine()
    seeds = sorted({seed for rows in found.values() for seed in rows})
    about = {
        "results of commit": "; ".join(sorted(commits)),
        "seeds": ", ".join(map(str, seeds)),
        "size": size.name + ("" if size is FULL else ": a trial, from which nothing follows"),
        "models": f"{size.shape.layers} text layers of width {size.shape.width}",
        "machine": f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers", "peft")),
    }
    sections: dict[str, Section] = {
        f"{name}-{place}" if place else name: section
        for name, rows in found.items()
        for place, section in enumerate(SECTIONS[name](rows))
    }
    lines = [INTRODUCTION.lstrip(), f"    python {shlex.join(sys.argv)}", "", *table(["", ""], about.items())]
    lines.append(wrapped(READING) + "\n## What to try first\n")
    lines += [wrapped(advice.text()) for section in sections.values() for advice in section.advices]
    for name, section in sections.items():
        draw(section.charts, figures / name)
        lines.append(section.text(os.path.relpath(figures / f"{name}.png", at.parent)))
    spent = [[part, f"{fmean(seconds):.0f}"] for part, seconds in parts.items()]
    total = f"{sum(fmean(seconds) for seconds in parts.values()):.0f}"
    lines += [
        "## What it takes\n",
        "Seconds of processor time for a seed:\n",
        *table(["", "s"], [*spent, ["all", total]]),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, ""]))


def main(words: Sequence[str] | None = None) -> None:
    options = _options(words)
    size = sized[options.size]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    trial = options.data / size.name
    results = options.results or (HERE / "results" if size is FULL else trial / "results")
    markdown = options.markdown or (ROOT / "docs" / "evidence.md" if size is FULL else trial / "evidence.md")
    figures = options.figures or markdown.with_suffix("")
    run_all(needed(options.only, seeds), options.data.resolve(), results, size, options.jobs)
    figures.mkdir(parents=True, exist_ok=True)
    # what an earlier run of other experiments has left is on the page, too
    written = page(*read_results(results, seeds, size), size, figures, markdown)
    markdown.write_text(written, encoding="utf-8")
    print(written)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"the first of them (default {FIRST_SEED})")
    every = list(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    chosen = parser.add_mutually_exclusive_group()
    trial = "a trial of a quarter of an hour"
    chosen.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help=trial)
    chosen.add_argument("--size", choices=list(sized), default="full", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: cores)")
    data = HERE.parent / "data" / "evidence"
    parser.add_argument("--data", type=Path, default=data, help="folder for models (default benchmarks/data/evidence)")
    parser.add_argument("--results", type=Path, help="folder for results (default benchmarks/evidence/results)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here (default docs/evidence.md)")
    parser.add_argument("--figures", type=Path, help="folder for figures (default beside the page, by its name)")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
