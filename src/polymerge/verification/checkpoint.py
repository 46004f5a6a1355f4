"""Does a checkpoint load as it is? Its files, its values, its ties, the model's classes, the processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from polymerge.checkpoint import Checkpoint, open_checkpoint
from polymerge.families import read_names, text_tower
from polymerge.generation.models import PROCESSOR_FILES, load_told, model_class, named_class, quiet
from polymerge.namemap import map_names
from polymerge.reads import names_read
from polymerge.verification.findings import Finding, Verification
from polymerge.verification.values import BLOCK, blocks_of, finite

__all__ = ["verify_checkpoint"]

_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def verify_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Check that a checkpoint folder loads as it is, without taking memory for its weights.

    Its headers are read and every value is looked at once; the model is built on torch's meta device from its own
    config and loaded with `from_pretrained`, which must leave no key missing, unexpected or mismatched; the processor
    or tokenizer is loaded; tied tensors must agree; the number of parameters must be that of the template.

    trust_remote_code  run Python files that lie in the folder, where its model needs them

    raises PolymergeError where it cannot be opened.
    """
    path = Path(folder)
    checkpoint = open_checkpoint(str(folder), path)
    size = sum(entry.nbytes for entry in checkpoint.entries.values())
    files = Finding(
        "files", True, f"{len(checkpoint.entries)} tensors, {size / 1e9:.2f} GB in {len(checkpoint.files)} file(s)"
    )
    with quiet():
        findings = (
            files,
            finite(checkpoint.entries.values()),
            _parameters(checkpoint),
            _ties(checkpoint),
            _loads(checkpoint, trust_remote_code),
            _processor(checkpoint, trust_remote_code),
        )
    return Verification(path, findings)


def _parameters(checkpoint: Checkpoint) -> Finding:
    count = sum(prod(entry.shape) for name, entry in checkpoint.entries.items() if name not in checkpoint.aliases)
    record = checkpoint.folder / "polymerge.json"
    if not record.is_file():
        return Finding("parameters", None, f"{count}; no polymerge.json to say how many the template has")
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["output"]["parameters"]
    except (ValueError, KeyError, TypeError) as error:
        return Finding("parameters", False, f"{record.name} cannot be read: {type(error).__name__}: {error}")
    if count != expected:
        return Finding("parameters", False, f"{count}, the template has {expected}")
    return Finding("parameters", True, f"{count}, as many as the template has")


def _ties(checkpoint: Checkpoint) -> Finding:
    family = read_names(checkpoint.config, checkpoint.entries).family
    tensors = map_names(family, checkpoint.entries, str(checkpoint.folder)).tensors
    pair = [tensors.get(name) for name in ("text.embed_tokens.weight", "text.lm_head.weight")]
    if text_tower(checkpoint.config, family).ties_head is not True:
        return Finding("ties", True, "the config ties nothing")
    if pair[0] is None or pair[1] is None:
        return Finding("ties", True, "head and embedding are one tensor")
    embedding, head = (checkpoint.entries[names_read(expr)[0]] for expr in pair if expr is not None)
    same = embedding.nbytes == head.nbytes and all(
        np.array_equal(one, other)
        for one, other in zip(blocks_of(embedding, BLOCK), blocks_of(head, BLOCK), strict=True)
    )
    detail = (
        "are stored twice with the same values" if same else "are tied by the config and stored with different values"
    )
    return Finding("ties", same, f"{embedding.name} and {head.name} {detail}")


def _loads(checkpoint: Checkpoint, trust_remote_code: bool) -> Finding:
    try:
        import transformers
    except ImportError as error:
        return Finding("loads", None, f"transformers cannot be imported: {error}")
    config = checkpoint.config
    if not config:
        return Finding("loads", None, "there is no config.json, so no class can be asked to load it")
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        return Finding("loads", None, "its model is code that lies in the folder; --trust-remote-code runs it")
    loader = model_class(config)
    # a class that only its authors' program has: transformers may take it for another one by its model type
    foreign = "auto_map" not in config and _without_class(config)
    if foreign and config.get("model_type") not in transformers.CONFIG_MAPPING:
        return Finding("loads", None, f"{foreign}, and no code lies in the folder")
    try:
        _, wrong = load_told(
            loader,
            str(checkpoint.folder),
            device_map="meta",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever a model's class raises means that the folder does not load
        if foreign:
            return Finding("loads", None, f"{foreign}, and {loader.__name__} cannot load it")
        return Finding("loads", False, f"{loader.__name__}: {type(error).__name__}: {error}")
    if wrong and foreign:
        return Finding("loads", None, f"{foreign}, and {loader.__name__} has other names ({wrong})")
    if wrong:
        return Finding("loads", False, f"{loader.__name__}: {wrong}")
    return Finding("loads", True, f"{loader.__name__}: no key missing, unexpected or mismatched")


def _without_class(config: Mapping[str, Any]) -> str:
    """That transformers has none of the classes that a config names; empty where it has one, or none is named."""
    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    return f"transformers has no class {named[0]}" if named and named_class(config) is None else ""


def _processor(checkpoint: Checkpoint, trust_remote_code: bool) -> Finding:
    names = {path.name for path in checkpoint.folder.iterdir()}
    if not names & {*PROCESSOR_FILES, *_TOKENIZERS}:
        return Finding("processor", None, "the template has neither processor nor tokenizer files")
    try:
        import transformers
    except ImportError as error:
        return Finding("processor", None, f"transformers cannot be imported: {error}")
    loader = transformers.AutoProcessor if names & set(PROCESSOR_FILES) else transformers.AutoTokenizer
    try:
        loaded = loader.from_pretrained(
            str(checkpoint.folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a processor's class raises means that it does not load
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # transformers says it with a ValueError, too
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and "to be installed" in detail):
            return Finding("processor", None, f"a package that it needs is not installed: {detail}")
        if "auto_map" in checkpoint.config and not trust_remote_code:
            return Finding("processor", None, "it is code that lies in the folder; --trust-remote-code runs it")
        if foreign := _without_class(checkpoint.config):
            return Finding("processor", None, f"{foreign}, and {loader.__name__} cannot load what it reads with")
        return Finding("processor", False, f"{loader.__name__}: {detail}")
    return Finding("processor", True, type(loaded).__name__)
