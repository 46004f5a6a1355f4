"""The published checkpoints that transformers has no class of: config, decoder, and what is beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tiny_eyes as eyes
from layouts import BIASES
from tiny_configs import TOWER


@dataclass(frozen=True)
class Tree:
    """What a published checkpoint holds.

    published  what tests/golden/names.json calls it; empty if it is not there
    kind       its decoder's lineage; `layout` is the names that this has, after `root`
    config     what config.json says beside the decoder's sizes, which stand under the key `nested` or at the root
    eyes       the tensors of all other parts
    more       what its layers have beyond a Llama's; `buffers` for rotary frequencies, in all of them
    shared     the key for the heads of keys and values; without one there are as many as of queries
    """

    published: str
    kind: str
    layout: str
    config: Mapping[str, Any]
    eyes: eyes.Shapes = field(default_factory=dict)
    root: str = ""
    nested: str = ""
    more: tuple[str, ...] = ()
    shared: str = "num_key_value_heads"
    buffers: bool = False

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config holds it."""
        text = config.get(self.nested, config)
        keys = {key for key in ("num_key_value_heads", "num_multi_query_heads") if key in text}
        own = all(config.get(key) == value for key, value in self.config.items())
        return own and text.get("model_type") in (self.kind, config.get("model_type")) and keys == {self.shared} - {""}


def code(config: str, model: str, *more: str) -> dict[str, Any]:
    """Where a config says that the classes are: in files beside the weights."""
    return {"auto_map": {"AutoConfig": config, **dict.fromkeys(("AutoModelForCausalLM", *more), model)}}


INTERNVL = {
    "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                 "AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    "ps_version": "v2", "select_layer": -1,
    "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **TOWER},
}  # fmt: skip
LLAVA = {"model_type": "llava", "mm_hidden_size": eyes.WIDTH, "mm_projector_type": "mlp2x_gelu",
         "mm_vision_select_layer": -2, "use_mm_proj": True}  # fmt: skip
COGVLM = {
    "architectures": ["CogVLMForCausalLM"],
    **code("configuration_cogvlm.CogVLMConfig", "modeling_cogvlm.CogVLMForCausalLM"),
    "vision_config": {"hidden_size": eyes.WIDTH, "intermediate_size": eyes.INNER, "num_heads": 2,
                      "num_hidden_layers": eyes.BLOCKS, "num_positions": eyes.PATCHES + 1, "patch_size": 4},
}  # fmt: skip
MINICPM_V = {"architectures": ["MiniCPMV"], "model_type": "minicpmv", "query_num": eyes.PATCHES,
             **code("configuration_minicpm.MiniCPMVConfig", "modeling_minicpmv.MiniCPMV", "AutoModel")}  # fmt: skip

