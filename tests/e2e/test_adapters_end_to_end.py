"""Merged adapters as people use them: loaded by PEFT on their base, with everything that travels with the factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import tiny
from adapters_made import (
    LAYER,
    PEFT_WARNINGS,
    adapter,
    close,
    config,
    exact_updates,
    llama,
    loaded,
    recipe,
    record,
    tensors,
    total,
    updates,
)
from polymerge.planning import make_plan
from running import cli, merged, raw, recipe_file

pytestmark = PEFT_WARNINGS


# --- adapters that were trained, of a model with eyes


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llava", tmp_path_factory.mktemp("vlm") / "base", dtype="float32")


def eyes(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def train(vlm: Path, folder: Path, seed: int, targets: list[str], **settings: Any) -> Path:
    """A few steps of training on one answer."""
    torch.manual_seed(seed)
    peft = get_peft_model(eyes(vlm), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | settings))
    optimizer = torch.optim.Adam([one for one in peft.parameters() if one.requires_grad], lr=0.03)
    question = tiny._question(peft.get_base_model(), vlm, "llava")
    for _ in range(4):
        logits = peft(**question).logits[0, -1]
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([7 + seed]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    both = ["q_proj", "v_proj"]  # of the language model and of the vision tower
    return [
        train(vlm, folder / "one", 1, [*both, "linear_1"]),
        train(vlm, folder / "two", 2, [*both, "down_proj"], modules_to_save=["linear_2"]),
    ]


def said(model: Any, vlm: Path) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    answer = model.generate(
        **tiny._question(base, vlm, "llava"), max_new_tokens=3, min_new_tokens=3, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.cat(answer.logits)


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.7}),
    "ties": ("ties", {"density": 0.5}),
    "ties, knots": ("ties", {"density": 0.5, "space": "knots"}),
    "ties, core": ("ties", {"density": 0.5, "space": "core"}),
    "ties, factors": ("ties", {"density": 0.5, "space": "factors"}),
    "dare_linear": ("dare_linear", {"density": 0.5}),
    "dare_ties": ("dare_ties", {"density": 0.5}),
    "robustmerge": ("robustmerge", {}),
    "robustmerge, product": ("robustmerge", {"compose": "product", "floor": None}),
    "cat": ("cat", {}),
    "svd": ("svd", {"rank": 3}),
    "tsv": ("tsv", {"rank": 8}),
}


@pytest.mark.parametrize(("method", "parameters"), METHODS.values(), ids=METHODS)
def test_every_method_speaks(
    vlm: Path, experts: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    weight = None if method == "robustmerge" else [0.6, 0.8]
    out = merged(recipe(method, experts, weight, parameters=parameters, base_model=str(vlm)), tmp_path / "out")
    plain, model = said(eyes(vlm), vlm), loaded(out, eyes(vlm))
    logits = said(model, vlm)
    assert logits.isfinite().all()
    assert (logits - plain).abs().max() > 1e-3
    again = tensors(out)
    got = updates(model)
    assert {name.rpartition(".lora_")[0] for name in again if ".lora_" in name} == set(got)
    assert len(got) == 2 * 4 + 1 + 2  # q and v of two layers of two towers, linear_1, down_proj of two layers
    assert config(out)["modules_to_save"] == ["linear_2"]
    held = tensors(experts[1])
    name = "model.multi_modal_projector.linear_2.weight"
    assert torch.equal(again[name], held[name])
    assert torch.equal(dict(model.named_modules())["base_model.model.model.multi_modal_projector.linear_2"]
                       .modules_to_save["default"].weight, held[name])  # fmt: skip


def test_a_sum_of_two_experts_is_both_folded_in(vlm: Path, experts: list[Path], tmp_path: Path) -> None:
    out = merged(recipe("cat", experts, [0.6, 0.8], base_model=str(vlm)), tmp_path / "out")
    base = {name: tensor.double() for name, tensor in eyes(vlm).state_dict().items()}
    both = loaded(out, eyes(vlm)).merge_and_unload()
    apart = [loaded(one, eyes(vlm)).merge_and_unload().state_dict() for one in experts]
    for name, tensor in both.state_dict().items():
        wanted = base[name] + sum(
            weight * (one[name].double() - base[name]) for weight, one in zip([0.6, 0.8], apart, strict=True)
        )
        if "linear_2" in name:  # a full weight, which only one has
            wanted = apart[1][name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_overrides_go_by_the_layers_of_the_base(vlm: Path, experts: list[Path], tmp_path: Path) -> None:
    """The names of a local base are known, so that layers of the text tower are, and the vision tower is not meant."""
    given = recipe(
        "cat", experts, 0.5, base_model=str(vlm), overrides=[{"layers": "1-1", "merge_method": "copy"}],
        exclude=["vision.*"],
    )  # fmt: skip
    out = merged(given, tmp_path / "out")
    ranks = {name: tensor.shape[0] for name, tensor in tensors(out).items() if name.endswith("lora_A.weight")}
    before, after = tensors(experts[0]), tensors(out)
    for name, rank in ranks.items():
        if "layers.1." in name or "vision_tower" in name:
            assert torch.equal(after[name], before[name])
        else:
            assert rank == (8 if "_proj.lora" in name and "down" not in name else 4), name
    assert not any("layers.1.mlp.down_proj" in name for name in ranks)  # the template has none
    one = updates(loaded(experts[0], eyes(vlm)))
    for module, update in updates(loaded(out, eyes(vlm))).items():
        if "layers.1." in module or "vision_tower" in module:
            np.testing.assert_array_equal(update, one[module])
    left = {entry.name for entry in make_plan(given).left_out}
    assert any("layers.1.mlp.down_proj.lora_A" in name for name in left)
    assert sum("vision_tower" in name for name in left) == 2 * 2 * 2


OLDER = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
         "model.multi_modal_projector.": "multi_modal_projector."}  # fmt: skip


def older(folder: Path, target: Path, **settings: Any) -> Path:
    """An adapter with the names that a transformers before 4.52 has in memory."""
    shutil.copytree(folder, target)
    held = {}
    for name, tensor in tensors(folder).items():
        prefix = next(one for one in OLDER if name.startswith(one))
        held[f"base_model.model.{OLDER[prefix]}{name.removeprefix(prefix)}"] = tensor
    save_file(held, target / "adapter_model.safetensors")
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


def test_layouts_of_names_are_joined(vlm: Path, experts: list[Path], tmp_path: Path) -> None:
    """The output has the template's; what only the other has is refused, for no name is translated back."""
    old = older(experts[0], tmp_path / "old")
    plain = merged(recipe("cat", experts, 0.5, template=str(experts[1]), exclude=["*linear_1*"],
                          base_model=str(vlm)), tmp_path / "plain")  # fmt: skip
    said = recipe("cat", [old, experts[1]], 0.5, template=str(experts[1]), base_model=str(vlm))
    ran = cli("merge", recipe_file(said, tmp_path / "refused.yaml"), "-o", tmp_path / "refused")
    assert ran.status == 2
    assert "'old' has multi_modal_projector.linear_1, which the template 'two' has not" in ran.err
    assert "another layout: language_model.model.layers.0" in ran.err
    out = merged(said | {"exclude": ["*linear_1*"]}, tmp_path / "out")
    assert raw(out) == raw(plain)


