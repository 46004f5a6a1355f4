"""Which files of an adapter's folder hold its weights, and which are of the training, or of a whole model, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from polymerge.checkpoints.discovery import COMPANIONS, INDEX_SUFFIX, LAYOUTS, shards_of
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, RecipeError

__all__ = ["CONFIG", "LLAVA", "AdapterFiles", "holds_adapter", "sort_files"]

CONFIG: Final = "adapter_config.json"
LLAVA: Final = "non_lora_trainables.bin"
"""Where LLaVA puts the full weights that were trained beside the factors."""

_FACTORS: Final = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference, as for PEFT
_SHARD: Final = re.compile(r"adapter_model-\d+-of-\d+\.(?:safetensors|bin)")
_WHOLE: Final = re.compile(r"(?:model|pytorch_model|consolidated).*\.(?:safetensors|bin|pth)(?:\.index\.json)?")
_FSDP: Final = re.compile(r"pytorch_model_fsdp.*\.bin")
_TRAINING: Final = re.compile(
    r"(?:training_args|optimizer|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|dl_state_dict"
    r"|trainer_state).*|.*_optim_states\.pt"
)
_VALUE_HEAD: Final = re.compile(r"value_head\.(?:safetensors|bin)")
_UNREADABLE: Final = (".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")


@dataclass
class AdapterFiles:
    """The weight files of an adapter's folder by what they are.

    factors   PEFT's own: one file, or its shards
    index     of the shards, where there is one
    beside    full weights of the base under another name, such as LLaVA's
    whole     a whole model that lies there as well
    left_out  what is no weight of the adapter, and why
    """

    factors: tuple[str, ...] = ()
    index: str | None = None
    beside: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> tuple[str, ...]:
        """The files that are read."""
        return (*self.factors, *self.beside)


def holds_adapter(names: Collection[str]) -> bool:
    """Whether files of these names are an adapter: a config of one, and no whole model in its usual files.

    What accelerate's FSDP writes, pytorch_model_fsdp.bin, is the state of a training and no such file.
    """
    return CONFIG in names and not _whole(names)


def sort_files(folder: Path, names: Collection[str]) -> AdapterFiles:
    """Sort the files of an adapter's folder.

    Raises RecipeError where a whole model lies beside the adapter, so that nothing says which of the two is meant, and
    CheckpointError where the factors are missing, or some of their shards.
    """
    found = AdapterFiles(whole=_whole(names))
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    single = [name for name in _FACTORS if name in names]
    if found.whole:
        raise _two_kinds(folder, found.whole, [*single, *shards])
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
        elif _TRAINING.fullmatch(name):
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


def _whole(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if _WHOLE.fullmatch(name) and not _FSDP.fullmatch(name))


def _preferred(shards: list[str]) -> list[str]:
    """Those of one suffix, safetensors first."""
    safe = [name for name in shards if name.endswith(".safetensors")]
    return safe or shards


def _two_kinds(folder: Path, whole: list[str], factors: list[str]) -> RecipeError:
    if not factors:
        return RecipeError(
            f"{folder}: has {CONFIG} and no {_FACTORS[0]}; what lies there is a whole model ({listed(whole)}). Name it "
            "as a model, or name the folder that PEFT saved."
        )
    return RecipeError(
        f"{folder}: holds an adapter ({listed(factors, 1)}) and a whole model ({listed(whole)}), and the model may "
        f"have the adapter in it. Move {CONFIG} and {listed(factors, 1)} to a folder of their own and name that, or "
        "name this folder as a model."
    )
