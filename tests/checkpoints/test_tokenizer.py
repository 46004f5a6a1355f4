"""Tokens from the files of a tokenizer: the forms that `tokenizers` writes, slow tokenizers, sentencepiece."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from polymerge.checkpoints.tokenizer import read_tokens
from polymerge.errors import CheckpointError, MissingExtraError

WORDS = ("<unk>", "a", "b", "ab", "ß")


def put(folder: Path, **files: Any) -> Path:
    """Write JSON files by their stems."""
    folder.mkdir(exist_ok=True, parents=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- tokenizer.json


@pytest.mark.parametrize(
    "model",
    [
        WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"),
        BPE({word: place for place, word in enumerate(WORDS)}, merges=[("a", "b")]),
        Unigram([(word, -float(place)) for place, word in enumerate(WORDS)], unk_id=0),
    ],
    ids=["WordLevel", "BPE", "Unigram"],
)
def test_every_kind_of_tokenizer_json(model: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens(["plus"])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True), "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    assert read_tokens(tmp_path) == expected
    assert expected == dict(enumerate((*WORDS, "plus", "<image>")))


def test_tokenizer_json_comes_before_the_other_files(tmp_path: Path) -> None:
    put(tmp_path, tokenizer={"model": {"vocab": {"x": 0}}}, vocab={"y": 0}, added_tokens={"z": 1})
    assert read_tokens(tmp_path) == {0: "x"}


# --- slow tokenizers


def test_vocab_json_with_what_was_added(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"4": {"content": "<|im_end|>", "special": True}, "0": {"content": "a"}}}
    put(tmp_path, vocab={"b": 1, "a": 0}, added_tokens={"<image>": 3}, tokenizer_config=config)
    assert read_tokens(tmp_path) == {0: "a", 1: "b", 3: "<image>", 4: "<|im_end|>"}


def test_vocab_json_alone(tmp_path: Path) -> None:
    assert read_tokens(put(tmp_path, vocab={"b": 1, "a": 0}, tokenizer_config={})) == {0: "a", 1: "b"}


# --- sentencepiece


def message(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer, shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def model(*pieces: str) -> bytes:
    """A sentencepiece model, `<unk>` and the pieces: each a text, a float score, and a kind (2 is unknown)."""
    kinds = {"<unk>": 2}
    return b"".join(
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", -1.5) + bytes([3 << 3, kinds.get(text, 1)]))
        for text in ("<unk>", *pieces)
    )


def test_sentencepiece_with_what_was_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model("<s>", "</s>", "<0x0A>", "▁the", "x" * 100))
    put(tmp_path, added_tokens={"<image>": 6}, tokenizer_config={"added_tokens_decoder": {"7": {"content": "<eoc>"}}})
    expected = ("<unk>", "<s>", "</s>", "<0x0A>", "▁the", "x" * 100, "<image>", "<eoc>")
    assert read_tokens(tmp_path) == dict(enumerate(expected))


def test_sentencepiece_that_was_trained(tmp_path: Path) -> None:
    words = ["the quick brown fox", "jumps over the lazy dog", "Grüße aus der weiten Welt"] * 20
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=5
        )
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert read_tokens(tmp_path) == {number: expected.id_to_piece(number) for number in range(len(expected))}


def test_without_sentencepiece_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model("a"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r"tokenizer.model: reading it needs sentencepiece.*\[transformers\]"):
        read_tokens(tmp_path)


# --- what cannot be read


def test_no_tokenizer_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, tokenizer_config={"added_tokens_decoder": {"0": {"content": "a"}}})
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, vocab.json or tokenizer.model.*vocab: template"):
        read_tokens(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"vocab": null}}'),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}'),
        ("tokenizer.json", b'{"model": {"vocab": [3]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "0"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1, "content": null}]}'),
        ("vocab.json", b"[1, 2]"),
        ("vocab.json", b'{"a": null}'),
        ("tokenizer.model", model("a", "b")[:-1]),
        ("tokenizer.model", model("a", "b")[:4]),
        ("tokenizer.model", model("a", "a")),
        ("tokenizer.model", b"\x80\x80"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"),
    ],
)
def test_a_broken_tokenizer_is_an_error_that_names_its_folder(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read") as raised:
        read_tokens(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize("stem", ["added_tokens", "tokenizer_config"])
def test_a_broken_addition_is_an_error_too(stem: str, tmp_path: Path) -> None:
    put(tmp_path, vocab={"a": 0}, **{stem: ["a"]})
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        read_tokens(tmp_path)
