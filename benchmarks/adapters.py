"""Merge four LoRA adapters of the demo's vision-language model in every way, and ask each merge about all four tasks.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --markdown docs/adapters.md

Each adapter is taught one operation on two handwritten digits (sum, difference, larger, smaller) by
examples/finetune_lora.py; `polymerge merge` and PEFT's add_weighted_adapter merge them. The questions are about scans
that nobody was taught, and only an answer that is right to the word counts. Each method that has a scale is asked
again at the scale that answers most of other questions, about other pictures of such scans. Trained adapters are kept
for later runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import polymerge
from measure import RunError, machine, measure
from polymerge.demo import trained_models as models
from polymerge.demo.digit_questions import Question, Share, draw_questions, score_vlm, share
from polymerge.demo.train import in_picture
from polymerge.demo.world import ARITHMETIC, PERCEPTION, Pairs, ask, draw, load_handwriting, split_pairs
from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS

VLM = Path(models.__file__).parent / "checkpoints" / "vlm"
SEED = 1  # that the shipped model was trained with: its held-out scans are those of this seed
SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_lora.py"
PICTURES = 8000  # that each adapter is taught with
RANK = 8
TRAINING = f"--rank {RANK} --alpha 16 --batch-size 64 --epochs 2 --learning-rate 3e-3 --seed 0"
WEIGHT = 0.25
SEARCH_SEED, SEARCH_PICTURES = SEED + 1, 2  # of the questions that a scale is searched with
NORMS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
NEAR, TOO_LARGE = (0.5, 1.2), 1.5
UNTAUGHT = "perception"

INTRODUCTION = """
# Merging four adapters

Four LoRA adapters of the demo's small vision-language model, each taught one operation on two handwritten digits, and
what is left of them in one merged adapter. The page is what this command has printed:
"""

RESULTS = """
## Right answers, %

Answers are right if they are so to the word. The questions are about held-out scans; each of the four tasks has the
same {count} digit pairs. ± is one standard error, with all questions on one pair as a cluster: how a number might vary
with other pairs and pictures, not with other adapters. All rows have been asked the same questions. Perception (what
digits and colours are there) is what the model could do before, and none of the adapters was taught. `norm` is the
Frobenius norm of the update over the root mean square of the four adapters', as `polymerge merge` prints it. The last
column is the time of the whole command, or of PEFT's call.

A scale that is *searched* gives the most right answers to {searched} other questions on the four tasks, about other
pictures: other draws from the scans that nobody was taught, of the same digit pairs. It is one of those that make a
norm of {norms}, to two digits; of equals it is the one with the smaller norm. The answers in the table had no part in
it.
"""

DECIDES = """
## What decides

The size of the update does, more than the method. Of the {near_count} merges here whose norm is between {near[0]:.1f}
and {near[1]:.1f}, the mean of the four is {near_mean[0]:.1f} to {near_mean[1]:.1f} %; of the {large_count} above
{large:.1f} it is {large_mean[0]:.1f} to {large_mean[1]:.1f} %, and perception, which nobody meant to change,
{large_perception[0]:.1f} to {large_perception[1]:.1f} %. At their searched scales the methods' means are
{searched_mean[0]:.1f} to {searched_mean[1]:.1f} %, and their norms {searched_norm[0]:.2f} to {searched_norm[1]:.2f}.
Perception is what tells methods apart: {near_perception[0]:.1f} to {near_perception[1]:.1f} % between {near[0]:.1f} and
{near[1]:.1f}. Within a method it falls as the norm grows, and rows of about one norm still differ in it. So compare
methods at one norm, or search the scale of each (`polymerge search RECIPE --vary scale`), before one is called better.

RobustMerge as released carries `scale: 2` on both factors, so it multiplies the update by 4, on a sum over the A
factors that nothing divides by their number. Here that makes a norm of {released:.2f}. `polymerge merge` prints the
norm of every merge of adapters, and names a `scale` where it is above 1.5. `compose: factors` and `space: factors` join
each adapter's B with every other one's A, so they need adapters that began with one A; the cosine of two adapters' A
is {cosines[0]:.2f} to {cosines[1]:.2f} here. Where it is below 0.5, the merge says so.
"""


@dataclass(frozen=True)
class Case:
    """A merge by polymerge; `weight` is that of each adapter, None where the method takes none.

    search  whether its scale is searched; not where another row is the same merge but for its scale
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = WEIGHT
    search: bool = True

    @property
    def scale(self) -> float | None:
        """What the merged update is multiplied with; None where the method has no scale."""
        own = METHODS[self.method].parameter("scale")
        return float(self.parameters.get("scale", own.default)) if own else None

    @property
    def power(self) -> int:
        """Of the scale, that the norm grows with: where A and B are merged apart, each of them carries it."""
        apart = self.parameters.get("space") == "factors" or self.method == "robustmerge"
        return 2 if apart and self.parameters.get("compose") != "product" else 1

    def scaled(self, scale: float) -> Case:
        """The same merge with another scale."""
        return replace(self, parameters={**self.parameters, "scale": scale})

    def recipe(self, adapters: Iterable[Path]) -> dict[str, Any]:
        """Write the recipe for some adapters."""
        own = {} if self.weight is None else {"parameters": {"weight": self.weight}}
        listed = [{"model": str(folder), **own} for folder in adapters]
        return {"merge_method": self.method, "models": listed, "parameters": dict(self.parameters)}


