"""Check that an adapter loads as it is: its files, config and values, and with PEFT on a base built from its config."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from polymerge.checkpoints.adapter import Adapter, open_adapter
from polymerge.checkpoints.files import class_names, read_config
from polymerge.checkpoints.hub import split_revision
from polymerge.checkpoints.loading import model_class, named_class, needs_code, quiet
from polymerge.checkpoints.tensor_info import listed
from polymerge.engine.findings import Finding, Verification, finite
from polymerge.errors import PolymergeError
from polymerge.paths import given_path

__all__ = ["base_folder", "verify_adapter"]


def verify_adapter(
    folder: str | Path,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    checked: Collection[str] = (),
) -> Verification:
    """Check an adapter folder: its tensors fit its config and are finite, and PEFT finds a module for each.

    The base is built on the meta device from its config alone; its weights are not read and need not be there.

    base               a folder, or a hub id whose config is in the cache; by default the one that the adapter's config
                       names
    trust_remote_code  run Python files from the base's folder if its model needs them
    checked            names of tensors whose values are known to be finite, and are not read

    raises PolymergeError if it cannot be opened.
    """
    path = given_path(folder)
    adapter = open_adapter(str(folder), path)
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    held = f"{len(adapter.pairs)} modules of rank {', '.join(map(str, ranks))}, {len(adapter.non_lora)} full weights"
    return Verification(
        path,
        (
            Finding("files", True, held),
            _names(adapter),
            finite(adapter.entries, path, checked),
            _config(path),
            _base(adapter, base, trust_remote_code),
        ),
    )


def _names(adapter: Adapter) -> Finding:
    """Check that full weights are named as PEFT expects: under `base_layer` for modules that also have factors."""
    lost = [
        entry.name
        for parameter, entry in adapter.non_lora.items()
        if parameter.rpartition(".")[0] in adapter.pairs and ".base_layer." not in entry.name
    ]
    if lost:
        return Finding("names", False, f"{len(lost)} weights of modules with factors are not in base_layer: {lost[0]}")
    return Finding("names", True, "every full weight has the name that PEFT looks for")


def _config(path: Path) -> Finding:
    try:
        from peft import PeftConfig
    except ImportError as error:
        return Finding("config", None, f"peft is not installed: {error}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # whatever PEFT raises means that the folder does not load
        return Finding("config", False, f"PeftConfig: {type(error).__name__}: {error}")
    return Finding("config", True, f"{type(config).__name__}, rank {getattr(config, 'r', '?')}")


def _base(adapter: Adapter, said: str | None, trust_remote_code: bool) -> Finding:
    """Check that PEFT finds a module of the base for each tensor of the adapter, and a tensor for each module."""
    try:
        import peft
        import transformers  # noqa: F401 (peft, once loaded, stays without it)
    except ImportError as error:
        return Finding("loads", None, f"{error.name or 'peft'} is not installed")
    if adapter.layout == "llava":
        return Finding("loads", None, "it is in LLaVA's own layout, which PEFT alone does not load")
    folder, why = base_folder(said or adapter.config.get("base_model_name_or_path"), adapter.config.get("revision"))
    if folder is None:
        return Finding("loads", None, f"{why}: say where it is with `base`")
    try:
        config = read_config(folder / "config.json")
    except PolymergeError as error:
        return Finding("loads", None, f"its base cannot be read: {error}")
    if needs_code(config) and not trust_remote_code:
        return Finding("loads", None, "its base is code that lies in a folder, which `trust_remote_code` runs")
    if class_names(config) and named_class(config) is None and "auto_map" not in config:
        return Finding("loads", None, f"transformers has none of the classes of its base {folder}")
    loader = _class_of(adapter.config, config)
    try:
        with quiet():
            model, resized = _skeleton(loader, folder, adapter, trust_remote_code)
    except Exception as error:  # whatever a model's class raises says that the base itself cannot be built here
        return Finding("loads", None, f"{loader.__name__} cannot build its base {folder}: {_first(error)}")
    try:
        with quiet():
            loaded = peft.PeftModel.from_pretrained(
                model, str(adapter.folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
            # what it has found a place for is told only by loading once more
            result = loaded.load_adapter(
                str(adapter.folder), "default", low_cpu_mem_usage=True, torch_device="cpu",
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
            )  # fmt: skip
    except Exception as error:  # whatever PEFT raises means that the adapter does not load
        return Finding("loads", False, f"PEFT on {type(model).__name__} of {folder}: {_first(error)}")
    # PEFT saves the weights of a resized vocabulary under several names, and finds those of one
    lost, empty = sorted({*result.unexpected_keys} - {*adapter.skipped}), sorted(result.missing_keys)
    where = f"PEFT on {type(model).__name__} of {folder}{f', resized to {resized} rows' if resized else ''}"
    absent = f"{len(empty)} tensors of modules are not there: {listed(empty, 2)}"
    # without them a module is the base's, unless its factors begin with an update
    if lost or (empty and adapter.config.get("init_lora_weights") is False):
        parts = [f"{len(lost)} tensors find no module: {listed(lost, 2)}"] if lost else []
        parts += [absent] if empty else []
        return Finding("loads", False, f"{where}: {'; '.join(parts)}.{_older(lost, empty)}")
    if empty:
        return Finding("loads", True, f"{where}: every tensor has its module, and {absent}, so these are the base's")
    return Finding("loads", True, f"{where}: every tensor has its module")


def base_folder(base: object, revision: object) -> tuple[Path | None, str]:
    """The folder of the base's config, or None and the reason; the network is not used."""
    if not isinstance(base, str) or not base:
        return None, "its config names no base"
    path = given_path(base)
    if (path / "config.json").is_file():
        return path, ""
    if path.exists() or path.is_absolute():
        return None, f"its base {base} has no config.json here"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, own = split_revision(base)
    try:
        found = try_to_load_from_cache(name, "config.json", revision=own or (str(revision) if revision else None))
    except HFValidationError:
        found = None
    return (Path(found).parent, "") if isinstance(found, str) else (None, f"its base {base} is not on this disk")


