"""The demo's models as VLMEvalKit's LLaVA_Next, which wants transformers 4, reads and understands them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

USERS, ASSISTANTS = "<assistant>", "ASSISTANT:"


def as_vicuna(model: Path, folder: Path) -> Path:
    """Copy a model; its tokenizer calls the assistant as Vicuna's does, and its files are those of transformers 4."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(USERS, ASSISTANTS), encoding="utf-8")
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **names})
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    _write(folder / "preprocessor_config.json", processor.pop("image_processor"))
    _write(folder / "processor_config.json", processor)
    return folder


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")
