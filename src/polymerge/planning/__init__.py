"""Recipe and headers in, every tensor's fate out."""

from __future__ import annotations

from polymerge.planning.data import Input, LeftOut, Piece, Plan, Step
from polymerge.planning.fates import make_plan

__all__ = ["Input", "LeftOut", "Piece", "Plan", "Step", "make_plan"]
