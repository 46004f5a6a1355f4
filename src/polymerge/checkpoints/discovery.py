"""Tell from names which files of a folder are weights of a model or adapter, and which were left by training."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, RecipeError

__all__ = [
    "COMPANIONS",
    "CONFIG",
    "INDEX_SUFFIX",
    "LAYOUTS",
    "LLAVA",
    "AdapterFiles",
    "Weights",
    "find_weights",
    "holds_adapter",
    "is_plain",
    "matters",
    "of_training",
    "shards_of",
    "sort_files",
]

LAYOUTS: Final = {".safetensors": "safetensors", ".bin": "torch", ".pth": "torch", ".pt": "torch"}
"""The format of a weight file, by its suffix."""

COMPANIONS: Final = ("spk_dict.pt",)
"""Files with a weight file's suffix that are not weights but needed for loading: the voices of Qwen2.5-Omni."""

INDEX_SUFFIX: Final = ".index.json"

# in order of preference: what the names of the weight files look like, and the usual name of a single one
_KINDS: Final = (
    (re.compile(r".+\.safetensors"), "model.safetensors"),
    (re.compile(r"pytorch_model.*\.bin"), "pytorch_model.bin"),
    (re.compile(r".+\.(?:pth|pt)"), "model.pth"),
)
_OF_ADAPTERS: Final = re.compile(r"adapter_model\..+|non_lora_trainables\.bin")
# states of a training that end like weights: of optimizer, scheduler, random numbers, ranks
_STATES: Final = re.compile(
    r"(?:training_args|trainer_state|optimizer|optim_state|(?:lr_)?scheduler|scaler|sampler|rng_state|random_states?"
    r"|dl_state_dict)(?:[\d._-].*)?\.(?:pth?|bin|pkl|pickle|safetensors)|.*_optim_states\.pt"
    r"|(?:bf16_|fp16_)?zero_.+_states\.pt",
    re.IGNORECASE,
)
# what else it leaves in the folder of its model, by kind: earlier checkpoints, logs and their plots, results, and the
# settings of trainers and their launchers
_TRAINING_FOLDERS: Final = re.compile(
    r"(?:tmp-|last-)?checkpoint(?:s|-.+)?|(?:global_?step|iter|step|epoch)[_-]?\d+|runs|logs?|.*_logs|tensorboard|wandb"
    r"|swanlog|mlruns|mlflow|(?:optimizer|pytorch_model_fsdp)_\d+"
    r"|__pycache__",
    re.IGNORECASE,
)
_TRAINING_FILES: Final = re.compile(
    r"(?:trainer_state|log_history|train(?:er|ing)?_(?:args|arguments|config|params|metrics|history)"
    r"|hparams|llamaboard_config|zero_?[0-3].*|(?:ds|deepspeed|accelerate|fsdp)(?:_.*)?(?:config|z(?:ero)?_?\d).*)\.(?:json|ya?ml|txt)"
    r"|(?:(?:bf16_)?zero_pp|mp)_rank(?:[_-].*)?\.(?:pth?|bin|pkl|pickle|safetensors)"
    r"|.*\.(?:distcp|jsonl|log|out|err|lock)|(?:.*[_-])?logs?\.(?:txt|json|csv)|nohup.*|events\.out\.tfevents\..*"
    r"|.*_results\.(?:json|txt|csv)|metrics\.(?:json|csv)|(?:.*[_-])?loss(?:[_-].*)?\.(?:png|jpe?g|svg|pdf|csv|txt)"
    r"|latest(?:_.*)?|zero_to_fp32\.py",
    re.IGNORECASE,
)
_WANTED: Final = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py",
)  # fmt: skip
_UNWANTED: Final = ("consolidated*", "original/*", "*training_args.bin", "optimizer*", "onnx/*")
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})\.\w+")
_MOST_SHARDS: Final = 100_000


CONFIG: Final = "adapter_config.json"
LLAVA: Final = "non_lora_trainables.bin"
"""LLaVA's file of full weights trained with the factors."""

_FACTORS: Final = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference, as for PEFT
_ADAPTER_SHARD: Final = re.compile(r"adapter_model-\d+-of-\d+\.(?:safetensors|bin)")
_MODEL_FILE: Final = re.compile(r"(?:model|pytorch_model|consolidated).*\.(?:safetensors|bin|pth)(?:\.index\.json)?")
_FSDP: Final = re.compile(r"pytorch_model_fsdp.*\.bin")
_VALUE_HEAD: Final = re.compile(r"value_head\.(?:safetensors|bin)")
_UNREADABLE: Final = (".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")


@dataclass(frozen=True, slots=True)
class Weights:
    """The chosen weight files: those listed in `index`, or `files` if there is no index."""

    files: tuple[str, ...] = ()
    index: str | None = None
    usual: str | None = None
    """A file beside the index that usually holds the entire model; the index has to list it."""


