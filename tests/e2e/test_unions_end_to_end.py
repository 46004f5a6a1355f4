"""Unions of real tokenizers of each kind, and of a VLM with language models: they load, and every token has its row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import polymerge
from polymerge.checkpoints.loading import load_model
from polymerge.errors import Refused
from running import same_weights
from tiny import build, generate, load, related_llm
from vocabularies import listed

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip


def decoder(folder: Path, kind: str, rows: int, seed: int) -> Path:
    torch.manual_seed(seed)
    if kind == "qwen2":
        Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=True, **SIZES)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES)).save_pretrained(folder)
    return folder


def added(first: int, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The decoder of a tokenizer_config.json; what stands in <| |> is special."""
    settings = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(first + n): {"content": one, "special": "|" in one, **settings} for n, one in enumerate(tokens)}


def say_added(folder: Path, where: str, first: int, tokens: Sequence[str], config: dict[str, Any]) -> None:
    """Write added tokens into the file that one or another version of transformers puts them in."""
    if where in ("decoder", "both"):
        config = config | {"added_tokens_decoder": added(first, tokens)}
    if where in ("listed", "both"):
        numbers = {token: first + place for place, token in enumerate(tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(numbers))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def of_bytes(folder: Path, merges: Sequence[str], tokens: Sequence[str], where: str) -> int:
    """A tokenizer of bytes, in the files of Qwen2's; `fast` and `fast decoder` have a tokenizer.json alone."""
    folder.mkdir()
    vocabulary = {byte: place for place, byte in enumerate(sorted(ByteLevel.alphabet()))}
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    say_added(folder, "decoder" if where.startswith("fast") else where, len(vocabulary), tokens, config)
    if where.startswith("fast"):
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)
    if where == "fast decoder":
        said = json.loads((folder / "tokenizer_config.json").read_text())
        decoder_of = {"added_tokens_decoder": added(len(vocabulary), tokens)}
        (folder / "tokenizer_config.json").write_text(json.dumps(said | decoder_of))
    return len(vocabulary) + len(tokens)


def of_pieces(folder: Path, size: int, more: Sequence[str], tokens: Sequence[str], where: str) -> int:
    """A sentencepiece model in the files of Llama's."""
    folder.mkdir()
    words = ["the quick brown fox", "jumps over the lazy dog", "hello world", *more] * 20
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, vocab_size=size, hard_vocab_limit=False,
            model_type="bpe", minloglevel=5,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    say_added(folder, where, pieces, tokens, config)
    return int(pieces) + len(tokens)


