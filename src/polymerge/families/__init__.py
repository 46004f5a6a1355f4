"""Model families: a small table of names for each, and the choice of a table for a config."""

from __future__ import annotations

from polymerge.families.config import TextTower, family_of, splits, text_config, text_tower, untied, with_rows
from polymerge.families.quantization import quantization_method
from polymerge.families.recognition import Reading, nearest, read_names
from polymerge.families.registry import FAMILIES

__all__ = [
    "FAMILIES",
    "Reading",
    "TextTower",
    "family_of",
    "nearest",
    "quantization_method",
    "read_names",
    "splits",
    "text_config",
    "text_tower",
    "untied",
    "with_rows",
]
