"""Tiny checkpoints that programs take like published ones: heads of 32, a whole processor, a sentencepiece model.

    folder = build("qwen2_vl", tmp_path / "vlm", seed=0)
    moved = tiny.perturbed(folder, tmp_path / "tuned", seed=1)
    adapter = adapter_of(folder, tmp_path / "adapter", seed=2)

Their files beside the weights have the form that published checkpoints have, which transformers 4 reads, too.
"""

from __future__ import annotations

import functools
import io
import json
import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from polymerge import fold, merge
from tiny import as_2024, perturbed

HIDDEN, ROWS, SIDE = 128, 512, 56
"""Width, rows of the embedding, and edge of an image in pixels."""

CORPUS = (
    "what is the sum of two and three ?", "the colour of the ball is red , green or blue .", "name the largest of them",
    "a user asks a question about the picture and the assistant answers it", "describe what you see in this image",
    "USER ASSISTANT one two three four five six seven eight nine ten",
)  # fmt: skip

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_OF_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>"}  # fmt: skip

SPECIALS = {
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
    "idefics3": {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>",
                 "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
    **dict.fromkeys(QWENS, _OF_QWEN),
}  # fmt: skip
"""The tokens of each family beside those of the text, by the role they have in its processor."""

FAMILIES = tuple(SPECIALS)

_SEEN = {
    "llava": "<image>\n", "llava_next": "<image>\n", "idefics3": "<image>", "internvl": "<IMG_CONTEXT>\n",
    **dict.fromkeys(QWENS, "<|vision_start|><|image_pad|><|vision_end|>"),
}  # fmt: skip

_TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] | upper }}}}: {{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}"
    "{seen}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}} {{% endfor %}}"
    "{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)

_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 14, "projection_dim": 64,
         "num_hidden_layers": 3}  # fmt: skip
