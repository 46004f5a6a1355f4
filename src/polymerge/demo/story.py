"""The story: merge the reasoning model into the vision-language model, ask before and after, and show a control.

It is the main experiment of "Bring Reason to Vision" (ICML 2025) in the small. The merged checkpoints are made by the
public `polymerge.merge` and loaded as any user would load them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from polymerge import merge
from polymerge.demo.after_merging import choose_weight, draw_accuracy, make_page, report_choice
from polymerge.demo.digit_questions import (
    GROUPS,
    Question,
    Share,
    draw_questions,
    score_language_model,
    score_vlm,
    share,
)
from polymerge.demo.shipped import shipped_models
from polymerge.demo.train import train_all
from polymerge.demo.trained_models import load, load_processor, save_language_model
from polymerge.demo.world import load_handwriting, split_pairs
from polymerge.durable import write_file

SHIPPED = Path(__file__).parent / "checkpoints"
SHIPPED_SEED = 1  # the world and the training run that the shipped checkpoints come from
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25)
INTERPOLATIONS = (0.1, 0.2)  # the reasoning model's share where weights are averaged, as the paper writes it
EXCLUDED = ["text.embed_tokens.weight", "text.lm_head.weight"]

LIMITS = """
Mind the first and third column: what a weight gains on unseen pairs it may cost in perception and on seen pairs. This
is one small world and one training run, and it was built for merging to matter: some of the language models' text is
laid out as a picture's patches are, so words and pictures are read alike."""

Row = dict[str, Any]
Say = Callable[[str], None]


