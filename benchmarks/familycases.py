"""The pairs of tiny checkpoints that `families.py` merges, and what has to come out of each.

The checkpoints and the merges they are held against are those of the tests: `tests/tiny.py` builds them, and
`tests/test_end_to_end.py` has the literal merge of two models in memory.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from measure import RunError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / room) for room in ("support", "e2e")]
tiny: Any = importlib.import_module("tiny")
tiny_classless: Any = importlib.import_module("tiny_classless")
tiny_configs: Any = importlib.import_module("tiny_configs")
tiny_trees: Any = importlib.import_module("tiny_trees")
end_to_end: Any = importlib.import_module("test_end_to_end")
tiny_configs.QWEN3_TOWER.update(depth=3, deepstack_visual_indexes=[0, 1, 2])

FAMILIES: tuple[str, ...] = tiny_configs.VLMS
CLASSLESS: tuple[str, ...] = tuple(family for family in FAMILIES if family in tiny_configs.CLASSLESS)
"""Those that transformers has no class of."""

WITH_CODE = tuple(family for family in CLASSLESS if "auto_map" in next(iter(tiny_trees.TREES[family].values())).config)
"""Those of them that are published with their code beside the weights."""

OTHERWISE = {**dict.fromkeys(tiny.OLD, "names of 2024"), "qwen3_vl_moe": "experts as published"}
"""Families whose published checkpoints are not what transformers 5 writes, and how they are."""


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


def cases_of(family: str, folder: Path) -> Iterator[Case]:
    """Build a family's checkpoints and merge them literally; also as they were published, where that was otherwise."""
    vlm = tiny.build(family, folder / "vlm", dtype="float32")
    tuned = tiny.perturbed(vlm, folder / "tuned", seed=5)
    llm = tiny.related_llm(vlm, folder / "llm", seed=1)
    ours, theirs = contents(vlm, vlm), contents(tuned, vlm)
    if family in CLASSLESS:
        joined = tiny_classless.joined(vlm, llm, end_to_end.average)
    else:
        joined = contents(end_to_end.literal_merge(vlm, llm, folder / "literal"), vlm)
    averaged = {
        name: tensor if tiny.is_buffer(name) else end_to_end.average(tensor, theirs[name])
        for name, tensor in ours.items()
    }
    rows = {f"`{family}`": (vlm, tuned)}
    if family in OTHERWISE:
        old = [tiny.as_2024(shutil.copytree(one, folder / "2024" / one.name)) for one in (vlm, tuned)]
        rows[f"`{family}`, {OTHERWISE[family]}"] = (old[0], old[1])
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
    """The tensors that the template's class makes of a checkpoint, and the names that it found to be wrong, by how.

    A family without a class is looked at as it lies in files.
    """
    family = tiny.family_in(template)
    if family in CLASSLESS:
        found, wanted = tiny.load(folder), tiny.load(template)
        shapes = {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape}
        report = {"missing": wanted.keys() - found.keys(), "unexpected": found.keys() - wanted.keys()}
        return found, {kind: set(names) for kind, names in {**report, "mismatched": shapes}.items() if names}
    kind: Any = type(tiny.open_model(template)) if family in tiny.CLASSES else AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = {kind.removesuffix("_keys"): set(names) for kind, names in info.items() if names}
    return dict(model.state_dict()), faults
