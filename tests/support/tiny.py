"""Tiny real checkpoints of every family: built, saved, renamed, perturbed and run by transformers' own classes.

    vlm = build("llava_next", tmp_path / "vlm", seed=0)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)      # a plain language model, near the text tower of it
    tuned = perturbed(llm, tmp_path / "tuned", seed=2)    # a fine-tune of that
    logits = generate(vlm)                                # loads strictly, shows it an image

One seed gives the same bytes every time. A family's sizes are fixed but for layers and vocabulary, so that any two
checkpoints of one lineage fit together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics2Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import logging

import tiny_classless
import tiny_experts
from tiny_configs import (
    ANYRES,
    CLASSLESS,
    CROSS,
    IMAGE,
    LLMS,
    MODEL_TYPES,
    PATCH,
    ROWS,
    SPECIALS,
    TEXT,
    VLMS,
    WITH_PROCESSOR,
    WORDS,
    config_of,
    decoder,
    image_settings,
)
from tiny_questions import question as _question
from tiny_trees import FAMILY_OF, TREES

logging.set_verbosity_error()
logging.disable_progress_bar()

CLASSES = {
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
}
"""The classes of the families that no Auto class for images and text knows."""

LLAVA_LIVE = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
              "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
              "image_newline": "model.image_newline", "vision_model.": "model.vision_model.",
              "audio_tower.": "model.audio_tower."}  # fmt: skip
QWEN_LIVE = {"visual.": "model.visual.", "audio_tower.": "model.audio_tower.", "model.": "model.language_model."}
LIKE_LLAVA = ("llava", "llava_next", "llava_onevision", "internvl", "gemma3", "paligemma", "mistral3", "mllama",
              "qwen2_audio")  # fmt: skip
LIVE = dict.fromkeys(LIKE_LLAVA, LLAVA_LIVE) | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni"), QWEN_LIVE)
"""By family, the prefixes that transformers 5 writes and those it has in memory; the first that fits is replaced."""

OLD = {
    family: {"vision_tower.": "vision_tower.vision_model."}
    for family in ("llava", "llava_next", "llava_onevision", "gemma3", "paligemma")
}
"""By family, the prefixes that transformers 5 writes and those of 2024."""

TEXT_PREFIX = {
    **dict.fromkeys(("idefics2", "idefics3"), ("model.text_model.", "lm_head.")),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni"), ("model.", "lm_head.")),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "deepseek_vl"), ("model.language_model.", "lm_head.")),
}
"""Where a family, as `build` writes it, has decoder and head, if not under `language_model.`"""


# --- building


def build(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    text: str | None = None,
    layers: int = 2,
    tie: bool = False,
    vocab: int = ROWS,
    keys: int = 2,
    shard: bool = False,
) -> Path:
    """Write a checkpoint with random weights, its tokenizer and its image processor, and return its folder.

    `text` names the decoder where the family leaves a choice (of those in `tiny_trees.TREES` for one without a
    class); `vocab` is the number of rows of the embedding, `keys` that of heads of keys and values.
    """
    kind = text or TEXT.get(family, family)
    size = "20KB" if shard else "5GB"
    if family in TREES:
        tree = TREES[family][kind]
        settings = tiny_classless.config_of(tree, decoder(tree.kind, layers, vocab, tie, keys), dtype)
        tiny_classless.write_config(folder, settings)
        tensors = tiny_classless.blank(tree, settings)
        _fill(tensors, seed)
        cast = {name: tensor if is_buffer(name) else tensor.to(getattr(torch, dtype))
                for name, tensor in tensors.items()}  # fmt: skip
        save_torch_state_dict(cast, folder, max_shard_size=size)
    else:
        config = config_of(family, decoder(kind, layers, vocab, tie, keys))
        with torch.random.fork_rng():
            model = _class_of(family)(config) if family in CLASSES else _class_of(family).from_config(config)
        _fill(dict(model.named_parameters()), seed)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
    _save_tokenizer(folder, family)
    if family in WITH_PROCESSOR:
        _processor(folder, family).save_pretrained(folder)
    elif family in VLMS:
        _write_json(folder / "preprocessor_config.json", image_settings(family))
    return folder


def is_buffer(name: str) -> bool:
    """Whether a tensor follows from the config: stored in float32, and the same in all fine-tunes."""
    return name.endswith("inv_freq")


def _class_of(family: str) -> Any:
    """The class that loads a family."""
    if family in CLASSES:
        return getattr(transformers, CLASSES[family])
    return AutoModelForCausalLM if family in LLMS else AutoModelForImageTextToText


def _fill(parameters: dict[str, Tensor], seed: int) -> None:
    """Draw every parameter, biases and norms too, so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            center = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.normal_(center, 0.1, generator=generator)


def _save_tokenizer(folder: Path, family: str) -> None:
    specials = SPECIALS.get(family, {})
    vocabulary = {word: place for place, word in enumerate((*WORDS, *specials.values()))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=specials, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.chat_template = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def _processor(folder: Path, family: str) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if family == "idefics2":
        sizes = {"size": {"shortest_edge": IMAGE, "longest_edge": IMAGE}, "do_image_splitting": False}
        return Idefics2Processor(Idefics2ImageProcessorPil(**sizes), tokenizer, image_seq_len=3)
    sizes = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    kept = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        return LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, **kept)
    return LlavaNextProcessor(LlavaNextImageProcessorPil(**sizes, **ANYRES), tokenizer, **kept)


# --- relatives