FULL = len(ARITHMETIC) * RANK  # a rank at which nothing is lost of a sum
TRIMMED = {"density": 0.2}
DARE_TIES = {**TRIMMED, "normalize": "none"}

CASES = {
    "robustmerge": Case("robustmerge", TRIMMED, None),
    "robustmerge, scale: 0.5": Case("robustmerge", {**TRIMMED, "scale": 0.5}, None, search=False),
    "robustmerge, compose: product": Case("robustmerge", {**TRIMMED, "compose": "product"}, None),
    "linear": Case("linear", {"rank": FULL}),
    "linear, space: factors": Case("linear", {"space": "factors"}),
    "task_arithmetic, weight 0.5": Case("task_arithmetic", {"rank": FULL}, 0.5),
    "task_arithmetic, weight 0.5, space: factors": Case("task_arithmetic", {"space": "factors"}, 0.5),
    "ties": Case("ties", {**TRIMMED, "rank": FULL}),
    "ties, space: factors": Case("ties", {**TRIMMED, "space": "factors"}),
    "ties, space: knots": Case("ties", {**TRIMMED, "space": "knots", "rank": FULL}),
    "ties, space: core": Case("ties", {**TRIMMED, "space": "core", "rank": FULL}),
    "dare_linear": Case("dare_linear", {**TRIMMED, "rank": FULL}),
    "dare_linear, space: factors": Case("dare_linear", {**TRIMMED, "space": "factors"}),
    "dare_ties": Case("dare_ties", {**DARE_TIES, "rank": FULL}),
    "dare_ties, space: knots": Case("dare_ties", {**DARE_TIES, "space": "knots", "rank": FULL}),
    "dare_ties, space: core": Case("dare_ties", {**DARE_TIES, "space": "core", "rank": FULL}),
    "cat": Case("cat"),
    "cat, weight 0.5": Case("cat", weight=0.5, search=False),
    f"svd, rank {RANK}": Case("svd", {"rank": RANK}),
    f"tsv, rank {RANK}": Case("tsv", {"rank": RANK}),
    f"tsv, rank {RANK}, weight 1": Case("tsv", {"rank": RANK}, 1.0, search=False),
    f"tsv, rank {FULL}": Case("tsv", {"rank": FULL}),
    "iso_c": Case("iso_c", weight=None),
    "iso_cts": Case("iso_cts", weight=None),
    "optmerge": Case("optmerge", weight=None),
    "swudi, init: mean": Case("swudi", {"init": "mean"}, None),
    "aswudi, init: mean": Case("aswudi", {"init": "mean"}, None),
    "dc_merge": Case("dc_merge", weight=None),
    "task_arithmetic, weight 1, calibrate: svc": Case("task_arithmetic", {"rank": FULL, "calibrate": "svc"}, 1.0),
}
"""What polymerge merges, by its name in the table; weights are 0.25 and ranks as large as needed unless it says so."""

