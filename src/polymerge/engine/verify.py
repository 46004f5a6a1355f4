"""Check that an output loads as it is: its files, its values, its ties, the model's classes, the processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from polymerge.checkpoints import Checkpoint, open_checkpoint
from polymerge.checkpoints.adapter import is_adapter
from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.folder import bring
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.json_objects import read_json
from polymerge.checkpoints.loading import PROCESSOR_FILES, load_told, model_class, named_class, needs_code, quiet
from polymerge.checkpoints.names import unwrapped
from polymerge.checkpoints.needed_packages import needed_package
from polymerge.dtypes import MERGEABLE, dtype_code, dtype_name, holds
from polymerge.engine.extents import Files
from polymerge.engine.findings import BLOCK, Finding, Verification, finite
from polymerge.engine.verify_adapter import verify_adapter
from polymerge.errors import PolymergeError, RecipeError, human_size
from polymerge.families import read_names, text_tower
from polymerge.families.config import config_dtype, splits
from polymerge.families.expressions import names_read
from polymerge.families.names_on_disk import as_published, why_published
from polymerge.families.resolve import map_names
from polymerge.paths import given_path

__all__ = ["Finding", "Verification", "verify"]

_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def verify(
    folder: str | Path,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    checked: Collection[str] = (),
) -> Verification:
    """Check that a checkpoint or adapter folder loads as it is, without allocating its weights.

    folder             or a hub id, which is downloaded in full
    base               for an adapter: its base, if not the one that its config names
    trust_remote_code  run Python files from the folder if its model needs them
    checked            names of tensors whose values are known to be finite, and are not read

    raises RecipeError or CheckpointError if a hub id cannot be downloaded; all other problems are findings.
    """
    path = given_path(folder)
    if not (path.exists() or path.is_absolute() or path.parent.is_dir()):
        path = locate(str(folder))
        bring(str(folder), path)
    try:
        if is_adapter(path):
            return verify_adapter(path, base=base, trust_remote_code=trust_remote_code, checked=checked)
        if base is not None:
            raise RecipeError(f"{path}: is a checkpoint; base is only for adapters")
        return _verify_checkpoint(path, trust_remote_code, checked)
    except PolymergeError as error:
        return Verification(path, (Finding("files", False, "; ".join(map(str, error.problems))),))


def _verify_checkpoint(path: Path, trust_remote_code: bool, checked: Collection[str]) -> Verification:
    """Check that a checkpoint folder loads as it is, without allocating its weights.

    Its headers are read and every value is looked at once, but for tensors in `checked`; the model is built on torch's
    meta device from its own config and loaded with `from_pretrained`, which must leave no key missing, unexpected or
    mismatched, and round no value; the processor or tokenizer is loaded; a head that is stored although the config ties
    it is compared with the embedding; the number of parameters must be that of the template.

    trust_remote_code  run Python files from the folder if its model needs them

    raises PolymergeError if it cannot be opened.
    """
    checkpoint = open_checkpoint(str(path), path)
    size = sum(entry.nbytes for entry in checkpoint.entries.values())
    files = Finding(
        "files", True, f"{len(checkpoint.entries)} tensors, {human_size(size)} in {len(checkpoint.files)} file(s)"
    )
    with quiet():
        loads, model = _loads(checkpoint, trust_remote_code)
        findings = (
            files,
            finite(checkpoint.entries.values(), path, checked),
            _parameters(checkpoint),
            _names(checkpoint),
            _ties(checkpoint),
            loads,
            _dtypes(checkpoint, model),
            _processor(checkpoint, trust_remote_code),
        )
    return Verification(path, findings)


def _parameters(checkpoint: Checkpoint) -> Finding:
    count = sum(prod(entry.shape) for name, entry in checkpoint.entries.items() if name not in checkpoint.aliases)
    record = checkpoint.folder / "polymerge.json"
    if not record.is_file():
        return Finding("parameters", None, f"{count}; no polymerge.json to say how many the template has")
    try:
        expected = read_json(record, dict[str, Any], most=RECORDS_BYTES)["output"]["parameters"]
    except (PolymergeError, KeyError, TypeError) as error:
        return Finding("parameters", False, f"{record.name} cannot be read: {type(error).__name__}: {error}")
    if count != expected:
        return Finding("parameters", False, f"{count}, the template has {expected}")
    return Finding("parameters", True, f"{count}, as many as the template has")


def _names(checkpoint: Checkpoint) -> Finding:
    """What the tensors are called: as their family is published, or as transformers 5 has them in memory."""
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    reading = read_names(checkpoint.config, shapes)
    plain = {unwrapped(name, reading.wrappers): shape for name, shape in shapes.items()}
    found = as_published(checkpoint.config, reading, plain)
    if found.why:
        return Finding("names", None, f"what its family is published with is not known: {found.why}")
    if said := why_published("it", found):
        return Finding("names", True, said)
    return Finding("names", True, "those that its family is published with")


def _ties(checkpoint: Checkpoint) -> Finding:
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    family = read_names(checkpoint.config, shapes).family
    tensors = map_names(family, shapes, str(checkpoint.folder), splits(checkpoint.config, family), shapes).tensors
    pair = [tensors.get(name) for name in ("text.embed_tokens.weight", "text.lm_head.weight")]
    if text_tower(checkpoint.config, family).ties_head is not True:
        return Finding("ties", True, "the config ties nothing")
    if pair[0] is None or pair[1] is None:
        return Finding("ties", True, "head and embedding are one tensor")
    embedding, head = (checkpoint.entries[names_read(expr)[0]] for expr in pair if expr is not None)
    with Files() as files:
        pairs = zip(files.blocks(embedding, BLOCK), files.blocks(head, BLOCK), strict=False)
        same = embedding.nbytes == head.nbytes and all(np.array_equal(one, other) for one, other in pairs)
    if same:
        return Finding("ties", True, f"{embedding.name} and {head.name} are stored twice with the same values")
    detail = (
        f"{head.name} is a head of its own: transformers 5 takes it although the config ties it to {embedding.name}; "
        "what goes by the config alone (vLLM, transformers 4) needs tie_word_embeddings: false there"
    )
    return Finding("ties", True, detail)


def _loads(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Finding, Any]:
    """Check that the folder loads; return the finding and, if it does, the model on the meta device."""
    try:
        import transformers
    except ImportError as error:
        return Finding("loads", None, f"transformers cannot be imported: {error}"), None
    config = checkpoint.config
    if not config:
        return Finding("loads", None, "there is no config.json, so no class can be asked to load it"), None
    if needs_code(config) and not trust_remote_code:
        return Finding("loads", None, "its model is code that lies in the folder; `trust_remote_code` runs it"), None
    try:
        loader = model_class(config)
        # a class that only its authors' program has: transformers may take it for another one by its model type
        foreign = "auto_map" not in config and _without_class(config)
    except ImportError as error:  # of what its file imports
        return Finding("loads", None, needed_package(error)), None
    if foreign and config.get("model_type") not in transformers.CONFIG_MAPPING:
        return Finding("loads", None, f"{foreign}, and no code lies in the folder"), None
    try:
        model, wrong = load_told(
            loader,
            str(checkpoint.folder),
            device_map="meta",
            dtype="auto",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever a model's class raises means that the folder does not load
        if said := needed_package(error):
            return Finding("loads", None, said), None
        if foreign:
            return Finding("loads", None, f"{foreign}, and {loader.__name__} cannot load it"), None
        return Finding("loads", False, f"{loader.__name__}: {type(error).__name__}: {error}"), None
    if wrong and foreign:
        return Finding("loads", None, f"{foreign}, and {loader.__name__} has other names ({wrong})"), None
    if wrong:
        return Finding("loads", False, f"{loader.__name__}: {wrong}"), None
    return Finding("loads", True, f"{loader.__name__}: no key missing, unexpected or mismatched"), model


def _dtypes(checkpoint: Checkpoint, model: Any) -> Finding:
    """Check that loading the folder as it is does not round values.

    A model is loaded in one dtype, and what is stored in a wider one is rounded. That is a fault if it happens to most
    tensors, or to any that polymerge wrote; not if a published checkpoint stores a few, such as its norms, with more
    digits than its own config asks for, nor if a family keeps modules in float32 anyway.

    model  on the meta device; None if it could not be loaded, so that only the config can tell
    """
    stored = Counter[str]()
    for entry in checkpoint.entries.values():
        if entry.dtype in MERGEABLE:
            stored[entry.dtype] += prod(entry.shape)
    loaded = config_dtype(checkpoint.config)
    if model is not None:
        found = Counter[str]()
        for parameter in model.parameters():
            found[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        loaded = dtype_code(found.most_common(1)[0][0]) if found else None
    held = " and ".join(map(dtype_name, (code for code, _ in stored.most_common())))
    if loaded is None:
        return Finding("dtypes", None, f"stored as {held or 'integers'}, and no dtype is known that it is loaded in")
    name = dtype_name(loaded)
    rounded = {
        own: entry.dtype
        for own, entry in checkpoint.entries.items()
        if entry.dtype in MERGEABLE and not holds(loaded, entry.dtype)
    }
    if not rounded:
        return Finding("dtypes", True, f"stored as {held}, loaded as {name}")
    known = _rounded_by_template(checkpoint)
    few = known is None and stored.most_common(1)[0][0] not in rounded.values()
    wrong = [] if few else [own for own in rounded if own not in (known or ())]
    detail = f"{len(wrong or rounded)} tensors stored as {' and '.join(sorted({*map(dtype_name, rounded.values())}))}"
    if wrong:
        first = f"first {wrong[0]}"
        return Finding("dtypes", False, f"{detail} are rounded to {name} when it is loaded, {first}. Mend config.json")
    whose = "as in the template" if known is not None else "beside most of its tensors"
    return Finding("dtypes", True, f"{detail}, {whose}; all is loaded as {name}")


def _rounded_by_template(checkpoint: Checkpoint) -> list[str] | None:
    """Tensors that the template's own config rounds as well, according to polymerge.json; None without it."""
    try:
        record = read_json(checkpoint.folder / "polymerge.json", dict[str, Any], most=RECORDS_BYTES)
        names = record["output"]["rounded_by_template"]
    except (PolymergeError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _without_class(config: Mapping[str, Any]) -> str:
    """A note if transformers lacks the class that a config names; empty otherwise."""
    named = class_names(config)
    return f"transformers has no class {named[0]}" if named and named_class(config) is None else ""


def _processor(checkpoint: Checkpoint, trust_remote_code: bool) -> Finding:
    names = {path.name for path in checkpoint.folder.iterdir()}
    if not names & {*PROCESSOR_FILES, *_TOKENIZERS}:
        return Finding("processor", None, "the template has neither processor nor tokenizer files")
    try:
        import transformers
    except ImportError as error:
        return Finding("processor", None, f"transformers cannot be imported: {error}")
    name = "AutoProcessor" if names & set(PROCESSOR_FILES) else "AutoTokenizer"
    try:
        loader = getattr(transformers, name)
        loaded = loader.from_pretrained(
            str(checkpoint.folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a processor's class raises means that it does not load
        if said := needed_package(error):
            return Finding("processor", None, said)
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "auto_map" in checkpoint.config and not trust_remote_code:
            return Finding("processor", None, "it is code that lies in the folder; `trust_remote_code` runs it")
        if foreign := _without_class(checkpoint.config):
            return Finding("processor", None, f"{foreign}, and {name} cannot load what it reads with")
        return Finding("processor", False, f"{name}: {detail}")
    if wrong := _misnumbered(checkpoint, getattr(loaded, "tokenizer", loaded)):
        return Finding("processor", False, f"{type(loaded).__name__}: {wrong}")
    return Finding("processor", True, type(loaded).__name__)


def _misnumbered(checkpoint: Checkpoint, tokenizer: Any) -> str:
    """Which added token of polymerge.json's has another number in the loaded tokenizer; empty if none has."""
    record = checkpoint.folder / "polymerge.json"
    try:
        said = read_json(record, dict[str, Any], most=RECORDS_BYTES) if record.is_file() else {}
        added = [(one["content"], one["id"]) for one in (said.get("vocabulary") or {}).get("added", ())]
    except (PolymergeError, KeyError, TypeError, AttributeError) as error:
        return f"{record.name} cannot be read: {type(error).__name__}: {error}"
    for token, number in added:
        if (found := tokenizer.convert_tokens_to_ids(token)) != number:
            return f"added token '{token}' has the number {found}, its row is {number}"
    return ""