def related_llm(vlm: Path, folder: Path, *, seed: int = 0, size: float = 0.02, vocab: int | None = None) -> Path:
    """Write the plain language model that `vlm` may have been made of: its text tower, moved by random steps of `size`.

    `vocab` is its number of rows where it differs: rows of the tower are left out, or random ones follow them.
    """
    family, weights = family_in(vlm), tiny_experts.apart(load(vlm))
    outside = _read_json(vlm / "config.json")
    if family in CLASSLESS:
        tree, sizes = tiny_classless.tree_in(vlm)
        inside: dict[str, Any] = outside.get(tree.nested, outside)
        kind, keys = tree.kind, sizes.keys // sizes.width
    else:
        inside = outside["text_config"]
        kind, keys = inside["model_type"] if inside["model_type"] in LLMS else TEXT[family], 2
    between = CROSS if family == "mllama" else ()
    own = [layer for layer in range(inside["num_hidden_layers"]) if layer not in between]
    tie = bool(outside.get("tie_word_embeddings") or inside.get("tie_word_embeddings"))
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    rows = vocab or inside["vocab_size"]
    build(kind, folder, seed=seed, dtype=dtype, layers=len(own), tie=tie, vocab=rows, keys=keys)
    body, head = TEXT_PREFIX.get(family, ("language_model.model.", "language_model.lm_head."))

    def name_in_vlm(name: str) -> str:
        inner = name.removeprefix("model.").split(".")
        if inner[0] == "layers":
            inner[1] = str(own[int(inner[1])])
        return head + name.removeprefix("lm_head.") if name.startswith("lm_head.") else body + ".".join(inner)

    names = load(folder)
    near = tiny_classless.plain_llm(vlm) if family in CLASSLESS else {n: weights[name_in_vlm(n)] for n in names}
    assert near.keys() == names.keys()

    def placed(name: str, tensor: Tensor) -> Tensor:
        common = min(len(near[name]), len(tensor))
        return torch.cat([near[name][:common], tensor[common:]])

    _rewrite(folder, lambda name: name, placed)
    return perturbed(folder, folder, seed=seed + 1, size=size)


def perturbed(checkpoint: Path, folder: Path, *, seed: int, size: float = 0.02) -> Path:
    """Write a copy of a checkpoint whose every weight has moved by normal steps of `size`: a fine-tune of it."""
    if folder != checkpoint:
        shutil.copytree(checkpoint, folder)
    generator = torch.Generator().manual_seed(seed)

    def moved(name: str, tensor: Tensor) -> Tensor:
        if is_buffer(name):
            return tensor
        step = torch.empty(tensor.shape).normal_(0.0, size, generator=generator)
        return (tensor.float() + step).to(tensor.dtype)

    _rewrite(folder, lambda name: name, moved)
    return folder


# --- names


def as_2024(folder: Path) -> Path:
    """Give a checkpoint that transformers 5 wrote the names of 2024, in place; experts lie transposed there."""
    if family_in(folder) == "qwen3_vl_moe":
        return tiny_experts.in_one(folder, transposed=True)
    return _renamed(folder, OLD)


def as_live(folder: Path) -> Path:
    """Give a checkpoint that transformers 5 wrote the names that it has in memory, in place: such files exist too."""
    if family_in(folder) in ("qwen3_moe", "mixtral"):
        return tiny_experts.in_one(folder)
    return _renamed(folder, LIVE)


def _renamed(folder: Path, prefixes: dict[str, dict[str, str]]) -> Path:
    table = prefixes.get(family_in(folder), {})

    def renamed(name: str) -> str:
        for old, new in table.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    _rewrite(folder, renamed, lambda _, tensor: tensor)
    return folder


def _rewrite(folder: Path, rename: Callable[[str], str], change: Callable[[str, Tensor], Tensor]) -> None:
    """Rewrite every tensor of a checkpoint where it lies, in the order of the names."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = {rename(name): change(name, tensor) for name, tensor in sorted(load_file(shard).items())}
        save_file(tensors, shard, metadata={"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = _read_json(index_file)
        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
        _write_json(index_file, index)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names on disk, sorted."""
    shards = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return dict(sorted((name, tensor) for shard in shards for name, tensor in shard.items()))


def family_in(folder: Path) -> str:
    """The family that a checkpoint was built as."""
    config = _read_json(folder / "config.json")
    for architecture in config.get("architectures") or ():
        if architecture in FAMILY_OF:
            return FAMILY_OF[architecture]
    said = config["model_type"]
    names = {"smolvlm": "idefics3", **{model_type: family for family, model_type in MODEL_TYPES.items()}}
    return names.get(said, said)


def open_model(folder: Path, **options: Any) -> Any:
    """The model in a checkpoint, by the class that transformers has for it."""
    return _class_of(family_in(folder)).from_pretrained(folder, **options)


def loaded(folder: Path) -> Any:
    """The model in float32; fails unless every tensor on disk has its place in it and the other way round."""
    kind = _read_json(folder / "config.json")["model_type"]
    text = kind in LLMS or kind in ("gpt2", "gpt_oss")
    auto = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any, folder: Path) -> Tensor:
    """What a model that was loaded from `folder` makes of a sum, and of an image if it can see."""
    kind = _read_json(folder / "config.json")["model_type"]
    found = model(**_question(model, folder, kind)).logits
    assert isinstance(found, Tensor)
    return found


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


# --- running


def generate(folder: Path, tokens: int = 3) -> Tensor:
    """Load a checkpoint, let it say `tokens` words about an image if it can see, and return their logits [token, word].

    Fails unless every tensor on disk has its place in the model and the other way round.
    """
    model, report = open_model(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    said = model.generate(
        **_question(model, folder, family_in(folder)), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.cat(said.logits)
