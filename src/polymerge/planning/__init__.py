"""Recipe and headers in, every tensor's fate out."""

from __future__ import annotations

from polymerge.planning.data import Input, LeftOut, Piece, Plan, Step
from polymerge.planning.making import make_plan
from polymerge.planning.pairs import AdapterPlan, PairRead, PairStep

__all__ = ["AdapterPlan", "Input", "LeftOut", "PairRead", "PairStep", "Piece", "Plan", "Step", "make_plan"]