# --- what travels with the factors


def folded(folder: Path) -> dict[str, Tensor]:
    return {name: one.double() for name, one in loaded(folder).merge_and_unload().state_dict().items()}


def test_biases_of_the_factors_are_summed(tmp_path: Path) -> None:
    """Also where only one of the adapters has them; scaled as its factors are."""
    adapters = [
        adapter(tmp_path / "one", 1, r=3, lora_alpha=5),
        adapter(tmp_path / "two", 2, r=2, lora_alpha=7, lora_bias=True, target_modules=["q_proj", "v_proj"]),
        adapter(tmp_path / "three", 3, r=4, use_rslora=True, lora_bias=True),
    ]
    weight = [0.5, -1.0, 2.0]
    out = merged(recipe("cat", adapters, weight, parameters={"scale": 0.5}), tmp_path / "out")
    base = {name: tensor.double() for name, tensor in llama().state_dict().items()}
    apart = [folded(one) for one in adapters]
    moved = set()
    for name, tensor in folded(out).items():
        change = 0.5 * sum(number * (one[name] - base[name]) for number, one in zip(weight, apart, strict=True))
        torch.testing.assert_close(tensor, base[name] + change, rtol=1e-5, atol=2e-5, msg=name)
        moved |= {name.rpartition(".")[2]} if change.abs().max() > 0.1 else set()
    assert moved == {"weight", "bias"}
    assert config(out)["lora_bias"] is True


