"""Every family, one row each, and which of them a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from polymerge.families.cambrian import CAMBRIAN
from polymerge.families.cogvlm import COGVLM
from polymerge.families.deepseek_vl import DEEPSEEK_VL
from polymerge.families.deepseek_vl_original import DEEPSEEK_VL_ORIGINAL
from polymerge.families.gemma import GEMMA
from polymerge.families.gemma2 import GEMMA2
from polymerge.families.gemma3 import GEMMA3
from polymerge.families.gemma3_text import GEMMA3_TEXT
from polymerge.families.generic import GENERIC
from polymerge.families.idefics2 import IDEFICS2
from polymerge.families.idefics3 import IDEFICS3
from polymerge.families.internlm2 import INTERNLM2
from polymerge.families.internvl import INTERNVL
from polymerge.families.internvl_chat import INTERNVL_CHAT
from polymerge.families.llama import LLAMA
from polymerge.families.llava import LLAVA
from polymerge.families.llava_next import LLAVA_NEXT
from polymerge.families.llava_onevision import LLAVA_ONEVISION
from polymerge.families.llava_original import LLAVA_ORIGINAL
from polymerge.families.minicpm_v import MINICPM_V
from polymerge.families.mistral import MISTRAL
from polymerge.families.mistral3 import MISTRAL3
from polymerge.families.mixtral import MIXTRAL
from polymerge.families.mllama import MLLAMA
from polymerge.families.molmo import MOLMO
from polymerge.families.mplug_owl2 import MPLUG_OWL2
from polymerge.families.paligemma import PALIGEMMA
from polymerge.families.phi3 import PHI3
from polymerge.families.phi3_v import PHI3_V
from polymerge.families.qwen2 import QWEN2
from polymerge.families.qwen2_5_omni import QWEN2_5_OMNI
from polymerge.families.qwen2_5_vl import QWEN2_5_VL
from polymerge.families.qwen2_audio import QWEN2_AUDIO
from polymerge.families.qwen2_vl import QWEN2_VL
from polymerge.families.qwen3 import QWEN3
from polymerge.families.qwen3_moe import QWEN3_MOE
from polymerge.families.qwen3_vl import QWEN3_VL
from polymerge.families.qwen3_vl_moe import QWEN3_VL_MOE
from polymerge.families.rules import Family

__all__ = ["FAMILIES", "claimed"]

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        family.name: family
        for family in (
            LLAVA,
            LLAVA_NEXT,
            LLAVA_ONEVISION,
            IDEFICS2,
            IDEFICS3,
            QWEN2_VL,
            QWEN2_5_VL,
            QWEN3_VL,
            QWEN3_VL_MOE,
            QWEN2_AUDIO,
            QWEN2_5_OMNI,
            INTERNVL,
            INTERNVL_CHAT,
            GEMMA3,
            PALIGEMMA,
            MISTRAL3,
            MLLAMA,
            LLAVA_ORIGINAL,
            MPLUG_OWL2,
            COGVLM,
            MINICPM_V,
            CAMBRIAN,
            PHI3_V,
            DEEPSEEK_VL,
            DEEPSEEK_VL_ORIGINAL,
            MOLMO,
            LLAMA,
            MISTRAL,
            MIXTRAL,
            QWEN2,
            QWEN3,
            QWEN3_MOE,
            GEMMA,
            GEMMA2,
            GEMMA3_TEXT,
            PHI3,
            INTERNLM2,
            GENERIC,
        )
    }
)
"""Every family by its name; `generic` takes what no other one claims."""


def claimed(config: Mapping[str, object]) -> Family:
    """The family that a config names.

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