def run(
    out: Path,
    *,
    train: bool = False,
    seed: int | None = None,
    weights: Sequence[float] = WEIGHTS,
    threads: int = 1,
    pictures: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Tell the story and return what it measured; `out` gets the merged checkpoints, demo.json and demo.png.

    What an earlier run left there is replaced.

    train     train the three models anew (10 to 20 minutes) into out/checkpoints instead of taking the shipped ones
    seed      of the world and the training, when training; the shipped checkpoints have their own
    weights   what the reasoning model's delta is multiplied with
    threads   of torch; models this small are fastest on one, and training then repeats to the bit
    pictures  pictures per pair and kind of question; None for all questions
    """
    started = time.perf_counter()
    seed = SHIPPED_SEED if seed is None or not train else seed
    before = torch.get_num_threads()
    bars: Any = transformers_logging
    bars.disable_progress_bar()
    try:
        torch.set_num_threads(threads)
        checkpoints = out / "checkpoints" if train else shipped_models()
        if train:
            train_all(checkpoints, seed=seed, say=say)
        results = _tell(checkpoints, out, seed, tuple(weights), pictures, say)
    finally:
        torch.set_num_threads(before)
        bars.enable_progress_bar()
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_file(out / "demo.json", json.dumps(results, indent=2) + "\n")
    draw_accuracy(results, out / "demo")
    say(f"\n{results['seconds']:.0f} s. {out / results['page']} tells it all, and what each layer contributes.")
    say("Beside it lie demo.json, demo.png, the checkpoints, and every answer.")
    return results


def _tell(
    checkpoints: Path, out: Path, seed: int, weights: tuple[float, ...], pictures: int | None, say: Say
) -> dict[str, Any]:
    pairs = split_pairs(seed)
    training, held_out = load_handwriting(seed)
    questions = draw_questions(pairs, held_out, seed, pictures=pictures)
    say(_introduction(len(questions), sum(map(len, training.source)), sum(map(len, held_out.source))))

    base, reason, vlm = (str(checkpoints / name) for name in ("base", "reason", "vlm"))
    control = out / "random"
    write_control(Path(base), Path(reason), control, seed)

    results: dict[str, Any] = {"seed": seed, "questions": len(questions), "in words": {}, "rows": []}
    say("Told in words (the language models, arithmetic on unseen pairs):")
    for name, folder in (("base", base), ("reasoning", reason)):
        model, tokenizer = load(LlamaForCausalLM, Path(folder)), AutoTokenizer.from_pretrained(folder)
        some = [question for question in questions if question.group == "unseen"]
        found = share([float(right) for right in score_language_model(model, tokenizer, some)], some)
        results["in words"][name] = asdict(found)
        say(f"  {name:<24}{_percent(found)}")

    say(f"\nShown as pictures:{'':<8}{'perception':>14}{'unseen pairs':>15}{'seen pairs':>15}{'gain on unseen':>18}")
    reference: list[bool] = []

    def report(name: str, method: str, weight: float, folder: Path) -> None:
        model, processor = load(LlavaForConditionalGeneration, folder), load_processor(folder)
        right = score_vlm(model, processor, questions)
        reference[:] = reference or right
        row = _row(right, reference, questions) | {"name": name, "method": method, "weight": weight}
        results["rows"].append(row)
        say(_line(name, row, gain=method != "none"))

    report("VLM, nothing merged", "none", 0.0, Path(vlm))
    for weight in weights:
        merged = out / f"reason-{weight:g}"
        merge(_recipe(vlm, base, reason, weight), merged, force=True)
        report(f"+ {weight:g} x reasoning delta", "task_arithmetic", weight, merged)
    for weight in weights:
        merged = out / f"random-{weight:g}"
        merge(_recipe(vlm, base, str(control), weight), merged, force=True)
        report(f"+ {weight:g} x random delta", "random", weight, merged)
    for weight in INTERPOLATIONS:
        merged = out / f"linear-{weight:g}"
        merge(_interpolation(vlm, reason, weight), merged, force=True)
        report(f"{1 - weight:g} VLM + {weight:g} reasoning", "linear", weight, merged)
    # one more value beyond the last weight, for the ends of a search cannot be chosen
    step = weights[-1] - weights[-2] if len(weights) > 1 else weights[-1]
    searched = choose_weight(_recipe(vlm, base, reason, 0.0), questions, (0.0, *weights, weights[-1] + step), out)
    results["choice"], told = report_choice(searched.outcome, results["rows"])
    say(told)
    chosen = _recipe(vlm, base, reason, results["choice"]["chosen"])
    merged = out / f"reason-{results['choice']['chosen']:g}"
    page, told = make_page(Path(vlm), merged, chosen, questions, searched.folder, out)
    say("\nThe merge with the chosen weight beside the VLM as it was, on a part of the questions:\n")
    say(told)
    results["page"] = page.name
    say(LIMITS)
    return results


def write_control(base: Path, reason: Path, folder: Path, seed: int) -> None:
    """Write a model as far from the base as the reasoning model is, tensor by tensor, in random directions."""
    start = load(LlamaForCausalLM, base)
    goal = load(LlamaForCausalLM, reason).state_dict()
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in start.state_dict().items():
            noise = torch.randn(tensor.shape, generator=dice)
            tensor += noise * ((goal[name] - tensor).norm() / noise.norm())
    save_language_model(start, folder)


def _recipe(vlm: str, base: str, other: str, weight: float) -> dict[str, Any]:
    """Add `weight` times the other model's delta to the text tower; embedding and head stay, as in the paper."""
    return {
        "merge_method": "task_arithmetic",
        "template": vlm,
        "base_model": base,
        "models": [
            {"model": vlm, "parameters": {"weight": 1.0}},
            {"model": other, "parameters": {"weight": weight}},
        ],
        "parts": ["text"],
        "exclude": EXCLUDED,
    }


def _interpolation(vlm: str, other: str, weight: float) -> dict[str, Any]:
    """Average the weights of the two models, as the paper writes it."""
    return {
        "merge_method": "linear",
        "template": vlm,
        "models": [
            {"model": vlm, "parameters": {"weight": 1 - weight}},
            {"model": other, "parameters": {"weight": weight}},
        ],
        "parts": ["text"],
        "exclude": EXCLUDED,
    }


def _row(right: list[bool], reference: list[bool], questions: list[Question]) -> Row:
    """Shares of right answers per group; for unseen pairs also per operation, and the gain over the plain VLM."""
    row: Row = {}
    for group, (kinds, _) in GROUPS.items():
        places = [place for place, question in enumerate(questions) if question.group == group]
        asked = [questions[place] for place in places]
        row[group] = asdict(share([float(right[place]) for place in places], asked))
        if group == "unseen":
            row["gain"] = asdict(share([float(right[place]) - reference[place] for place in places], asked))
            row["by kind"] = {kind: fmean(right[p] for p in places if questions[p].kind == kind) for kind in kinds}
    return row


def _introduction(questions: int, training: int, held_out: int) -> str:
    return f"""\
{questions} questions about pictures of two handwritten digits. Held out are the {held_out} scans that the
pictures are made of (training used the other {training}) and, for 82 of the 100 digit pairs, all arithmetic:
base model and VLM were taught sum, difference, larger and smaller on 18 pairs only. The reasoning model
was taught all pairs, but in words, never in a picture. The control merges a random delta, each of its
tensors as long as the reasoning delta's. ± is one standard error with all questions on one pair as a
cluster: how the number might vary with other pairs, not from one training run to the next.
"""


def _line(name: str, row: Row, *, gain: bool) -> str:
    groups = "".join(f"{_percent(Share(**row[group])):>15}" for group in ("perception", "unseen", "seen"))
    points = f"{100 * row['gain']['value']:+.1f} ± {100 * row['gain']['error']:.1f}" if gain else ""
    return f"  {name:<24}{groups[1:]}{points:>18}"


def _percent(found: Share) -> str:
    return f"{100 * found.value:.1f} ± {100 * found.error:.1f} %"