PEFT_CASES: dict[str, dict[str, Any]] = {
    "PEFT linear": {"combination_type": "linear"},
    "PEFT cat": {"combination_type": "cat"},
    f"PEFT svd, rank {RANK}": {"combination_type": "svd", "svd_rank": RANK},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: by column a share, by `failure` why there is none; `norm` is that of the update."""

    shares: Mapping[str, Share] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""
    norm: float | None = None
    searched: bool = False


class Examiner:
    """Asks the model, with an adapter or without, about the held-out scans."""

    def __init__(self, pictures: int | None) -> None:
        pairs, scans = Pairs((), split_pairs(SEED).every), load_handwriting(SEED)[1]
        exam = draw_questions(pairs, scans, SEED, pictures=pictures)
        self.exam = {task: [q for q in exam if q.kind == task] for task in ARITHMETIC}
        self.exam[UNTAUGHT] = [q for q in exam if q.kind in PERCEPTION]
        self.processor = models.load_processor(VLM)
        others = draw_questions(pairs, scans, SEARCH_SEED, pictures=SEARCH_PICTURES)
        self.other_exam = [q for q in others if q.kind in ARITHMETIC]

    def right_of_others(self, model: Any) -> int:
        """How many answers are right to questions on the four tasks that are not in the exam."""
        return sum(score_vlm(model, self.processor, self.other_exam))

    def ask(self, model: Any, tasks: Sequence[str] = (*ARITHMETIC, UNTAUGHT)) -> dict[str, list[float]]:
        """Mark the answers to all questions of some tasks."""
        return {task: [float(mark) for mark in score_vlm(model, self.processor, self.exam[task])] for task in tasks}

    def shares(self, marks: Mapping[str, list[float]]) -> dict[str, Share]:
        """Sum up marks by task, and over all taught tasks."""
        found = {task: share(some, self.exam[task]) for task, some in marks.items()}
        taught: list[Question] = [q for task in ARITHMETIC for q in self.exam[task]]
        return found | {"mean": share([mark for task in ARITHMETIC for mark in marks[task]], taught)}


def load(adapters: Mapping[str, Path]) -> Any:
    """Load the model with some adapters by their names, the first one in use; every tensor has to find its place."""
    model: Any = models.load(LlavaForConditionalGeneration, VLM)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
        if misfits := sorted(wanted ^ load_file(folder / "adapter_model.safetensors").keys()):
            raise RunError(f"{folder}: {len(misfits)} tensors are missing or find no place, such as {misfits[0]}")
    return model.eval()


def train(folder: Path, more: Sequence[str]) -> dict[str, Path]:
    """Train the four adapters, as many at a time as there are cores, or take those of an earlier run."""

    def one(task: str) -> None:
        data = _write_lessons(task, folder)
        command = [sys.executable, str(SCRIPT), "--model", str(VLM), "--data", str(data), "--images", str(folder)]
        out = folder / f"{task}.new"
        shutil.rmtree(out, ignore_errors=True)
        taken = measure([*command, "--output", str(out), *words], {"OMP_NUM_THREADS": "1"})
        (out / "trained.txt").write_text(shlex.join(words), encoding="utf-8")
        shutil.rmtree(folder / task, ignore_errors=True)
        out.rename(folder / task)
        shutil.rmtree(folder / "images" / task)
        print(f"taught {task}: {taken.seconds:.0f} s", file=sys.stderr)

    words = [*TRAINING.split(), *more]
    lacking = [task for task in ARITHMETIC if _text(folder / task / "trained.txt") != shlex.join(words)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, lacking))
    return {task: folder / task for task in ARITHMETIC}


def _write_lessons(task: str, folder: Path) -> Path:
    """Draw pictures of training scans and ask about each, in LLaVA's format."""
    dice = random.Random(f"adapter {task} {SEED}")
    pairs, (handwriting, _) = split_pairs(SEED), load_handwriting(SEED)
    (folder / "images" / task).mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(PICTURES):
        lesson = in_picture(task, dice.choice(pairs.every), dice)
        assert lesson.scene
        name = f"images/{task}/{number}.png"
        Image.fromarray(draw(lesson.scene, handwriting, dice, jitter=True)).save(folder / name, compress_level=1)
        said = {"human": "<image>\n" + " ".join(ask(task)), "gpt": " ".join(lesson.answer)}
        turns = [{"from": speaker, "value": value} for speaker, value in said.items()]
        listed.append({"id": f"{task} {number}", "image": name, "conversations": turns})
    data = folder / f"{task}.json"
    data.write_text(json.dumps(listed), encoding="utf-8")
    return data


def merge(name: str, case: Case, adapters: Mapping[str, Path], scratch: Path) -> tuple[Path, float]:
    """Merge with polymerge, as a user would: the adapter's folder and the seconds that it took."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    recipe, out = scratch / f"{stem}.yaml", scratch / stem
    recipe.write_text(yaml.safe_dump(case.recipe(adapters.values()), sort_keys=False), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    program = Path(sys.executable).with_name("polymerge")
    return out, measure([str(program), "merge", str(recipe), "-o", str(out)]).seconds


def recorded_norm(folder: Path) -> float:
    """The norm that polymerge has written beside an update."""
    record = json.loads((folder / "polymerge.json").read_text(encoding="utf-8"))
    return float(record["output"]["update_norm"]["ratio"])


def norm_in(model: Any, name: str, others: Sequence[str]) -> float:
    """The norm of an adapter in a model over the root mean square of others, multiplied out."""
    squares = dict.fromkeys((name, *others), 0.0)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for adapter in squares:
            update = layer.get_delta_weight(adapter).detach().double()
            squares[adapter] += float(update.square().sum())
    return math.sqrt(squares[name] / (sum(squares[other] for other in others) / len(others)))


def search_scale(
    examiner: Examiner, case: Case, norm: float, adapters: Mapping[str, Path], scratch: Path
) -> tuple[float, list[int]]:
    """The scale with the most right answers to other questions than those of the exam, and the numbers of them all."""
    assert case.scale is not None
    scales = [float(f"{case.scale * (wanted / norm) ** (1 / case.power):.2g}") for wanted in NORMS]
    right = []
    for scale in scales:
        out = scratch / "searching"
        polymerge.merge(case.scaled(scale).recipe(adapters.values()), out, force=True, check=False, threads=1)
        right.append(examiner.right_of_others(load({"merged": out})))
    return scales[right.index(max(right))], right


def merge_by_peft(name: str, adapters: Mapping[str, Path]) -> tuple[Any, float]:
    """Merge with PEFT: the model with the merged adapter in use, and the seconds that it took."""
    model = load(adapters)
    start = time.perf_counter()
    model.add_weighted_adapter(list(adapters), [WEIGHT] * len(adapters), "merged", **PEFT_CASES[name])
    seconds = time.perf_counter() - start
    model.set_adapter("merged")
    return model, seconds


def contest(examiner: Examiner, adapters: Mapping[str, Path], names: Sequence[str], scratch: Path) -> dict[str, Row]:
    """Ask the model alone, with each adapter, and with each merge of them."""
    rows = {"zero-shot": Row(examiner.shares(examiner.ask(models.load(LlavaForConditionalGeneration, VLM))))}
    of_adapters = {task: examiner.ask(load({task: folder})) for task, folder in adapters.items()}
    rows["each adapter on its own task"] = Row(examiner.shares({task: of_adapters[task][task] for task in adapters}))
    together = load(adapters)
    rows |= {
        f"adapter of {task}": Row(examiner.shares(marks), norm=norm_in(together, task, list(adapters)))
        for task, marks in of_adapters.items()
    }
    for name in names:
        try:
            if name in CASES:
                rows |= of_polymerge(name, examiner, adapters, scratch)
            else:
                model, seconds = merge_by_peft(name, adapters)
                norm = norm_in(model, "merged", list(adapters))
                rows[name] = Row(examiner.shares(examiner.ask(model)), seconds, norm=norm)
                _tell(name, rows[name])
        except (RunError, PolymergeError, ValueError, RuntimeError, OSError, KeyError) as error:
            rows[name] = Row(failure=f"{type(error).__name__}: {error}")
            _tell(name, rows[name])
    return rows


def of_polymerge(name: str, examiner: Examiner, adapters: Mapping[str, Path], scratch: Path) -> dict[str, Row]:
    """A row for the merge as it is listed, and one at its searched scale."""

    def row(title: str, case: Case, searched: bool) -> None:
        folder, seconds = merge(title, case, adapters, scratch)
        shares = examiner.shares(examiner.ask(load({"merged": folder})))
        rows[title] = Row(shares, seconds, norm=recorded_norm(folder), searched=searched)
        _tell(title, rows[title])

    rows: dict[str, Row] = {}
    case = CASES[name]
    row(name, case, False)
    norm = rows[name].norm
    if case.search and case.scale is not None and norm:
        scale, right = search_scale(examiner, case, norm, adapters, scratch)
        print(f"{name}: right of {len(examiner.other_exam)} at norms {NORMS}: {right}", file=sys.stderr)
        row(f"{name}, scale: {scale:g} (searched)", case.scaled(scale), True)
    return rows


def _tell(name: str, row: Row) -> None:
    norm = "" if row.norm is None else f", norm {row.norm:.2f}"
    print(f"{name}: {row.failure or _percent(row.shares['mean'])}{norm}", file=sys.stderr, flush=True)


def to_markdown(about: Mapping[str, str], rows: Mapping[str, Row], examiner: Examiner, cosines: Sequence[float]) -> str:
    """Write the page; `cosines` are those of every two adapters' A factors."""
    columns = (*ARITHMETIC, "mean", UNTAUGHT)
    head = ["", "norm", *ARITHMETIC, "mean of the four", f"{UNTAUGHT}, untaught", "s"]
    lines = [INTRODUCTION.lstrip(), f"    python {shlex.join(sys.argv)}", "", *_table(["", ""], about.items())]
    count = len({q.scene.digits for q in examiner.exam[ARITHMETIC[0]]})
    norms = f"{', '.join(f'{norm:g}' for norm in NORMS[:-1])} or {NORMS[-1]:g}"
    lines.append(_wrapped(RESULTS.format(count=count, searched=len(examiner.other_exam), norms=norms)))
    body = []
    for name, row in rows.items():
        cells = [_percent(row.shares[column]) if column in row.shares else "" for column in columns]
        cells = ["failed", *cells[1:]] if row.failure else cells
        norm = "" if row.norm is None else f"{row.norm:.2f}"
        body.append([name, norm, *cells, "" if row.seconds is None else f"{row.seconds:.1f}"])
    return "\n".join([*lines, *_table(head, body)]) + f"\n{what_decides(rows, cosines)}"


def what_decides(rows: Mapping[str, Row], cosines: Sequence[float]) -> str:
    """The paragraph on norms, in numbers of the table; nothing where too few merges were asked for."""
    merges = [row for name, row in rows.items() if row.norm is not None and not name.startswith("adapter of ")]
    near = [row for row in merges if NEAR[0] <= (row.norm or 0) <= NEAR[1]]
    large = [row for row in merges if (row.norm or 0) > TOO_LARGE]
    searched = [row for row in merges if row.searched]
    released = rows.get("robustmerge", Row()).norm
    if not (near and large and searched and cosines) or released is None:
        return ""

    def span(of: Iterable[Row], column: str) -> tuple[float, float]:
        values = [100 * row.shares[column].value for row in of]
        return min(values), max(values)

    own = [row.norm for row in searched if row.norm is not None]
    found = DECIDES.format(
        near=NEAR, near_count=len(near), near_mean=span(near, "mean"), near_perception=span(near, UNTAUGHT),
        large=TOO_LARGE, large_count=len(large), large_mean=span(large, "mean"),
        large_perception=span(large, UNTAUGHT), searched_mean=span(searched, "mean"),
        searched_norm=(min(own), max(own)), released=released, cosines=(min(cosines), max(cosines)),
    )  # fmt: skip
    return _wrapped(found)


def _wrapped(text: str) -> str:
    """Paragraphs in lines of one length, once their numbers are in them."""
    return "\n".join(
        ["", *(textwrap.fill(one, 120, break_on_hyphens=False) + "\n" for one in text.strip().split("\n\n"))]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _percent(marks: Share) -> str:
    return f"{100 * marks.value:.1f} ± {100 * marks.error:.1f}"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def main() -> None:
    options = _options()
    start, host = time.perf_counter(), machine()
    torch.set_num_threads(1)  # the model is small
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's concern
    folder = options.data.resolve() / "adapters"
    more = ["--train-projector"] if options.train_projector else []
    adapters = train(folder / ("projector" if more else "plain"), more)
    taught = time.perf_counter() - start
    examiner = Examiner(options.pictures)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    rows = contest(examiner, adapters, options.methods, scratch)
    training = shlex.join([*TRAINING.split(), *more])
    about = {
        "model": f"LLaVA of {sum(p.numel() for p in load(adapters).get_base_model().parameters()) / 1e6:.1f} million",
        "adapters": f"LoRA on the text tower's linear layers, {PICTURES} pictures each; `{training}`",
        "questions": ", ".join(f"{task} {len(asked)}" for task, asked in examiner.exam.items()),
        "weight": f"{WEIGHT} for each adapter where a row does not say another",
        "machine": f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers", "peft")),
        "time": f"{time.perf_counter() - start:.0f} s, {taught:.0f} s of it training (0 if done before)",
    }
    norms = polymerge.merge(Case("cat").recipe(adapters.values()), scratch / "together", force=True, check=False).norms
    assert norms is not None
    page = to_markdown(about, rows, examiner, list(norms.cosines.values()))
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)
    if failed := [f"{name}: {row.failure}" for name, row in rows.items() if row.failure]:
        sys.exit("\n".join(["failed:", *failed]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*CASES, *PEFT_CASES]
    parser.add_argument("--methods", nargs="*", choices=every, default=every, metavar="NAME", help="; ".join(every))
    parser.add_argument("--train-projector", action="store_true", help="adapters with a projector (PEFT merges none)")
    parser.add_argument("--pictures", type=int, metavar="N", help="of each digit pair for each kind of question")
    data = Path(__file__).parent / "data"
    parser.add_argument("--data", type=Path, default=data, help="folder for adapters (default benchmarks/data)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
