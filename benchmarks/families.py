"""Merge tiny checkpoints of every family with polymerge and with mergekit, and judge what comes out.

    python benchmarks/families.py --only llava,qwen2_vl
    python benchmarks/families.py --mergekit ENVIRONMENT --markdown docs/families-matrix.md

The checkpoints and the merges they are held against are those of the tests: `tests/tiny.py` builds them, and
`tests/test_end_to_end.py` has the literal merge of two models in memory. See benchmarks/README.md for the environments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from measure import RunError
from polymerge.families import FAMILIES

Tool = Callable[..., tuple[int, str]]
"""Merges: recipe, place of the output, options -> exit status and what was printed."""

Tools = Mapping[str, Mapping[int | None, Tool]]
"""By name, a tool under each of its hash seeds."""

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
tiny: Any = importlib.import_module("tiny")
end_to_end: Any = importlib.import_module("test_end_to_end")
importlib.import_module("tiny_configs").QWEN3_TOWER.update(depth=3, deepstack_visual_indexes=[0, 1, 2])

WEIGHTS = (0.7, 0.3)
SEEDS = (0, 1, 2)
NEAR = 1e-5
"""Largest relative error that is rounding; a tensor that was not merged is a thousand times as far away."""

PAIRS = {"VLM + LLM": "llm", "VLM + VLM": "tuned"}
CRIMES, TRUST = "--allow-crimes", "--trust-remote-code"
"""What mergekit may ask for: models of two architectures, code from a checkpoint."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
VERSIONS = "import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in {names}), sep=', ')"

SERVER = """
import importlib.metadata, json, os, sys, traceback
(entry,) = importlib.metadata.entry_points(group="console_scripts", name="mergekit-yaml")
main = entry.load()
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv, status = ["mergekit-yaml", *words], 1
        try:
            status = main() or 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the command `mergekit-yaml` in forks of a process that has imported it: imports take longer than tiny merges."""

INTRODUCTION = """# Every family, merged and judged

Tiny checkpoints of each family, merged by both tools from the same recipe, and each output looked at: does it load with
no tensor missing, unexpected or of another shape, and is it right to the last tensor, as a literal merge of the two
models in memory has it? The page is what this command has printed:
"""

READING = """
- **VLM + LLM**: the family's model and a plain language model near its text tower. Every tensor of the text tower has
  to be 0.7 of one and 0.3 of the other, all the rest the template's to the last bit.
- **VLM + VLM**: two fine-tunes of one model. Every tensor of every part has to be 0.7 of one and 0.3 of the other.
- **right**: exit status 0, loads strictly by transformers' own class, every merged tensor within rounding of the
  literal merge ({near:g} of its size), every other one equal to the template's.
- **refused**: said what is the matter, wrote nothing. **crash**: a Python error. Neither of them makes a wrong file.
- **exit 0** without *right*: the tool reported success, and this is what is wrong with its output.
"""

LIMITS = """\
The checkpoints are random and tiny (two layers, 64 words, float32, one file, head not tied) and have the names that
transformers {transformers} writes, or those of 2024, which published checkpoints have, where these were others.
Nothing is said of a merge's quality.

The embedding of mllama has eight rows more than that of its language model, and stays the template's.

Both tools run with their defaults on one recipe, which says `dtype: float32`; polymerge without its own check of the
output, `--no-verify`, and mergekit under PYTHONHASHSEED {seeds}, since its result may depend on it. Where it does, the
cell counts seeds and does not name them: which seed gives what depends on the names of the folders as well.

Where mergekit asks for `{crimes}`, it gets it in a second try, and counts as right if that is.

mergekit's command runs in forks of a process that has imported it, one for each hash seed.

mergekit runs in an environment of its own; all outputs are loaded by the transformers of polymerge's.

internvl_chat has no class in transformers: its outputs are held against the names and values in files. The code
beside its weights is a stand-in, so that mergekit, which asks to run it, is not given the chance.

qwen3_vl_moe holds all experts in one tensor, the language model that it grows from has them one by one. That model is
drawn anew here. polymerge merges the two if the recipe excludes the experts.

The vision tower of qwen3_vl and qwen3_vl_moe has three layers with a merger each, as many mergers as published ones
have, since mergekit looks for them whatever the config says.

Not here, for want of a class in transformers that could build and load them: {remote}. Their tables are tested on the
names of published checkpoints and on layouts written by hand.

Not here, although transformers has a class of that name: {unbuilt}.

Families of plain language models ({llms}) have no row: the first columns merge those that a model of images grows
from.
"""


