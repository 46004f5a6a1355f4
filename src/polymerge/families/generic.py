"""Any other checkpoint: names stand for themselves, so it can be merged with its like and with nothing else."""

from __future__ import annotations

from polymerge.families.rules import Family, Rule

GENERIC = Family(
    "generic",
    rules=(Rule("{rest}", "{rest}"),),
    title="any checkpoint, merged with others of the very same layout",
)