def check(one: Path, other: Path, out: Path) -> Any:
    """Every token has the number of its row, the template's tokens theirs; the model writes with them."""
    first, second, united = (AutoTokenizer.from_pretrained(folder) for folder in (one, other, out))
    numbers, theirs = united.get_vocab(), second.get_vocab()
    assert numbers.items() >= first.get_vocab().items()
    assert numbers.keys() == first.get_vocab().keys() | theirs.keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    rows = model.get_input_embeddings().weight
    assert len(rows) == model.config.vocab_size >= len(united)
    lent = load(other)["model.embed_tokens.weight"]
    for token in theirs.keys() - first.get_vocab().keys():
        assert torch.allclose(rows[numbers[token]], lent[theirs[token]], rtol=0, atol=1e-6), token
        assert united.convert_ids_to_tokens(numbers[token]) == token
    said = model.generate(**united("hello <think>", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert said.shape[1] == len(united("hello <think>").input_ids) + 3
    return united


@pytest.mark.parametrize("where", ["decoder", "listed", "both", "fast", "fast decoder"])
def test_a_union_of_byte_tokenizers(where: str, tmp_path: Path) -> None:
    merges = ["h e", "l l", "he ll"]
    files = "decoder" if where == "fast" else where
    ours = of_bytes(tmp_path / "one", [*merges, "hell o"], ["<|endoftext|>", "<|im_start|>"], where)
    theirs = of_bytes(tmp_path / "other", [*merges, "w o"], ["<|endoftext|>", "<think>", "<|eyes|>"], files)
    models = [
        decoder(tmp_path / "one", "qwen2", ours + 2, 1),
        decoder(tmp_path / "other", "qwen2", theirs, 2),
    ]
    polymerge.merge(listed(*models, tokenizer_source="union"), tmp_path / "out")
    united = check(*models, tmp_path / "out")
    text = "hello <think>world<|eyes|><|im_start|>x"
    assert united.decode(united(text).input_ids) == text
    pieces = united.tokenize(text)
    assert [one for one in pieces if "<" in one] == ["<think>", "<|eyes|>", "<|im_start|>"]
    assert "wo" in pieces, "which is found as it stands, not by merges"
    if where != "listed":  # which does not say what is special
        assert united.decode(united(text).input_ids, skip_special_tokens=True) == "hello <think>worldx"


@pytest.mark.parametrize("where", ["decoder", "listed", "both"])
def test_a_union_of_sentencepiece_tokenizers(where: str, tmp_path: Path) -> None:
    ours = of_pieces(tmp_path / "one", 60, [], ["<|image|>"], where)
    theirs = of_pieces(tmp_path / "other", 66, ["dogged foxes"], ["<think>", "<|eyes|>"], where)
    models = [decoder(tmp_path / "one", "llama", ours + 2, 1), decoder(tmp_path / "other", "llama", theirs, 2)]
    polymerge.merge(listed(*models, tokenizer_source="union"), tmp_path / "out")
    united = check(*models, tmp_path / "out")
    assert {"<think>", "<|eyes|>", "<|image|>"} <= set(united.tokenize("the <think>fox<|eyes|><|image|>"))


# --- a VLM and language models


def speaking(vlm: Path, folder: Path, *more: str) -> Path:
    """A language model near the VLM's text tower without its image tokens, and with `more` tokens of its own."""
    llm = related_llm(vlm, folder, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"extra_special_tokens": list(more)})
    tokenizer.save_pretrained(llm)
    return llm


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics2"])
def test_a_union_keeps_what_a_vlm_sees_by(family: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm", seed=1)
    llm = speaking(vlm, tmp_path / "llm", "<think>", "<|tool|>")
    recipe = listed(vlm, llm, weights=(0.7, 0.3), tokenizer_source="union", parts=["text"])
    plan = polymerge.plan(recipe)
    out = polymerge.merge(recipe, tmp_path / "out").folder
    before, after = AutoProcessor.from_pretrained(vlm), AutoProcessor.from_pretrained(out)
    old, new = before.tokenizer.get_vocab(), after.tokenizer.get_vocab()
    assert new.items() >= old.items()
    assert new.keys() == old.keys() | {"<think>", "<|tool|>"}
    said, now = (json.loads((folder / "config.json").read_text()) for folder in (vlm, out))
    assert image_in(out) == image_in(vlm) == new["<image>"]
    rows = max(said["text_config"]["vocab_size"], len(new))
    assert now["text_config"]["vocab_size"] == rows
    name = next(step.name for step in plan.steps if step.canonical == "text.embed_tokens.weight")
    merged, theirs = load(out)[name], load(vlm)[name]
    assert len(merged) == rows
    image = new["<image>"]
    assert torch.allclose(merged[image], theirs[image], rtol=0, atol=1e-6), "the only one that has it lends it"
    assert generate(out).shape[-1] == rows
    with polymerge.live(listed(vlm, llm, weights=(0.2, 0.8), tokenizer_source="union", parts=["text"])) as live:
        live.set(plan)  # as a search goes from one weight to the next
        same_weights(live.model, load_model(out))
        assert AutoProcessor.from_pretrained(live.processor_folder).tokenizer.get_vocab() == new


def image_in(folder: Path) -> Any:
    """The number of the image token that a VLM's config.json names."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("image_token_index", config.get("image_token_id"))


def test_a_language_model_s_tokenizer_cannot_be_a_vlm_s(tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", seed=1)
    llm = speaking(vlm, tmp_path / "llm", "<think>")
    said = json.loads((llm / "tokenizer.json").read_text())
    image = image_in(vlm)
    assert image not in {one["id"] for one in said["added_tokens"] if one["content"] == "<image>"}
    recipe = listed(vlm, llm, tokenizer_source=str(llm), parts=["text"])
    with pytest.raises(
        Refused, match=rf"config.json of 'vlm' has image_token_index: {image}, its token '<image>'.*union"
    ):
        polymerge.plan(recipe)
    based = listed(vlm, merge_method="task_arithmetic", base_model=str(llm), tokenizer_source="base", parts=["text"])
    with pytest.raises(Refused, match="the model would not see what is not text"):
        polymerge.plan(based)
