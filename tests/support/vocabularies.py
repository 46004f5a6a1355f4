"""Tiny models with a tokenizer.json each, and what a union of them is by a loop over rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layouts import Sizes, random_tower, write

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_vocabulary(
    folder: Path,
    seed: int,
    tokens: Sequence[str],
    rows: int = 0,
    *,
    added: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    layout: str = "llama",
    **config: Any,
) -> Path:
    """A decoder whose first rows stand for these tokens and `added` ones, the rest of `rows` for none."""
    sizes = Sizes(rows=rows or len(tokens) + len(added), layers=1)
    write(layout, folder, random_tower(sizes, seed, dtype=dtype), sizes)
    special = [
        {"id": len(tokens) + place, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for place, token in enumerate(added)
    ]  # fmt: skip
    vocabulary = {"type": "WordLevel", "vocab": {token: place for place, token in enumerate(tokens)}}
    written = {"model": vocabulary, "added_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(said | config), encoding="utf-8")
    return folder


def filled_in(
    tokens: Sequence[str], held: Sequence[tuple[Sequence[str], Tensor]], base: int | None = None
) -> list[Tensor]:
    """Each model's rows for `tokens`: its own; else the base's, if that has the token; else the mean of all that do.

    held   the tokens of each model, with its tensor; `base` is the index of the base among them
    """
    rows: list[list[Tensor]] = [[] for _ in held]
    for token in tokens:
        have = [tensor[own.index(token)].float() for own, tensor in held if token in own]
        of_base = base is not None and token in held[base][0]
        for place, (own, tensor) in enumerate(held):
            if token in own:
                rows[place].append(tensor[own.index(token)].float())
            elif of_base and base is not None:
                rows[place].append(held[base][1][held[base][0].index(token)].float())
            else:
                total = have[0].clone()
                for other in have[1:]:
                    total = total + other
                rows[place].append(total / len(have))
    return [torch.stack(own) for own in rows]


def listed(*models: Path | str, weights: Sequence[float] = (), **more: Any) -> dict[str, Any]:
    """A recipe, linear if nothing else is said."""
    shares = weights or [0.5] * len(models)
    entries = [
        {"model": str(model), "parameters": {"weight": weight}} for model, weight in zip(models, shares, strict=True)
    ]
    return {"merge_method": "linear", "models": entries, **more}


def tokenizer_in(folder: Path) -> Mapping[str, int]:
    """The numbers of a tokenizer.json's tokens, as they are written."""
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return said["model"]["vocab"] | {one["content"]: one["id"] for one in said["added_tokens"]}
