"""LoRA adapters: pairs of factors, and the full weights that were trained with them, from headers alone.

PEFT writes an adapter_config.json and one adapter_model.safetensors (older: .bin), in which every name starts with
`base_model.model.` and continues as in the base model. LLaVA adds a non_lora_trainables.bin with the full
weights that were trained, such as the projector's, and the config.json of the model; other trainers name that file
differently. So every weight file of the folder is read, except known exceptions (see `discovery`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from polymerge.checkpoints.adapter_config import LoraConfig, foreign_kind, read_lora_config, saved_modules
from polymerge.checkpoints.discovery import CONFIG, LLAVA, AdapterFiles, holds_adapter, sort_files
from polymerge.checkpoints.files import disagreements, missing, read_config, read_file, read_index, reading
from polymerge.checkpoints.identity import Stamp, Stamps, stamps_of
from polymerge.checkpoints.names import Sorted, sort_names
from polymerge.checkpoints.pairs import AGAIN, GATHER, Pair, paired, token_rows
from polymerge.checkpoints.tensor_info import Contents, TensorInfo, listed
from polymerge.dtypes import MERGEABLE
from polymerge.errors import CheckpointError, RecipeError, Refused, collecting, refuse

__all__ = ["Adapter", "is_adapter", "open_adapter"]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, as described by its headers; no tensor has been read."""

    source: str
    """As given by the user."""
    folder: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    model_config: Mapping[str, Any]
    """config.json beside it, or {} if there is none."""
    layout: Literal["peft", "llava"]
    """"llava" if a non_lora_trainables.bin is beside the factors."""
    pairs: Mapping[str, Pair]
    """By module, in file order."""
    non_lora: Mapping[str, TensorInfo]
    """By parameter name in the base model, the full tensor that replaces it."""
    tokens: Mapping[str, tuple[tuple[int, ...], TensorInfo]]
    """By the name of an embedding's parameter, token indices and the rows that replace theirs."""
    files: tuple[Path, ...]
    skipped: Mapping[str, str]
    """Tensors in the files that are not part of the adapter -> why they are left out."""
    beside: tuple[Path, ...] = ()
    """Those of `files` that are not PEFT's own."""
    became: Mapping[str, str] = field(default_factory=dict)
    """For every weight file in the folder, by name, its content or why it is left out."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Weight files in the folder that are not part of the adapter -> why."""
    stamps: Stamps = field(default_factory=dict, compare=False, repr=False)
    """Of every file that was read, or whose header was, from before."""

    @property
    def entries(self) -> tuple[TensorInfo, ...]:
        """Every tensor of the adapter, under its name in the file."""
        factors = [entry for pair in self.pairs.values() for entry in (pair.a, pair.b, pair.bias) if entry]
        return (*factors, *self.non_lora.values(), *(rows for _, rows in self.tokens.values()))

    def where(self, parameters: Iterable[str]) -> str:
        """The location of full weights with these names: files beside PEFT's own, or the folder."""
        files = [self.non_lora[name].file for name in parameters if name in self.non_lora]
        return ", ".join(map(str, dict.fromkeys(file for file in files if file in self.beside))) or str(self.folder)

    def saved_apart(self, parameter: str) -> bool:
        """Return whether a full weight belongs to a copy that PEFT trained in place of a module (`modules_to_save`).

        Every other full weight is the base's own tensor, which head and embedding share if the base ties them.
        """
        module = parameter.rpartition(".")[0]
        return any(f".{module}".endswith(f".{name}") for name in saved_modules(self.config))

    @property
    def tokens_of_tied(self) -> bool:
        """Whether trained rows apply to both an embedding and its tied head, as those of a plain list do."""
        return isinstance(self.config.get("trainable_token_indices"), list)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it changes, by their names in the model that it was trained on, each once."""
        weights = (pair.parameter for pair in self.pairs.values())
        biases = (f"{module}.bias" for module, pair in self.pairs.items() if pair.bias)
        return tuple(dict.fromkeys((*self.non_lora, *self.tokens, *weights, *biases)))


def is_adapter(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter_config.json and without the weights of a full model."""
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:
        return False
    return holds_adapter(names)


def open_adapter(source: str, path: Path) -> Adapter:
    """Read configs and headers of the adapter in the folder `path`, and check that they agree.

    `source` is its name as given by the user. Nothing in the files is executed.

    Raises RecipeError if `path` is not an adapter, CheckpointError if it cannot be listed, and Refused with everything
    is wrong with it.
    """
    try:
        if not path.exists():
            raise RecipeError(f"adapter '{source}': {missing(path.absolute())}")
        folder = path.resolve()
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        present = {file.name for file in there if not file.is_dir()}
        inside = [file.name for file in there if (file / CONFIG).is_file()]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check its permissions.") from None
    if CONFIG not in present:
        held = f"It holds {listed([file.name for file in there], 8)}. " if there else ""
        then = (
            f"Name {listed([str(folder / name) for name in inside])}." if inside else "Name the folder that PEFT saved."
        )
        raise RecipeError(f"{folder}: has no {CONFIG}, so it is not an adapter. {held}{then}")

    with collecting() as found:
        adapter = _read(source, folder, present)
        if adapter is not None and not found:
            return adapter
    raise Refused(found)