def of_training(name: str) -> bool:
    """Return whether a file, given by its path in a checkpoint, was left by training and is not part of the model."""
    *folders, file = name.split("/")
    of_files = (_TRAINING_FILES, _STATES)
    return any(map(_TRAINING_FOLDERS.fullmatch, folders)) or any(pattern.fullmatch(file) for pattern in of_files)


def matters(name: str) -> bool:
    """Return whether a file of a remote folder, given by its path there, can be part of a checkpoint."""
    wanted = any(fnmatch(name, one) for one in _WANTED) and not any(fnmatch(name, one) for one in _UNWANTED)
    return wanted and not of_training(name)


def _beside_weights(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_OF_ADAPTERS, _STATES))


def find_weights(folder: Path) -> Weights:
    """Choose the weight files of a folder by their names alone.

    Safetensors come before pytorch_model*.bin, these before a .pth or .pt. Within a kind, an index comes first, then
    the usual name, then the only file, then a full set of shards. A consolidated*.safetensors beside others is the
    same model in another layout and is passed over.

    A folder with the name of a weight file, as zero_to_fp32.py creates, is searched if it is the only candidate.

    Raises RecipeError if there are none, or if the choice is the user's; CheckpointError
    where shards are missing.
    """
    names = sorted(path.name for path in folder.iterdir())
    folders = [name for name in names if (folder / name).is_dir()]
    names = [name for name in names if name not in folders]
    for pattern, usual in _KINDS:
        candidates = [name for name in names if pattern.fullmatch(name) and not _beside_weights(name)]
        indexes = [
            name for name in names if name.endswith(INDEX_SUFFIX) and pattern.fullmatch(name.removesuffix(INDEX_SUFFIX))
        ]
        if indexes:
            index = usual + INDEX_SUFFIX if usual + INDEX_SUFFIX in indexes else _only(folder, indexes, "indexes")
            return Weights(index=index, usual=usual if usual in candidates else None)
        if usual in candidates:
            return Weights((usual,))
        candidates = [name for name in candidates if not name.startswith("consolidated")] or candidates
        if candidates:
            return Weights(shards_of(folder, candidates) or (_only(folder, candidates, "weight files and no index"),))
    for name in folders:
        if any(pattern.fullmatch(name) for pattern, _ in _KINDS):
            inside = find_weights(folder / name)
            listed_in = None if inside.index is None else f"{name}/{inside.index}"
            return Weights(tuple(f"{name}/{file}" for file in inside.files), listed_in)
    if CONFIG in names:
        raise RecipeError(
            f"{folder}: is an adapter, not a model. Write BASE+{folder} to take it together with its base, or fold it "
            "into one with `polymerge fold`."
        )
    if way := _shards_of_training(folder, folders):
        raise RecipeError(f"{folder}: has no weights of a full model, only {way}")
    there = sorted([*names, *folders])
    raise RecipeError(
        f"{folder}: has no weights (*.safetensors, pytorch_model*.bin, *.pth, *.pt). "
        + (f"It holds {listed(there, 8)}. Name another folder, or the file itself." if there else "It is empty.")
    )


def _shards_of_training(folder: Path, folders: Sequence[str]) -> str:
    """Describe training shards in a folder without weights, and how to gather them; empty if there are none."""
    for name in ("", *folders):
        inside = [path.name for path in (folder / name).iterdir()]
        where = f"'{name}'" if name else listed(sorted(inside))
        if any(re.fullmatch(r"(?:bf16_|fp16_)?(?:zero|mp_rank).*_states\.pt", one) for one in inside):
            return (
                f"the shards of DeepSpeed ({where}). Gather them there (python zero_to_fp32.py . OUT), and name OUT, "
                "with config.json in it"
            )
        if any(one.endswith(".distcp") for one in inside):
            return (
                f"the shards of FSDP ({where}). Gather them (accelerate merge-weights {folder / name} OUT), and name "
                "OUT, with config.json in it"
            )
    return ""


def _only(folder: Path, names: Sequence[str], what: str) -> str:
    if len(names) > 1:
        raise RecipeError(
            f"{folder}: has {len(names)} {what}: {listed(names, 8)}. Name the one file that is the model, or remove "
            "the others."
        )
    return names[0]


