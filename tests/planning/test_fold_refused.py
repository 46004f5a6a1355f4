"""Adapters that cannot be folded: each is refused by name, with both values, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from polymerge.errors import CheckpointError
from running import Ran, checkpoint, cli, leftovers, small_llama

UP = "model.layers.0.mlp.up_proj"
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
FACTORS = {f"{UP}.lora_A.weight": torch.ones(2, 6), f"{UP}.lora_B.weight": torch.ones(9, 2)}


def adapter(folder: Path, tensors: Mapping[str, Tensor] = FACTORS, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({PREFIX + name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", small_llama(1))


def fold(learned: Path, tmp_path: Path, base: Path | None = None, *words: object) -> Ran:
    given = ["--base", base] if base is not None else []
    return cli("fold", learned, *given, "-o", tmp_path / "made" / "out", "--no-verify", *words)


def refused(learned: Path, tmp_path: Path, base: Path | None = None, status: int = 2) -> str:
    """What the command says; it fails, does so without a traceback, and leaves nothing where the output would be."""
    (tmp_path / "made").mkdir(exist_ok=True)
    ran = fold(learned, tmp_path, base)
    assert ran.status == status, ran.err
    assert "Traceback" not in ran.err
    assert not list((tmp_path / "made").iterdir())
    assert not leftovers(tmp_path)
    return " ".join(ran.err.split())


def test_what_these_tests_start_from_is_folded(base: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert fold(adapter(tmp_path / "adapter"), tmp_path, base).status == 0


def test_modules_that_the_base_does_not_have(base: Path, tmp_path: Path) -> None:
    layers = (7, 8, 9, 10)
    other = {name.replace("layers.0", f"layers.{layer}"): x for layer in layers for name, x in FACTORS.items()}
    learned = adapter(tmp_path / "adapter", other)
    said = refused(learned, tmp_path, base)
    few = ", ".join(f"model.layers.{layer}.mlp.up_proj.weight" for layer in (10, 7, 8))
    assert "1 problem, nothing was written" in said
    assert f"'adapter': the adapter ({learned}) has weights for {few} and 1 more, which its base ({base}, " in said
    assert "family llama) does not have: its text tower has 2 layers. Name the base that it was trained on" in said


SHAPES: dict[str, tuple[dict[str, Tensor], str]] = {
    "another width": (
        {f"{UP}.lora_A.weight": torch.ones(2, 5), f"{UP}.lora_B.weight": torch.ones(9, 2)},
        f"{UP} of the adapter is for [9, 5], {UP}.weight of its base is [9, 6]. Name the base that it was trained on",
    ),
    "another vocabulary": (
        {
            "model.embed_tokens.lora_embedding_A": torch.ones(2, 8),
            "model.embed_tokens.lora_embedding_B": torch.ones(6, 2),
        },
        "model.embed_tokens of the adapter is for [8, 6], model.embed_tokens.weight of its base is [7, 6]",
    ),
    "an extra": (
        FACTORS | {"model.norm.weight": torch.ones(8)},
        "model.norm.weight of the adapter is for [8], model.norm.weight of its base is [6]. Name the base that it was",
    ),
    "a head without its embedding": (
        FACTORS | {"lm_head.weight": torch.ones(8, 6)},
        "the adapter has lm_head.weight with 8 rows, its base 7, and model.embed_tokens.weight would have 7: a "
        "vocabulary has as many in both",
    ),
    "an extra of another rank": (
        FACTORS | {"model.norm.weight": torch.ones(6, 1)},
        "model.norm.weight of the adapter is for [6, 1], model.norm.weight of its base is [6]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), SHAPES.values(), ids=SHAPES)
def test_shapes_that_differ(tensors: dict[str, Tensor], words: str, base: Path, tmp_path: Path) -> None:
    said = refused(adapter(tmp_path / "adapter", tensors), tmp_path, base)
    assert f"1. 'adapter': {words}" in said


def test_a_token_beyond_the_vocabulary(base: Path, tmp_path: Path) -> None:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 6)}
    learned = adapter(tmp_path / "adapter", FACTORS | rows, trainable_token_indices={"embed_tokens": [3, 9]})
    said = refused(learned, tmp_path, base)
    assert (
        "model.embed_tokens.weight of the adapter is for [10, 6], model.embed_tokens.weight of its base is [7, 6]"
        in said
    )


def test_everything_is_said_at_once(base: Path, tmp_path: Path) -> None:
    tensors = {name.replace("layers.0", "layers.5"): x for name, x in FACTORS.items()}
    tensors |= SHAPES["another width"][0] | {"lm_head.weight": torch.ones(8, 6)}
    said = refused(adapter(tmp_path / "adapter", tensors), tmp_path, base)
    assert "3 problems, nothing was written" in said


def no_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").unlink()
    return f"{folder}: has no adapter_config.json, so it is not an adapter. It holds 'adapter_model.safetensors'"


def a_checkpoint(folder: Path) -> str:
    checkpoint(folder, small_llama(2))
    return f"{folder}: holds an adapter ('adapter_model.safetensors') and a whole model ('model.safetensors'), and"


def not_there(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"{folder}: there is no such file or folder"


def no_weights(folder: Path) -> str:
    (folder / "adapter_model.safetensors").unlink()
    return f"{folder}: has neither adapter_model.safetensors nor adapter_model.bin. Download it"


def another_method(folder: Path) -> str:
    adapter(folder, peft_type="IA3")
    return f"{folder / 'adapter_config.json'}: peft_type is 'IA3', only 'LORA' can be read"


@pytest.mark.parametrize(
    ("spoil", "status"),
    [(no_adapter, 2), (a_checkpoint, 2), (not_there, 2), (no_weights, 1), (another_method, 1)],
)
def test_what_is_no_adapter(spoil: Callable[[Path], str], status: int, base: Path, tmp_path: Path) -> None:
    """2 where the command line names the wrong thing, 1 where what it names is broken."""
    learned = adapter(tmp_path / "adapter")
    words = spoil(learned)
    assert words in refused(learned, tmp_path, base, status)


def test_a_base_that_is_not_said(base: Path, tmp_path: Path) -> None:
    learned = adapter(tmp_path / "adapter")
    words = f"{learned}: its config names no base: pass the model that it was trained on as `--base`"
    assert words in refused(learned, tmp_path)
    assert words in refused(adapter(learned, base_model_name_or_path=None), tmp_path)
    assert fold(learned, tmp_path, base).status == 0


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    learned = adapter(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "bass"))
    assert f"{tmp_path / 'bass'}: there is no such file or folder" in refused(learned, tmp_path)
    assert f"{tmp_path / 'gone'}: there is no such file or folder" in refused(learned, tmp_path, tmp_path / "gone")
    (tmp_path / "bass").mkdir()
    assert str(tmp_path / "bass") in refused(learned, tmp_path)


def test_an_adapter_as_base(tmp_path: Path) -> None:
    learned, other = adapter(tmp_path / "adapter"), adapter(tmp_path / "other")
    assert str(other) in refused(learned, tmp_path, other)


@pytest.mark.parametrize("name", [f"{UP}.lora_A.weight", f"{UP}.lora_B.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none_in_the_adapter(name: str, value: float, base: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in FACTORS.items()} | {"model.norm.weight": torch.ones(6)}
    tensors[name].view(-1)[3] = value
    said = refused(adapter(tmp_path / "adapter", tensors), tmp_path, base, status=1)
    assert str(tmp_path / "adapter" / "adapter_model.safetensors") in said
    assert f"{name if 'norm' not in name else 'text.norm.weight'} " in said
    assert "holds NaN or infinity" in said


def test_a_number_that_is_none_in_the_base(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP}.weight"][2, 3] = float("nan")
    save_file(tensors, base / "model.safetensors")
    said = refused(adapter(tmp_path / "adapter"), tmp_path, base, status=1)
    assert f"{base / 'model.safetensors'}: text.layers.0.mlp.up_proj.weight of 'adapter' holds NaN or infinity" in said


@pytest.mark.parametrize(("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_a_base_whose_numbers_nothing_can_be_added_to(
    dtype: torch.dtype, code: str, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(dtype)
    save_file(tensors, base / "model.safetensors")
    said = refused(adapter(tmp_path / "adapter"), tmp_path, base, status=1)
    assert f"1. 'adapter': {UP}.weight is held as {code}: an adapter cannot be added to it" in said


def test_a_tied_head_of_a_family_that_is_not_known_cannot_change_alone(base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text('{"model_type": "unheard", "tie_word_embeddings": true}')
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    learned = adapter(tmp_path / "adapter", FACTORS | {"lm_head.weight": torch.ones(7, 6)})
    assert "its base ties the head to the embedding, so a checkpoint of it has no place" in refused(
        learned, tmp_path, base
    )
    learned = adapter(tmp_path / "other", FACTORS | {"model.embed_tokens.weight": torch.ones(7, 6)})
    assert "the adapter changes model.embed_tokens.weight alone, which may be the head as well" in refused(
        learned, tmp_path, base
    )


def test_an_adapter_that_changed_since_it_was_planned(base: Path, tmp_path: Path) -> None:
    learned = adapter(tmp_path / "adapter")
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{learned}"]})
    adapter(learned, {name: tensor.bfloat16() for name, tensor in FACTORS.items()})
    with pytest.raises(CheckpointError, match="its tensors have changed since it was planned"):
        polymerge.merge(plan, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)
