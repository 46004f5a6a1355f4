"""The model families: one small table of names a file, and which table a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from polymerge.families.cambrian import CAMBRIAN
from polymerge.families.cogvlm import COGVLM
from polymerge.families.config import TextTower, quantization_method, splits, text_config, text_tower
from polymerge.families.generic import GENERIC
from polymerge.families.idefics2 import IDEFICS2
from polymerge.families.internvl import INTERNVL
from polymerge.families.internvl_chat import INTERNVL_CHAT
from polymerge.families.llama import LLAMA
from polymerge.families.llava import LLAVA
from polymerge.families.llava_next import LLAVA_NEXT
from polymerge.families.llava_onevision import LLAVA_ONEVISION
from polymerge.families.llava_original import LLAVA_ORIGINAL
from polymerge.families.minicpm_v import MINICPM_V
from polymerge.families.mistral import MISTRAL
from polymerge.families.mplug_owl2 import MPLUG_OWL2
from polymerge.families.qwen2 import QWEN2
from polymerge.families.qwen2_5_vl import QWEN2_5_VL
from polymerge.families.qwen2_vl import QWEN2_VL
from polymerge.mapping import Family

__all__ = ["FAMILIES", "TextTower", "family_of", "quantization_method", "splits", "text_config", "text_tower"]

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        family.name: family
        for family in (
            LLAVA,
            LLAVA_NEXT,
            LLAVA_ONEVISION,
            IDEFICS2,
            QWEN2_VL,
            QWEN2_5_VL,
            INTERNVL,
            INTERNVL_CHAT,
            LLAVA_ORIGINAL,
            MPLUG_OWL2,
            COGVLM,
            MINICPM_V,
            CAMBRIAN,
            LLAMA,
            MISTRAL,
            QWEN2,
            GENERIC,
        )
    }
)
"""Every family by its name; `generic` takes what no other one claims."""


def family_of(config: Mapping[str, object]) -> Family:
    """The family whose names a checkpoint has, decided by its config.json alone.

    An architecture that is named decides: the first LLaVA checkpoints have transformers' model type and tensor names of
    their own. The model type decides where no architecture is named.
    """
    architectures = config.get("architectures")
    for family in FAMILIES.values():
        if isinstance(architectures, list) and architectures:
            if any(name in family.architectures for name in architectures):
                return family
        elif config.get("model_type") in family.model_types:
            return family
    return GENERIC