TREES: Mapping[str, Mapping[str, Tree]] = {
    "internvl_chat": {
        "llama": Tree("", "llama", "llama", INTERNVL, eyes.INTERNVL, "language_model.", "llm_config"),
        "qwen2": Tree("", "qwen2", "llama", INTERNVL, eyes.INTERNVL, "language_model.", "llm_config", BIASES),
        "internlm2": Tree(
            "OpenGVLab/InternVL2_5-8B (InternLM2 decoder)",
            "internlm2", "internlm2", INTERNVL, eyes.INTERNVL, "language_model.", "llm_config",
        ),
    },
    "llava_original": {
        "qwen2": Tree(
            "lmms-lab/llava-onevision-qwen2-7b-ov (with its vision tower, names of 3 layers)", "qwen2", "llama",
            {**LLAVA, "architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "google/siglip-so400m-patch14-384",
             "mm_patch_merge_type": "spatial_unpad"},
            eyes.LLAVA_ONEVISION, more=BIASES,
        ),
        "llama": Tree(
            "liuhaotian/llava-v1.5-7b", "llama", "llama",
            {**LLAVA, "architectures": ["LlavaLlamaForCausalLM"],
             "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
            eyes.LLAVA, buffers=True,
        ),
    },
    "mplug_owl2": {"llama": Tree(
        "MAGAer13/mplug-owl2-llama2-7b (names of 3 layers)", "llama", "mplug_owl2",
        {"architectures": ["MPLUGOwl2LlamaForCausalLM"], "model_type": "mplug_owl2",
         "visual_config": {"visual_abstractor": {"hidden_size": eyes.WIDTH, "num_hidden_layers": 1},
                           "visual_model": {"hidden_size": eyes.WIDTH, "num_hidden_layers": 1, "patch_size": 4}}},
        eyes.MPLUG_OWL2, buffers=True,
    )},
    "cogvlm": {
        "llama": Tree(
            "THUDM/cogvlm-chat-hf (names of 3 layers, of the code that converts and loads it)", "llama", "cogvlm",
            COGVLM, eyes.COGVLM, shared="", buffers=True,
        ),
        # keys and values are shared, and the queries, keys and values of image tokens have biases
        "llama3": Tree(
            "THUDM/cogvlm2-llama3-chat-19B", "llama", "cogvlm", COGVLM,
            eyes.COGVLM2, more=tuple(f"{name}@image" for name in BIASES), shared="num_multi_query_heads", buffers=True,
        ),
    },
    "minicpm_v": {
        "qwen2": Tree("openbmb/MiniCPM-V-2_6", "qwen2", "llama", {**MINICPM_V, "version": 2.6}, eyes.MINICPM_V,
                      root="llm.", more=BIASES),
        "llama": Tree("openbmb/MiniCPM-Llama3-V-2_5", "llama", "llama", {**MINICPM_V, "mm_use_im_start_end": True},
                      eyes.MINICPM_V, root="llm."),
        "minicpm": Tree("openbmb/MiniCPM-V-2", "minicpm", "llama",
                        {**MINICPM_V, "vision_encoder": "vit_so400m_patch14_siglip_384.webli", "scale_emb": 12},
                        eyes.MINICPM_V_2, root="llm."),
    },
    "cambrian": {"llama": Tree(
        "nyu-visionx/cambrian-8b (names that its code gives, of 2 layers)", "llama", "llama",
        {"architectures": ["CambrianLlamaForCausalLM"], "model_type": "cambrian_llama", "mm_projector_type": "sva",
         "num_query_group": 1, "connector_depth": 3, "num_of_vision_sampler_layers": eyes.BLOCKS,
         "vision_hidden_size": eyes.WIDTH}, eyes.CAMBRIAN,
    )},
    "phi3_v": {"phi3": Tree(
        "microsoft/Phi-3-vision-128k-instruct", "phi3", "phi3",
        {"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v",
         **code("configuration_phi3_v.Phi3VConfig", "modeling_phi3_v.Phi3VForCausalLM"),
         "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp"},
         "img_processor": {"image_dim_out": eyes.WIDTH, "name": "clip_vision_model", "num_img_tokens": eyes.PATCHES}},
        eyes.PHI3_V,
    )},
    "deepseek_vl_original": {"llama": Tree(
        "deepseek-ai/deepseek-vl (names that transformers' converter reads, the decoder's of 2 layers as its Llama has "
        "them)", "llama", "llama",
        {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality",
         "aligner_config": {"cls": "MlpProjector", "model_type": "aligner"},
         "vision_config": {"cls": "HybridVisionTower", "model_type": "vision"}},
        eyes.DEEPSEEK_VL, "language_model.", "language_config",
    )},
    "molmo": {"qwen2": Tree(
        "allenai/Molmo-7B-D-0924 (a quantized copy, less what quantizing added)", "qwen2", "molmo",
        {"architectures": ["MolmoForCausalLM"], "model_type": "molmo", "qkv_bias": True, "layer_norm_type": "rms",
         **code("config_molmo.MolmoConfig", "modeling_molmo.MolmoForCausalLM")}, eyes.MOLMO, more=BIASES,
    )},
    "internlm2": {"internlm2": Tree(
        "InternLM2-7B, a fine-tune", "internlm2", "internlm2",
        {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2",
         **code("configuration_internlm2.InternLM2Config", "modeling_internlm2.InternLM2ForCausalLM", "AutoModel")},
    )},
    "minicpm": {"minicpm": Tree(
        "", "minicpm", "llama", {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm",
                                 **code("configuration_minicpm.MiniCPMConfig", "modeling_minicpm.MiniCPMForCausalLM")},
    )},
}  # fmt: skip
"""By family and by decoder; the first of a family is built where none is asked for."""

FAMILY_OF = {tree.config["architectures"][0]: family for family, trees in TREES.items() for tree in trees.values()}
"""The family of an architecture."""

LAYOUTS = {"phi3": "phi3", "internlm2": "internlm2"}
"""The names of a plain language model where they are not a Llama's."""
