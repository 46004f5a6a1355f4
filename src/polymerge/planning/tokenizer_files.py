"""Bring the files beside an output's weights in line with the vocabulary and the chat template that a plan chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymerge.checkpoints.added_tokens import add_tokens, write_chat_template
from polymerge.checkpoints.json_objects import read_json
from polymerge.planning.plan import Plan

__all__ = ["chooses_files", "with_ids", "write_chosen"]


def chooses_files(plan: Plan) -> bool:
    """Return whether files beside the weights are others than those that are copied."""
    chosen = plan.vocabulary
    return plan.chat_template is not None or (chosen is not None and bool(chosen.added or chosen.ids))


def write_chosen(plan: Plan, folder: Path) -> None:
    """Change the copied files in a folder: added tokens, numbers of tokens in configs, the chat template.

    raises CheckpointError where a file that is to be changed cannot be read.
    """
    if plan.vocabulary is not None:
        add_tokens(folder, plan.vocabulary.added)
        for name, ids in plan.vocabulary.ids.items():
            if (file := folder / name).is_file():
                said = with_ids(read_json(file, dict[str, Any]), ids)
                file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plan.chat_template is not None:
        write_chat_template(folder, plan.chat_template)


def with_ids(config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other numbers of tokens, at every level that has them."""
    return {
        key: with_ids(value, ids)
        if isinstance(value, Mapping)
        else ids[key]
        if key in ids and value is not None
        else value
        for key, value in config.items()
    }