def full(folder: Path) -> list[Path]:
    return [adapter(folder / str(n), n, modules_to_save=["lm_head"], dtype=torch.float32) for n in (1, 2, 3)]


@pytest.mark.parametrize("method", ["linear", "ties", "robustmerge", "cat"])
def test_full_weights_are_their_mean_whatever_the_method(tmp_path: Path, method: str) -> None:
    adapters, weight = full(tmp_path), None if method == "robustmerge" else [0.1, 0.2, 3]
    out = merged(recipe(method, adapters, weight), tmp_path / "out")
    mean = sum(tensors(one)["lm_head.weight"].double() for one in adapters) / 3
    torch.testing.assert_close(tensors(out)["lm_head.weight"].double(), mean, rtol=0, atol=1e-6)
    head = loaded(out).get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(head, tensors(out)["lm_head.weight"])


def test_full_weights_as_the_recipe_says(tmp_path: Path) -> None:
    adapters, weight = full(tmp_path), [0.5, 1.0, -0.25]
    base = tmp_path / "base"
    llama().save_pretrained(base)
    origin = llama().lm_head.weight.detach().double()
    own = [tensors(one)["lm_head.weight"].double() for one in adapters]
    deltas = torch.stack([one - origin for one in own])
    votes = torch.tensor(weight)[:, None, None].double()
    sign = torch.where((votes * deltas).sum(0) >= 0, 1.0, -1.0)
    agree = (votes * deltas * sign > 0).double()
    elected = (votes * deltas * agree).sum(0) / (votes * agree).sum(0)
    wanted = {
        "first": own[1],
        "linear": sum(number * one for number, one in zip(weight, own, strict=True)) / 1.25,
        "task_arithmetic": origin + (votes * deltas).sum(0),
        "ties": origin + elected,
    }
    for extra, expected in wanted.items():
        said = recipe("cat", adapters, weight, parameters={"extra": extra}, template=str(adapters[1]))
        out = merged(said | {"base_model": str(base)}, tmp_path / f"out-{extra}")
        got = tensors(out)["lm_head.weight"].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0 if extra == "first" else 2e-6, msg=extra)
        close(exact_updates(out), *total(adapters, weight))
        sources = [entry["source"] for entry in record(out)["inputs"]]
        assert (str(base) in sources) == (extra in ("task_arithmetic", "ties"))


def test_a_full_weight_that_one_has(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2, modules_to_save=["lm_head"])
    out = merged(recipe("cat", [one, other]), tmp_path / "out")
    assert torch.equal(tensors(out)["lm_head.weight"], tensors(other)["lm_head.weight"])
    assert config(out)["modules_to_save"] == ["lm_head"]
    loaded(out)
    without = merged(recipe("cat", [one, other], exclude=["lm_head.weight"]), tmp_path / "without")
    assert "lm_head.weight" not in tensors(without)  # what is excluded is the template's, which has none
    assert config(without)["modules_to_save"] is None
    kept = merged(recipe("cat", [one, other], exclude=["lm_head.weight"], template=str(other)), tmp_path / "kept")
    assert torch.equal(tensors(kept)["lm_head.weight"], tensors(other)["lm_head.weight"])


