"""Planning: a recipe and tensor headers become a plan that states every tensor's fate."""

from __future__ import annotations

from polymerge.planning.plan import Input, LeftOut, Lora, Piece, Plan, Step
from polymerge.planning.planner import make_plan

__all__ = ["Input", "LeftOut", "Lora", "Piece", "Plan", "Step", "make_plan"]
