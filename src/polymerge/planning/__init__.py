"""Recipe and headers in, every tensor's fate out."""

from __future__ import annotations

from polymerge.planning.making import make_plan
from polymerge.planning.pairs import AdapterPlan, PairRead, PairStep
from polymerge.planning.plan import Input, LeftOut, Piece, Plan, Step

__all__ = ["AdapterPlan", "Input", "LeftOut", "PairRead", "PairStep", "Piece", "Plan", "Step", "make_plan"]
