"""Which files of a folder are its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, RecipeError

__all__ = ["COMPANIONS", "INDEX_SUFFIX", "LAYOUTS", "Weights", "find_weights", "of_training", "shards_of"]

LAYOUTS: Final = {".safetensors": "safetensors", ".bin": "torch", ".pth": "torch", ".pt": "torch"}
"""How a weight file is read, by the end of its name."""

COMPANIONS: Final = ("spk_dict.pt",)
"""What ends like weights and is none, and a model does not load without it: the voices of Qwen2.5-Omni."""

INDEX_SUFFIX: Final = ".index.json"

# in order of preference: what the names of the weight files look like, and the usual name of a single one
_KINDS: Final = (
    (re.compile(r".+\.safetensors"), "model.safetensors"),
    (re.compile(r"pytorch_model.*\.bin"), "pytorch_model.bin"),
    (re.compile(r".+\.(?:pth|pt)"), "model.pth"),
)
# what trainers leave beside the weights
_NOT_WEIGHTS: Final = re.compile(
    r"adapter_model\..+|non_lora_trainables\.bin|(?:bf16_|fp16_)?zero_.+_states\.pt|(?:training_args|optimizer|scheduler|scaler|rng_state).*\.(?:bin|pth?)"
)
# what a training run leaves in the folder of its model, by kind: earlier states, the states of optimizer, scheduler,
# random numbers and of each rank, logs and their plots, results, and the settings of trainers and their launchers
_TRAINING_FOLDERS: Final = re.compile(
    r"(?:tmp-|last-)?checkpoint(?:s|-.+)?|(?:global_?step|iter|step|epoch)[_-]?\d+|runs|logs?|.*_logs|tensorboard|wandb"
    r"|swanlog|mlruns|mlflow|(?:optimizer|pytorch_model_fsdp)_\d+"
    r"|__pycache__",
    re.IGNORECASE,
)
_TRAINING_FILES: Final = re.compile(
    r"(?:trainer_state|log_history|train(?:er|ing)?_(?:args|arguments|config|params|metrics|history)"
    r"|hparams|llamaboard_config|zero_?[0-3].*|(?:ds|deepspeed|accelerate|fsdp)(?:_.*)?(?:config|z(?:ero)?_?\d).*)\.(?:json|ya?ml|txt)"
    r"|(?:rng_state|random_states?|optimizer|optim_state|scheduler|scaler|sampler|zero_pp_rank|bf16_zero_pp_rank"
    r"|mp_rank)(?:[_-].*)?\.(?:pth?|bin|pkl|pickle|safetensors)"
    r"|.*\.(?:distcp|jsonl|log|out|err|lock)|(?:.*[_-])?logs?\.(?:txt|json|csv)|nohup.*|events\.out\.tfevents\..*"
    r"|.*_results\.(?:json|txt|csv)|metrics\.(?:json|csv)|(?:.*[_-])?loss(?:[_-].*)?\.(?:png|jpe?g|svg|pdf|csv|txt)"
    r"|latest(?:_.*)?|zero_to_fp32\.py",
    re.IGNORECASE,
)
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.\w+")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files that were chosen: those that `index` lists, or `files` where there is no index."""

    files: tuple[str, ...] = ()
    index: str | None = None
    whole: str | None = None
    """A file beside the index whose usual content is the whole model; the index has to list it."""


def of_training(name: str) -> bool:
    """Whether a file, by its path in a checkpoint's folder, is of the training that left it there and of no model."""
    *folders, file = name.split("/")
    return any(map(_TRAINING_FOLDERS.fullmatch, folders)) or _TRAINING_FILES.fullmatch(file) is not None


def find_weights(folder: Path) -> Weights:
    """Choose the weight files of a folder by their names alone.

    Safetensors come before pytorch_model*.bin, these before a .pth or .pt. Within a kind, an index comes first, then
    the usual name, then the only file, then a full set of shards. A consolidated*.safetensors beside others is the
    same model in another layout and is passed over.

    A folder that is called as a weight file is, as zero_to_fp32.py makes it, is looked into where it stands alone.

    Raises RecipeError where there are none, or where there is a choice that only the user can make; CheckpointError
    where shards are missing.
    """
    names = sorted(path.name for path in folder.iterdir())
    folders = [name for name in names if (folder / name).is_dir()]
    names = [name for name in names if name not in folders]
    for pattern, usual in _KINDS:
        candidates = [name for name in names if pattern.fullmatch(name) and not _NOT_WEIGHTS.fullmatch(name)]
        indexes = [
            name for name in names if name.endswith(INDEX_SUFFIX) and pattern.fullmatch(name.removesuffix(INDEX_SUFFIX))
        ]
        if indexes:
            index = usual + INDEX_SUFFIX if usual + INDEX_SUFFIX in indexes else _only(folder, indexes, "indexes")
            return Weights(index=index, whole=usual if usual in candidates else None)
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
    if "adapter_config.json" in names:
        raise RecipeError(
            f"{folder}: is an adapter, not a model. Write BASE+{folder} to take it together with its base, or fold it "
            "into one with `polymerge fold`."
        )
    if way := _shards_of_training(folder, folders):
        raise RecipeError(f"{folder}: has no weights of a whole model, only {way}")
    there = sorted([*names, *folders])
    raise RecipeError(
        f"{folder}: has no weights (*.safetensors, pytorch_model*.bin, *.pth, *.pt). "
        + (f"It holds {listed(there, 8)}. Name another folder, or the file itself." if there else "It is empty.")
    )


def _shards_of_training(folder: Path, folders: Sequence[str]) -> str:
    """The shards of a training run that a folder holds in place of weights, and what gathers them; empty for none."""
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
    """The names, in order, where they are the shards of one model and nothing else; () where they are not."""
    matches = [_SHARD.fullmatch(name) for name in names]
    series = {(match["stem"], match["total"]) if match else None for match in matches}
    if None in series or len(series) > 1:
        return ()
    numbered = {int(match["number"]): name for match, name in zip(matches, names, strict=True) if match}
    total = next(int(match["total"]) for match in matches if match)
    if missing := [str(number) for number in range(1, total + 1) if number not in numbered]:
        raise CheckpointError(
            f"{folder}: has {len(names)} of {total} shards ({names[0]}, ...) and no index; missing are "
            f"{listed(missing)}. Download them."
        )
    return tuple(numbered[number] for number in sorted(numbered))
