"""Added tokens in the files of a tokenizer: read from, and written to, each file that lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polymerge.checkpoints.added_tokens import add_tokens
from polymerge.checkpoints.tokenizer import AddedToken, read_added
from polymerge.errors import CheckpointError

NEW = AddedToken(3, "<new>", special=True)


def test_without_a_tokenizer_json_a_decoder_is_made_of_all_that_are_listed(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<old>": 2}')
    assert read_added(tmp_path) == [AddedToken(2, "<old>")]
    add_tokens(tmp_path, [NEW])
    assert read_added(tmp_path) == [AddedToken(2, "<old>"), NEW]
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<old>": 2, "<new>": 3}
    assert list(json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]) == ["2", "3"]


def test_a_token_that_is_there_gets_the_settings(tmp_path: Path) -> None:
    before = {"model": {"vocab": {}}, "added_tokens": [{"id": 3, "content": "<new>", "special": False}], "more": [1.5]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(before))
    add_tokens(tmp_path, [NEW])
    assert read_added(tmp_path) == [NEW]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["more"] == [1.5]
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_a_decoder_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": {"content": 7}}}')
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read: tokenizer_config\.json"):
        read_added(tmp_path)
