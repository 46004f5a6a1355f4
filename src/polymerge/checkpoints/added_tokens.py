"""Write tokens and a chat template into the tokenizer's files of an output, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.bounds import TOKENIZER_BYTES
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.tokenizer import AddedToken, read_added

__all__ = ["add_tokens", "write_chat_template"]

_CONFIG: Final = "tokenizer_config.json"
_DECODER: Final = "added_tokens_decoder"
_TEMPLATE: Final = "chat_template"


def add_tokens(folder: Path, tokens: Sequence[AddedToken]) -> None:
    """Add tokens to the tokenizer in a folder, or settings to those that it has.

    They go into every file that lists added tokens: tokenizer.json; added_tokens.json; and the decoder in
    tokenizer_config.json, before which transformers 5 reads none of the others. Without tokenizer.json that decoder is
    made if there is none.

    raises CheckpointError where one of these files cannot be read.
    """
    if not tokens:
        return
    fast, listed, config = folder / "tokenizer.json", folder / "added_tokens.json", folder / _CONFIG
    before = read_added(folder)
    if fast.is_file():
        data = read_json(fast, dict[str, Any], most=TOKENIZER_BYTES)
        rest = [one for one in data.get("added_tokens") or [] if one["id"] not in {token.id for token in tokens}]
        data["added_tokens"] = sorted([*rest, *map(asdict, tokens)], key=lambda one: one["id"])
        _write(fast, data)
    if listed.is_file():
        _write(listed, read_json(listed, dict[str, int]) | {token.content: token.id for token in tokens})
    said = read_json(config, dict[str, Any]) if config.is_file() else {}
    if _DECODER in said or not fast.is_file():
        decoder = {token.id: asdict(token) for token in (*before, *tokens)}
        for one in decoder.values():
            del one["id"]
        said[_DECODER] = {str(number): decoder[number] for number in sorted(decoder)}
        _write(config, said)


def write_chat_template(folder: Path, template: str) -> None:
    """Write a chat template as transformers does, into chat_template.jinja, and wherever else the folder has one.

    Older programs read it in tokenizer_config.json, chat_template.json or processor_config.json: where these hold one,
    they get the same. Of several templates with names the one called default is replaced.

    raises CheckpointError where one of these files cannot be read.
    """
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in (_CONFIG, "processor_config.json", "chat_template.json"):
        file = folder / name
        said = read_json(file, dict[str, Any]) if file.is_file() else {}
        if _TEMPLATE not in said:
            continue
        named = said[_TEMPLATE]
        said[_TEMPLATE] = template
        if isinstance(named, list):
            others = [one for one in named if isinstance(one, dict) and one.get("name") != "default"]
            said[_TEMPLATE] = [{"name": "default", "template": template}, *others]
        _write(file, said)


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