def test_an_excluded_full_weight_is_the_template_s(tmp_path: Path) -> None:
    adapters = full(tmp_path)
    given = recipe("cat", adapters, exclude=["lm_head.weight"], template=str(adapters[1]))
    out = merged(given, tmp_path / "out")
    assert torch.equal(tensors(out)["lm_head.weight"], tensors(adapters[1])["lm_head.weight"])
    left = {(entry.input, entry.name) for entry in make_plan(given).left_out}
    assert left == {(place, "base_model.model.lm_head.weight") for place in (0, 2)}


def test_trained_tokens_are_averaged(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / str(n), n, trainable_token_indices=[5, 0]) for n in (1, 2)]
    out = merged(recipe("cat", adapters), tmp_path / "out")
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    mean = sum(tensors(one)[name].double() for one in adapters) / 2
    torch.testing.assert_close(tensors(out)[name].double(), mean, rtol=0, atol=1e-7)
    rows = folded(out)["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[[5, 0]], mean, rtol=0, atol=1e-6)
    untouched = [n for n in range(20) if n not in (5, 0)]
    assert torch.equal(rows[untouched], llama().model.embed_tokens.weight.detach().double()[untouched])


def test_an_embedding_with_its_whole_weight(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / str(n), n, target_modules=["embed_tokens", "q_proj"]) for n in (1, 2)]
    out = merged(recipe("linear", adapters, parameters={"rank": 6}), tmp_path / "out")
    name = "model.embed_tokens.base_layer.weight"
    assert torch.equal(tensors(out)[name], tensors(adapters[0])[name])  # the base's, so that their mean is the same
    close(exact_updates(out), *total(adapters, [0.5, 0.5]))


