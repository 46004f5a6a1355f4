"""`polymerge inspect` of adapters: what they are, and what a merge has kept of the directions of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from running import cli, merged


def adapter(
    folder: Path, seed: int, *, rank: int = 4, alpha: int = 8, modules: tuple[str, ...] = ("q_proj", "v_proj")
) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        name = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn((rank, 12), generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn((10, rank), generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules),
              "base_model_name_or_path": "base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def dense(folder: Path, module: str, scaling: float) -> np.ndarray:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.self_attn.{module}"
    return scaling * tensors[f"{name}.lora_B.weight"].astype(float) @ tensors[f"{name}.lora_A.weight"].astype(float)


def test_the_numbers_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2, rank=3, alpha=6)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (one, other)]
    out = merged({"merge_method": "cat", "models": models}, tmp_path / "out")
    ran = cli("inspect", out, "--against", one, other, "--largest", 2, "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)["against"]
    assert [entry["adapter"] for entry in report] == ["one", "other"]
    for entry, folder, rank in zip(report, (one, other), (4, 3), strict=True):
        assert entry["left_out"] == 0
        assert entry["absent"] == []
        cosines, ratios = [], []
        for module in ("q_proj", "v_proj"):
            u, s, v = np.linalg.svd(dense(folder, module, 2.0))
            ours = np.linalg.svd(0.5 * (dense(one, module, 2.0) + dense(other, module, 2.0)))
            for n in range(rank):
                cosines.append((n, (abs(u[:, n] @ ours[0][:, n]) + abs(v[n] @ ours[2][n])) / 2))
                ratios.append((n, ours[1][n] / s[n]))
        for group, wanted in (("largest", lambda n: n < 2), ("rest", lambda n: n >= 2)):
            assert entry[group]["count"] == sum(wanted(n) for n, _ in cosines)
            assert entry[group]["cosine"] == pytest.approx(np.mean([c for n, c in cosines if wanted(n)]), abs=1e-5)
            assert entry[group]["ratio"] == pytest.approx(np.mean([r for n, r in ratios if wanted(n)]), rel=1e-5)


def test_an_adapter_against_itself_is_kept_whole(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 3)
    (entry,) = json.loads(cli("inspect", one, "--against", one, "--json").out)["against"]
    for group in ("largest", "rest"):
        assert entry[group]["cosine"] == pytest.approx(1, abs=1e-6)
        assert entry[group]["ratio"] == pytest.approx(1, abs=1e-6)
    assert "largest 1.000, 1.000 (2); rest 1.000, 1.000 (6) over 2 modules" in cli("inspect", one, "--against", one).out


def test_modules_that_the_merge_has_not_are_told_and_strangers_refused(tmp_path: Path) -> None:
    one, more = adapter(tmp_path / "one", 4), adapter(tmp_path / "more", 5, modules=("q_proj", "k_proj"))
    said = cli("inspect", one, "--against", more)
    assert said.status == 0
    assert "1 of its modules are not in the merge, such as model.layers.0.self_attn.k_proj" in said.out
    stranger = adapter(tmp_path / "stranger", 6, modules=("o_proj",))
    refused = cli("inspect", one, "--against", stranger)
    assert refused.status == 2
    assert "have no module in common" in refused.err
    assert cli("inspect", one, "--largest", 2).status == 2


def test_adapters_are_described(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 7)
    said = cli("inspect", one).out
    assert "LoRA adapter (peft layout) of base" in said
    assert "2 modules, rank 4, times 2; 0 full weights" in said
    (entry,) = json.loads(cli("inspect", one, "--json").out)["adapters"]
    assert (entry["ranks"], entry["scalings"], entry["base"]) == ([4], [2.0], "base")