_QWEN = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_TOWERS: dict[str, dict[str, Any]] = {
    "llava": _CLIP,
    "llava_next": _CLIP,
    "idefics3": {**_TOWER, "image_size": SIDE, "patch_size": 14},
    "internvl": {**_TOWER, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
    "qwen2_vl": {**_QWEN, "embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2},
    "qwen2_5_vl": {**_QWEN, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": HIDDEN, "window_size": 112,
                   "fullatt_block_indexes": [1]},
    "qwen3_vl": {**_QWEN, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": HIDDEN, "patch_size": 16,
                 "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}  # fmt: skip
_TEXT = {"llava": "llama", "llava_next": "llama", "idefics3": "llama", "internvl": "qwen2", "qwen3_vl": "qwen3"}
_GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def build(family: str, folder: Path, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write a checkpoint of one of `FAMILIES` with random weights and all that its processor reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(family)
    with torch.random.fork_rng():
        model = AutoModelForImageTextToText.from_config(config)
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    as_2024(folder)  # the published names, where transformers 5 writes others
    _as_published(folder / "config.json")
    write_tokenizer(folder, SPECIALS[family], _SEEN[family])
    for name, content in _processor_files(family).items():
        _write(folder / name, content)
    return folder


def build_llm(kind: str, folder: Path, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write a language model (llama, qwen2 or qwen3) with random weights and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_decoder(kind)))
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, {}, "")
    return folder


def adapter_of(folder: Path, target: Path, *, seed: int = 0, projector: bool = False) -> Path:
    """Write a LoRA of a checkpoint's attention in its text tower, with random factors; with its projector whole."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    whole = ["multi_modal_projector.linear_1"] if projector else None
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)", init_lora_weights=False,
        modules_to_save=whole,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks the model by a name that transformers will drop
        torch.manual_seed(seed)
        made = get_peft_model(model, config)
    made.peft_config["default"].base_model_name_or_path = str(folder)
    made.save_pretrained(target)
    return target


def under_names_of_memory(folder: Path) -> Path:
    """Give a checkpoint the names that transformers 5 has in memory, in place: such files are published, too."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merged_checkpoint(family: str, folder: Path) -> Path:
    """The average of a checkpoint of a family and of a fine-tune of it, merged by polymerge."""
    one = build(family, folder / "one")
    other = perturbed(one, folder / "other", seed=1)
    models = [{"model": str(model)} for model in (one, other)]
    return merge({"merge_method": "linear", "parameters": {"weight": 0.5}, "models": models}, folder / "merged").folder


def merged_adapter(family: str, folder: Path, *, projector: bool = False) -> Path:
    """The merge of two adapters of one base, by polymerge."""
    base = build(family, folder / "base")
    adapters = [adapter_of(base, folder / f"adapter{seed}", seed=seed, projector=projector) for seed in (1, 2)]
    models = [{"model": str(adapter)} for adapter in adapters]
    recipe = {"merge_method": "linear", "base_model": str(base), "parameters": {"weight": 0.5}, "models": models}
    return merge(recipe, folder / "merged").folder


def _decoder(kind: str) -> dict[str, Any]:
    more = {"head_dim": 32} if kind == "qwen3" else {}
    return {
        "model_type": kind, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS, "max_position_embeddings": 2048,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _config(family: str) -> Any:
    tokens = {role: _first_special() + place for place, role in enumerate(SPECIALS[family])}
    text = _decoder(_TEXT.get(family, "qwen2"))
    more: dict[str, Any] = {"image_token_id": tokens.get("image_token", tokens.get("context_image_token"))}
    if family in QWENS:
        del text["model_type"]
        sections = (
            {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
            if family == "qwen3_vl"
            else {"mrope_section": [4, 6, 6]}
        )
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, **sections}
        more |= {"video_token_id": tokens["video_token"], "vision_start_token_id": tokens["vision_bos_token"],
                 "vision_end_token_id": tokens["vision_eos_token"]}  # fmt: skip
    if family == "llava_next":
        more["image_grid_pinpoints"] = _GRID
    if family == "idefics3":
        more["scale_factor"] = 2
    if family == "internvl":
        more["image_seq_length"] = 4
    if family.startswith("llava"):
        more["image_seq_length"] = 16
    return AutoConfig.for_model(
        family, text_config=text, vision_config=_TOWERS[family], tie_word_embeddings=False, **more
    )


def _as_published(file: Path) -> None:
    """Say how positions are turned by the names that published configs have, which transformers 4 reads, too."""
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = text.pop("rope_parameters", None) or {}
    text["rope_theta"] = rope.pop("rope_theta", 1e4)
    if "mrope_section" in rope:
        text["rope_scaling"] = rope
    _write(file, config)


def _fill(model: Any, seed: int) -> None:
    """Draw every parameter; wide enough that the most probable word stands out, whatever the last bits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            center = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.normal_(center, 0.1, generator=generator)


# --- files beside the weights


@functools.cache
def _sentencepiece() -> bytes:
    """A sentencepiece model that was trained on `CORPUS`, with bytes to fall back on."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=written, model_type="bpe", vocab_size=400, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>", num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return written.getvalue()


@functools.cache
def _pieces() -> tuple[tuple[str, float], ...]:
    model = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece())
    return tuple((model.id_to_piece(place), model.get_score(place)) for place in range(model.get_piece_size()))


def _first_special() -> int:
    return len(_pieces())


def write_tokenizer(folder: Path, specials: dict[str, str], seen: str) -> None:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and the chat template of one of the families."""
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    pieces = {piece: place for place, (piece, _) in enumerate(_pieces())}
    # sentencepiece joins the two neighbours whose union has the highest score
    splits = [
        (score, piece[:cut], piece[cut:])
        for piece, score in _pieces()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces and not piece.startswith("<")
    ]
    merges = [(left, right) for _, left, right in sorted(splits, key=lambda one: -one[0])]
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in ("<pad>", "<s>", "</s>", "<unk>")])
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in specials.values()])
    backend.save(str(folder / "tokenizer.json"))
    added = {
        str(backend.token_to_id(word)): {
            "content": word, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for word in ("<pad>", "<s>", "</s>", "<unk>", *specials.values())
    }  # fmt: skip
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "model_max_length": 2048, "add_bos_token": True, "add_eos_token": False,
            "extra_special_tokens": specials, "added_tokens_decoder": added, "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(_TEMPLATE.format(seen=seen), encoding="utf-8")


def _processor_files(family: str) -> dict[str, dict[str, Any]]:
    """The files of a family's processor, by name, as published checkpoints have them."""
    how = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
           "image_mean": _MEAN, "image_std": _STD, "resample": 3, "do_resize": True}  # fmt: skip
    square = {"height": SIDE, "width": SIDE}
    cut = {"size": {"shortest_edge": SIDE}, "crop_size": square, "do_center_crop": True}
    kept = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
            "image_token": "<image>"}  # fmt: skip
    match family:
        case "llava" | "llava_next":
            name = "Llava" if family == "llava" else "LlavaNext"
            kind = "CLIPImageProcessor" if family == "llava" else "LlavaNextImageProcessor"
            grid = {} if family == "llava" else {"image_grid_pinpoints": _GRID, "do_pad": True}
            named = {"processor_class": f"{name}Processor"}
            return {
                "preprocessor_config.json": {**how, **cut, **grid, "image_processor_type": kind, **named},
                "processor_config.json": {**kept, **named},
            }
        case "idefics3":
            edge = {"longest_edge": SIDE}
            sizes = {"size": edge, "max_image_size": edge, "do_image_splitting": False, "do_pad": True}
            named = {"processor_class": "Idefics3Processor"}
            return {
                "preprocessor_config.json": {**how, **sizes, "image_processor_type": "Idefics3ImageProcessor", **named},
                "processor_config.json": {"image_seq_len": 4, **named},
            }
        case "internvl":
            named = {"processor_class": "InternVLProcessor"}
            size = {"size": square, "crop_to_patches": False, "min_patches": 1, "max_patches": 1}
            return {
                "preprocessor_config.json": {
                    **how, **size, "image_processor_type": "GotOcr2ImageProcessorFast", **named,
                },
                "video_preprocessor_config.json": {
                    **how, "size": square, "video_processor_type": "InternVLVideoProcessor", **named,
                },
                "processor_config.json": {"image_seq_length": 4, **named},
            }  # fmt: skip
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    patch = _TOWERS[family]["patch_size"]
    edges = {"min_pixels": 56 * 56, "max_pixels": 224 * 224}
    area = {"size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}} if family == "qwen3_vl" else edges
    sizes = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, **area}
    named = {"processor_class": f"{name}Processor"}
    video = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    return {
        "preprocessor_config.json": {**how, **sizes, "image_processor_type": "Qwen2VLImageProcessor", **named},
        "video_preprocessor_config.json": {**how, **sizes, "video_processor_type": video, **named},
    }


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def folded(adapter: Path, out: Path) -> Path:
    """The checkpoint that an adapter makes of its base, by polymerge."""
    return fold(adapter, out).folder
