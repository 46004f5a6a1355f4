"""Pairs of tiny checkpoints of any model type, merged and held against a literal merge in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import tiny_derived
from derived_runs import Question, question_for
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


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, and what has to come out of their merge.

    model     the template's, in memory
    expected  the tensors of the merge by their names in memory
    question  what the model is asked; None if it takes no input that was tried
    """

    name: str
    template: Path
    other: Path
    model: Any
    expected: Mapping[str, Tensor]
    question: Question | None

    def check(self, out: Path) -> None:
        """Merge; fails unless every tensor and the answer are those of the literal merge."""
        models = [{"model": str(one), "parameters": {"weight": weight}}
                  for one, weight in zip((self.template, self.other), WEIGHTS, strict=True)]  # fmt: skip
        merge({"merge_method": "linear", "models": models, "dtype": "float32"}, out)
        made = opened(type(self.model), out)
        compare(made.state_dict(), self.expected)
        self.check_answer(made)

    def check_answer(self, made: Any) -> None:
        """Fails unless a model answers as the literal merge does."""
        if self.question is not None:
            assert torch.allclose(self.question.answered_by(made), self._answer, rtol=1e-3, atol=1e-4, equal_nan=True)

    @cached_property
    def _answer(self) -> Tensor:
        assert self.question is not None
        literal = copy.deepcopy(self.model)
        literal.load_state_dict(self.expected)
        return self.question.answered_by(literal)


def pairs(kind: str, class_name: str, folder: Path, config: Any = None) -> Iterator[Pair]:
    """The pairs that a model type can be merged in: a fine-tune, the same with other names, a language model."""
    config = config or tiny_derived.tiny_config(kind)
    named = getattr(transformers, class_name)
    vlm = tiny_derived.build(config, folder / "vlm", seed=1, class_name=class_name)
    tuned = tiny_derived.build(config, folder / "tuned", seed=2, class_name=class_name)
    ours, theirs = opened(named, vlm), opened(named, tuned)
    question = question_for(ours)
    both = averaged(ours.state_dict(), theirs.state_dict())
    what = "VLM" if is_multimodal(config) else "LLM"
    yield Pair(f"{what} + {what}", vlm, tuned, ours, both, question)
    live = in_memory(theirs, tuned, folder / "live")
    yield Pair(f"{what} + {what} in memory's names", vlm, live, ours, both, question)
    if (text := partner(config)) is not None:
        other = tiny_derived.build(text, folder / "llm", seed=3)
        llm = opened(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], other)
        yield Pair(f"VLM + {text.model_type}", vlm, other, ours, joined(ours, llm), question)


def is_multimodal(config: Any) -> bool:
    return config.model_type in tiny_derived.multimodal_types()


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
    """The model in a checkpoint; fails unless every tensor on disk has its place, and every place its tensor."""
    model, report = loaded(named, folder)
    assert not any(report.values()), f"{folder.name} is not loaded as it is: {report}"
    return model


def loaded(named: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in a checkpoint, and the names that its class found to be wrong, by how."""
    # not the class's own `from_pretrained`, which may know nothing of reports
    load: Any = transformers.PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    model, report = load(named, folder, dtype=torch.float32, output_loading_info=True)
    if hasattr(model, "load_speakers"):
        model.load_speakers(folder / "spk_dict.pt")
    return model.eval(), report


def in_memory(model: Any, like: Path, folder: Path) -> Path:
    """Write a model under the names that it has in memory, as some trainers do."""
    folder.mkdir()
    state = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    return folder


def averaged(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> State:
    first, second = WEIGHTS
    return {
        name: tensor * first + theirs[name] * second if tensor.dtype.is_floating_point else tensor
        for name, tensor in ours.items()
    }


def joined(vlm: Any, llm: Any) -> State:
    """The tensors of a multimodal model whose decoder and head are merged with those of a language model."""
    model = copy.deepcopy(vlm)
    thinker = getattr(model, "thinker", model)  # what speaks around it has decoders of its own
    decoder = thinker.get_decoder()
    head = thinker.get_output_embeddings() or decoder.get_output_embeddings()
    while decoder.get_decoder() is not decoder and any(one is head for one in decoder.modules()):
        decoder = decoder.get_decoder()
    decoder.load_state_dict(averaged(decoder.state_dict(), llm.get_decoder().state_dict()))
    inside = any(one is head for one in decoder.modules())
    if head is not None and not inside and head.weight is not thinker.get_input_embeddings().weight:
        head.load_state_dict(averaged(head.state_dict(), llm.get_output_embeddings().state_dict()))
    return dict(model.state_dict())


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6)]
    assert not wrong, f"{len(wrong)} of {len(expected)} are wrong, such as {wrong[:3]}"
