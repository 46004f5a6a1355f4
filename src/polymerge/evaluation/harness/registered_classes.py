"""The classes in lmms-eval and VLMEvalKit for each family, from lmms-eval 0.7.3 and VLMEvalKit of August 2026."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from polymerge.errors import RecipeError
from polymerge.families.registry import GENERIC, claimed

__all__ = ["DATASETS", "OWN_CODE", "WRAPPERS", "Wrapper", "family_of", "wrapper_of"]


@dataclass(frozen=True)
class Wrapper:
    """The classes that run checkpoints of a family, or of one layout of it.

    family      a family of the table, or the model type of a config that no table claims
    when        members of config.json, and the value that each must have or, if it is a list, hold
    lmms        lmms-eval's model name; empty if it has none
    lmms_path   the name of its argument for the folder
    placed      whether it accepts device_map
    simple      whether force_simple is needed: the other variant has its own chat template
    kit         VLMEvalKit's class, which takes the folder as model_path; empty if it has none
    kit_more    its additional arguments, with those without which it samples
    named       the folder's own name must contain this, ignoring case: the model's code reads its kind off it
    path_has    VLMEvalKit dispatches on the path: it must contain this, ignoring case
    path_lacks  and none of these
    """

    family: str
    lmms: str = ""
    kit: str = ""
    when: Mapping[str, object] = field(default_factory=dict)
    lmms_path: str = "pretrained"
    placed: bool = True
    simple: bool = False
    kit_more: Mapping[str, object] = field(default_factory=dict)
    named: str = ""
    path_has: str = ""
    path_lacks: tuple[str, ...] = ()

    def fits(self, config: Mapping[str, object]) -> bool:
        """Whether a checkpoint of the family has the layout that the row is for."""
        return all(
            value in found if isinstance(found := config.get(name), list) else str(found) == str(value)
            for name, value in self.when.items()
        )


_GREEDY: Final = {"do_sample": False}
_ONEVISION: Final = {"architectures": "LlavaQwenForCausalLM"}

WRAPPERS: Final[tuple[Wrapper, ...]] = (
    # under this name the class for LLaVA-NeXT loads a LLaVA, and asks it by its own chat template
    Wrapper("llava", "llava_hf", "LLaVA_Next", simple=True, path_has="interleave", path_lacks=("34b",)),
    Wrapper("llava_next", "llava_hf", "LLaVA_Next", simple=True, path_lacks=("34b", "interleave")),
    Wrapper("llava_onevision", "llava_hf", "LLaVA_OneVision_HF", simple=True),
    Wrapper("llava_original", "llava_onevision", "LLaVA_OneVision", _ONEVISION, named="llava", path_lacks=("video",)),
    Wrapper("llava_original", "llava", "LLaVA", named="llava"),
    Wrapper("qwen2_vl", "qwen2_vl", "Qwen2VLChat", kit_more=_GREEDY),
    Wrapper("qwen2_5_vl", "qwen2_5_vl", "Qwen2VLChat", kit_more=_GREEDY),
    Wrapper("qwen2_5_omni", "qwen2_5_omni", "Qwen2VLChat", kit_more=_GREEDY),
    Wrapper("qwen3_vl", "qwen3_vl", "Qwen3VLChat", kit_more=_GREEDY, path_lacks=("omni",)),
    Wrapper("qwen3_vl_moe", "qwen3_vl", "Qwen3VLChat", kit_more=_GREEDY, path_lacks=("omni",)),
    Wrapper("qwen3_5", "qwen3_5"),
    Wrapper("qwen2_audio", "qwen2_audio"),
    Wrapper("internvl", "internvl_hf"),
    Wrapper("internvl_chat", "internvl2", "InternVLChat", kit_more={"version": "V2.0"}, path_has="internvl"),
    Wrapper("gemma3", "gemma3", "Gemma3"),
    Wrapper("gemma4", "gemma4", "Gemma4"),
    Wrapper("paligemma", "", "PaliGemma"),
    Wrapper("mistral3", "mistral3_vl"),
    Wrapper("mllama", "llama_vision", "llama_vision", path_lacks=("instruct", "cot")),
    Wrapper("idefics2", "idefics2", "IDEFICS2", kit_more=_GREEDY),
    Wrapper("idefics3", "", "SmolVLM2", {"model_type": "smolvlm"}),
    Wrapper("idefics3", "", "SmolVLM", kit_more=_GREEDY),
    Wrapper("minicpm_v", "minicpm_v", "MiniCPM_V_2_6", {"version": 2.6}, placed=False),
    Wrapper("minicpm_v", "minicpm_v", "MiniCPM_Llama3_V", {"version": 2.5}, placed=False),
    Wrapper("minicpm_v", "minicpm_v", "MiniCPM_V", placed=False),
    Wrapper("phi3_v", "phi3v", "Phi3Vision", lmms_path="model_id_name", placed=False),
    Wrapper("cogvlm", "cogvlm2", "CogVlm", placed=False, kit_more=_GREEDY),
    Wrapper("mplug_owl2", "", "mPLUG_Owl2", named="mplug_owl2"),
    Wrapper("cambrian", "", "Cambrian", named="cambrian"),
    Wrapper("deepseek_vl_original", "", "DeepSeekVL"),
    Wrapper("molmo", "", "molmo"),
)
"""The first row that fits counts."""

OWN_CODE: Final = frozenset(
    {
        "cambrian", "cogvlm", "deepseek_vl_original", "internvl_chat", "llava_original", "minicpm_v", "molmo",
        "mplug_owl2", "phi3_v",
    }
)  # fmt: skip
"""The families that transformers has no class for: their code is their own."""

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


def family_of(config: Mapping[str, object]) -> str:
    """The family of a checkpoint, or the model type of a config that no table claims."""
    table = claimed(config)
    return str(config.get("model_type")) if table is GENERIC else table.name


def wrapper_of(config: Mapping[str, object], tool: str) -> Wrapper:
    """Look up the row of a checkpoint by its config.json.

    raises RecipeError if the tool has no class for it.
    """
    rows = [row for row in WRAPPERS if (row.lmms if tool == "lmms-eval" else row.kit)]
    family = family_of(config)
    found = next((row for row in rows if row.family == family and row.fits(config)), None)
    if found is None:
        raise RecipeError(
            f"{tool} has no model that is known to run checkpoints of the family {family}. It has one for "
            f"{', '.join(sorted({row.family for row in rows}))}"
        )
    return found