# --- dtype, exclude, overrides, rank


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype_is_that_of_what_is_merged(tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    adapters = [adapter(tmp_path / "one", 1, modules_to_save=["lm_head"]), adapter(tmp_path / "two", 2)]
    wide = merged(recipe("svd", adapters, 0.5), tmp_path / "wide")
    out = merged(recipe("svd", adapters, 0.5, dtype=dtype), tmp_path / "out")
    for name, tensor in tensors(out).items():
        if name == "lm_head.weight":  # of one adapter alone: a copy
            assert torch.equal(tensor, tensors(adapters[0])[name])
        else:
            assert torch.equal(tensor, tensors(wide)[name].to(kind)), name


def test_what_is_excluded_is_the_template_s(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1, target_modules=["q_proj", "v_proj"])
    two = adapter(tmp_path / "two", 2, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    given = recipe("cat", [one, two], exclude=["*q_proj", "*down_proj.weight"], template=str(one))
    out = merged(given, tmp_path / "out")
    assert not any("down_proj" in name for name in tensors(out))
    assert config(out)["rank_pattern"] or config(out)["r"] != 3
    for name, tensor in tensors(out).items():
        if "q_proj" in name:
            assert torch.equal(tensor, tensors(one)[name])
    wanted, sizes = total([one, two], [1, 1])
    first = exact_updates(one)
    kept = {name: first[name] if "q_proj" in name else wanted[name] for name in first}
    close(exact_updates(out), kept, sizes)
    reasons = {entry.reason for entry in make_plan(given).left_out}
    assert len(reasons) == 2
    assert all("excluded by the recipe" in reason for reason in reasons)


def test_overrides_by_name_and_method(tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 6}
    adapters = [adapter(tmp_path / str(n), n, **targets) for n in (1, 2)]
    out = merged(
        recipe(
            "cat", adapters, [0.5, 2.0],
            overrides=[
                {"match": "*.layers.1.*q_proj", "merge_method": "copy"},
                {"match": "*v_proj*", "merge_method": "svd", "parameters": {"rank": 2, "weight": [1, 3]}},
                {"match": "*layers.0.mlp*", "parameters": {"scale": 0.5}},
            ],
        ),
        tmp_path / "out",
    )  # fmt: skip
    plain, sizes = total(adapters, [0.5, 2.0])
    other, _ = total(adapters, [1, 3])
    got, first, errors = exact_updates(out), exact_updates(adapters[0]), record(out)["output"]["relative_error"]
    for module, update in plain.items():
        wanted = 0.5 * update if "layers.0.mlp" in module else update
        if module == LAYER.format(1, "q_proj"):
            wanted = first[module]
            assert module not in errors
        elif "v_proj" in module:
            u, s, v = np.linalg.svd(other[module], full_matrices=False)
            wanted = (u[:, :2] * s[:2]) @ v[:2]
            assert errors[module] == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-5)
            assert errors[module] > 0.05
        else:
            assert errors[module] == 0
        np.testing.assert_allclose(got[module], wanted, rtol=0, atol=5e-6 * 4 * sizes[module], err_msg=module)


@pytest.mark.parametrize("rank", [1, 4, 6, 100, None])
def test_rank_and_what_it_has_no_room_for(tmp_path: Path, rank: int | None) -> None:
    adapters = [adapter(tmp_path / "one", 1, r=2, lora_alpha=3), adapter(tmp_path / "two", 2, r=4, lora_alpha=3)]
    whole, _ = total(adapters, [0.5, 0.5])
    for method in ("linear", "svd", "cat"):
        said = recipe(method, adapters, 0.5, parameters={"rank": rank})
        out = merged(said, tmp_path / method)
        most = 6 if method == "cat" and rank is None else min(rank or 4, 6)
        assert config(out)["r"] == most
        got, errors = exact_updates(out), record(out)["output"]["relative_error"]
        assert record(out)["output"]["ranks"] == [most]
        for module, update in whole.items():
            s = np.linalg.svd(update, compute_uv=False)
            least = np.linalg.norm(s[most:]) / np.linalg.norm(s)
            true = np.linalg.norm(update - got[module]) / np.linalg.norm(update)
            assert true == pytest.approx(least, abs=2e-7)
            assert errors[module] == pytest.approx(true, abs=2e-7)
            assert (errors[module] == 0) == (most == 6)


def test_an_adapter_that_was_switched_off(tmp_path: Path) -> None:
    """Its alpha is 0: as the template it gives no scaling that the others' updates could be divided by."""
    off, on = adapter(tmp_path / "off", 1, lora_alpha=0), adapter(tmp_path / "on", 2)
    out = merged(recipe("cat", [off, on], [1, 2]), tmp_path / "out")
    close(exact_updates(out), *total([off, on], [1, 2]))


def test_force_replaces_and_dry_run_writes_nothing(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    out = merged(recipe("cat", [one, two]), tmp_path / "out")
    before = raw(out)
    merged(recipe("cat", [one, two], 2.0), out, "--force")
    assert raw(out) != before
    merged(recipe("cat", [one, two]), tmp_path / "dry", "--dry-run")
    assert not (tmp_path / "dry").exists()


def test_format_torch(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    out = merged(recipe("cat", [one, two]), tmp_path / "out", "--format", "torch")
    plain = merged(recipe("cat", [one, two]), tmp_path / "plain")
    assert not (out / "adapter_model.safetensors").exists()
    held = torch.load(out / "adapter_model.bin", weights_only=True)
    assert {name.removeprefix("base_model.model."): None for name in held} == dict.fromkeys(tensors(plain))
    got = updates(PeftModel.from_pretrained(llama(), out))
    close(got, updates(loaded(plain)), 0.0)


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / "one", 1, r=3), adapter(tmp_path / "two", 2, r=4, modules_to_save=["lm_head"])]
    plan = make_plan(recipe("cat", adapters))
    out = merged(recipe("cat", adapters), tmp_path / "out")
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(out).values())
    assert plan.size == sizes
    assert json.loads(json.dumps(plan.config)) == config(out)