def _class_of(adapter: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The class that an adapter was trained on if its config names it, else the one that the base's config names."""
    import transformers

    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if isinstance(named, str) and hasattr(transformers, named):
        return getattr(transformers, named)
    return transformers.AutoModel if adapter.get("task_type") == "FEATURE_EXTRACTION" else model_class(config)


def _skeleton(loader: Any, folder: Path, adapter: Adapter, trust_remote_code: bool) -> tuple[Any, int]:
    """Build the base on the meta device; return it and the number of vocabulary rows to resize it to, or 0."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
    text, rows = config.get_text_config(), _rows(adapter)
    resized = rows if rows and rows != getattr(text, "vocab_size", rows) else 0
    if resized:
        text.vocab_size = rows
    with torch.device("meta"):
        if issubclass(loader, transformers.PreTrainedModel):
            return loader._from_config(config), resized
        return loader.from_config(config, trust_remote_code=trust_remote_code), resized


def _rows(adapter: Adapter) -> int:
    """The number of vocabulary rows of an adapter that changes embedding or head; otherwise 0."""
    ends = ("embed_tokens", "lm_head")
    full = [(name.removesuffix(".weight"), entry.shape[0]) for name, entry in adapter.non_lora.items() if entry.shape]
    pairs = [(name, pair.shape[1] if pair.embedding else pair.shape[0]) for name, pair in adapter.pairs.items()]
    return next((rows for module, rows in (*full, *pairs) if module.rpartition(".")[2] in ends), 0)


def _older(lost: list[str], empty: list[str]) -> str:
    """Advice for an adapter named after another layout of its base."""
    return (
        " The names are those of another transformers, or of another model: `polymerge fold` joins either layout"
        if lost and empty
        else ""
    )


def _first(error: Exception) -> str:
    """Format an error's type and message on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