def shards_of(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The names in order if they are exactly the shards of one model, else ()."""
    matches = [_SHARD.fullmatch(name) for name in names]
    series = {(match["stem"], match["total"]) if match else None for match in matches}
    if None in series or len(series) > 1:
        return ()
    numbered = {int(match["number"]): name for match, name in zip(matches, names, strict=True) if match}
    total = next(int(match["total"]) for match in matches if match)
    if total > _MOST_SHARDS:
        raise CheckpointError(f"{folder}: '{names[0]}' is one of {total} shards, more than any model has. Rename it.")
    if missing := [str(number) for number in range(1, total + 1) if number not in numbered]:
        raise CheckpointError(
            f"{folder}: has {len(names)} of {total} shards ({names[0]}, ...) and no index; missing are "
            f"{listed(missing)}. Download them."
        )
    return tuple(numbered[number] for number in sorted(numbered))


@dataclass
class AdapterFiles:
    """The weight files of an adapter's folder, by kind.

    factors   PEFT's own: one file, or its shards
    index     of the shards, if there is one
    beside    full weights of the base under another name, such as LLaVA's
    left_out  files that are not weights of the adapter, and why
    """

    factors: tuple[str, ...] = ()
    index: str | None = None
    beside: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> tuple[str, ...]:
        """The files that are read."""
        return (*self.factors, *self.beside)


def holds_adapter(names: Collection[str]) -> bool:
    """Return whether these file names belong to an adapter: its config, and no full model under the usual names.

    accelerate's pytorch_model_fsdp.bin is an FSDP training state and does not count as a full model.
    """
    return CONFIG in names and not _models_among(names)


def sort_files(folder: Path, names: Collection[str]) -> AdapterFiles:
    """Sort the files of an adapter's folder.

    Raises RecipeError if a full model is beside the adapter, which makes the folder ambiguous, and
    CheckpointError where the factors are missing, or some of their shards.
    """
    found, models = AdapterFiles(), _models_among(names)
    shards = sorted(name for name in names if _ADAPTER_SHARD.fullmatch(name))
    single = [name for name in _FACTORS if name in names]
    if models:
        raise _two_kinds(folder, models, [*single, *shards])
    found.factors = (single[0],) if single else shards_of(folder, _preferred(shards)) if shards else ()
    if not found.factors:
        state = next((name for name in names if _FSDP.fullmatch(name)), None)
        then = (
            f"'{state}' is the state of a training with FSDP: save the adapter with PEFT." if state else "Download it."
        )
        raise CheckpointError(f"{folder}: has neither {' nor '.join(_FACTORS)}. {then}")
    index = f"adapter_model{PurePosixPath(found.factors[0]).suffix}{INDEX_SUFFIX}"
    found.index = index if not single and index in names else None
    for name in sorted(names):
        if name in found.factors or name in COMPANIONS:
            continue
        if name in single or name in shards:
            found.left_out[name] = f"{listed(found.factors, 1)} is read in its place, as PEFT does"
        elif PurePosixPath(name).suffix in _UNREADABLE:
            found.left_out[name] = f"{PurePosixPath(name).suffix} is a form that is not read"
        elif PurePosixPath(name).suffix not in LAYOUTS:
            continue
        elif _STATES.fullmatch(name):
            found.left_out[name] = "state of the training, no weights of the model"
        elif _VALUE_HEAD.fullmatch(name):
            found.left_out[name] = "the head of a reward model, for which the model has no place"
        elif _FSDP.fullmatch(name):
            found.left_out[name] = (
                f"the state of all weights that FSDP saved in training; the adapter is in {listed(found.factors, 1)}"
            )
        else:
            found.beside.append(name)
    found.beside.sort(key=lambda name: name != LLAVA)
    return found


def _models_among(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if _MODEL_FILE.fullmatch(name) and not _FSDP.fullmatch(name))


def _preferred(shards: list[str]) -> list[str]:
    """The shards of one suffix, safetensors first."""
    safe = [name for name in shards if name.endswith(".safetensors")]
    return safe or shards


def _two_kinds(folder: Path, models: list[str], factors: list[str]) -> RecipeError:
    if not factors:
        return RecipeError(
            f"{folder}: has {CONFIG} and no {_FACTORS[0]}; what lies there is a whole model ({listed(models)}). Name "
            "it as a model, or name the folder that PEFT saved."
        )
    return RecipeError(
        f"{folder}: holds an adapter ({listed(factors, 1)}) and a whole model ({listed(models)}), and the model may "
        f"have the adapter in it. Move {CONFIG} and {listed(factors, 1)} to a folder of their own and name that, or "
        "name this folder as a model."
    )


_NAME_MOST: Final = 255  # bytes, on every filesystem
_PATH_MOST: Final = 2048


def is_plain(name: str) -> bool:
    """Return whether a file name is a relative path that stays below its folder, and that a file can have."""
    parts = name.split("/")
    lengths = [len(part.encode("utf-8", "replace")) for part in parts]
    return (
        not PureWindowsPath(name).anchor  # a drive, a share or a leading slash
        and not any(part in ("", ".", "..") for part in parts)
        and max(lengths) <= _NAME_MOST
        and sum(lengths) <= _PATH_MOST
        and not any(character in "\\\0" or "\ud800" <= character <= "\udfff" for character in name)
    )
