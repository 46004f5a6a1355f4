"""Merge four LoRA adapters of the demo's vision-language model in every way, and ask each merge about all four tasks.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --markdown docs/adapters.md

Each adapter is taught one operation on two handwritten digits (sum, difference, larger, smaller) by
examples/finetune_lora.py; polymerge and PEFT's add_weighted_adapter merge them. The questions are about scans that
nobody was taught, and only an answer that is right to the word counts. Each merge is asked again at the scale that
answers most of other questions, about other pictures of such scans. Trained adapters and finished merges are kept for
later runs.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import polymerge
from cases import DENSITY, Case, of_the_table
from exam import Exam, Kept, Row, contest, of_the_demo
from lessons import PICTURES, VLM, teach
from measure import RunError, machine
from polymerge.demo import trained_models
from polymerge.demo.world import ARITHMETIC
from scorepage import findings, results, table, wrapped

RANK = 8
TRAINING = f"--rank {RANK} --alpha 16 --batch-size 64 --epochs 2 --learning-rate 3e-3 --seed 0"
FULL = len(ARITHMETIC) * RANK  # a rank at which nothing is lost of a sum
WEIGHT = 1 / len(ARITHMETIC)

INTRODUCTION = """
# Merging four adapters

Four LoRA adapters of the demo's small vision-language model, each taught one operation on two handwritten digits, and
what is left of them in one merged adapter. The page is what this command has printed:
"""

RELEASED = """
RobustMerge as released carries `scale: 2` on both factors, so it multiplies the update by 4, on a sum over the A
factors that nothing divides by their number. Here that makes a norm of {released:.2f}. `polymerge merge` prints the
norm of every merge of adapters, and names a `scale` where it is above 1.5. `compose: factors` and `space: factors` join
each adapter's B with every other one's A, so they need adapters that began with one A; the cosine of two adapters' A
is {cosines[0]:.2f} to {cosines[1]:.2f} here. Where it is below 0.5, the merge says so.
"""

TRIMMED = {"density": DENSITY}
SUMMED = {"rank": FULL}

CASES = {
    **of_the_table(lambda row: row.takes_adapters, len(ARITHMETIC), SUMMED),
    "robustmerge, compose: product": Case("robustmerge", {"compose": "product"}),
    "linear, space: factors": Case("linear", {"space": "factors"}, WEIGHT),
    "ties, space: factors": Case("ties", {**TRIMMED, "space": "factors"}, WEIGHT),
    "ties, space: knots": Case("ties", {**TRIMMED, "space": "knots", **SUMMED}, WEIGHT),
    "ties, space: core": Case("ties", {**TRIMMED, "space": "core", **SUMMED}, WEIGHT),
    "dare_linear, space: factors": Case("dare_linear", {**TRIMMED, "space": "factors"}, WEIGHT),
    "dare_ties, space: knots": Case("dare_ties", {**TRIMMED, "space": "knots", **SUMMED}, WEIGHT),
    "dare_ties, space: core": Case("dare_ties", {**TRIMMED, "space": "core", **SUMMED}, WEIGHT),
    f"svd, rank: {RANK}": Case("svd", {"rank": RANK}, WEIGHT),
    f"tsv, rank: {RANK}": Case("tsv", {"rank": RANK}),
    "swudi, init: mean": Case("swudi", {"init": "mean"}),
    "aswudi, init: mean": Case("aswudi", {"init": "mean"}),
    "task_arithmetic, weight: 1, calibrate: svc": Case("task_arithmetic", {**SUMMED, "calibrate": "svc"}, 1.0),
}
"""What polymerge merges, by its name in the tables."""

PEFT_CASES: dict[str, dict[str, Any]] = {
    "merged by PEFT, linear": {"combination_type": "linear"},
    "merged by PEFT, cat": {"combination_type": "cat"},
    f"merged by PEFT, svd of rank {RANK}": {"combination_type": "svd", "svd_rank": RANK},
}


def load(adapters: Mapping[str, Path]) -> Any:
    """Load the model with some adapters by their names, the first one in use; every tensor has to find its place."""
    model: Any = trained_models.load(LlavaForConditionalGeneration, VLM)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
        if misfits := sorted(wanted ^ load_file(folder / "adapter_model.safetensors").keys()):
            raise RunError(f"{folder}: {len(misfits)} tensors are missing or find no place, such as {misfits[0]}")
    return model.eval()


def norm_in(model: Any, name: str, others: Sequence[str]) -> float:
    """The norm of an adapter in a model over the root mean square of others, multiplied out."""
    squares = dict.fromkeys((name, *others), 0.0)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for adapter in squares:
            update = layer.get_delta_weight(adapter).detach().double()
            squares[adapter] += float(update.square().sum())
    return math.sqrt(squares[name] / (sum(squares[other] for other in others) / len(others)))


def of_models(adapters: Mapping[str, Path], exam: Exam, kept: Kept) -> dict[str, Row]:
    """The model alone, with each adapter, and with each on its own task."""

    def of_adapter(task: str) -> Row:
        model = load({task: adapters[task]}).merge_and_unload()
        return Row(exam.ask(model), norm_in(load(adapters), task, list(adapters)))

    alone = kept.row("zero-shot", "", lambda: Row(exam.ask(trained_models.load(LlavaForConditionalGeneration, VLM))))
    named = {f"adapter of {task}": kept.row(f"adapter of {task}", "", partial(of_adapter, task)) for task in adapters}
    own = Row({task: row.marks[task] for task, row in zip(adapters, named.values(), strict=True)})
    return {"zero-shot": alone, "each adapter on its own task": own, **named}


def of_peft(adapters: Mapping[str, Path], exam: Exam, kept: Kept) -> dict[str, Row]:
    """Merges by PEFT."""

    def merged(how: Mapping[str, Any]) -> Row:
        model = load(adapters)
        model.add_weighted_adapter(list(adapters), [WEIGHT] * len(adapters), "merged", **how)
        model.set_adapter("merged")
        return Row(exam.ask(model), norm_in(model, "merged", list(adapters)))

    return {name: kept.row(name, repr(how), partial(merged, how)) for name, how in PEFT_CASES.items()}


def merges(
    folder: Path, adapters: Mapping[str, Path], exam: Exam, cases: Mapping[str, Case], kept: Kept
) -> dict[str, Row]:
    """Every merge at its searched scale."""

    def made(case: Case, scale: float | None) -> tuple[Any, float]:
        out = folder / "merged"
        done = polymerge.merge(case.recipe(list(adapters.values()), scale=scale), out, force=True, check=False)
        if done.norms is None:
            raise RunError(f"{case.method}: the merge says no norm")
        return load({"merged": out}).merge_and_unload(), done.norms.ratio

    return contest(cases, made, exam, kept)


def main() -> None:
    options = _options()
    host = machine()
    torch.set_num_threads(1)  # the model is small
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's concern
    training = [*TRAINING.split(), *(["--train-projector"] if options.train_projector else [])]
    folder = options.data.resolve() / "adapters" / ("projector" if options.train_projector else "plain")
    adapters = teach(folder, ARITHMETIC, training)
    exam = of_the_demo(ARITHMETIC, options.pictures)

    versions = ", ".join(f"{name} {version(name)}" for name in ("polymerge", "torch", "transformers", "peft"))
    asked = {task: len(some) for task, some in exam.questions.items()}
    cases = {name: CASES[name] for name in options.methods if name in CASES}
    kept = Kept(folder / "merges.json", f"{shlex.join(training)}; {versions}; {asked}")
    searched = merges(folder, adapters, exam, cases, kept)
    models = of_models(adapters, exam, kept)
    if not options.train_projector:  # PEFT merges none
        models |= of_peft(adapters, exam, kept)
    model = load(adapters).get_base_model()
    about = {
        "model": f"LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million with its adapters",
        "adapters": f"LoRA on the text tower's linear layers, {PICTURES} pictures each; `{shlex.join(training)}`",
        "questions": ", ".join(f"{task} {count}" for task, count in asked.items()),
        "weight": f"{WEIGHT:g} of each adapter where a method has weights without a default",
        "density": f"{DENSITY:g} where a method keeps a share of each delta",
        "machine": f"{host['processor']}, {host['cores']} cores, {host['memory']}, {host['system']}",
        "versions": versions,
    }
    together = polymerge.merge(CASES["cat"].recipe(list(adapters.values())), folder / "merged", force=True, check=False)
    cosines = list(together.norms.cosines.values()) if together.norms else []
    released = searched["robustmerge"].as_is[0] if "robustmerge" in searched else 0.0
    lines = [INTRODUCTION.lstrip(), f"    python {shlex.join(sys.argv)}", "", *table(["", ""], about.items())]
    page = "\n".join([*lines, results(exam, models, searched), findings(exam, searched)])
    if released and cosines:
        page += wrapped(RELEASED.format(released=released, cosines=(min(cosines), max(cosines))))
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    print(page)
    if failed := [f"{name}: {row.failure}" for name, row in searched.items() if row.failure]:
        sys.exit("\n".join(["failed:", *failed]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(CASES)
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
