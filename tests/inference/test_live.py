"""A plan carried out into a loaded model gives the weights that merge writes, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import polymerge
from adapters_made import adapter, llama
from ignored import VALUE_HEAD, recipe_of, with_more
from polymerge.analysis.layerwise import plan_and_baseline
from polymerge.checkpoints.loading import load_model
from polymerge.errors import CheckpointError, RecipeError
from polymerge.inference.live import LiveModel
from polymerge.methods.table import METHODS
from polymerge.planning import make_plan
from polymerge.planning.folding import fold_recipe
from polymerge.planning.plan import Layout
from polymerge.recipe.parsing import read_recipe
from running import same_weights, with_config
from tiny import as_2024, as_live, build, perturbed, related_llm

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "slerp": {"t": 0.3},
    "metagpt": {},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {"filter_wise": True},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "ram": {},
    "ramplus_tl": {},
}


def test_every_method_on_checkpoints_is_looked_at() -> None:
    assert set(PARAMETERS) == {row.name for row in METHODS.values() if row.on in ("weights", "deltas")}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A VLM, the language model that it may be made of, and a fine-tune of that."""
    folder = tmp_path_factory.mktemp("models")
    vlm = build("llava", folder / "vlm")
    base = related_llm(vlm, folder / "base", seed=1)
    return {"vlm": str(vlm), "base": str(base), "other": str(perturbed(base, folder / "other", seed=2))}


def recipe(models: dict[str, str], method: str, weight: float = 0.4, **more: Any) -> dict[str, Any]:
    parameters = {**PARAMETERS[method], **more.pop("parameters", {})}
    said = {"weight": weight} if METHODS[method].parameter("weight") else {}
    merged = [models["vlm"], models["other"]][2 - (METHODS[method].models or 2) :]
    return {
        "merge_method": method,
        "template": models["vlm"],
        "base_model": models["base"],
        "models": [
            {
                "model": model,
                "parameters": {name: 1 - value if model == models["vlm"] else value for name, value in said.items()},
            }
            for model in merged
        ],
        "parameters": parameters,
        **more,
    }


def written(plan: polymerge.Plan, folder: Path) -> Path:
    polymerge.merge(plan, folder, check=False)
    return folder


CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in PARAMETERS},
    "ties, one threshold for the model": {"method": "ties", "parameters": {"trim": "model"}},
    "layer swap": {"method": "linear", "overrides": [{"layers": "0-0", "merge_method": "copy"}]},
    "float32 tensors in a bfloat16 model": {"method": "task_arithmetic", "dtype": "float32"},
    "part of the vocabulary": {"method": "linear", "vocab": "overlap"},
}


@pytest.mark.parametrize("case", CASES)
def test_live_weights_are_those_of_the_merged_folder(case: str, family: dict[str, str], tmp_path: Path) -> None:
    plans = [polymerge.plan(recipe(family, weight=weight, **CASES[case])) for weight in (0.4, 0.7)]
    live = LiveModel(plans[0])
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    for number, plan in enumerate((*plans, plans[0])):  # the first once more: nothing of another plan is left
        live.set(plan)
        same_weights(live.model, load_model(written(plan, tmp_path / str(number))))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in live.model.state_dict().items())


@pytest.mark.parametrize("name", ["llava_next", "idefics2", "qwen2_vl", "qwen2_5_vl", "llava_onevision", "internvl"])
@pytest.mark.parametrize("layout", [None, as_2024, as_live], ids=["saved", "2024", "live"])
def test_families_and_layouts(name: str, layout: Any, tmp_path: Path) -> None:
    vlm = build(name, tmp_path / "vlm", tie=name == "internvl")
    other = related_llm(vlm, tmp_path / "other", seed=1)
    if layout is not None:
        layout(vlm)
    plan = polymerge.plan(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(vlm), "parameters": {"weight": 0.6}},
                {"model": str(other), "parameters": {"weight": 0.4}},
            ],
        }
    )
    live = LiveModel(plan)
    live.set(plan)
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))


def test_another_dtype_is_rounded_from_what_merge_writes(family: dict[str, str], tmp_path: Path) -> None:
    plan = polymerge.plan(recipe(family, "linear"))
    live = LiveModel(plan, dtype="float32")
    live.set(plan)
    assert live.model.dtype == torch.float32
    same_weights(live.model, load_model(written(plan, tmp_path / "out"), dtype="float32"))


def test_the_bits_do_not_depend_on_threads(family: dict[str, str]) -> None:
    plan = polymerge.plan(recipe(family, "dare_ties"))
    one, three = LiveModel(plan, threads=1), LiveModel(plan, threads=3)
    one.set(plan)
    three.set(plan)
    same_weights(one.model, three.model)


def test_a_model_that_is_written_to_between_two_plans_is_noticed(family: dict[str, str], tmp_path: Path) -> None:
    mine = {**family, "other": str(shutil.copytree(family["other"], tmp_path / "tuned"))}
    file = Path(mine["other"]) / "model.safetensors"
    live = LiveModel(polymerge.plan(recipe(mine, "linear")))
    live.set(polymerge.plan(recipe(mine, "linear")))
    plan = polymerge.plan(recipe(mine, "linear", 0.6))
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(CheckpointError, match=f"{file}: was written to while"):
        live.set(plan)
    live.set(plan)  # which reads all of it again
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))


