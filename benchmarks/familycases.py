"""The pairs of tiny checkpoints that `families.py` merges, and what has to come out of each.

The checkpoints and the merges they are held against are those of the tests: `tests/support/tiny_derived.py` shrinks the
default config of any model type, `tests/support/tiny.py` builds published checkpoints, and each has a literal merge of
two models in memory.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

from measure import RunError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / room) for room in ("support", "e2e")]
derived_walk: Any = importlib.import_module("derived_walk")
tiny: Any = importlib.import_module("tiny")
tiny_classless: Any = importlib.import_module("tiny_classless")
tiny_derived: Any = importlib.import_module("tiny_derived")
tiny_configs: Any = importlib.import_module("tiny_configs")
tiny_trees: Any = importlib.import_module("tiny_trees")
end_to_end: Any = importlib.import_module("test_end_to_end")
tiny_configs.QWEN3_TOWER.update(depth=3, deepstack_visual_indexes=[0, 1, 2])

CLASSLESS: tuple[str, ...] = tuple(family for family in tiny_configs.VLMS if family in tiny_configs.CLASSLESS)
"""Families that transformers has no class of."""

WITH_CODE = tuple(family for family in CLASSLESS if "auto_map" in next(iter(tiny_trees.TREES[family].values())).config)
"""Those of them that are published with their code beside the weights."""

OTHERWISE = {**dict.fromkeys(tiny.OLD, "names of 2024"), "qwen3_vl_moe": "experts as published"}
"""Families whose published checkpoints are not what transformers 5 writes, and how they are."""

PUBLISHED: tuple[str, ...] = (*OTHERWISE, *CLASSLESS)

TYPES: Mapping[str, str] = tiny_derived.multimodal_types()
TEXT_TYPES: Mapping[str, str] = tiny_derived.text_types()
"""The model types that transformers has a class of, each with the class."""

Opened = tuple[Mapping[str, Tensor], Mapping[str, set[str]], Any]
"""The tensors of a checkpoint by name in memory, the names that are wrong, by how, and the model if it has a class."""


@dataclass(frozen=True)
class Case:
    """Two checkpoints, and what has to come out, by name in memory.

    row       the model type; or the family, and which names its files have
    opens     a folder's tensors and faults as the template's class sees them
    answers   fails if a model answers otherwise than the literal merge; None if it takes no input that was tried
    runs      how it answers: `generates`, `passes` or not at all
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
    opens: Callable[[Path], Opened]
    answers: Callable[[Any], None] | None = None
    runs: str = ""


def cases_of_type(kind: str, folder: Path) -> Iterator[Case]:
    """Build the pairs of a model type and merge them literally."""
    named = (TYPES | TEXT_TYPES)[kind]
    for pair in derived_walk.pairs(kind, named, folder):
        own = pair.model.state_dict()
        merged = changed(own, pair.expected)
        partner = pair.name.startswith("VLM + ") and not pair.name.startswith("VLM + VLM")
        asked = pair.question
        yield Case(
            kind, pair.name, pair.template, pair.other, own, pair.expected, merged, merged if partner else frozenset(),
            partial(opened, getattr(transformers, named)), pair.check_answer if asked else None,
            "" if asked is None else "generates" if asked.generates else "passes",
        )  # fmt: skip


def opened(named: Any, folder: Path) -> Opened:
    """What a class makes of a folder."""
    model, report = derived_walk.loaded(named, folder)
    return dict(model.state_dict()), _faults(report), model


def cases_as_published(family: str, folder: Path) -> Iterator[Case]:
    """Build a family's checkpoints as they are published, where that is not as transformers writes them."""
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
    row, one, other = family, vlm, tuned
    if family in OTHERWISE:
        row = f"{family}, {OTHERWISE[family]}"
        one, other = (tiny.as_2024(shutil.copytree(old, folder / "2024" / old.name)) for old in (vlm, tuned))
    text, opens = changed(ours, joined), partial(loaded, template=one)
    yield Case(row, "VLM + VLM", one, other, ours, averaged, changed(ours, averaged), text, opens)
    yield Case(row, "VLM + LLM", one, llm, ours, joined, text, text, opens)


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors that are not what they were."""
    return frozenset(name for name, tensor in before.items() if not torch.equal(tensor, after[name]))


def contents(folder: Path, template: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that loads strictly; raises RunError where it does not."""
    tensors, faults, _ = loaded(folder, template)
    if faults:
        raise RunError(f"{folder}: {faults}")
    return dict(tensors)


def loaded(folder: Path, template: Path) -> Opened:
    """The tensors that the template's class makes of a checkpoint, and the names that it found to be wrong, by how.

    A family without a class is looked at as it lies in files.
    """
    family = tiny.family_in(template)
    if family in CLASSLESS:
        found, wanted = tiny.load(folder), tiny.load(template)
        shapes = {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape}
        report = {"missing": wanted.keys() - found.keys(), "unexpected": found.keys() - wanted.keys()}
        return found, _faults({**report, "mismatched": shapes}), None
    kind: Any = type(tiny.open_model(template)) if family in tiny.CLASSES else AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return dict(model.state_dict()), _faults(info), model


def _faults(report: Mapping[str, Any]) -> dict[str, set[str]]:
    return {kind.removesuffix("_keys"): set(names) for kind, names in report.items() if names}
