"""Folding an adapter into its base: what comes out loads without PEFT and says what the model said with the adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS
from folded import SAME_LOGITS, SAME_WEIGHTS, check, trained
from layouts import Sizes, config_of, random_tower, stored
from paths import GOLDEN, SUPPORT
from polymerge.checkpoints.identity import sampled_digest
from polymerge.engine.device import Device, Torch
from polymerge.engine.model_card import model_card
from polymerge.planning.estimate import BLOCK
from running import checkpoint, cli, fold, raw, weights
from tiny import as_2024, as_live, build, loaded, logits

pytestmark = PEFT_WARNINGS

PROGRAM = Path(sys.executable).with_name("polymerge")


# --- models with adapters


LAYOUTS: dict[str, Callable[[Path], Path]] = {"": lambda folder: folder, "2024": as_2024, "live": as_live}
MODELS = [
    ("llava", ""), ("llava", "2024"), ("llava", "live"), ("qwen2_vl", ""), ("qwen2_vl", "live"), ("idefics2", ""),
    ("llama", ""),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "layout"), MODELS)
def test_every_family_in_every_layout(family: str, layout: str, dtype: str, tmp_path: Path) -> None:
    base = LAYOUTS[layout](build(family, tmp_path / "base", dtype=dtype))
    case = trained(base, tmp_path / "adapter")
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    changed = check(case, out, exact=dtype == "float32")
    adapted = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if ".lora_A." in name]
    assert len(changed) == len(adapted)
    assert all(name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")) for name in changed)


VISION = r".*vision_tower.*\.(q_proj|fc1)"
SETTINGS: dict[str, dict[str, Any]] = {
    "everything linear": {"target_modules": "all-linear"},
    "rank stabilized": {"use_rslora": True, "r": 4, "lora_alpha": 9},
    "patterns": {
        "rank_pattern": {"down_proj": 5, r".*language_model.layers\.1\..*q_proj": 1},
        "alpha_pattern": {"down_proj": 0.5, "v_proj": 11},
    },
    "vision tower, biases of factors": {"target_modules": VISION, "lora_bias": True},
    "all biases": {"bias": "all"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules to save": {"modules_to_save": ["multi_modal_projector", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 0, 63]}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whatever_peft_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", dtype="float32")
    case = trained(base, tmp_path / "adapter", **settings)
    assert check(case, fold(base, tmp_path / "adapter", tmp_path / "out"))


def test_names_of_older_transformers(tmp_path: Path) -> None:
    """An adapter that was trained with the names of 2024 in memory goes onto a base that has today's on disk."""
    base = as_live(build("llava", tmp_path / "base", dtype="float32"))
    case = trained(base, tmp_path / "adapter", modules_to_save=["multi_modal_projector", "lm_head"])

    def older(name: str) -> str:
        for new, old in (
            ("model.model.language_model.", "model.language_model.model."),
            ("model.lm_head.", "model.language_model.lm_head."),
            ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
            ("model.model.vision_tower.", "model.vision_tower.vision_model."),
        ):
            name = name.replace(f"base_model.{new}", f"base_model.{old}")
        return name

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {older(name): tensor for name, tensor in load_file(file).items()}
    assert not set(renamed) & set(load_file(file))
    save_file(renamed, file)
    check(case, fold(base, tmp_path / "adapter", tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2]}),
        ("qwen2_vl", {"target_modules": r".*language_model.*(q_proj|v_proj)", "lora_bias": True}),
    ],
    ids=["llama", "qwen2_vl"],
)
def test_what_is_tied_stays_tied(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32", tie=True)
    case = trained(base, tmp_path / "adapter", **settings)
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    check(case, out)
    assert not any("lm_head" in name for name in raw(out))
    model = loaded(out)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_adapter_that_parts_head_and_embedding_is_said(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    case = trained(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    ran = cli("fold", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0
    assert "note: 'adapter': its adapter parts the head from the embedding, which its base ties" in ran.err
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), base), case.says, **SAME_LOGITS)

    trained(base, tmp_path / "whole", modules_to_save=["embed_tokens"])
    assert "parts the head" in cli("fold", tmp_path / "whole", "--base", base, "--dry-run").out
    trained(base, tmp_path / "rows", trainable_token_indices=[1])
    assert "parts the head" not in cli("fold", tmp_path / "rows", "--base", base, "--dry-run").out


def test_a_tied_head_that_is_stored_again_changes_with_its_embedding(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    case = trained(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[9, 2])
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    held = raw(fold(base, tmp_path / "adapter", tmp_path / "out"))
    assert held["lm_head.weight"] == held["model.embed_tokens.weight"] != raw(base)["lm_head.weight"]
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), base), case.says, **SAME_LOGITS)