def test_a_template_that_is_written_to_after_it_was_loaded_is_noticed(family: dict[str, str], tmp_path: Path) -> None:
    mine = {**family, "vlm": str(shutil.copytree(family["vlm"], tmp_path / "mine"))}
    plan = polymerge.plan(recipe(mine, "linear"))
    live = LiveModel(plan)
    file = Path(mine["vlm"]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    for _ in range(2):  # what is not merged stays what was loaded
        with pytest.raises(CheckpointError, match=f"{file}: was written to while"):
            live.set(plan)


def test_experts_that_transformers_fuses(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    plans = [
        polymerge.plan(
            {
                "merge_method": "linear",
                "models": [
                    {"model": folders[0], "parameters": {"weight": 1 - weight}},
                    {"model": folders[1], "parameters": {"weight": weight}},
                ],
            }
        )
        for weight in (0.25, 0.5)
    ]
    live = LiveModel(plans[0])
    assert "model.layers.0.mlp.experts.gate_up_proj" in live.model.state_dict()
    for number, plan in enumerate((*plans, plans[0])):
        live.set(plan)
        same_weights(live.model, AutoModelForCausalLM.from_pretrained(written(plan, tmp_path / f"out{number}")))


def test_a_plan_of_another_template_is_refused(family: dict[str, str], tmp_path: Path) -> None:
    live = LiveModel(polymerge.plan(recipe(family, "linear")))
    other = perturbed(Path(family["vlm"]), tmp_path / "another", seed=9)
    with pytest.raises(RecipeError, match="of another template"):
        live.set(polymerge.plan(recipe({**family, "vlm": str(other)}, "linear")))


def test_a_plan_with_another_model_is_taken(family: dict[str, str], tmp_path: Path) -> None:
    live = LiveModel(polymerge.plan(recipe(family, "linear")))
    other = perturbed(Path(family["other"]), tmp_path / "another", seed=9)
    plan = polymerge.plan(recipe({**family, "other": str(other)}, "linear"))
    live.set(plan)
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias of a factor for a broken one
@pytest.mark.parametrize(
    ("method", "layout", "trained"),
    [
        ("robustmerge", "peft", {}),
        ("ties", "peft", {"modules_to_save": ["lm_head"]}),
        ("ties", "llava", {"modules_to_save": ["lm_head", "k_proj"]}),
        ("cat", "peft", {"lora_bias": True, "trainable_token_indices": {"embed_tokens": [1, 3]}}),
    ],
)
def test_adapters_are_merged_and_folded_into_their_base(
    method: str, layout: Layout, trained: dict[str, Any], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    modules = (["q_proj"], ["q_proj", "v_proj"])
    adapters = [str(adapter(tmp_path / str(n), n, target_modules=some, **trained)) for n, some in enumerate(modules)]
    weights = {} if method == "robustmerge" else {"weight": 0.5}
    plans = [
        polymerge.plan(
            {
                "merge_method": method,
                "base_model": str(tmp_path / "base"),
                "models": [{"model": folder, "parameters": weights} for folder in adapters],
                "parameters": {"scale": scale},
            }
        )
        for scale in (1.0, 2.0)
    ]
    plans = [replace(plan, layout=layout) for plan in plans]
    live = LiveModel(plans[0])
    for number, plan in enumerate((*plans, plans[0])):
        live.set(plan)
        merged_adapter = written(plan, tmp_path / f"adapter{number}")
        folded = polymerge.plan(fold_recipe(str(merged_adapter), str(tmp_path / "base")))
        same_weights(live.model, load_model(written(folded, tmp_path / f"out{number}")))


def test_a_template_that_does_not_load_whole_is_refused(family: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vlm = build("llava", tmp_path / "vlm")
    tensors = load_file(vlm / "model.safetensors")
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, vlm / "model.safetensors", metadata={"format": "pt"})
    plan = polymerge.plan(recipe({**family, "vlm": str(vlm)}, "linear"))
    with pytest.raises(CheckpointError, match="1 missing"):
        LiveModel(plan)


def test_infinities_in_an_input_are_refused(family: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = perturbed(Path(family["other"]), tmp_path / "bad", seed=3)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    plan = polymerge.plan(recipe({**family, "other": str(bad)}, "linear"))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        LiveModel(plan).set(plan)


def test_what_another_plan_changed_is_the_template_s_again(family: dict[str, str], tmp_path: Path) -> None:
    live = LiveModel(polymerge.plan(recipe(family, "linear")))
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    live.set(polymerge.plan(recipe(family, "linear")))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in live.model.state_dict().items())
    plan = polymerge.plan(recipe(family, "linear", exclude=["text.layers.*", "text.embed_tokens.weight"]))
    live.set(plan)
    after = live.model.state_dict()
    kept = [name for name in before if ".layers." in name]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))


def test_a_template_without_what_the_recipe_ignores(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    odd = with_more(one, VALUE_HEAD, tmp_path / "odd")
    asked = recipe_of(odd, perturbed(one, tmp_path / "other", seed=1), ignore=["v_head.*"])
    plan = make_plan(asked)
    live = LiveModel(plan)
    live.set(plan)
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))
    # what it is like without the merge leaves the same out
    full, baseline = plan_and_baseline(read_recipe(asked))
    assert full == plan
    assert baseline is not None
    assert {one.name for one in baseline.plan.left_out} == set(VALUE_HEAD)
    LiveModel(baseline.plan)


def test_a_template_that_says_it_is_quantized_is_told_so(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    stale = with_config(perturbed(one, tmp_path / "stale", seed=1), quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"says that it is quantized \(fp8\).*Merge it alone first"):
        LiveModel(make_plan(recipe_of(stale, one)))
    out = written(
        make_plan({"merge_method": "linear", "models": [str(stale)], "parameters": {"weight": 1}}), tmp_path / "o"
    )
    plan = make_plan(recipe_of(out, one))
    live = LiveModel(plan)
    live.set(plan)
    same_weights(live.model, load_model(written(plan, tmp_path / "out")))
