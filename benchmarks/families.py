"""Merge tiny checkpoints of every family with polymerge and with mergekit, and judge what comes out.

    python benchmarks/families.py --only llava,qwen2_vl
    python benchmarks/families.py --mergekit ENVIRONMENT --markdown docs/families-matrix.md

    python benchmarks/families.py --derived --markdown docs/families-derived.md

The last walks over all model types that transformers has a class of, without a table (`familywalk.py`).
`familycases.py` builds the checkpoints, `familyverdicts.py` judges, `familypage.py` writes the page. See
benchmarks/README.md for the environments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from familycases import FAMILIES, Case, cases_of
from familypage import to_markdown
from familytools import ASKED_FOR, SEEDS, Mergekit, Tool, Tools, polymerge
from familyverdicts import Verdict, judge
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

    case: Case
    tool: str
    options: tuple[str, ...]
    seed: int | None
    ended: Future[tuple[int, str, Path]]


def verdicts(cases: Iterable[Case], tools: Tools, pool: ThreadPoolExecutor) -> Iterator[Verdict]:
    """Let every tool merge every case under each of its hash seeds, and again with what it asks for."""

    def start(case: Case, tool: str, *options: str) -> Iterator[Run]:
        for seed, program in tools[tool].items():
            yield Run(case, tool, options, seed, pool.submit(run, case, program, *options))

    waiting = [one for case in cases for tool in tools for one in start(case, tool)]
    for one in waiting:  # grows while it is gone through
        status, printed, out = one.ended.result()
        right, text = judge(one.case, status, printed, out)
        for asked in ASKED_FOR:
            options = (*one.options, asked)
            tried = [other.options for other in waiting if other.case is one.case and other.tool == one.tool]
            if text.startswith(f"refused: asks for `{asked}`") and asked not in one.options and options not in tried:
                waiting += start(one.case, one.tool, *options)
        yield Verdict(one.case.row, one.case.pair, one.tool, " ".join(one.options), one.seed, status, right, text)


def walk_all(options: argparse.Namespace) -> None:
    """Walk over the model types without a table, and write the page."""
    from familywalk import TYPES, walk, walk_page

    kinds = options.only.split(",") if options.only else TYPES
    if unknown := [kind for kind in kinds if kind not in TYPES]:
        raise RunError(f"{', '.join(unknown)}: transformers has no multimodal class of that type")
    walked = []
    for one in walk(kinds):
        walked.append(one)
        print(f"{one.kind} {one.pair}: {one.text}", file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers"))
    page = walk_page(sys.argv, {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "environment": versions}, walked)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)


def main() -> None:
    options = _options()
    if options.derived:
        walk_all(options)
        return
    tools: dict[str, Mapping[int | None, Tool]] = {"polymerge": {None: polymerge}}
    versions = [f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers")]
    about = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "polymerge's environment": ", ".join(versions)}
    if options.mergekit:
        code = VERSIONS.format(names=("mergekit", "torch", "transformers"))
        asked = [str(options.mergekit / "bin" / "python"), "-c", code]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        about["mergekit's environment"] = done.stdout.strip()
    servers = {seed: Mergekit(options.mergekit, seed) for seed in SEEDS} if options.mergekit else {}
    if servers:
        tools["mergekit"] = {seed: server for seed, server in servers.items()}  # noqa: C416 (of a wider type)
    found: list[Verdict] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        cases = (case for family in _families(options.only) for case in cases_of(family, Path(scratch) / family))
        for one in verdicts(cases, tools, pool):
            found.append(one)
            print(f"{one.row}, {one.pair}, {one.tool} {one.options}: {one.text}", file=sys.stderr, flush=True)
    for server in servers.values():
        server.end()
    own = {str(options.mergekit): "ENVIRONMENT", str(options.json): "FILE"}  # what lies elsewhere on other machines
    command = [own.get(word, word) for word in sys.argv]
    if options.json:
        report = {"command": command, "about": about, "runs": [asdict(one) for one in found]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = to_markdown(command, about, found, tools)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, metavar="ENVIRONMENT", help="the virtual environment of mergekit")
    parser.add_argument("--only", metavar="FAMILY,...", help=f"{', '.join(FAMILIES)}; or model types, with --derived")
    parser.add_argument("--derived", action="store_true", help="walk over all model types of transformers instead")
    parser.add_argument("--jobs", type=int, default=2, help="merges at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


def _families(text: str | None) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else FAMILIES
    if unknown := [name for name in names if name not in FAMILIES]:
        raise RunError(f"{', '.join(unknown)}: cannot be built; there are {', '.join(FAMILIES)}")
    return names


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
