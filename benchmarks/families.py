"""Merge tiny checkpoints of every model type with polymerge and with mergekit, and judge what comes out.

    python benchmarks/families.py --only llava,qwen3_5
    python benchmarks/families.py --mergekit ENVIRONMENT --markdown docs/families-matrix.md

With `--json FILE` a run that was cut short goes on where it was.
`familycases.py` builds the checkpoints, `familyverdicts.py` judges, `familypage.py` writes the page. See
benchmarks/README.md for the environments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
import yaml

from familycases import PUBLISHED, TEXT_TYPES, TYPES, Case, cases_as_published, cases_of_type
from familypage import to_markdown
from familytools import ASKED_FOR, SEEDS, Mergekit, Tool, Tools, polymerge
from familyverdicts import Verdict, judge, shortened
from measure import RunError

WEIGHTS = (0.7, 0.3)
VERSIONS = "import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in {names}), sep=', ')"


def run(case: Case, tool: Tool, *options: str) -> tuple[int, str, Path]:
    """Merge a case: exit status, what was printed, and where the output is or would be."""
    scratch = Path(tempfile.mkdtemp(dir=case.template.parent))
    recipe, out = scratch / "recipe.yaml", scratch / "out"
    models = zip((case.template, case.other), WEIGHTS, strict=True)
    said: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": weight}} for model, weight in models],
        "dtype": "float32",
    }
    recipe.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return (*tool(recipe, out, *options), out)


@dataclass(frozen=True)
class Run:
    """One run of one tool, which may not have ended yet."""

    tool: str
    options: tuple[str, ...]
    seed: int
    ended: Future[tuple[int, str, Path]]


def verdicts(case: Case, tools: Tools, pool: ThreadPoolExecutor) -> Iterator[Verdict]:
    """Let every tool merge a case under each of its hash seeds, and again with what it asks for."""

    def start(tool: str, *options: str) -> Iterator[Run]:
        for seed, program in tools[tool].items():
            yield Run(tool, options, seed, pool.submit(run, case, program, *options))

    only = [tool for tool in tools if tool == "polymerge" or (case.pair.startswith("VLM") and "names" not in case.pair)]
    waiting = [one for tool in only for one in start(tool)]
    for one in waiting:  # grows while it is gone through
        status, printed, out = one.ended.result()
        right, text = judge(case, status, printed, out)
        for asked in ASKED_FOR:
            options = (*one.options, asked)
            tried = [other.options for other in waiting if other.tool == one.tool]
            if text.startswith(f"refused: asks for `{asked}`") and asked not in one.options and options not in tried:
                waiting += start(one.tool, *options)
        yield Verdict(case.row, case.pair, one.tool, " ".join(one.options), one.seed, status, right, text, case.runs)
        shutil.rmtree(out.parent)


def not_built(kind: str, folder: Path) -> Iterator[Case | Verdict]:
    """The cases of a model type, or why there is none: its checkpoint is not built here."""
    try:
        yield from [*cases_of_type(kind, folder)]
    except Exception as error:  # whatever a class raises where its default config is not enough
        said = shortened(f"{type(error).__name__}: {error}")
        yield Verdict(kind, "", "polymerge", "", 0, 1, False, f"not built: {said}", "")


def cases(kind: str, folder: Path) -> Iterator[Case | Verdict]:
    """Build what is merged of one model type."""
    yield from cases_as_published(kind, folder) if kind in PUBLISHED else ()
    yield from not_built(kind, folder / "type") if kind in TYPES | TEXT_TYPES else ()


def main() -> None:
    options = _options()
    versions = [f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers")]
    about = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "polymerge's environment": ", ".join(versions)}
    if options.mergekit:
        code = VERSIONS.format(names=("mergekit", "torch", "transformers"))
        asked = [str(options.mergekit / "bin" / "python"), "-c", code]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        about["mergekit's environment"] = done.stdout.strip()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    own = {str(options.mergekit): "ENVIRONMENT", str(options.json): "FILE"}  # what lies elsewhere on other machines
    report: dict[str, Any] = {"command": [own.get(word, word) for word in sys.argv], "about": about, "runs": {}}
    runs = report["runs"]
    if options.json and options.json.exists():
        runs |= json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    peers = {seed: Mergekit(options.mergekit, seed) for seed in SEEDS} if options.mergekit else {}
    tools: Tools = {"polymerge": {0: polymerge}, **({"mergekit": peers} if peers else {})}
    with ThreadPoolExecutor(options.jobs) as pool:
        for kind in _kinds(options.only):
            if kind not in runs:
                with tempfile.TemporaryDirectory() as scratch:
                    runs[kind] = [asdict(one) for one in judged(cases(kind, Path(scratch)), tools, pool)]
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for peer in peers.values():
        peer.end()
    found = [Verdict(**one) for kind in _kinds(options.only) for one in runs[kind]]
    page = to_markdown(report["command"], about, found)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)


def judged(made: Iterable[Case | Verdict], tools: Tools, pool: ThreadPoolExecutor) -> Iterator[Verdict]:
    """The verdicts over cases, said as they come."""
    for one in made:
        for verdict in [one] if isinstance(one, Verdict) else verdicts(one, tools, pool):
            said = f"{verdict.row}, {verdict.pair}, {verdict.tool} {verdict.options}: {verdict.text}"
            print(said, file=sys.stderr, flush=True)
            yield verdict


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, metavar="ENVIRONMENT", help="the virtual environment of mergekit")
    parser.add_argument("--only", metavar="NAME,...", help="model types, or families as published")
    parser.add_argument("--jobs", type=int, default=2, help="merges at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here; those in it are not run again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


def _kinds(text: str | None) -> tuple[str, ...]:
    known = tuple(dict.fromkeys((*TYPES, *PUBLISHED, *TEXT_TYPES)))
    names = tuple(text.split(",")) if text else known
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"{', '.join(unknown)}: no model type of transformers, and no family as published")
    return names


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
