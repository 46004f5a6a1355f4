"""What is said of a merge of `families.py`: whether it is right to the last tensor, and in a few words what it made."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from familycases import Case, tiny
from familytools import ASKED_FOR

NEAR = 1e-5
"""Largest relative error that is rounding; a tensor that was not merged is a thousand times as far away."""


@dataclass(frozen=True)
class Verdict:
    """What one run of one tool came to."""

    row: str
    pair: str
    tool: str
    options: str
    hash_seed: int
    status: int
    right: bool
    text: str
    runs: str


def judge(case: Case, status: int, printed: str, out: Path) -> tuple[bool, str]:
    """Whether a run made what it should, and in a few words what it made."""
    if status:
        return False, failure(printed, out)
    kinds = [
        json.loads((one / "config.json").read_text(encoding="utf-8")).get("model_type") for one in (out, case.template)
    ]
    if kinds[0] != kinds[1]:  # and so not loaded: transformers might build another model at its full size
        held, wanted = (len(tiny.load(one)) for one in (out, case.template))
        return False, f"exit 0, says that it is a {kinds[0]}, and has {held} tensors where the template has {wanted}"
    try:
        found, faults, model = case.opens(out)
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
    if not words and case.answers is not None:
        try:
            case.answers(model)
        except AssertionError:
            words.append("answers otherwise")
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
    starts = [place for place, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    error = lines[starts[-1] :] if starts else lines[-1:]
    said = " ".join(error).replace("-", "_")
    asked = next((option for option in ASKED_FOR if option.strip("-").replace("-", "_") in said), "")
    if problem or asked:
        return f"refused: {shortened(problem or f'asks for `{asked}`')}{left}"
    # a message of many lines says at its end what the matter is, unless it starts with a sentence
    ends = f" ... {error[-1]}" if len(error) > 1 and not error[0].endswith(".") else ""
    return f"crash: {shortened(''.join(error[:1]))}{shortened(ends)}{left}"


def shortened(text: str, most: int = 150) -> str:
    """One line that a cell of a table can hold, without the folders of this run."""
    line = re.sub(r"\S*/(vlm|llm|tuned|out)\b", r"\1", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= most else line[: most - 3] + "..."
