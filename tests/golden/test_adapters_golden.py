"""RobustMerge of adapters in LLaVA's layout, from the command line, against what its released code writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paths import GOLDEN
from running import merged

ADAPTERS = GOLDEN / "adapters"
CASES = json.loads((ADAPTERS / "cases.json").read_text())
PREFIX = "base_model.model."
BOTH = pytest.mark.parametrize("layout", ["llava", "peft"])
NAMES = pytest.mark.parametrize("name", CASES)


def inputs(name: str) -> list[Path]:
    return [ADAPTERS / name / "inputs" / adapter for adapter in CASES[name]["adapters"]]


def recipe(name: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder)} for folder in inputs(name)]
    return {"merge_method": "robustmerge", "models": models, "dtype": "float32"} | more


def stored(folder: Path, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors and the full weights of an output, under the names in its files."""
    if layout == "llava":
        factors = torch.load(folder / "adapter_model.bin", weights_only=True)
        return factors, torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    held = load_file(folder / "adapter_model.safetensors")
    return (
        {name: tensor for name, tensor in held.items() if ".lora_" in name},
        {name: tensor for name, tensor in held.items() if ".lora_" not in name},
    )


def as_loaded(names: Any, layout: str) -> list[str]:
    """The parameters that full weights stand for: as LLaVA's loader takes prefixes off, or as PEFT does."""
    if layout == "peft":
        assert all(name.startswith(PREFIX) for name in names)
        return [name.removeprefix(PREFIX) for name in names]
    names = [name[11:] if name.startswith("base_model.") else name for name in names]
    if any(name.startswith("model.model.") for name in names):
        names = [name[6:] if name.startswith("model.") else name for name in names]
    return names


def within(got: Tensor, wanted: Tensor, tolerance: Any) -> None:
    if tolerance["mode"] == "bitwise":
        assert torch.equal(got, wanted)
    size = float(wanted.abs().max())
    np.testing.assert_allclose(got, wanted, rtol=tolerance["rtol"], atol=tolerance["atol_rel_to_max"] * size)


@BOTH
@NAMES
def test_the_factors_are_those_of_the_released_code(name: str, layout: str, tmp_path: Path) -> None:
    out = merged(recipe(name), tmp_path / "out", "--layout", layout)
    factors, _ = stored(out, layout)
    expected = load_file(ADAPTERS / name / "expected" / "adapter_model.safetensors")
    assert set(factors) == set(expected)
    for key, wanted in expected.items():
        assert factors[key].dtype == torch.float32
        within(factors[key], wanted, CASES[name]["tolerance"]["lora_A" if ".lora_A." in key else "lora_B"])


@BOTH
@NAMES
def test_other_weights_are_the_mean(name: str, layout: str, tmp_path: Path) -> None:
    """Bit for bit where the reference rounds no more than once: in float32 it computes as here, and of T = 2 it halves,
    which is exact, and rounds the sum, as the mean is rounded here.

    Of T = 3 in bfloat16, u = 2^-8 (half the distance of neighbours, as a share), it rounds the coefficient 1/3, each
    of three products and two sums, so that each model's share is off by at most (1 + u)^4 - 1 < 4.1 u: one for the
    coefficient, one for the product, two for the sums that it takes part in. Here the mean, taken in float32, is
    rounded once: 1 u of itself. Together less than 5.2 u of the mean of the magnitudes."""
    out = merged(recipe(name, dtype=CASES[name]["on_disk"]), tmp_path / "out", "--layout", layout)
    _, full = stored(out, layout)
    expected = load_file(ADAPTERS / name / "expected" / "non_lora_trainables.safetensors")
    assert sorted(as_loaded(full, layout)) == sorted(expected)
    sources = [torch.load(folder / "non_lora_trainables.bin", weights_only=True) for folder in inputs(name)]
    for key, parameter in zip(full, as_loaded(full, layout), strict=True):
        assert full[key].dtype == expected[parameter].dtype
        if name != "r16_T3_bf16":
            assert torch.equal(full[key], expected[parameter]), parameter
            continue
        (there,) = [one for one in sources[0] if one.endswith(parameter)]
        size = sum(source[there].double().abs() for source in sources) / len(sources)
        apart = (full[key].double() - expected[parameter].double()).abs()
        assert (apart <= 5.2 * 2.0**-8 * size).all(), parameter
        exact = sum(source[there].double() for source in sources) / len(sources)
        assert ((full[key].double() - exact).abs() <= 2.0**-8 * exact.abs() + 8 * 2.0**-24 * size).all(), parameter


