"""The three models of the story, small but of the real classes: Llama, and LLaVA with a CLIP vision tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from polymerge.demo.world import ASSISTANT, BEGIN, END, IMAGE, PAD, PATCH, SIZE, USER, WORDS
from polymerge.families import read_names
from polymerge.families.names_on_disk import as_published

IMAGE_ID = len(WORDS)  # the vision-language model has one word more than the language models
IMAGE_TOKENS = (SIZE // PATCH) ** 2
MEAN, STD = 0.5, 0.5  # of the image processor

# a conversation is one turn: what the user shows and asks, then the answer
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <" + "{{ message['role'] }}> "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """How large the models are; by default the demo's, whose language model has about 866 thousand parameters.

    width, inner, layers                          of the language model
    vision_width, vision_inner, vision_layers     of the vision tower
    """

    width: int = 128
    inner: int = 384
    layers: int = 4
    vision_width: int = 96
    vision_inner: int = 192
    vision_layers: int = 3


DEMO = Shape()


def llama_config(vocabulary: int, shape: Shape = DEMO) -> LlamaConfig:
    """Describe the language model."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=WORDS.index(BEGIN),
        eos_token_id=WORDS.index(END),
        pad_token_id=WORDS.index(PAD),
    )


def new_base(seed: int, shape: Shape = DEMO) -> LlamaForCausalLM:
    """Make the language model that everything else starts from, untrained."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(len(WORDS), shape))


def new_vlm(base: LlamaForCausalLM, seed: int, shape: Shape = DEMO) -> LlavaForConditionalGeneration:
    """Build a vision-language model on the base: its text tower is the base's, vision tower and projector are new.

    The embedding and the head get one row more, for `<image>`.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=shape.vision_width,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama_config(len(WORDS) + 1, shape),
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    vlm = LlavaForConditionalGeneration(config)
    grow_from(base, vlm)
    return vlm


def grow_from(base: LlamaForCausalLM, vlm: Any) -> None:
    """Give a vision-language model, which has one word more, the base's text tower and head."""
    with torch.no_grad():
        tower = vlm.model.language_model.state_dict()
        for name, tensor in base.model.state_dict().items():
            tower[name][: tensor.shape[0]] = tensor
        vlm.lm_head.weight[: len(WORDS)] = base.lm_head.weight
        vlm.lm_head.weight[len(WORDS) :] = 0


def tokenizer(*, with_image: bool) -> Any:
    """Make the tokenizer: one token a word, words apart by spaces."""
    words = [*WORDS, IMAGE] if with_image else list(WORDS)
    inner = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token=PAD))
    inner.pre_tokenizer = WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructors untyped
    outer = fast(
        tokenizer_object=inner,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": IMAGE} if with_image else {},
    )
    outer.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    outer.chat_template = CHAT_TEMPLATE
    return outer


def processor() -> Any:
    """Make what turns pictures and prompts into the vision-language model's input."""
    images = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    llava: Any = LlavaProcessor
    return llava(
        images,
        tokenizer(with_image=True),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_language_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a language model with its tokenizer, weights in float16."""
    save_weights(model, folder)
    tokenizer(with_image=False).save_pretrained(folder)


def save_vlm(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a vision-language model with its processor, weights in float16."""
    save_weights(model, folder)
    processor().save_pretrained(folder)


def save_weights(model: Any, folder: Path) -> None:
    """Write a half-precision copy; the model itself goes on in float32."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    _publish(folder)


def _publish(folder: Path) -> None:
    """Give a folder's tensors the names that their family is published with, which other programs read.

    transformers writes a model that was not read from a file without a level of its vision tower's names.
    """
    file = folder / "model.safetensors"
    tensors, config = load_file(file), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = as_published(config, read_names(config, shapes), shapes).names
    if names:
        save_file({names.get(own, (own,))[0]: tensor for own, tensor in tensors.items()}, file, {"format": "pt"})


def load(kind: type[Any], folder: Path) -> Any:
    """Load a checkpoint to be asked: in float32, ready to generate."""
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_processor(folder: Path) -> Any:
    """Load the processor that a vision-language checkpoint brings along."""
    auto: Any = AutoProcessor
    return auto.from_pretrained(folder, local_files_only=True)