def _read(source: str, folder: Path, present: Collection[str]) -> Adapter | None:
    """Read the adapter in a folder with these files, refusing all problems; None for other kinds of adapters."""
    where = folder / CONFIG
    configs: dict[str, Mapping[str, Any]] = {}
    stamps: dict[Path, Stamp | None] = stamps_of([where, folder / "config.json"])
    for name in (CONFIG, "config.json"):
        with reading(folder / name):
            configs[name] = read_config(folder / name)
    rules: LoraConfig | None = None
    if CONFIG in configs:
        if foreign := foreign_kind(configs[CONFIG], str(where)):
            refuse(foreign)
            return None
        with reading(where):
            rules = read_lora_config(configs[CONFIG], str(where))

    contents: dict[str, Contents] = {}
    files = AdapterFiles()
    with reading(folder):
        files = sort_files(folder, present)
    stamps |= stamps_of(folder / name for name in (*files.read, *([files.index] if files.index else [])))
    for name in files.factors:
        with reading(folder / name):
            contents[name] = read_file(folder / name)
    if files.index and len(contents) == len(files.factors):
        with reading(folder / files.index):
            held_by = {name: [entry.name for entry in file.entries] for name, file in contents.items()}
            refuse(*disagreements(folder / files.index, read_index(folder / files.index), held_by))
    for name in files.beside:
        with reading(folder / name, "If it is not part of the adapter, move it out of the folder."):
            contents[name] = read_file(folder / name)
            if not contents[name].entries:
                raise CheckpointError(f"{folder / name}: holds no tensors.")
    held = [(file, name in files.beside) for name, file in contents.items()]
    found, misnamed = sort_names(folder, held, wrapped=bool(rules and rules.parameters))
    if not (rules is None and configs.get(CONFIG, {}).get("target_parameters")):  # which names modules otherwise
        refuse(*misnamed)
    refuse(*_unusable(found))
    whole = len(contents) == len(files.read) > 0
    if whole and not (found.factors or found.non_lora or found.tokens or misnamed):
        refuse(CheckpointError(f"{folder}: holds no tensors in {listed(files.read)}. {AGAIN}"))
    pairs: dict[str, Pair] = {}
    if all(name in contents for name in files.factors):
        pairs = paired(found, rules, where)
    tokens = token_rows(found, rules, where) if rules and whole else {}
    return Adapter(
        source=source,
        folder=folder,
        config=MappingProxyType(dict(configs.get(CONFIG, {}))),
        model_config=MappingProxyType(dict(configs.get("config.json", {}))),
        layout="llava" if LLAVA in present else "peft",
        pairs=MappingProxyType(pairs),
        non_lora=MappingProxyType(found.non_lora),
        tokens=MappingProxyType(tokens),
        files=tuple(folder / name for name in files.read),
        skipped=MappingProxyType(found.skipped),
        beside=tuple(folder / name for name in files.beside),
        became=MappingProxyType(_became(files, found)),
        left_out=MappingProxyType(files.left_out),
        stamps=MappingProxyType(stamps),
    )


def _became(files: AdapterFiles, found: Sorted) -> dict[str, str]:
    """Describe what each weight file holds."""
    factors = Counter(entry.file.name for slots in found.factors.values() for entry in slots.values())
    full = Counter(entry.file.name for entry in found.non_lora.values())
    rows = Counter(entry.file.name for entry in found.tokens.values())
    said: dict[str, list[str]] = {name: [] for name in files.read}
    for counts, what in ((factors, "factors"), (full, "full weights"), (rows, "trained rows of embeddings")):
        for name, count in counts.items():
            said[name].append(f"{count} {what}")
    for (first, second), names in found.repeated.items():
        said[second.name].append(f"{len(names)} that {first.name} holds byte for byte, and that are read there")
    became = {name: ", ".join(words) or "nothing that is read" for name, words in said.items()}
    return became | {name: f"left out: {why}" for name, why in files.left_out.items()}


def _unusable(found: Sorted) -> list[CheckpointError]:
    """Errors for dtypes without arithmetic, and for full weights that were sharded across other processes when
    saved.
    """
    factors = [tensor for slots in found.factors.values() for tensor in slots.values()]
    full = [*found.non_lora.values(), *found.tokens.values()]
    names: dict[tuple[Path, str], list[str]] = {}
    for tensor in (*factors, *full):
        if tensor.dtype not in MERGEABLE:
            then = f"which cannot be merged. Save the adapter in one of {', '.join(MERGEABLE)}."
            names.setdefault((tensor.file, f" of dtype {tensor.dtype}, {then}"), []).append(tensor.name)
    for tensor in full:
        if 0 in tensor.shape:
            why = f": without a number, for it was not gathered. {GATHER}"
            names.setdefault((tensor.file, why), []).append(f"{tensor.name} {list(tensor.shape)}")
    return [CheckpointError(f"{file}: {listed(held)}{why}") for (file, why), held in names.items()]
