"""The classes in lmms-eval and VLMEvalKit for each family, from lmms-eval 0.7.3 and VLMEvalKit of 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polymerge.errors import RecipeError

__all__ = ["DATASETS", "WRAPPERS", "Wrapper", "wrapper_of"]


@dataclass(frozen=True)
class Wrapper:
    """A family's row.

    lmms        lmms-eval's model name; empty if it has none
    lmms_path   the name of its argument for the folder
    placed      whether it accepts device_map
    simple      whether force_simple is needed: the other variant has its own chat template
    kit         VLMEvalKit's class, which takes the folder as model_path; empty if it has none
    kit_more    its additional arguments
    path_has    VLMEvalKit dispatches on the path: it must contain one of these words, ignoring case
    path_lacks  and none of these
    """

    family: str
    lmms: str = ""
    kit: str = ""
    lmms_path: str = "pretrained"
    placed: bool = True
    simple: bool = False
    kit_more: Mapping[str, object] = field(default_factory=dict)
    path_has: tuple[str, ...] = ()
    path_lacks: tuple[str, ...] = ()


_QWEN_2_5 = ("2.5", "2_5", "qwen25")

WRAPPERS: Mapping[str, Wrapper] = {
    row.family: row
    for row in (
        Wrapper("llava", "llava_hf", simple=True),
        Wrapper("llava_next", "llava_hf", "LLaVA_Next", simple=True, path_lacks=("34b", "interleave")),
        Wrapper("llava_onevision", "llava_hf", "LLaVA_OneVision_HF", simple=True),
        Wrapper("llava_original", "llava", "LLaVA", path_has=("llava",)),
        Wrapper("qwen2_vl", "qwen2_vl", "Qwen2VLChat", path_lacks=("omni", *_QWEN_2_5)),
        Wrapper("qwen2_5_vl", "qwen2_5_vl", "Qwen2VLChat", path_has=_QWEN_2_5, path_lacks=("omni",)),
        Wrapper("qwen2_5_omni", "qwen2_5_omni", "Qwen2VLChat", path_has=("omni",)),
        Wrapper("qwen3_vl", "qwen3_vl", "Qwen3VLChat"),
        Wrapper("qwen3_vl_moe", "qwen3_vl", "Qwen3VLChat"),
        Wrapper("qwen2_audio", "qwen2_audio"),
        Wrapper("internvl", "internvl_hf"),
        Wrapper("internvl_chat", "internvl2", "InternVLChat", kit_more={"version": "V2.0"}, path_has=("internvl",)),
        Wrapper("gemma3", "gemma3", "Gemma3"),
        Wrapper("paligemma", "", "PaliGemma"),
        Wrapper("mistral3", "mistral3_vl"),
        Wrapper("mllama", "llama_vision", "llama_vision"),
        Wrapper("idefics2", "idefics2", "IDEFICS2"),
        Wrapper("idefics3", "", "IDEFICS2", path_has=("idefics3",)),
        Wrapper("minicpm_v", "minicpm_v", placed=False),
        Wrapper("phi3_v", "phi3v", "Phi3Vision", lmms_path="model_id_name", placed=False),
        Wrapper("cogvlm", "", "CogVlm", path_has=("cogvlm",)),
        Wrapper("mplug_owl2", "", "mPLUG_Owl2", path_has=("mplug_owl2", "mplug-owl2")),
        Wrapper("cambrian", "", "Cambrian", path_has=("cambrian",)),
        Wrapper("deepseek_vl_original", "", "DeepSeekVL"),
        Wrapper("molmo", "", "molmo"),
    )
}

_MCQ, _YES_NO, _VQA = "ImageMCQDataset", "ImageYORNDataset", "ImageVQADataset"

DATASETS: Mapping[str, str] = {
    "MathVista_MINI": "MathVista",
    "MathVision": "MathVision",
    "MathVision_MINI": "MathVision",
    "MathVerse_MINI": "MathVerse",
    "MathVerse_MINI_Vision_Only": "MathVerse",
    "DynaMath": "Dynamath",
    "WeMath": "WeMath",
    "LogicVista": "LogicVista",
    "MMMU_DEV_VAL": "MMMUDataset",
    "MMMU_TEST": "MMMUDataset",
    "MME": _YES_NO,
    "HallusionBench": _YES_NO,
    "POPE": _YES_NO,
    "MMBench_DEV_EN": _MCQ,
    "MMBench_DEV_CN": _MCQ,
    "MMBench_DEV_EN_V11": _MCQ,
    "MMBench_TEST_EN": _MCQ,
    "SEEDBench_IMG": _MCQ,
    "ScienceQA_VAL": _MCQ,
    "ScienceQA_TEST": _MCQ,
    "AI2D_TEST": _MCQ,
    "MMStar": _MCQ,
    "RealWorldQA": _MCQ,
    "BLINK": _MCQ,
    "A-OKVQA": _MCQ,
    "OCRVQA_TESTCORE": _VQA,
    "TextVQA_VAL": _VQA,
    "DocVQA_VAL": _VQA,
    "InfoVQA_VAL": _VQA,
    "ChartQA_TEST": _VQA,
    "GQA_TestDev_Balanced": _VQA,
    "OCRBench": "OCRBench",
    "MMVet": "MMVet",
    "LLaVABench": "LLaVABench",
    "COCO_VAL": "ImageCaptionDataset",
    "VizWiz": "VizWiz",
}
"""VLMEvalKit's class for a data set, which its config file has to name; `NAME=CLASS` sets it for any other one."""


def wrapper_of(family: str, tool: str) -> Wrapper:
    """Look up a family's row.

    raises RecipeError if the tool has no class for it.
    """
    row = WRAPPERS.get(family)
    known = [row.family for row in WRAPPERS.values() if (row.lmms if tool == "lmms-eval" else row.kit)]
    if row is None or row.family not in known:
        raise RecipeError(
            f"{tool} has no model that is known to run checkpoints of the family {family}. It has one for "
            f"{', '.join(sorted(known))}"
        )
    return row
