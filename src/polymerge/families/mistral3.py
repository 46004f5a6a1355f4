"""Mistral Small 3.1 and its successors in transformers' layout: LLaVA's outer names, a Pixtral tower, a Mistral.

The layout of Mistral's own `consolidated.safetensors` is not one of renamed tensors: queries and keys have their rows
in another order there.
"""

from __future__ import annotations

from polymerge.families.internvl import INTERNVL
from polymerge.families.rules import Family

MISTRAL3 = Family(
    "mistral3",
    rules=INTERNVL.rules,
    model_types=("mistral3",),
    architectures=("Mistral3ForConditionalGeneration",),
    decoders=("mistral",),
    title="Mistral Small 3.1, 3.2 (transformers layout)",
    source="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
)
