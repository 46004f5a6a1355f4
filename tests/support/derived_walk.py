"""Merge tiny checkpoints of a model type that has no table, and hold the result against a literal merge in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import tiny_derived
from polymerge import merge

WEIGHTS = (0.7, 0.3)

RELATIVES = {
    "glm4v_text": "glm4", "glm4v_moe_text": "glm4_moe", "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2", "qwen2_5_omni_text": "qwen2", "qwen3_vl_text": "qwen3", "gemma4_text": "gemma4_text",
    "qwen3_vl_moe_text": "qwen3_moe", "qwen3_omni_moe_text": "qwen3_moe", "paddleocr_vl_text": "ernie4_5",
    "exaone4_5_text": "exaone4", "granite_docling_text": "llama",
}  # fmt: skip
"""By the model type of a text tower that has no class of its own, that of the language model it grew from."""

State = dict[str, Tensor]


def pairs(kind: str, class_name: str, folder: Path, config: Any = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The pairs that a model type can be merged in, each with a function that merges it and fails if it is wrong."""
    config = config or tiny_derived.tiny_config(kind)
    named = getattr(transformers, class_name)
    vlm = tiny_derived.build(config, folder / "vlm", seed=1, class_name=class_name)
    tuned = tiny_derived.build(config, folder / "tuned", seed=2, class_name=class_name)
    ours, theirs = opened(named, vlm), opened(named, tuned)

    def whole(other: Path, out: str) -> None:
        made = merged(vlm, other, folder / out)
        compare(tiny_derived.open_strictly(made, class_name), averaged(ours.state_dict(), theirs.state_dict()))

    yield "VLM + VLM", lambda: whole(tuned, "out")
    yield "VLM + VLM in memory's names", lambda: whole(in_memory(theirs, tuned, folder / "live"), "out2")
    text = partner(config)
    if text is None:
        return
    llm_folder = tiny_derived.build(text, folder / "llm", seed=3)
    llm = opened(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], llm_folder)

    def tower() -> None:
        made = merged(vlm, llm_folder, folder / "out3", parts=["text"])
        compare(tiny_derived.open_strictly(made, class_name), joined(ours, llm))

    yield f"VLM + {text.model_type}", tower


def partner(config: Any) -> Any | None:
    """The config of a language model that a multimodal one may have grown from."""
    if config.is_encoder_decoder or (own := tiny_derived.text_partner(config)) is not None:
        return None if config.is_encoder_decoder else own
    text = config.get_text_config()
    relative = RELATIVES.get(text.model_type)
    if relative is None or relative not in transformers.CONFIG_MAPPING:
        return None
    said = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    rope = said.get("rope_parameters")
    if isinstance(rope, dict):
        said["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    said.setdefault("head_dim", said["hidden_size"] // said["num_attention_heads"])
    return transformers.CONFIG_MAPPING[relative].from_dict(said)


def opened(named: Any, folder: Path) -> Any:
    """The model in a checkpoint; fails where transformers does not load what it wrote."""
    model, report = named.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), f"transformers does not load its own checkpoint: {report}"
    return model.eval()


def in_memory(model: Any, like: Path, folder: Path) -> Path:
    """Write a model under the names that it has in memory, as some trainers do."""
    folder.mkdir()
    state = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    return folder


def merged(vlm: Path, other: Path, out: Path, **more: Any) -> Path:
    models = [{"model": str(one), "parameters": {"weight": weight}}
              for one, weight in zip((vlm, other), WEIGHTS, strict=True)]  # fmt: skip
    merge({"merge_method": "linear", "template": str(vlm), "models": models, "vocab": "overlap", **more}, out)
    return out


def averaged(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> State:
    first, second = WEIGHTS
    return {
        name: tensor * first + theirs[name] * second if tensor.dtype.is_floating_point else tensor
        for name, tensor in ours.items()
    }


def joined(vlm: Any, llm: Any) -> State:
    """The tensors of a multimodal model whose decoder and head are merged with those of a language model."""
    model = copy.deepcopy(vlm)
    decoder = model.get_decoder()
    head = model.get_output_embeddings() or decoder.get_output_embeddings()
    while decoder.get_decoder() is not decoder and any(one is head for one in decoder.modules()):
        decoder = decoder.get_decoder()
    decoder.load_state_dict(averaged(decoder.state_dict(), llm.get_decoder().state_dict()))
    inside = any(one is head for one in decoder.modules())
    if head is not None and not inside and head.weight is not model.get_input_embeddings().weight:
        head.load_state_dict(averaged(head.state_dict(), llm.get_output_embeddings().state_dict()))
    return dict(model.state_dict())


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6)]
    assert not wrong, f"{len(wrong)} of {len(expected)} are wrong, such as {wrong[:3]}"