# --- LLaVA's own layout

ADAPTER = GOLDEN / "adapters" / "r4_T2_bf16" / "inputs" / "adapter_0_IconQA"
SIZES = Sizes(heads=4, width=16, hidden=64, inner=91, rows=10)
PROJECTOR = {"0.weight": (64, 10), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}


def of_llava(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The updates of an adapter that LLaVA saved, by the names of LLaVA's tower, and its projector."""
    factors = torch.load(adapter / "adapter_model.bin", weights_only=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    updates = {}
    for name, a in factors.items():
        if ".lora_A." in name:
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            plain = name.removeprefix("base_model.model.model.").replace(".lora_A.", ".")
            updates[plain] = b.double() @ a.double() * (config["lora_alpha"] / config["r"])
    beside = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    return updates, {name.removeprefix("base_model.model."): tensor for name, tensor in beside.items()}


@pytest.mark.parametrize("layout", ["llava_original", "llava"])
def test_an_adapter_of_llava(layout: str, tmp_path: Path) -> None:
    """Into LLaVA's own layout and into that of transformers, where modules and the projector have other names."""
    updates, projector = of_llava(ADAPTER)
    tower = random_tower(SIZES, seed=1, dtype=torch.float32)
    tensors = stored(layout, tower, SIZES)
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    generator = torch.Generator().manual_seed(2)
    hf = {"0": "multi_modal_projector.linear_1", "2": "multi_modal_projector.linear_2"}
    named = {
        name: f"model.mm_projector.{name}" if layout == "llava_original" else f"{hf[name[0]]}{name[1:]}"
        for name in PROJECTOR
    }
    for name, shape in PROJECTOR.items():
        tensors[named[name]] = torch.randn(shape, generator=generator)
    base = checkpoint(tmp_path / "base", tensors, config_of(layout, SIZES))
    out = fold(base, adapter, tmp_path / "out", "--no-verify")
    found = load_file(out / "model.safetensors")
    for name, tensor in stored(layout, {n: t.double() + updates.get(n, 0) for n, t in tower.items()}, SIZES).items():
        if torch.equal(tensor, tensors[name].double()):
            assert torch.equal(found[name], tensors[name]), name
        else:
            torch.testing.assert_close(found[name].double(), tensor, **SAME_WEIGHTS)
    assert len(updates) == 14
    for name, own in named.items():
        assert torch.equal(found[own], projector[f"model.mm_projector.{name}"].float())
        assert not torch.equal(found[own], tensors[own])


# --- the command


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of it that is named in no config, written by hand: PEFT is not needed to fold."""
    folder = tmp_path_factory.mktemp("small")
    generator = torch.Generator().manual_seed(0)
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    shapes = {
        "model.embed_tokens.weight": (1009, 131), f"{up}.weight": (331, 131), f"{down}.weight": (131, 331),
        "model.norm.weight": (131,), "lm_head.weight": (1009, 131),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    base = checkpoint(folder / "base", tensors)
    factors = {
        f"{module}.lora_{kind}.weight": shape
        for module, pair in ((up, {"A": (5, 131), "B": (331, 5)}), (down, {"A": (5, 331), "B": (131, 5)}))
        for kind, shape in pair.items()
    }
    factors |= {"model.embed_tokens.lora_embedding_A": (5, 1009), "model.embed_tokens.lora_embedding_B": (131, 5)}
    factors["model.norm.weight"] = (131,)
    (folder / "adapter").mkdir()
    save_file(
        {f"base_model.model.{name}": torch.randn(shape, generator=generator) for name, shape in factors.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return base, folder / "adapter"


def test_what_is_recorded(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out", "--no-verify", "--json", "--sha256")
    record = json.loads((tmp_path / "out" / "polymerge.json").read_text())
    (source,) = record["inputs"]
    assert (source["source"], source["family"]) == (f"{base}+{adapter}", "llama")
    files = {
        "model.safetensors": base / "model.safetensors",
        "+adapter_model.safetensors": adapter / "adapter_model.safetensors",
    }
    assert source["sha256"] == {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert source["sampled"] == {name: sampled_digest(file) for name, file in files.items()}
    assert record["recipe"]["models"][0]["model"] == f"{base}+{adapter}"
    assert record["output"]["tensors"] == {"folded": 4, "copied": 1}
    assert record["command"][:3] == ["polymerge", "fold", str(adapter)]
    report = json.loads(ran.out)
    assert report["plan_hash"] == record["plan_hash"]
    assert report["tensors"] == {"merged": 0, "folded": 4, "dequantized": 0, "copied": 1, "tied": 0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{base}+{adapter}" in card
    assert "4 have an adapter folded in, 1 are copied" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_card_names_both_on_the_hub(small: tuple[Path, Path]) -> None:
    base, adapter = small
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{adapter}"]})
    entry = replace(plan.inputs[0], source="their/base@v2+my/adapter")
    front = model_card(replace(plan, inputs=(entry,)), "out", {}, {}).split("---")[1]
    assert yaml.safe_load(front)["base_model"] == ["their/base", "my/adapter"]


def test_a_dry_run_says_what_would_be_and_writes_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    said = cli("fold", adapter, "--base", base, "--dry-run")
    assert said.status == 0
    lines = said.out.split("\n")
    embedding = "model.embed_tokens.weight"
    for line in (
        "copy of 1 model",
        f"  adapter  template, model 0: family llama, 12 tensors, 744.2 kB, {base}+{adapter}",
        "folded: 4 tensors, 438.1 kB",
        f"  {embedding} <- {embedding} + adapter",
        "  model.layers.{i}.mlp.up_proj.weight <- model.layers.{i}.mlp.up_proj.weight + adapter, i = 0",
        "  model.norm.weight <- adapter/base_model.model.model.norm.weight",
        "output: 5 tensors (4 folded, 1 copied), 702.4 kB",
    ):
        assert line in lines, line
    plan = json.loads(cli("fold", adapter, "--base", base, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert {step["fate"] for step in plan["steps"]} == {"folded", "copied"}
    assert [entry["name"] for entry in plan["left_out"]] == []
    assert not list(tmp_path.iterdir())
    read_again = polymerge.plan(plan)
    assert read_again.hash == plan["hash"]
    folded = fold(base, adapter, tmp_path / "one", "--no-verify")
    assert weights(polymerge.merge(read_again, tmp_path / "other", check=False).folder) == weights(folded)


def test_the_base_that_the_config_names(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    named = shutil.copytree(adapter, tmp_path / "named")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    ran = cli("fold", named, "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 0, ran.err
    assert raw(tmp_path / "out") == raw(fold(base, adapter, tmp_path / "given", "--no-verify"))


def test_out_is_needed_and_never_replaced_unasked(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    assert cli("fold", adapter, "--base", base).status == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert refused.status != 0
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    assert cli("fold", adapter, "--base", base, "-o", tmp_path / "out", "--no-verify", "--force").status == 0
    assert not (tmp_path / "out" / "mine").exists()
    for place in small:
        files = sorted(place.iterdir())
        said = cli("fold", adapter, "--base", base, "-o", place, "--force", "--no-verify")
        assert said.status != 0
        assert str(place) in said.err
        assert sorted(place.iterdir()) == files


def test_what_is_no_part_of_the_adapter_is_said(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    more = shutil.copytree(adapter, tmp_path / "more")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.lm_head.original_module.weight"
    save_file(tensors | {name: torch.ones(3)}, more / "adapter_model.safetensors")
    ran = cli("fold", more, "--base", base, "-o", tmp_path / "out", "--no-verify")
    assert f"note: 'more': '{name}' in its file is left out: is the base's own" in ran.err
    assert raw(tmp_path / "out") == raw(fold(base, adapter, tmp_path / "same", "--no-verify"))


def test_torch_files(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    out = fold(base, adapter, tmp_path / "out", "--no-verify", "--format", "torch")
    expected = load_file(fold(base, adapter, tmp_path / "same", "--no-verify") / "model.safetensors")
    held = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert set(held) == set(expected)
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


# --- the same bits, in the same room


@pytest.mark.parametrize(("threads", "block"), [(1, 997), (2, 1024), (2, 65_537), (1, 10**9)])
def test_threads_and_blocks_change_nothing(threads: int, block: int, small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    expected = raw(fold(base, adapter, tmp_path / "out", "--no-verify"))
    plan = {"merge_method": "copy", "models": [f"{base}+{adapter}"]}
    made = polymerge.merge(plan, tmp_path / "other", check=False, threads=threads, block=block, shard_size="200KB")
    assert len(list(made.folder.glob("*.safetensors"))) > 1
    assert raw(made.folder) == expected


def test_torch_computes_the_same_bits(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = small
    expected = weights(fold(base, adapter, tmp_path / "out", "--no-verify"))
    opened: list[str] = []

    def open_torch(name: str) -> Device:
        opened.append(name)
        return Torch("cpu")

    monkeypatch.setattr("polymerge.engine.merge.open_device", open_torch)
    plan = {"merge_method": "copy", "models": [f"{base}+{adapter}"]}
    made = polymerge.merge(plan, tmp_path / "other", check=False, threads=2, block=30_011)
    assert opened == ["cpu"]
    assert weights(made.folder) == expected


def test_the_hash_seed_changes_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    made = []
    for seed in "01":
        command = [PROGRAM, "fold", adapter, "--base", base, "-o", tmp_path / seed / "out", "--no-verify"]
        (tmp_path / seed).mkdir()
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=60)
        made.append({**weights(tmp_path / seed / "out"), "": (tmp_path / seed / "out" / "README.md").read_bytes()})
    assert made[0] == made[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 50 times the size, half of it in one tensor, takes no more: no update is ever whole."""
    jobs = []
    for rows, layers in ((4096, 1), (65_536, 8)):
        shapes = {"model.embed_tokens.weight": (rows, 1024)}
        shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (4096, 1024) for layer in range(layers)}
        base = checkpoint(
            tmp_path / f"base{rows}", {name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}
        )
        factors = {"model.embed_tokens.lora_embedding_A": (4, rows), "model.embed_tokens.lora_embedding_B": (1024, 4)}
        for name in list(shapes)[1:]:
            stem = name.removesuffix(".weight")
            factors |= {f"{stem}.lora_A.weight": (4, 1024), f"{stem}.lora_B.weight": (4096, 4)}
        adapter = tmp_path / f"adapter{rows}"
        adapter.mkdir()
        tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in factors.items()}
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
        plan = {"merge_method": "copy", "models": [f"{base}+{adapter}"]}
        jobs.append({"source": plan, "out": str(tmp_path / "out")})
    (tmp_path / "jobs.json").write_text(json.dumps({"warm up": jobs[:1], "measure": jobs}))
    command = [sys.executable, str(SUPPORT / "merge_and_measure.py"), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    small, large = json.loads(done.stdout)
    block = 4 * BLOCK
    assert small > block  # the measurement sees memory
    assert large < small + 16 * 2**20, f"{small >> 20} and {large >> 20} MiB"  # one tensor has 128 MiB
