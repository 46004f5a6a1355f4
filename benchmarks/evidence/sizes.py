"""How large the world is: what a whole run trains and asks, a quick one, and the one of the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from polymerge.demo.trained_models import Shape

__all__ = ["FULL", "QUICK", "TINY", "Size", "sized"]


@dataclass(frozen=True)
class Size:
    """What a run trains, merges and asks.

    schedule   by stage of training its steps and its highest learning rate
    batch      lessons a step
    exam       questions by group
    dev        further questions of the searched groups, by which weights and scales are chosen
    weights    of a language model's delta
    searched   methods into a VLM beside the plain sum
    probed     prompts of each task for each knockout
    grid       values of the weight between two architectures
    prompts    numbers of prompts that a choice without labels is tried with
    draws      of that many prompts
    cases      how many merges of adapters and of fine-tunes; None for all
    ends       of a schedule: values of its first and of its last layer
    """

    name: str
    shape: Shape
    schedule: Mapping[str, tuple[int, float]]
    batch: int
    exam: Mapping[str, int]
    dev: int
    weights: tuple[float, ...]
    searched: tuple[str, ...]
    probed: int
    grid: tuple[float, ...]
    prompts: tuple[int, ...]
    draws: int
    cases: int | None
    ends: tuple[float, ...]

    @property
    def digest(self) -> str:
        """Of all that it says, so that results of another size are not taken for its own."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def _stages(
    base: int, reason: int, sibling: int, vision: int, projector: int, vlm: int, taught: int
) -> dict[str, tuple[int, float]]:
    return {
        "base": (base, 2e-3),
        "reason": (reason, 1e-3),
        "sibling": (sibling, 5e-4),
        "vision": (vision, 2e-3),
        "projector": (projector, 3e-3),
        "vlm": (vlm, 5e-4),
        "adapter": (taught, 3e-3),
        "finetune": (taught, 1e-3),
    }


def _exam(each: int) -> dict[str, int]:
    return {"perception": each, "arithmetic": each, "order": each, "seen": each, "words": each, "lists": each}


_SHAPE = Shape(width=64, inner=128, layers=9, vision_width=64, vision_inner=128, vision_layers=2)

FULL = Size(
    name="full",
    shape=_SHAPE,
    schedule=_stages(1500, 600, 100, 800, 250, 500, 150),
    batch=48,
    exam=_exam(180),
    dev=180,
    weights=(0.25, 0.5, 0.75, 1.0, 1.25),
    searched=("ties", "dare_linear", "breadcrumbs", "della_linear"),
    probed=60,
    grid=tuple(place / 20 for place in range(15)),
    prompts=(20, 50, 100, 200),
    draws=20,
    cases=None,
    ends=(0.0, 0.25, 0.5, 0.75, 1.0),
)
"""The reported one."""

QUICK = Size(
    name="quick",
    shape=_SHAPE,
    schedule=_stages(600, 250, 60, 400, 120, 250, 60),
    batch=32,
    exam=_exam(90),
    dev=90,
    weights=(0.5, 1.0),
    searched=("ties",),
    probed=20,
    grid=tuple(place / 10 for place in range(8)),
    prompts=(20, 50, 100),
    draws=5,
    cases=6,
    ends=(0.0, 0.5, 1.0),
)
"""A trial of the command: too little training to learn much from."""

TINY = Size(
    name="tiny",
    shape=Shape(width=16, inner=16, layers=3, vision_width=16, vision_inner=16, vision_layers=1),
    schedule=_stages(2, 1, 1, 1, 1, 1, 1),
    batch=4,
    exam=_exam(4),
    dev=6,
    weights=(0.5, 1.0),
    searched=("ties",),
    probed=2,
    grid=(0.0, 0.2, 0.4, 0.6, 0.8),
    prompts=(4,),
    draws=2,
    cases=2,
    ends=(0.0, 1.0),
)
"""Of the tests: nothing is learnt, every line is run."""

sized = {size.name: size for size in (FULL, QUICK, TINY)}
"""By name."""
