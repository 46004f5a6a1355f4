"""Names and files that trainers leave: wrappers, LoRA that is not merged, shards that were not gathered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, llama, loaded
from ignored import problems_of, recipe_of, with_more
from polymerge.checkpoints.names import unwrapped, wrappers_in
from polymerge.errors import Refused
from running import checkpoint, cli, linear, merged, raw, small_llama
from tiny import build, load, perturbed

pytestmark = PEFT_WARNINGS

Rename = Callable[[str], str]

WRAPPERS: dict[str, Rename] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of a part": lambda name: name.replace(".layers.", "._orig_mod.layers."),
    "torch.compile of every layer": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "activation checkpoints": lambda name: name.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "Lightning": lambda name: f"model.{name}",
    "Lightning with DeepSpeed": lambda name: f"_forward_module.model.{name}",
    "Lightning with torch.compile": lambda name: f"model._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "DDP of PEFT": lambda name: f"module.base_model.model.{name}",
    "one of several models": lambda name: f"policy.actor.{name}",
}


def renamed(folder: Path, out: Path, rename: Rename, torch_file: bool = False) -> Path:
    """A copy of a checkpoint under other names."""
    tensors = {rename(name): tensor.contiguous() for name, tensor in load(folder).items()}
    shutil.copytree(folder, out)
    if torch_file:
        (out / "model.safetensors").unlink()
        torch.save(tensors, out / "pytorch_model.bin")
    else:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def plain_merges(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path, Path]]:
    """Of a family: two models, and both merges of them."""

    @cache
    def made(kind: str) -> tuple[Path, Path, Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        one = build(kind, folder / "one")
        other = perturbed(one, folder / "other", seed=1)
        return (
            one, other, merged(recipe_of(one, other), folder / "plain", "--no-verify"),
            merged(recipe_of(other, one), folder / "turned", "--no-verify"),
        )  # fmt: skip

    return made


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [
        *((wrapper, "qwen2_5_vl") for wrapper in WRAPPERS),
        *((wrapper, kind) for kind in ("qwen2", "llava", "gemma3") for wrapper in ("twice", "Lightning", "FSDP")),
    ],
)
def test_a_wrapped_checkpoint_is_the_plain_one(
    wrapper: str, kind: str, plain_merges: Callable[[str], tuple[Path, Path, Path, Path]], tmp_path: Path
) -> None:
    one, other, plain, turned = plain_merges(kind)
    wrapped = renamed(other, tmp_path / "wrapped", WRAPPERS[wrapper], torch_file=wrapper == "DistributedDataParallel")
    assert raw(merged(recipe_of(one, wrapped), tmp_path / "out", "--no-verify")) == raw(plain)
    assert raw(merged(recipe_of(wrapped, one), tmp_path / "turned", "--no-verify")) == raw(turned)
    plan = polymerge.plan(recipe_of(wrapped, one))
    assert any(note.startswith("'wrapped': '") and "added by a trainer" in note for note in plan.warnings)
    assert polymerge.plan(json.loads(json.dumps(plan.to_json()))) == plan
    assert {step.name for step in plan.steps} == set(load(one))


def test_a_wrapper_around_some_names_is_one_problem(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    half = renamed(one, tmp_path / "half", lambda name: f"module.{name}" if ".layers.1." in name else name)
    (problem,) = problems_of(recipe_of(one, half))
    assert "no rule of family 'qwen2' explains 12 of its 27 tensors: 'module.model.layers.1." in problem


def test_the_output_of_a_wrapped_template_loads_and_its_record_says_what_was_read(tmp_path: Path) -> None:
    one = build("qwen2_5_vl", tmp_path / "one")
    wrapped = renamed(one, tmp_path / "wrapped", WRAPPERS["FSDP"])
    out = merged(recipe_of(wrapped, perturbed(one, tmp_path / "other", seed=1)), tmp_path / "out")  # checked by loading
    record = json.loads((out / "polymerge.json").read_text(encoding="utf-8"))
    assert record["inputs"][0]["wrappers"] == ["._fsdp_wrapped_module."]
    assert "wrappers" not in record["inputs"][1]
    assert cli("verify", wrapped).status == 1  # for its names are not those of its class
    shown = cli("inspect", wrapped, one)
    assert "note: 'wrapped': '_fsdp_wrapped_module.' of its tensor names is added by a trainer" in shown.out
    assert "one can be merged into wrapped in projector, text, vision" in shown.out


def test_deltas_and_a_wrapped_base(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    models = [perturbed(base, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other"), 1)]
    entries = [{"model": str(model), "parameters": {"weight": 0.5, "density": 0.5}} for model in models]
    asked: dict[str, Any] = {"merge_method": "ties", "models": entries}
    plain = merged(asked | {"base_model": str(base)}, tmp_path / "plain")
    wrapped = renamed(base, tmp_path / "wrapped", WRAPPERS["DistributedDataParallel"])
    assert raw(merged(asked | {"base_model": str(wrapped)}, tmp_path / "out")) == raw(plain)


def test_a_wrapped_base_of_an_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter")
    wanted = loaded(folder).merge_and_unload().state_dict()
    wrapped = renamed(tmp_path / "base", tmp_path / "wrapped", WRAPPERS["torch.compile of every layer"])
    ran = cli("fold", folder, "--base", wrapped, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert set(load(tmp_path / "out")) == set(load(tmp_path / "base"))
    for name, tensor in load(tmp_path / "out").items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
        lambda name: name.replace("model.layers", "_fsdp_wrapped_module.model.layers"),
        lambda name: f"base_model.model.{name}",
        lambda name: f"module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"policy.actor.{name.replace('.self_attn', '._orig_mod.self_attn')}",
    ],
)
def test_a_wrapped_adapter_folds_as_the_plain_one(rename: Rename, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    plain = adapter(tmp_path / "plain", modules_to_save=["lm_head"])
    wrapped = shutil.copytree(plain, tmp_path / "wrapped")
    tensors = {rename(name): tensor for name, tensor in load_file(plain / "adapter_model.safetensors").items()}
    save_file(tensors, wrapped / "adapter_model.safetensors")
    for name in ("plain", "wrapped"):
        ran = cli("fold", tmp_path / name, "--base", tmp_path / "base", "-o", tmp_path / f"{name} folded")
        assert ran.status == 0, ran.err
    assert raw(tmp_path / "wrapped folded") == raw(tmp_path / "plain folded") != raw(tmp_path / "base")


def test_full_weights_of_an_adapter_that_were_not_gathered(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = {name: torch.zeros(0) if "lm_head" in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    ran = cli("fold", folder, "--base", tmp_path / "base", "--dry-run")
    assert ran.status == 1
    assert "lm_head" in ran.err
    assert "was not gathered" in ran.err
    assert "1 problem" in ran.err


def test_wrappers_of_names_alone() -> None:
    assert wrappers_in(["module.a", "module.b.c"]) == ("module.",)
    assert wrappers_in(["module.a", "b"]) == ()  # a name may begin so
    assert wrappers_in(["a._orig_mod.b", "c"]) == ("._orig_mod.",)
    assert wrappers_in(["a_orig_mod.b", "_orig_model.c"]) == ()
    assert wrappers_in([]) == ()
    assert unwrapped("module._orig_mod.a._orig_mod.b", ("._orig_mod.", "module.")) == "a.b"


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", small_llama(1))
    tensors = small_llama(2)
    other = checkpoint(tmp_path / "other", {**tensors, "_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()})
    (problem,) = problems_of(linear(one, other))
    assert "'lm_head.weight'" in problem
    assert "'_orig_mod.lm_head.weight'" in problem
    assert "are one tensor, 'lm_head.weight', without what a trainer put around their names" in problem


def test_names_of_a_model_that_nothing_is_known_of_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in small_llama(1).items()}
    models = []
    for name in ("one", "other"):
        models.append(checkpoint(tmp_path / name, tensors))
        (models[-1] / "config.json").unlink()
    plan = polymerge.plan(linear(*models))
    assert [step.name for step in plan.steps] == sorted(tensors)
    assert not any("trainer" in warning for warning in plan.warnings)


# --- LoRA that is not merged, shards that were not gathered


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "module."])
@pytest.mark.parametrize("kind", ["qwen2", "llava"])
def test_lora_in_a_checkpoint_is_refused_once_with_the_way_out(prefix: str, kind: str, tmp_path: Path) -> None:
    one = build(kind, tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load(one).items():
        if name.endswith("q_proj.weight"):
            module = prefix + name.removesuffix(".weight")
            tensors |= {f"{module}.base_layer.weight": tensor, f"{module}.lora_A.default.weight": torch.ones(2, 32)}
        else:
            tensors[prefix + name] = tensor
    save_file(tensors, other / "model.safetensors")
    for recipe in (recipe_of(one, other), recipe_of(other, one)):
        (problem,) = problems_of(recipe)
        assert problem.startswith(f"'other' ({other}): has unmerged LoRA factors, in ")
        assert "merge_and_unload()" in problem
        assert "polymerge fold" in problem
        assert "exclude" not in problem
    ran = cli("inspect", other)
    assert ran.status == 1
    assert "has unmerged LoRA factors" in ran.err


def test_so_is_that_of_loralib(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    factors = {f"model.layers.0.self_attn.q_proj.lora_{side}": torch.ones(2, 2) for side in "AB"}
    (problem,) = problems_of(recipe_of(one, with_more(one, factors, tmp_path / "other")))
    assert "has unmerged LoRA factors, in 2 of its 29 tensors" in problem
    assert "exclude" not in problem


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl"])
def test_empty_tensors_are_told_once(kind: str, tmp_path: Path) -> None:
    one = build(kind, tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    tensors = {name: tensor if tensor.dim() < 2 else torch.zeros(0) for name, tensor in load(one).items()}
    save_file(tensors, other / "model.safetensors")
    empty = sum(tensor.numel() == 0 for tensor in tensors.values())
    for recipe in (recipe_of(one, other), recipe_of(other, one)):
        (problem,) = problems_of(recipe)
        assert problem.startswith(
            f"'other' ({other}): {empty} of its {len(tensors)} tensors are empty, of shape [0], such as '"
        )
        assert "zero_to_fp32.py" in problem


# --- folders


def in_a_folder(one: Path, out: Path, index: bool) -> Path:
    """A checkpoint as zero_to_fp32.py writes it today: shards in a folder that is called as the file was."""
    inside = out / "pytorch_model.bin"
    shutil.copytree(one, out)
    (out / "model.safetensors").unlink()
    inside.mkdir()
    tensors = load(one)
    names, weight_map = sorted(tensors), {}
    for number, start in enumerate((0, len(names) // 2), 1):
        part = names[start:] if start else names[: len(names) // 2]
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, inside / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        said = json.dumps({"metadata": {}, "weight_map": weight_map})
        (inside / "pytorch_model.bin.index.json").write_text(said, encoding="utf-8")
    return out


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_that_is_called_as_the_file_was(index: bool, tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    other = perturbed(one, tmp_path / "other", seed=1)
    inside = in_a_folder(other, tmp_path / "inside", index)
    plain = merged(recipe_of(one, other), tmp_path / "plain")
    assert raw(merged(recipe_of(one, inside), tmp_path / "out")) == raw(plain)
    as_template = merged(recipe_of(inside, one), tmp_path / "again")
    assert raw(as_template) == raw(merged(recipe_of(other, one), tmp_path / "plain2"))
    assert not (as_template / "pytorch_model.bin").exists()
    if index:
        file = inside / "pytorch_model.bin" / "pytorch_model.bin.index.json"
        file.write_text(file.read_text(encoding="utf-8").replace("pytorch_model-00001", "../pytorch_model-00001"))
        (problem,) = problems_of(recipe_of(one, inside))
        assert "only plain paths below its own folder" in problem


@pytest.mark.parametrize(
    ("files", "tool"),
    [
        (["global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "python zero_to_fp32.py . OUT"),
        (["global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"], "python zero_to_fp32.py . OUT"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "python zero_to_fp32.py . OUT"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], "accelerate merge-weights"),
        (["__0_0.distcp", "__1_0.distcp"], "accelerate merge-weights"),
    ],
)
def test_shards_of_a_training_are_refused_with_what_gathers_them(files: list[str], tool: str, tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    run = tmp_path / "run"
    for file in files:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes(b"x")
    shutil.copy(one / "config.json", run)
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe_of(one, run))
    (problem,) = map(str, refused.value.problems)
    assert problem.startswith(f"{run}: has no weights of a full model, only the shards of ")
    assert tool in problem
