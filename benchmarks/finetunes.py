"""Merge three full fine-tunes of the demo's vision-language model by every method that merges checkpoints.

    python benchmarks/finetunes.py
    python benchmarks/finetunes.py --markdown docs/finetunes.md

Each copy is taught one operation on two handwritten digits (sum, larger, smaller), all of its weights, by
examples/finetune_lora.py. The questions are about scans that nobody was taught, and only an answer that is right to
the word counts. Each merge is asked at the scale that answers most of other questions, about other pictures of such
scans. Fine-tunes and finished merges are kept for later runs.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import polymerge
from cases import DENSITY, Case, of_the_table
from exam import Exam, Kept, Row, contest, of_the_demo
from lessons import PICTURES, VLM, teach
from measure import RunError, machine
from polymerge.demo import trained_models
from scorepage import findings, results, table

TASKS = ("sum", "larger", "smaller")
TRAINING = "--full --batch-size 64 --epochs 2 --learning-rate 1e-3 --seed 0"
WEIGHT = 1 / len(TASKS)

INTRODUCTION = """
# Merging three full fine-tunes

Three copies of the demo's small vision-language model, each taught one operation on two handwritten digits in all of
its weights, and what is left of them in one merged model. The page is what this command has printed:
"""

CASES = {
    **of_the_table(lambda row: row.on != "factors", len(TASKS), {}),
    "ties, trim: model": Case("ties", {"density": DENSITY, "trim": "model"}, WEIGHT),
    "sce, select_topk: 0.1": Case("sce", {"select_topk": 0.1}),
    "nearswap, t: 0.003": Case("nearswap", {"t": 0.003}),
    "nearswap, t: 0.01": Case("nearswap", {"t": 0.01}),
    "nuslerp of weights": Case("nuslerp", on_base=False),
    "nuslerp by row": Case("nuslerp", {"nuslerp_flatten": False}),
    "multislerp of weights": Case("multislerp", weight=WEIGHT, on_base=False),
    "model_stock, filter_wise": Case("model_stock", {"filter_wise": True}),
    "swudi, init: mean": Case("swudi", {"init": "mean"}),
    "aswudi, init: mean": Case("aswudi", {"init": "mean"}),
    "task_arithmetic, weight: 1, calibrate: svc": Case("task_arithmetic", {"calibrate": "svc"}, 1.0),
}
"""What is merged, by its name in the tables."""


def squared_change(base: Mapping[str, torch.Tensor], folder: Path) -> float:
    """The squared norm of what a checkpoint of one file has changed."""
    tensors = load_file(folder / "model.safetensors")
    if misfits := sorted(tensors.keys() ^ base.keys()):
        raise RunError(f"{folder}: {len(misfits)} tensors more or less than the base, such as {misfits[0]}")
    return sum(float((tensor.double() - base[name].double()).square().sum()) for name, tensor in tensors.items())


def load(folder: Path) -> Any:
    """Load a model to be asked."""
    return trained_models.load(LlavaForConditionalGeneration, folder)


def merges(
    folder: Path, tuned: Mapping[str, Path], exam: Exam, cases: Mapping[str, Case], kept: Kept
) -> dict[str, Row]:
    """Every merge at its searched scale."""
    base = load_file(VLM / "model.safetensors")
    mean_change = fmean(squared_change(base, one) for one in tuned.values())

    def made(case: Case, scale: float | None) -> tuple[Any, float]:
        out = folder / "merged"
        polymerge.merge(case.recipe(list(tuned.values()), VLM, scale), out, force=True, check=False)
        return load(out), math.sqrt(squared_change(base, out) / mean_change)

    return contest(cases, made, exam, kept)


def main() -> None:
    options = _options()
    host = machine()
    torch.set_num_threads(1)  # the model is small
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = options.data.resolve() / "finetunes"
    tuned = teach(folder, TASKS, TRAINING.split())
    exam = of_the_demo(TASKS, options.pictures)
    base = load_file(VLM / "model.safetensors")
    changes = {task: squared_change(base, one) for task, one in tuned.items()}
    mean_change = fmean(changes.values())
    versions = ", ".join(f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers"))
    asked = {task: len(some) for task, some in exam.questions.items()}
    cases = {name: CASES[name] for name in options.methods}
    kept = Kept(folder / "merges.json", f"{TRAINING}; {versions}; {asked}")
    searched = merges(folder, tuned, exam, cases, kept)

    def of_tuned(task: str) -> Row:
        return Row(exam.ask(load(tuned[task])), math.sqrt(changes[task] / mean_change))

    models = {"base": kept.row("base", "", lambda: Row(exam.ask(load(VLM))))}
    models |= {f"fine-tune of {task}": kept.row(f"fine-tune of {task}", "", partial(of_tuned, task)) for task in tuned}
    about = {
        "model": f"LLaVA of {sum(tensor.numel() for tensor in base.values()) / 1e6:.1f} million",
        "fine-tunes": f"all weights, {PICTURES} pictures each; `{TRAINING}`",
        "questions": ", ".join(f"{task} {count}" for task, count in asked.items()),
        "weight": "a third of each fine-tune where a method has weights without a default",
        "density": f"{DENSITY:g} where a method keeps a share of each delta",
        "one or two models": "the first two are merged, and the third into that, such that all weigh alike; the base "
        "of `nearswap` and `arcee_fusion` is what they merge into",
        "scale": "of the method; where it has none, or merges by steps, of `task_arithmetic` as a last stage",
        "machine": f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}",
        "versions": versions,
    }
    lines = [INTRODUCTION.lstrip(), f"    python {shlex.join(sys.argv)}", "", *table(["", ""], about.items())]
    page = "\n".join([*lines, results(exam, models, searched), findings(exam, searched)])
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)
    if failed := [f"{name}: {row.failure}" for name, row in searched.items() if row.failure]:
        sys.exit("\n".join(["failed:", *failed]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(CASES)
    parser.add_argument("--methods", nargs="*", choices=every, default=every, metavar="NAME", help="; ".join(every))
    parser.add_argument("--pictures", type=int, metavar="N", help="of each digit pair for each kind of question")
    data = Path(__file__).parent / "data"
    parser.add_argument("--data", type=Path, default=data, help="folder for fine-tunes (default benchmarks/data)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(str(error))
