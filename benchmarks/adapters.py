"""Merge four LoRA adapters of the demo's vision-language model in every way, and ask each merge about all four tasks.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --markdown docs/adapters.md

Each adapter is taught one operation on two handwritten digits (sum, difference, larger, smaller) by
examples/finetune_lora.py; `polymerge merge` and PEFT's add_weighted_adapter merge them. The questions are about scans
that nobody was taught, and only an answer that is right to the word counts. Trained adapters are kept for later runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from measure import RunError, machine, measure
from polymerge.demo import models
from polymerge.demo.lessons import in_picture
from polymerge.demo.pictures import draw, load_handwriting
from polymerge.demo.score import Question, Share, examine_vlm, share, write_exam
from polymerge.demo.world import ARITHMETIC, PERCEPTION, Pairs, ask, split_pairs

VLM = Path(models.__file__).parent / "checkpoints" / "vlm"
SEED = 1  # that the shipped model was trained with: its held-out scans are those of this seed
SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_lora.py"
PICTURES = 8000  # that each adapter is taught with
RANK = 8
TRAINING = f"--rank {RANK} --alpha 16 --batch-size 64 --epochs 2 --learning-rate 3e-3 --seed 0"
WEIGHT = 0.25
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
digits and colours are there) is what the model could do before, and none of the adapters was taught. The last column is
the time of the whole command, or of PEFT's call.
"""


@dataclass(frozen=True)
class Case:
    """A merge by polymerge; `weight` is that of each adapter, None where the method takes none."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = WEIGHT

    def recipe(self, adapters: Iterable[Path]) -> dict[str, Any]:
        """Write the recipe for some adapters."""
        own = {} if self.weight is None else {"parameters": {"weight": self.weight}}
        listed = [{"model": str(folder), **own} for folder in adapters]
        return {"merge_method": self.method, "models": listed, "parameters": dict(self.parameters)}


FULL = len(ARITHMETIC) * RANK  # a rank at which nothing is lost of a sum
TRIMMED = {"density": 0.2}
AVERAGED = {**TRIMMED, "normalize": "weight"}

CASES = {
    "robustmerge": Case("robustmerge", TRIMMED, None),
    "robustmerge, scale: 0.5": Case("robustmerge", {**TRIMMED, "scale": 0.5}, None),
    "robustmerge, compose: product": Case("robustmerge", {**TRIMMED, "compose": "product"}, None),
    "linear": Case("linear", {"rank": FULL}),
    "linear, space: factors": Case("linear", {"space": "factors"}),
    "task_arithmetic, weight 0.5": Case("task_arithmetic", {"rank": FULL}, 0.5),
    "ties": Case("ties", {**TRIMMED, "rank": FULL}),
    "ties, space: factors": Case("ties", {**TRIMMED, "space": "factors"}),
    "ties, space: knots": Case("ties", {**TRIMMED, "space": "knots", "rank": FULL}),
    "ties, space: core": Case("ties", {**TRIMMED, "space": "core", "rank": FULL}),
    "dare_linear": Case("dare_linear", {**TRIMMED, "rank": FULL}),
    "dare_linear, space: factors": Case("dare_linear", {**TRIMMED, "space": "factors"}),
    "dare_ties, normalize: weight": Case("dare_ties", {**AVERAGED, "rank": FULL}),
    "dare_ties, normalize: weight, space: knots": Case("dare_ties", {**AVERAGED, "space": "knots", "rank": FULL}),
    "dare_ties, normalize: weight, space: core": Case("dare_ties", {**AVERAGED, "space": "core", "rank": FULL}),
    "cat": Case("cat"),
    "cat, weight 0.5": Case("cat", weight=0.5),
    f"svd, rank {RANK}": Case("svd", {"rank": RANK}),
    f"tsv, rank {RANK}": Case("tsv", {"rank": RANK}),
    f"tsv, rank {RANK}, weight 1": Case("tsv", {"rank": RANK}, 1.0),
}
"""What polymerge merges, by its name in the table; weights are 0.25 and ranks as large as needed unless it says so."""

PEFT_CASES: dict[str, dict[str, Any]] = {
    "PEFT linear": {"combination_type": "linear"},
    "PEFT cat": {"combination_type": "cat"},
    f"PEFT svd, rank {RANK}": {"combination_type": "svd", "svd_rank": RANK},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: by column a share, by `failure` why there is none."""

    shares: Mapping[str, Share] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""


class Examiner:
    """Asks the model, with an adapter or without, about the held-out scans."""

    def __init__(self, pictures: int | None) -> None:
        every = split_pairs(SEED).every
        exam = write_exam(Pairs((), every), load_handwriting(SEED)[1], SEED, pictures=pictures)
        self.exam = {task: [q for q in exam if q.kind == task] for task in ARITHMETIC}
        self.exam[UNTAUGHT] = [q for q in exam if q.kind in PERCEPTION]
        self.processor = models.load_processor(VLM)

    def ask(self, model: Any, tasks: Sequence[str] = (*ARITHMETIC, UNTAUGHT)) -> dict[str, list[float]]:
        """Mark the answers to all questions of some tasks."""
        return {task: [float(mark) for mark in examine_vlm(model, self.processor, self.exam[task])] for task in tasks}

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


def merge(name: str, adapters: Mapping[str, Path], scratch: Path) -> tuple[Path, float]:
    """Merge with polymerge, as a user would: the adapter's folder and the seconds that it took."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    recipe, out = scratch / f"{stem}.yaml", scratch / stem
    recipe.write_text(yaml.safe_dump(CASES[name].recipe(adapters.values()), sort_keys=False), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    program = Path(sys.executable).with_name("polymerge")
    return out, measure([str(program), "merge", str(recipe), "-o", str(out)]).seconds


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
    rows |= {f"adapter of {task}": Row(examiner.shares(marks)) for task, marks in of_adapters.items()}
    for name in names:
        try:
            if name in CASES:
                folder, seconds = merge(name, adapters, scratch)
                model = load({"merged": folder})
            else:
                model, seconds = merge_by_peft(name, adapters)
            rows[name] = Row(examiner.shares(examiner.ask(model)), seconds)
        except (RunError, ValueError, RuntimeError, OSError, KeyError) as error:
            rows[name] = Row(failure=f"{type(error).__name__}: {error}")
        print(f"{name}: {rows[name].failure or _percent(rows[name].shares['mean'])}", file=sys.stderr)
    return rows


def to_markdown(about: Mapping[str, str], rows: Mapping[str, Row], examiner: Examiner) -> str:
    """Write the page."""
    columns = (*ARITHMETIC, "mean", UNTAUGHT)
    head = ["", *ARITHMETIC, "mean of the four", f"{UNTAUGHT}, untaught", "s"]
    lines = [INTRODUCTION.lstrip(), f"    python {shlex.join(sys.argv)}", "", *_table(["", ""], about.items())]
    lines.append(RESULTS.format(count=len({q.scene.digits for q in examiner.exam[ARITHMETIC[0]]})))
    body = []
    for name, row in rows.items():
        cells = [_percent(row.shares[column]) if column in row.shares else "" for column in columns]
        cells = ["failed", *cells[1:]] if row.failure else cells
        body.append([name, *cells, "" if row.seconds is None else f"{row.seconds:.1f}"])
    return "\n".join([*lines, *_table(head, body)]) + "\n"


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
    page = to_markdown(about, rows, examiner)
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
