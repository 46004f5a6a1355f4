"""The model families: one small table of names a file, and which table a config asks for."""

from __future__ import annotations

from polymerge.families.config import TextTower, family_of, splits, text_config, text_tower, untied, with_rows
from polymerge.families.quantization import quantization_method
from polymerge.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "TextTower",
    "family_of",
    "quantization_method",
    "splits",
    "text_config",
    "text_tower",
    "untied",
    "with_rows",
]