@dataclass(frozen=True)
class Case:
    """Two checkpoints, and what has to come out, by name in memory.

    row       the family, and which names its files have
    own       the template's tensors
    expected  those of the merge; `merged` are not the template's
    text      the names of the text tower's tensors
    """

    row: str
    pair: str
    template: Path
    other: Path
    own: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    merged: frozenset[str]
    text: frozenset[str]


@dataclass(frozen=True)
class Verdict:
    """What one run of one tool came to."""

    row: str
    pair: str
    tool: str
    options: str
    hash_seed: int | None
    status: int
    right: bool
    text: str


def cases_of(family: str, folder: Path) -> Iterator[Case]:
    """Build a family's checkpoints and merge them literally; with the names of 2024 too, where they were others."""
    vlm = tiny.build(family, folder / "vlm", dtype="float32")
    tuned = tiny.perturbed(vlm, folder / "tuned", seed=5)
    if family == "qwen3_vl_moe":
        llm = tiny.build("qwen3_moe", folder / "llm", dtype="float32", seed=1)
    else:
        llm = tiny.related_llm(vlm, folder / "llm", seed=1)
    ours, theirs = contents(vlm, vlm), contents(tuned, vlm)
    if family == "internvl_chat":
        joined = dict(ours)
        for name, tensor in tiny.load(llm).items():
            joined[f"language_model.{name}"] = end_to_end.average(ours[f"language_model.{name}"], tensor)
    else:
        joined = contents(end_to_end.literal_merge(vlm, llm, folder / "literal"), vlm)
    averaged = {name: end_to_end.average(tensor, theirs[name]) for name, tensor in ours.items()}
    rows = {f"`{family}`": (vlm, tuned)}
    if family in tiny.OLD:
        old = [tiny.as_2024(shutil.copytree(one, folder / "2024" / one.name)) for one in (vlm, tuned)]
        rows[f"`{family}`, names of 2024"] = (old[0], old[1])
    text = changed(ours, joined)
    for row, (one, other) in rows.items():
        yield Case(row, "VLM + LLM", one, llm, ours, joined, text, text)
        yield Case(row, "VLM + VLM", one, other, ours, averaged, changed(ours, averaged), text)


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors that are not what they were."""
    return frozenset(name for name, tensor in before.items() if not torch.equal(tensor, after[name]))


def contents(folder: Path, template: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that loads strictly; raises RunError where it does not."""
    tensors, faults = loaded(folder, template)
    if faults:
        raise RunError(f"{folder}: {faults}")
    return tensors


def loaded(folder: Path, template: Path) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """The tensors that the template's class makes of a checkpoint, and the names that it found to be wrong, by how."""
    family = tiny.family_in(template)
    if family == "internvl_chat":
        found, wanted = tiny.load(folder), tiny.load(template)
        shapes = {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape}
        report = {"missing": wanted.keys() - found.keys(), "unexpected": found.keys() - wanted.keys()}
        return found, {kind: set(names) for kind, names in {**report, "mismatched": shapes}.items() if names}
    kind: Any = type(tiny.open_model(template)) if family in tiny.CLASSES else AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = {kind.removesuffix("_keys"): set(names) for kind, names in info.items() if names}
    return dict(model.state_dict()), faults


