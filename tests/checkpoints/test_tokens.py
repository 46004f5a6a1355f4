"""Tokens from the files of a tokenizer: the forms that `tokenizers` writes, slow tokenizers, sentencepiece by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from polymerge.checkpoints.tokenizer import read_tokens
from polymerge.errors import CheckpointError

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


def varint(value: int) -> bytes:
    """A protocol buffer's number: seven bits a byte, the lowest first."""
    head = b""
    while value > 0x7F:
        head += bytes([value & 0x7F | 0x80])
        value >>= 7
    return head + bytes([value])


def message(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, kind: int = 1) -> bytes:
    """A SentencePiece: its text, a float score, its kind."""
    score = varint(2 << 3 | 5) + struct.pack("<f", -1.5)
    return message(1, message(1, text.encode()) + score + varint(3 << 3) + varint(kind))


def model(*pieces: str) -> bytes:
    """A ModelProto: pieces, then the trainer's and the normalizer's settings, of every wire type."""
    trainer = message(1, b"corpus.txt") + varint(4 << 3) + varint(300) + varint(9 << 3 | 1) + struct.pack("<d", 0.5)
    return b"".join(map(piece, pieces)) + message(2, trainer) + message(3, message(1, b"nmt_nfkc"))


def test_sentencepiece_by_hand(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model("<unk>", "<s>", "</s>", "<0x0A>", "▁the", "x" * 200))
    put(tmp_path, added_tokens={"<image>": 6}, tokenizer_config={"added_tokens_decoder": {"7": {"content": "<eoc>"}}})
    expected = ("<unk>", "<s>", "</s>", "<0x0A>", "▁the", "x" * 200, "<image>", "<eoc>")
    assert read_tokens(tmp_path) == dict(enumerate(expected))


@given(st.lists(st.text(min_size=1).filter(lambda text: text.isprintable()), max_size=20))
def test_any_pieces(tmp_path_factory: pytest.TempPathFactory, pieces: list[str]) -> None:
    folder = tmp_path_factory.mktemp("pieces", numbered=True)
    (folder / "tokenizer.model").write_bytes(model(*pieces))
    assert read_tokens(folder) == dict(enumerate(pieces))


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
        ("tokenizer.model", b"\x80\x80"),
        ("tokenizer.model", message(1, b"")),
        ("tokenizer.model", message(1, message(1, b"\xff"))),
        ("tokenizer.model", varint(1 << 3 | 3)),
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
