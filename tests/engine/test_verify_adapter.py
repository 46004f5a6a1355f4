"""`verify` of an adapter loads it with PEFT on its base's names, and says where the base is not at hand."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import polymerge
from adapters_made import PEFT_WARNINGS
from polymerge.engine.verify import Finding
from running import cli, linear, recipe_file
from tiny import LLMS, build

pytestmark = PEFT_WARNINGS

OLDER = {
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
    "gemma3": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
}
"""By family: what transformers called modules before 4.52."""


def opened(base: Path, kind: Any = None) -> Any:
    family = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    auto = kind or (AutoModelForCausalLM if family in LLMS else AutoModelForImageTextToText)
    return auto.from_pretrained(base)


def adapter(base: Path, folder: Path, seed: int = 1, kind: Any = None, **settings: Any) -> Path:
    """An adapter of random numbers, as PEFT saves it; its config names the base's folder."""
    said = {"r": 2, "lora_alpha": 4, "target_modules": r".*(language_model|^model\.layers).*(q_proj|v_proj)"} | settings
    made = get_peft_model(opened(base, kind), LoraConfig(**said))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    assert config_of(folder)["base_model_name_or_path"] == str(base)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))


def said(folder: Path, **more: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | more), encoding="utf-8")
    return folder


def older(folder: Path, copy: Path, prefixes: Mapping[str, str]) -> Path:
    """The adapter with the names that it would have had before transformers 4.52."""
    shutil.copytree(folder, copy)
    held = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        own = name.removeprefix("base_model.model.")
        new, old = next(((new, old) for new, old in prefixes.items() if own.startswith(new)), ("", ""))
        held[f"base_model.model.{old}{own.removeprefix(new)}"] = value
    save_file(held, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


def loads(folder: Path, **options: Any) -> Finding:
    return next(found for found in polymerge.verify(folder, **options).findings if found.check == "loads")


@pytest.fixture(scope="module", params=[*OLDER, "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param) / "base", dtype="float32")


def test_an_adapter_that_loads(base: tuple[str, Path], tmp_path: Path) -> None:
    _, model = base
    plain = adapter(model, tmp_path / "plain")
    named = type(opened(model)).__name__
    for one in (plain, adapter(model, tmp_path / "head", modules_to_save=["lm_head"])):
        found = loads(one)
        assert (found.passed, found.detail) == (True, f"PEFT on {named} of {model}: every tensor has its module")
    # nothing of the base but its config is read
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    assert loads(said(plain, base_model_name_or_path="/nowhere/base")).passed is None
    assert "its base /nowhere/base has no config.json here: say where it is with `base`" in loads(plain).detail
    assert "say where it is with `--base`" in cli("verify", plain).out
    ran = cli("verify", plain, "--base", bare)
    assert (ran.status, "every tensor has its module" in ran.out) == (0, True)


def test_verify_says_of_older_names_what_peft_does(base: tuple[str, Path], tmp_path: Path) -> None:
    family, model = base
    if family not in OLDER:
        pytest.skip("its names have stayed")
    new = adapter(model, tmp_path / "new")
    old = older(new, tmp_path / "old", OLDER[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        silent = PeftModel.from_pretrained(opened(model), old)
    found = any(bool(value.any()) for name, value in silent.named_parameters() if "lora_B" in name)
    assert found == (family != "qwen2_5_vl")  # of the others PEFT knows the names of before
    ran = cli("verify", old)
    assert ran.status == (0 if found else 1)
    assert ("every tensor has its module" in ran.out) == found
    if not found:
        count = len(load_file(old / "adapter_model.safetensors"))
        first = min(load_file(old / "adapter_model.safetensors")).replace(".lora_A.weight", "")
        assert f"{count} tensors find no module: '{first}" in ran.out
        assert f"{count} tensors of modules are not there" in ran.out
        assert "`polymerge fold` joins either layout" in ran.out


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_merge_of_two_layouts_has_the_names_that_load(first: str, base: tuple[str, Path], tmp_path: Path) -> None:
    family, model = base
    if family not in OLDER:
        pytest.skip("its names have stayed")
    new = adapter(model, tmp_path / "new", 1)
    same = adapter(model, tmp_path / "same", 2)
    old = older(same, tmp_path / "old", OLDER[family])
    order = (old, new) if first == "old" else (new, old)
    asked = linear(*order)
    asked["parameters"]["rank"] = 4
    plan = polymerge.plan(asked)
    assert any("'old' names modules as transformers did before 4.52" in one for one in plan.warnings) == (
        first == "old"
    )
    out = polymerge.merge(plan, tmp_path / "out").folder
    merged = dict(PeftModel.from_pretrained(opened(model), out).merge_and_unload().named_parameters())
    # by hand: the mean of both updates, the older one's taken from the same adapter under today's names
    before = dict(opened(model).named_parameters())
    updates = [
        dict(PeftModel.from_pretrained(opened(model), one).merge_and_unload().named_parameters()) for one in (new, same)
    ]
    changed = 0
    for name, value in before.items():
        mean = sum(one[name] - value for one in updates) / 2
        changed += bool(mean.any())
        torch.testing.assert_close(merged[name], value + mean, rtol=1e-5, atol=1e-5)
    assert changed == 4


def test_the_template_that_is_asked_for_stays(base: tuple[str, Path], tmp_path: Path) -> None:
    family, model = base
    if family not in OLDER:
        pytest.skip("its names have stayed")
    new = adapter(model, tmp_path / "new", 1)
    old = older(new, tmp_path / "old", OLDER[family])
    ran = cli("merge", recipe_file(linear(old, new, template=str(old)), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    if family == "qwen2_5_vl":
        assert ran.status == 1
        assert "tensors find no module" in ran.err
        assert not (tmp_path / "out").exists()
    else:
        assert ran.status == 0, ran.err
    # what only the older one has cannot be given today's name, so it stays the template
    more = adapter(model, tmp_path / "more", 3, target_modules=r".*(language_model).*(q_proj|v_proj|o_proj)")
    plan = polymerge.plan(linear(older(more, tmp_path / "older", OLDER[family]), new))
    assert plan.inputs[plan.template].label == "older"


@pytest.mark.parametrize("kind", ["lost", "more", "shape"])
def test_tensors_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base", dtype="float32")
    one = adapter(model, tmp_path / "one")
    file = one / "adapter_model.safetensors"
    held = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    if kind == "lost":
        del held[name.format("A")], held[name.format("B")]
        told = f"2 tensors of modules are not there: '{name.format('A.default')}', '{name.format('B.default')}'"
    elif kind == "more":
        held |= {name.format(end).replace("layers.0", "layers.7"): held[name.format(end)].clone() for end in "AB"}
        told = "2 tensors find no module: 'base_model.model.model.layers.7.self_attn.q_proj.lora_A"
    else:
        held[name.format("B")] = torch.ones(5, 2)
        told = "size mismatch"
    save_file(held, file, metadata={"format": "pt"})
    found = loads(one)
    # what is not there begins as no update at all, unless the config has it begin as one
    assert found.passed is (kind == "lost")
    assert told in found.detail
    if kind == "lost":
        assert loads(said(one, init_lora_weights=False)).passed is False


def test_an_adapter_of_a_model_without_a_head(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base", dtype="float32")
    one = adapter(model, tmp_path / "one", kind=AutoModel, target_modules=["q_proj"])
    assert loads(said(one, task_type="FEATURE_EXTRACTION", auto_mapping=None)).passed is True
    mapped = {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama.modeling_llama"}
    assert loads(said(one, task_type=None, auto_mapping=mapped)).passed is True
    assert loads(said(one, task_type="CAUSAL_LM", auto_mapping=None)).passed is False


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized")
def test_a_vocabulary_that_was_resized(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base", dtype="float32")
    grown = opened(model)
    rows = grown.config.vocab_size + 3
    grown.resize_token_embeddings(rows)
    said_so = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(grown, said_so).save_pretrained(tmp_path / "one")
    found = loads(tmp_path / "one")
    assert (found.passed, f"resized to {rows} rows" in found.detail) == (True, True)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_without_the_libraries_it_is_not_checked(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapter(build("llama", tmp_path / "base", dtype="float32"), tmp_path / "one")
    monkeypatch.setitem(sys.modules, package, None)
    found = loads(one)
    assert found.passed is None
    assert str(found) == f"loads       not checked: {package} is not installed"
    assert cli("verify", one).status == 0


def test_a_base_that_is_not_at_hand(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base", dtype="float32")
    one = adapter(model, tmp_path / "one")
    assert "its config names no base" in loads(said(one, base_model_name_or_path=None)).detail
    assert loads(one, base=str(model)).passed is True
    hub = said(one, base_model_name_or_path="owner/name-that-no-cache-has")
    assert loads(hub).passed is None
    assert "its base owner/name-that-no-cache-has is not on this disk" in loads(hub).detail
    ran = cli("verify", model, "--base", model)
    assert ran.status == 1
    assert "is a checkpoint; base is only for adapters" in ran.out


def test_a_base_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tmp_path / "base", dtype="float32")
    one = said(adapter(model, tmp_path / "one"), base_model_name_or_path="owner/name")
    cache = tmp_path / "cache" / "models--owner--name"
    commit = "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit, encoding="utf-8")
    (cache / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(model / "config.json", cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    assert loads(one).passed is True