class Mergekit:
    """mergekit's command under one hash seed, one merge at a time."""

    def __init__(self, environment: Path, seed: int) -> None:
        self._free = Lock()
        command = [str(environment / "bin" / "python"), "-c", SERVER]
        said = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": str(seed)}
        self._server = subprocess.Popen(
            command, env=said, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, recipe: Path, out: Path, *options: str) -> tuple[int, str]:
        """Merge: exit status and what was printed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log = recipe.with_suffix(".log")
        with self._free:
            print(json.dumps([[str(recipe), str(out), *options], str(log)]), file=self._server.stdin, flush=True)
            status = self._server.stdout.readline()
        if not status:
            raise RunError("mergekit's environment has no command mergekit-yaml that can be run")
        return int(status), log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """End its process."""
        self._server.kill()
        self._server.wait()


def polymerge(recipe: Path, out: Path, *options: str) -> tuple[int, str]:
    """Merge with polymerge: exit status and what was printed."""
    program = Path(sys.executable).with_name("polymerge")
    command = [str(program), "merge", str(recipe), "-o", str(out), "--no-verify", *options]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr + done.stdout


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


def judge(case: Case, status: int, printed: str, out: Path) -> tuple[bool, str]:
    """Whether a run made what it should, and in a few words what it made."""
    if status:
        return False, failure(printed, out)
    kinds = [
        json.loads((one / "config.json").read_text(encoding="utf-8"))["model_type"] for one in (out, case.template)
    ]
    if kinds[0] != kinds[1]:  # and so not loaded: transformers might build another model at its full size
        held, wanted = (len(tiny.load(one)) for one in (out, case.template))
        return False, f"exit 0, says that it is a {kinds[0]}, and has {held} tensors where the template has {wanted}"
    try:
        found, faults = loaded(out, case.template)
    except Exception as error:  # whatever it is that transformers makes of a broken folder
        return False, f"exit 0, does not load: {shortened(f'{type(error).__name__}: {error}')}"
    missing = faults.get("missing", set()) | (case.expected.keys() - found.keys())
    there = [name for name in case.expected if name not in missing and name not in faults.get("mismatched", ())]
    wrong = [name for name in there if not close(found[name], case.expected[name], exact=name not in case.merged)]
    still = {name for name in wrong if close(found[name], case.own[name], exact=False)}
    unmerged, rounded = still & case.merged, still - case.merged
    words = []
    if missing:
        tower = len(missing & case.text)
        whole = ", the whole text tower among them" if tower == len(case.text) else ""
        words.append(f"{len(missing)} of {len(case.expected)} tensors missing{whole}")
    words += [f"{len(names)} tensors {kind}" for kind, names in sorted(faults.items()) if kind != "missing"]
    if unmerged:
        words.append(f"{len(unmerged)} of {len(case.merged)} tensors not merged")
    if len(wrong) > len(still):
        words.append(f"{len(wrong) - len(still)} tensors with other values")
    if rounded:
        words.append(f"{len(rounded)} tensors that were to be kept are rounded")
    if words:
        return False, f"exit 0, {'; '.join(words)}"
    return True, f"right: {len(case.merged)} merged, {len(case.expected) - len(case.merged)} kept"


def close(found: Tensor, wanted: Tensor, *, exact: bool) -> bool:
    """Whether a tensor is what it should be, within rounding unless it has to be exact."""
    if found.shape != wanted.shape or exact:
        return torch.equal(found, wanted)
    return bool((found.double() - wanted.double()).abs().max() <= NEAR * wanted.double().abs().max())


def failure(printed: str, out: Path) -> str:
    """What a tool said when it ended with an error, and whether it left something behind."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    left = " (weights were left behind)" if list(out.glob("*.safetensors")) else ""
    problem = next((line.removeprefix("1. ") for line in lines if line.startswith("1. ")), "")
    asked = next(
        (option for option in (CRIMES, TRUST) if option.strip("-").replace("-", "_") in printed.replace("-", "_")), ""
    )
    if problem or asked:
        return f"refused: {shortened(problem or f'asks for `{asked}`')}{left}"
    starts = [place for place, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    error = lines[starts[-1] :] if starts else lines[-1:]
    ends = f" ... {error[-1]}" if len(error) > 1 else ""  # a message of many lines says at its end what the matter is
    return f"crash: {shortened(''.join(error[:1]))}{shortened(ends)}{left}"


def shortened(text: str, most: int = 150) -> str:
    """One line that a cell of a table can hold, without the folders of this run."""
    line = re.sub(r"\S*/(vlm|llm|tuned|out)\b", r"\1", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= most else line[: most - 3] + "..."


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
        if CRIMES in text and not any(other.options for other in waiting if other.case is one.case):
            waiting += start(one.case, one.tool, CRIMES)
        yield Verdict(one.case.row, one.case.pair, one.tool, " ".join(one.options), one.seed, status, right, text)


def cell(found: Sequence[Verdict]) -> str:
    """What one tool came to with one pair, over seeds and options."""
    parts = []
    for options in dict.fromkeys(one.options for one in found):
        tried = [one for one in found if one.options == options]
        texts = dict.fromkeys(one.text for one in tried)
        counts = {text: sum(one.text == text for one in tried) for text in texts}
        said = [text if len(texts) == 1 else f"{counts[text]} of {len(tried)} hash seeds: {text}" for text in texts]
        parts.append((f"with `{options}`: " if options else "") + "; ".join(said))
    return ". ".join(parts)


def to_markdown(
    command: Sequence[str], about: Mapping[str, str], found: Sequence[Verdict], tools: Iterable[str]
) -> str:
    """Write the page."""
    names = dict.fromkeys(one.row for one in found)
    columns = [(pair, tool) for pair in PAIRS for tool in tools]
    lines = [INTRODUCTION, f"    python {shlex.join(command)}", "", *table(["", ""], about.items())]
    lines.append(READING.format(near=NEAR))
    rows = {name: [_of(found, name, pair, tool) for pair, tool in columns] for name in names}
    body = [[name, *map(cell, row)] for name, row in rows.items()]
    sums = [sum(map(right_always, column)) for column in zip(*rows.values(), strict=True)]
    body.append(["**right under every seed**", *(f"**{count} of {len(rows)}**" for count in sums)])
    lines += table(["family", *(f"{pair}: {tool}" for pair, tool in columns)], body)
    lines += ["", "## What this does not show", "", *limits()]
    return "\n".join(lines) + "\n"


def limits() -> Iterator[str]:
    """What has to be known to read the table, one point of a list each."""
    others = [name for name in FAMILIES if name not in (*tiny.VLMS, "generic") and FAMILIES[name].parts != ("text",)]
    unbuilt = [name for name in others if any(kind in CONFIG_MAPPING for kind in FAMILIES[name].model_types)]
    words = {
        "transformers": version("transformers"),
        "seeds": ", ".join(map(str, SEEDS)),
        "crimes": CRIMES,
        "remote": ", ".join(name for name in others if name not in unbuilt),
        "unbuilt": ", ".join(unbuilt),
        "llms": ", ".join(name for name in FAMILIES if FAMILIES[name].parts == ("text",)),
    }
    for limit in LIMITS.split("\n\n"):
        if unbuilt or "{unbuilt}" not in limit:
            yield textwrap.fill(
                f"- {limit.format(**words).strip()}", 120, subsequent_indent="  ", break_on_hyphens=False
            )


def right_always(found: Sequence[Verdict]) -> bool:
    """Whether a tool was right under every seed, by its defaults or with what it asked for."""
    return any(all(one.right for one in found if one.options == options) for options in {one.options for one in found})


def _of(found: Sequence[Verdict], *place: str) -> list[Verdict]:
    return [one for one in found if (one.row, one.pair, one.tool) == place]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    options = _options()
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
        cases = (case for family in options.only for case in cases_of(family, Path(scratch) / family))
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
    parser.add_argument("--only", type=_families, default=tiny.VLMS, metavar="FAMILY,...", help=", ".join(tiny.VLMS))
    parser.add_argument("--jobs", type=int, default=2, help="merges at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


def _families(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in tiny.VLMS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: cannot be built; there are {', '.join(tiny.VLMS)}")
    return names


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