@NAMES
def test_in_float32_the_mean_is_rounded_once(name: str, tmp_path: Path) -> None:
    out = merged(recipe(name), tmp_path / "out")
    _, full = stored(out, "llava")
    sources = [torch.load(folder / "non_lora_trainables.bin", weights_only=True) for folder in inputs(name)]
    for key, parameter in zip(full, as_loaded(full, "llava"), strict=True):
        (there,) = [one for one in sources[0] if one.endswith(parameter)]
        exact = sum(source[there].double() for source in sources) / len(sources)
        size = sum(source[there].double().abs() for source in sources) / len(sources)
        assert full[key].dtype == torch.float32
        # T products and T - 1 sums in float32 at the most
        assert ((full[key].double() - exact).abs() <= 2 * len(sources) * 2.0**-24 * size).all()


@BOTH
def test_files_and_config(layout: str, tmp_path: Path) -> None:
    out = merged(recipe("r4_T2_bf16"), tmp_path / "out", "--layout", layout)
    weights = {"llava": {"adapter_model.bin", "non_lora_trainables.bin"}, "peft": {"adapter_model.safetensors"}}[layout]
    others = {"adapter_config.json", "config.json", "README.md", "polymerge.json"}
    assert {file.name for file in out.iterdir()} == weights | others
    template = inputs("r4_T2_bf16")[0]
    assert (out / "config.json").read_bytes() == (template / "config.json").read_bytes()
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (template, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"modules_to_save"}
    parameters = as_loaded(stored(out, layout)[1], layout)
    modules = sorted({parameter.rpartition(".")[0] for parameter in parameters})
    assert after["modules_to_save"] == (None if layout == "llava" else modules)
    written = json.loads((out / "polymerge.json").read_text())
    assert set(written["output"]["files"]) == weights
    assert written["recipe"]["merge_method"] == "robustmerge"
    assert set(written["output"]["relative_error"].values()) == {0.0}
    for folder, one in zip(inputs("r4_T2_bf16"), written["inputs"], strict=True):
        assert set(one["sampled"]) == {"adapter_model.bin", "non_lora_trainables.bin"}
        assert (Path(one["source"]).resolve(), one["sha256"]) == (folder.resolve(), {})


def test_without_a_word_the_layout_is_the_template_s(tmp_path: Path) -> None:
    out = merged(recipe("r4_T2_bf16"), tmp_path / "out")
    assert not (out / "adapter_model.safetensors").exists()
    as_peft = merged(recipe("r4_T2_bf16"), tmp_path / "peft", "--layout", "peft")
    for one, other in zip(stored(out, "llava"), stored(as_peft, "peft"), strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # what was written is an adapter again, in either layout
    for folder in (out, as_peft):
        again = merged(
            {"merge_method": "cat", "models": [{"model": str(folder), "parameters": {"weight": 1}}]},
            tmp_path / f"again-{folder.name}",
            "--layout",
            "llava",
        )
        for one, other in zip(stored(again, "llava"), stored(out, "llava"), strict=True):
            assert set(one) == set(other)
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@BOTH
@NAMES
def test_the_released_mean_is_that_of_the_released_code_bit_for_bit(name: str, layout: str, tmp_path: Path) -> None:
    said = recipe(name, dtype=CASES[name]["on_disk"], parameters={"extra": "released"})
    _, full = stored(merged(said, tmp_path / "out", "--layout", layout), layout)
    expected = load_file(ADAPTERS / name / "expected" / "non_lora_trainables.safetensors")
    for key, parameter in zip(full, as_loaded(full, layout), strict=True):
        assert torch.equal(full[key], expected[parameter]), parameter
