"""An output is loaded in the dtype that was written: config.json follows, and nothing is rounded on the way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import polymerge
from adapters_made import adapter
from polymerge.dtypes import MERGEABLE, holding, holds
from polymerge.planning.output_dtypes import Stored
from running import checkpoint, cli, linear, merged, recipe_file, small_llama
from tiny import build, load, perturbed, related_llm

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAID = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"([a-z0-9]+)"')


def cast(folder: Path, dtype: torch.dtype) -> Path:
    """The folder with every tensor in a dtype, whatever its config says."""
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saying(folder: Path, dtype: str, key: str = "torch_dtype", nested: bool = True) -> Path:
    """The folder with this dtype in its config, at the top and in each of its parts, indented as nobody else does."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and nested)):
        for other in ("dtype", "torch_dtype"):
            part.pop(other, None)
        part[key] = dtype
    file.write_text(json.dumps(config, indent=3, separators=(",", " :  ")), encoding="utf-8")
    return folder


def dtypes_in(folder: Path) -> set[str]:
    return {said for _, said in _SAID.findall((folder / "config.json").read_text(encoding="utf-8"))}


def stored(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def assert_loaded_as_stored(folder: Path, dtype: torch.dtype | None = None) -> None:
    """By default a model has the values that were written, to the bit, and all of them in one dtype."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    model.save_pretrained(folder / "again")
    assert {value.dtype for value in model.parameters()} == {model.dtype if dtype is None else dtype}
    again, written = load(folder / "again"), load_as_saved(folder)
    assert set(again) == set(written)
    assert all(torch.equal(again[name].double(), value.double()) for name, value in written.items())
    shutil.rmtree(folder / "again")


def load_as_saved(folder: Path) -> dict[str, Tensor]:
    """What is stored, under the names that transformers saves it by."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    model.save_pretrained(folder / "names")
    found = load(folder / "names")
    shutil.rmtree(folder / "names")
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    vlm = build("qwen2_5_vl", folder / "vlm")
    return vlm, perturbed(vlm, folder / "tuned", seed=3)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("before", "asked"), [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")]
)
@pytest.mark.parametrize("file_format", ["safetensors", "torch"])
def test_the_config_follows_the_dtype_that_is_asked(
    pair: tuple[Path, Path], key: str, before: str, asked: str, file_format: str, tmp_path: Path
) -> None:
    vlm = saying(cast(shutil.copytree(pair[0], tmp_path / "vlm"), DTYPES[before]), before, key)
    out = merged(linear(vlm, pair[1], dtype=asked), tmp_path / "out", "--format", file_format)
    text, own = ((folder / "config.json").read_text(encoding="utf-8") for folder in (out, vlm))
    assert dtypes_in(out) == {asked}
    assert _SAID.sub(r"\1?", text) == _SAID.sub(r"\1?", own)  # nothing else is another, not a blank
    # by hand: an average in float32, rounded once
    mine, other = load_file(vlm / "model.safetensors"), load_file(pair[1] / "model.safetensors")
    average = {name: (0.5 * mine[name].float() + 0.5 * other[name].float()).to(DTYPES[asked]) for name in mine}
    written = stored(out)
    assert all(torch.equal(written[name], value) for name, value in average.items())
    assert_loaded_as_stored(out, DTYPES[asked])


def test_nothing_is_changed_where_the_dtype_stays(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for said, asked in (("bfloat16", None), ("bfloat16", "bfloat16"), ("float32", None)):
        vlm = saying(shutil.copytree(pair[0], tmp_path / f"{said}-{asked}"), said)
        out = merged(linear(vlm, pair[1], **({"dtype": asked} if asked else {})), tmp_path / f"out-{said}-{asked}")
        # a config that asks for more digits than are stored loses none of them
        assert (out / "config.json").read_bytes() == (vlm / "config.json").read_bytes()


@pytest.mark.parametrize("command", ["merge", "fold"])
def test_a_config_that_rounds_the_template_s_own_tensors(command: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    vlm = saying(cast(shutil.copytree(pair[0], tmp_path / "vlm"), torch.float32), "bfloat16")
    if command == "merge":
        ran = cli("merge", recipe_file(linear(vlm, pair[1]), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    else:
        model = AutoModelForImageTextToText.from_pretrained(vlm)
        lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        ran = cli("fold", tmp_path / "adapter", "--base", vlm, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "its config.json says bfloat16, which rounds its tensors of float32" in ran.out + ran.err
    assert dtypes_in(tmp_path / "out") == {"float32"}
    assert_loaded_as_stored(tmp_path / "out", torch.float32)


@pytest.mark.parametrize("said", ["bfloat16", None])
def test_a_mixture_is_told_and_loses_nothing(said: str | None, tmp_path: Path) -> None:
    vlm = build("qwen2_5_vl", tmp_path / "vlm")
    other = related_llm(vlm, tmp_path / "llm", seed=1, vocab=77)
    if said is None:
        file = vlm / "config.json"
        file.write_text(re.sub(r'\n *"(?:torch_)?dtype": "[a-z0-9]+",?', "", file.read_text(encoding="utf-8")))
    assert dtypes_in(vlm) == ({said} if said else set())
    recipe = linear(vlm, other, dtype="float32", parts=["text"])
    plan = polymerge.plan(recipe)
    warning = next(one for one in plan.warnings if one.startswith("dtype: "))
    counts = {dtype: sum(step.dtype == dtype for step in plan.steps) for dtype in ("F32", "BF16")}
    assert min(counts.values()) > 0
    assert f"float32 ({counts['F32']})" in warning
    assert f"bfloat16 ({counts['BF16']})" in warning
    assert "config.json says float32, in which nothing of them is lost" in warning
    out = merged(recipe, tmp_path / "out")
    assert dtypes_in(out) == {"float32"}
    assert {str(value.dtype) for value in stored(out).values()} == {"torch.float32", "torch.bfloat16"}
    assert_loaded_as_stored(out, torch.float32)
    record = json.loads((out / "polymerge.json").read_text(encoding="utf-8"))
    assert record["output"]["dtypes"] == {"float32": counts["F32"], "bfloat16": counts["BF16"]}
    assert f"{counts['BF16']} are BF16" in (out / "README.md").read_text(encoding="utf-8")
    if said is None:
        before = json.loads((vlm / "config.json").read_text(encoding="utf-8"))
        assert json.loads((out / "config.json").read_text(encoding="utf-8")) == {"torch_dtype": "float32", **before}


def test_float16_with_bfloat16_is_loaded_as_float32(tmp_path: Path) -> None:
    vlm = build("qwen2_5_vl", tmp_path / "vlm")
    out = merged(linear(vlm, related_llm(vlm, tmp_path / "llm", seed=1), dtype="float16"), tmp_path / "out")
    assert dtypes_in(out) == {"float32"}
    assert_loaded_as_stored(out, torch.float32)


def test_norms_that_a_checkpoint_keeps_in_float32_leave_its_config_alone(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    vlm = shutil.copytree(pair[0], tmp_path / "vlm")
    tensors = load_file(vlm / "model.safetensors")
    norms = {name: value.float() for name, value in tensors.items() if "norm" in name}
    save_file(tensors | norms, vlm / "model.safetensors", metadata={"format": "pt"})
    ran = cli("verify", vlm)
    assert ran.status == 0, ran.out
    assert f"{len(norms)} tensors stored as float32, beside most of its tensors; all is loaded as bfloat16" in ran.out
    out = merged(linear(vlm, pair[1]), tmp_path / "out")
    assert (out / "config.json").read_bytes() == (vlm / "config.json").read_bytes()
    record = json.loads((out / "polymerge.json").read_text(encoding="utf-8"))
    assert sorted(record["output"]["rounded_by_template"]) == sorted(norms)
    assert not [one for one in record["plan"]["warnings"] if "dtype" in one]
    # what the template does not round is not lost because another dtype was asked for
    asked = merged(linear(saying(vlm, "float32"), pair[1], dtype="bfloat16", exclude=["*norm*"]), tmp_path / "asked")
    assert dtypes_in(asked) == {"float32"}
    assert_loaded_as_stored(asked, torch.float32)


def test_verify_tells_what_loading_rounds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for written, said in (("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float16")):
        folder = saying(cast(shutil.copytree(pair[0], tmp_path / written), DTYPES[written]), said)
        ran = cli("verify", folder)
        assert ran.status == 1
        count = len(load_file(folder / "model.safetensors"))
        assert f"{count} tensors stored as {written} are rounded to {said} when it is loaded" in ran.out
    assert cli("verify", saying(folder, "float32")).status == 0
    # of what polymerge has written, one tensor is enough
    out = merged(linear(*pair), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    name = next(one for one in tensors if one.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name].float()}, out / "model.safetensors", metadata={"format": "pt"})
    ran = cli("verify", out)
    assert ran.status == 1
    assert f"1 tensors stored as float32 are rounded to bfloat16 when it is loaded, first {name}" in ran.out


def test_a_config_alone_says_it_where_no_class_loads_the_folder(tmp_path: Path) -> None:
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "torch_dtype": "bfloat16"}
    folder = checkpoint(tmp_path / "model", small_llama(1, torch.float32), config)
    ran = cli("verify", folder)
    assert "stored as float32 are rounded to bfloat16" in ran.out
    checkpoint(folder, small_llama(1, torch.float32), {**config, "torch_dtype": "float32"})
    assert "dtypes      ok: stored as float32, loaded as float32" in cli("verify", folder).out


def test_only_dtypes_of_models_are_changed() -> None:
    text = """{"torch_dtype" : "torch.bfloat16", "a\\"b": {"dtype": "bfloat16", "x": ["dtype", {"dtype": "bfloat16"}]},
      "quantization_config": {"dtype": "bfloat16"}, "dtype_of": "bfloat16", "c": {"dtype": "auto", "dtype2": 1},
      "d": {"e": {"torch_dtype":"float16"}}, "s": "\\"dtype\\": \\"bfloat16\\"", "n": {"dtype": null}}"""
    made = Stored({"F32": 1}, "F32", frozenset({"F32"}), (), True, False).written_in(text)
    expected = text
    for before in ('"torch_dtype" : "torch.bfloat16"', '{"dtype": "bfloat16", "x"', '"torch_dtype":"float16"'):
        expected = expected.replace(before, re.sub(r"(?:torch\.)?b?float16", "float32", before))
    assert made == expected
    json.loads(made)


def test_which_dtype_holds_another() -> None:
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for wide in MERGEABLE:
        for narrow in MERGEABLE:
            info = torch.finfo(types[narrow])
            values = torch.tensor([info.max, info.tiny, 1 + info.eps], dtype=types[narrow])
            kept = torch.equal(values.to(types[wide]).to(torch.float64), values.to(torch.float64))
            assert holds(wide, narrow) == kept
    found: dict[Any, str] = {one: holding(one) for one in (("F16",), ("BF16", "F16"), ("F16", "F32"), ("F64", "BF16"))}
    assert list(found.values()) == ["F16", "F32", "F32", "F64"]


def test_the_dtype_that_an_adapter_s_config_names_follows(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_dtype": "float32"}), encoding="utf-8")
    for asked, said in ((None, "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        recipe = linear(*adapters, **({"dtype": asked} if asked else {}))
        recipe["parameters"]["rank"] = 4
        out = polymerge.merge(recipe, tmp_path / f"out-{asked}", check=False).folder
        found = {str(value.dtype) for value in load_file(out / "adapter_model.safetensors").values()}
        assert found == {f"torch.{asked or 'float32'}"}
        assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["lora_dtype"] == said


def test_a_dtype_that_nothing_is_written_in_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What is folded into the template keeps its dtype, as what is copied does; merged alone it takes another."""
    model = AutoModelForImageTextToText.from_pretrained(pair[0])
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    source = f"{pair[0]}+{tmp_path / 'adapter'}"
    copy = {"merge_method": "copy", "models": [source]}
    plan = polymerge.plan(copy | {"dtype": "float16"})
    assert {step.dtype for step in plan.steps} == {"BF16"}
    said = "none is merged: all keep theirs. It has an effect where the model is merged alone"
    assert any(said in warning for warning in plan.warnings)
    assert not any("dtype:" in warning for warning in polymerge.plan(copy).warnings)
    alone = polymerge.plan(
        {"merge_method": "linear", "models": [source], "parameters": {"weight": 1}, "dtype": "float16"}
    )
    assert not any(said in warning for warning in alone.warnings)
    made = stored(polymerge.merge(alone, tmp_path / "alone").folder)
    folded = stored(polymerge.merge(copy, tmp_path / "folded").folder)
    assert {value.dtype for value in made.values()} == {torch.float16}
    name = next(name for name in folded if name.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(made[name], folded[name].to(torch.float16))


def test_a_projector_of_another_dtype_than_the_model_that_it_comes_to(tmp_path: Path) -> None:
    """LLaVA's adapters: a float16 language model, trained in bfloat16. Nothing of either is rounded."""
    base = build("llama", tmp_path / "base", dtype="float16")
    tensors = load_file(base / "model.safetensors")
    learned = tmp_path / "adapter"
    learned.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, learned / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (learned / "adapter_config.json").write_text(json.dumps(settings))
    projector = torch.full((32, 8), 1e5, dtype=torch.bfloat16)  # more than float16 can hold
    torch.save({"base_model.model.model.mm_projector.weight": projector}, learned / "non_lora_trainables.bin")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "torch_dtype": "bfloat16"
    }  # fmt: skip
    config.pop("dtype")
    (learned / "config.json").write_text(json.dumps(config))
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{learned}"]})
    (said,) = [warning for warning in plan.warnings if "its config.json says" in warning]
    assert "says bfloat16, which rounds its tensors of float16; the output's says float32" in said
    out = polymerge.merge(plan, tmp_path / "out").folder
    assert dtypes_in(out) == {"float32"}
    made = stored(out)
    assert torch.equal(made["model.mm_projector.weight"], projector)
    assert torch.equal(made["lm_head.weight"], tensors["lm_head.weight"])
