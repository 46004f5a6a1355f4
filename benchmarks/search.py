"""What it costs to try n values of a coefficient: in one loaded model, and by merging, loading and deleting each.

    python benchmarks/search.py
    python benchmarks/search.py --size 1.2B --markdown docs/search-benchmark.md

Both ways run in one process, one after the other in every round, so that neither pays for imports; of the way over the
disk the check at the end of a merge is left out. The demo's models answer questions, so that there the whole is timed;
of the larger models (random numbers, see dataset.py) only what is not generation, which is the same for both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import polymerge
from dataset import MODELS, SHAPES, make_models
from measure import machine, settle
from polymerge.checkpoints.loading import load_model, load_processor
from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.story import EXCLUDED, SHIPPED, SHIPPED_SEED
from polymerge.demo.world import load_handwriting, split_pairs
from polymerge.inference.answering import Answerer, batches
from polymerge.inference.live import LiveModel
from polymerge.inference.prompts import Prompt
from polymerge.planning.variation import varied

VALUES = tuple(place / 20 for place in range(13))  # 0:0.6:0.05, the finer grid of the paper
PROMPTS = 100
DATA = Path(__file__).parent / "data"

Ask = Callable[[Any], object]


@dataclass
class Spent:
    """Seconds of one way over all values: for what comes once, for the weights, for the answers."""

    once: float = 0.0
    weights: float = 0.0
    answers: float = 0.0

    @property
    def without_answers(self) -> float:
        return self.once + self.weights


@dataclass
class Contest:
    """One workload: its recipe, and how a model of it is asked."""

    name: str
    recipe: Callable[[float], Mapping[str, Any]]
    ask: Ask | None
    memory: list[Spent] = field(default_factory=list)
    disk: list[Spent] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "none"], default="0.1B", help="of the larger models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="where the larger models are kept")
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polymerge-search-", dir=options.data.parent) as folder:
        out, contests = Path(folder), [demo("task_arithmetic"), demo("ties", density=0.2)]
        if options.size != "none":
            models = make_models(options.size, options.data)
            contests += [large(options.size, models, "linear"), large(options.size, models, "ties", density=0.2)]
        for contest in contests:
            (
                in_memory(contest, VALUES[:2]),
                over_disk(contest, out, VALUES[:1]),
            )  # compiles kernels, fills the page cache
            for _ in range(options.rounds):
                settle()
                contest.memory.append(in_memory(contest, VALUES))
                settle()
                contest.disk.append(over_disk(contest, out, VALUES))
            print(told([contest]), flush=True)
    page = f"{told(contests)}\n\n{', '.join(f'{name} {value}' for name, value in machine().items())}\n"
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")


def in_memory(contest: Contest, values: Sequence[float]) -> Spent:
    """Plan each value, load the template once, and give it the weights of each."""
    spent, start = Spent(), time.perf_counter()
    recipes = [polymerge.read_recipe(contest.recipe(value)) for value in values]
    first = plan_of(contest, values[0])
    plans = [varied(first, recipes[0], one) or polymerge.plan(one) for one in recipes]  # as the search does it
    live = LiveModel(plans[0])
    spent.once = time.perf_counter() - start
    for plan in plans:
        start = time.perf_counter()
        live.set(plan)
        spent.weights += time.perf_counter() - start
        spent.answers += asked(contest, live.model)
    return spent


def over_disk(contest: Contest, out: Path, values: Sequence[float]) -> Spent:
    """Plan, merge, load and delete each value."""
    spent = Spent()
    for value in values:
        start = time.perf_counter()
        polymerge.merge(plan_of(contest, value), out / "merged", check=False)
        model = load_model(out / "merged")
        touch(model)
        spent.weights += time.perf_counter() - start
        spent.answers += asked(contest, model)
        start = time.perf_counter()
        del model
        shutil.rmtree(out / "merged")
        spent.weights += time.perf_counter() - start
    return spent


def touch(model: Any) -> None:
    """Read a byte of every page: weights that are mapped are not loaded until someone looks at them."""
    for parameter in model.parameters():
        parameter.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def plan_of(contest: Contest, value: float) -> polymerge.Plan:
    plan = polymerge.plan(contest.recipe(value))
    assert isinstance(plan, polymerge.Plan)
    return plan


def asked(contest: Contest, model: Any) -> float:
    if contest.ask is None:
        return 0.0
    start = time.perf_counter()
    contest.ask(model)
    return time.perf_counter() - start


def demo(method: str, **parameters: Any) -> Contest:
    vlm, base, reason = (str(SHIPPED / name) for name in ("vlm", "base", "reason"))

    def recipe(value: float) -> Mapping[str, Any]:
        return {
            "merge_method": method,
            "template": vlm,
            "base_model": base,
            "models": [
                {"model": vlm, "parameters": {"weight": 1 - value}},
                {"model": reason, "parameters": {"weight": value}},
            ],
            "parameters": parameters,
            "parts": ["text"],
            "exclude": EXCLUDED,
        }

    return Contest(f"demo's VLM (1 M parameters), {method}", recipe, questions(Path(vlm)))


def questions(vlm: Path) -> Ask:
    """Ask a model the same hundred questions of the demo."""
    held_out = load_handwriting(SHIPPED_SEED)[1]
    asked = draw_questions(split_pairs(SHIPPED_SEED), held_out, SHIPPED_SEED, pictures=1)[:PROMPTS]
    folder = Path(tempfile.mkdtemp(prefix="polymerge-questions-"))
    prompts = []
    for number, question in enumerate(asked):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
        prompts.append(Prompt(number, question.prompt, (str(folder / f"{number}.png"),)))
    processor, cut = load_processor(vlm), batches(prompts, 50)

    def ask(model: Any) -> object:
        answerer = Answerer(model, processor, max_new_tokens=3)
        return [answerer.answer(batch) for batch in cut]

    return ask


def large(size: str, models: Path, method: str, **parameters: Any) -> Contest:
    base, a, b = (str(models / name) for name in MODELS)

    def recipe(value: float) -> Mapping[str, Any]:
        return {
            "merge_method": method,
            "base_model": base,
            "models": [
                {"model": a, "parameters": {"weight": 1 - value}},
                {"model": b, "parameters": {"weight": value}},
            ],
            "parameters": parameters,
        }

    return Contest(f"Llama of {size}, {method}", recipe, None)


def told(contests: Sequence[Contest]) -> str:
    """The table: seconds for all values together, median of the rounds, and the ratio with its spread."""
    lines = [
        "| models, method | in memory: once + weights, s | merged, loaded, deleted, s | ratio (least to most) "
        "| answers, either way, s | whole, ratio |",
        "|---|---|---|---|---|---|",
    ]
    for contest in contests:
        pairs = list(zip(contest.memory, contest.disk, strict=True))
        ratios = [disk.without_answers / memory.without_answers for memory, disk in pairs]
        whole = [
            (disk.without_answers + disk.answers) / (memory.without_answers + memory.answers) for memory, disk in pairs
        ]
        once, weights = (
            statistics.median(getattr(one, name) for one in contest.memory) for name in ("once", "weights")
        )
        disk = statistics.median(one.without_answers for one in contest.disk)
        answers = statistics.median(one.answers for one in (*contest.memory, *contest.disk))
        heard = contest.ask is not None
        lines.append(
            f"| {contest.name} | {once:.2f} + {weights:.2f} | {disk:.2f} "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) "
            f"| {f'{answers:.1f}' if heard else 'not timed'} "
            f"| {f'{statistics.median(whole):.2f} ({min(whole):.2f} to {max(whole):.2f})' if heard else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
