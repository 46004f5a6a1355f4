"""What the tests of plans share: a few models, recipes over them, and an account of what a plan reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headers_only import llm, vlm
from polymerge.families.expressions import Expr, names_read
from polymerge.planning import Piece, Plan, Step

HEAD, EMBEDDING = "text.lm_head.weight", "text.embed_tokens.weight"

MODELS = ("vlm", "tuned", "llm", "wide", "tied")
"""Two VLMs, a language model, one with more rows, one with a tied head; there is a `base` with fewer rows too."""


def model_folders(root: Path) -> dict[str, str]:
    """Write the models; the folder of each by its name."""
    return {
        "vlm": str(vlm(root / "vlm", shards=2)),
        "tuned": str(vlm(root / "tuned", dtype="F16")),
        "llm": str(llm(root / "llm", dtype="F32")),
        "wide": str(llm(root / "wide", vocab=20)),
        "tied": str(llm(root / "tied", tie=True, head=False)),
        "base": str(llm(root / "base", vocab=12)),
    }


def recipe_of(folders: dict[str, str], method: str, models: Any = ("vlm", "llm"), **fields: Any) -> dict[str, Any]:
    """A recipe with equal weights."""
    entries = [{"model": folders[name], "parameters": {"weight": 0.5}} for name in models]
    with_base = fields.pop("with_base", method != "linear")
    base = {"base_model": folders["base"]} if with_base else {}
    return {"merge_method": method, "models": entries} | base | fields


def step_of(plan: Plan, name: str) -> Step:
    (step,) = (step for step in plan.steps if step.name == name)
    return step


def reads_of(plan: Plan, piece: Piece) -> list[tuple[int, Expr]]:
    """What a piece reads: (input, expression) pairs."""
    reads = list(zip(plan.models, piece.reads, strict=True)) if piece.setting is not None else []
    return reads + ([(plan.base, piece.base)] if piece.base is not None and plan.base is not None else [])


def names_in(folder: str) -> set[str]:
    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        raw = file.read_bytes()
        names |= json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).keys()
    return names


def check_account(plan: Plan, inputs: list[set[str]]) -> None:
    """Each tensor of each input is read by a step or left out, with a reason, and never both."""
    read = {(plan.template, step.name) for step in plan.steps}
    for step in plan.steps:
        assert (step.fate == "merged") == any(piece.setting is not None for piece in step.pieces)
        for piece in step.pieces:
            read |= {(place, name) for place, expr in reads_of(plan, piece) for name in names_read(expr)}
    left = [(entry.input, entry.name) for entry in plan.left_out]
    assert len(left) == len(set(left))
    assert not read & set(left)
    assert read | set(left) == {(place, name) for place, names in enumerate(inputs) for name in names}
    assert all(entry.reason for entry in plan.left_out)
    # a base is read only by what works on deltas; what else is not read has a reason of its own
    assert all(entry.input == plan.base for entry in plan.left_out if entry.reason == "the method does not read it")
    assert all(step.reason for step in plan.steps if step.fate != "merged")
    assert sorted(step.name for step in plan.steps) == sorted(inputs[plan.template])
