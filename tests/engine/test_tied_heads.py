"""Heads and embeddings that a config ties: what is stored decides, and what PEFT makes two tensors of stays two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS
from folded import learned
from polymerge.errors import Refused
from polymerge.families import FAMILIES
from polymerge.inference.live import LiveModel
from polymerge.planning.inputs import _beside
from polymerge.planning.model import EMBEDDING, HEAD
from running import cli, fold, linear, merged
from tiny import as_2024, as_live, build, load, loaded, logits

pytestmark = PEFT_WARNINGS

FAMILIES_TIED = (
    "llama", "qwen3", "gemma2", "gemma3", "qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision", "internvl", "mistral3",
)  # fmt: skip

SAME_LOGITS = {"rtol": 1e-4, "atol": 5e-5}
"""Of float32 models whose factors are applied one by one in PEFT, and summed up in a checkpoint."""


def pair(folder: Path) -> tuple[Tensor, Tensor]:
    """Embedding and head as transformers loads them."""
    model = loaded(folder)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def flagged(folder: Path, value: bool = True) -> Path:
    """Have the config say that the head is tied, or that it is not, on every level."""
    config = json.loads((folder / "config.json").read_text())
    for level in (config, config.get("text_config")):
        if level is not None:
            level["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def silent(folder: Path) -> Path:
    """Have the config say nothing of ties."""
    config = json.loads((folder / "config.json").read_text())
    for level in (config, config.get("text_config", {})):
        level.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(folder: Path) -> tuple[str, str]:
    """The names of embedding and head in a file that has both."""
    stored = load(folder)
    return tuple(next(n for n in stored if n.endswith(end)) for end in ("embed_tokens.weight", "lm_head.weight"))  # type: ignore[return-value]


def weighted(*models: Path, weights: tuple[float, ...] = (0.7, 0.3), **more: Any) -> dict[str, Any]:
    listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return {"merge_method": "linear", "models": listed, **more}


# --- what is stored decides


@pytest.mark.parametrize("family", [*FAMILIES_TIED, "mllama"])
def test_a_head_of_its_own_is_merged_or_kept_although_the_flag_ties_it(family: str, tmp_path: Path) -> None:
    one, other = (
        flagged(build(family, tmp_path / name, seed=seed, dtype="float32", tie=False))
        for seed, name in enumerate(("one", "other"), 1)
    )
    if family == "llava_onevision":
        as_2024(other)
    (e1, h1), (e2, h2) = pair(one), pair(other)
    assert not torch.equal(e1, h1)
    assert not torch.equal(e2, h2)
    plan = polymerge.plan(weighted(one, other))
    out = merged(weighted(one, other), tmp_path / "out")
    embedding, head = pair(out)
    assert torch.allclose(embedding, 0.7 * e1 + 0.3 * e2, rtol=0, atol=1e-6)
    assert torch.allclose(head, 0.7 * h1 + 0.3 * h2, rtol=0, atol=1e-6)
    live = LiveModel(plan)
    live.set(plan)
    assert torch.equal(live.model.get_input_embeddings().weight, embedding)
    assert torch.equal(live.model.get_output_embeddings().weight, head)
    kept, was = merged(weighted(one, other, exclude=[HEAD]), tmp_path / "kept"), load(one)
    assert torch.equal(load(kept)[names(one)[1]], was[names(one)[1]])
    assert torch.allclose(pair(kept)[0], 0.7 * e1 + 0.3 * e2, rtol=0, atol=1e-6)
    other_way = merged(weighted(one, other, exclude=[EMBEDDING]), tmp_path / "other-way")
    assert torch.equal(pair(other_way)[0], e1)
    assert torch.allclose(pair(other_way)[1], 0.7 * h1 + 0.3 * h2, rtol=0, atol=1e-6)
    assert "head its own" in cli("inspect", one, other).out


def stored_twice(folder: Path, copy: Path) -> Path:
    """A copy of a tied checkpoint in which the head lies beside the embedding, with the same numbers."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(tensors | {"lm_head.weight": tensors[embedding].clone()}, copy / "model.safetensors", {"format": "pt"})
    return copy


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "dare_linear": {"merge_method": "dare_linear", "parameters": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "ties_model": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.3, "trim": "model"}},
    "metagpt": {"merge_method": "metagpt"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_a_head_that_is_a_copy_of_the_embedding_changes_nothing(family: str, method: str, tmp_path: Path) -> None:
    """Whatever a method draws or measures, the model is the one that is made where the copy is not stored."""
    plain = [build(family, tmp_path / f"plain{seed}", seed=seed, dtype="float32", tie=True) for seed in range(3)]
    twice = [stored_twice(folder, tmp_path / f"twice{place}") for place, folder in enumerate(plain)]
    outs = []
    for kind, (base, *models) in (("plain", plain), ("twice", twice)):
        asked = METHODS[method] | {"models": [str(one) for one in models]}
        asked |= {} if method == "linear" else {"base_model": str(base), "template": str(models[0])}
        outs.append(load(merged(asked, tmp_path / f"{kind} out")))
    lone, double = outs
    assert set(double) - set(lone) == {"lm_head.weight"}
    assert all(torch.equal(tensor, double[name]) for name, tensor in lone.items())
    assert torch.equal(double["lm_head.weight"], next(double[n] for n in lone if n.endswith("embed_tokens.weight")))


def test_copies_in_some_models_and_none_in_others(tmp_path: Path) -> None:
    plain, other = (build("qwen2_vl", tmp_path / str(n), seed=n, dtype="float32", tie=True) for n in (1, 2))
    twice = stored_twice(plain, tmp_path / "twice")
    for place, (first, second) in enumerate(((twice, other), (other, twice))):
        embedding, head = pair(merged(weighted(first, second), tmp_path / f"out{place}"))
        assert torch.equal(embedding, head)
        assert torch.allclose(embedding, 0.7 * pair(first)[0] + 0.3 * pair(second)[0], rtol=0, atol=1e-6)


def test_a_copy_can_part_from_its_embedding_in_a_live_model(tmp_path: Path) -> None:
    """transformers ties the two when it loads the template, and what a plan makes of them differs."""
    one, other = (build("qwen2_vl", tmp_path / str(n), seed=n, dtype="float32", tie=True) for n in (1, 2))
    twice = stored_twice(one, tmp_path / "twice")
    plan = polymerge.plan(weighted(twice, other, exclude=[HEAD]))
    live = LiveModel(plan)
    live.set(plan)
    embedding, head = pair(merged(weighted(twice, other, exclude=[HEAD]), tmp_path / "out"))
    assert torch.equal(head, pair(one)[1])
    assert not torch.equal(head, embedding)
    assert torch.equal(live.model.get_input_embeddings().weight, embedding)
    assert torch.equal(live.model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_a_file_that_has_the_head_alone(family: str, tmp_path: Path) -> None:
    """Which of two tied names is stored is up to whoever saved them; transformers takes either."""
    one, other = (build(family, tmp_path / str(n), seed=n, dtype="float32", tie=True) for n in (1, 2))
    expected = 0.7 * pair(one)[0] + 0.3 * pair(other)[0]
    tensors = load_file(one / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, one / "model.safetensors", {"format": "pt"})
    for place, asked in enumerate((weighted(one, other), weighted(other, one, weights=(0.3, 0.7)))):
        embedding, head = pair(merged(asked, tmp_path / f"out{place}"))
        assert torch.allclose(embedding, expected, rtol=0, atol=1e-6)
        assert torch.equal(head, embedding)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_name_of_what_is_not_stored_is_that_of_the_same_layout(name: str) -> None:
    family = FAMILIES[name]
    literal = [rule for rule in family.rules if "{" not in rule.pattern]
    embeddings = [rule.pattern for rule in literal if rule.names == (EMBEDDING,)]
    heads = {rule.pattern for rule in literal if rule.names == (HEAD,)}
    for embedding in embeddings if heads else ():
        head = _beside(family, embedding, HEAD)
        assert head in heads
        # of a layout in which all of a language model stands under one name, the head stands there too
        assert head.startswith("language_model.") == embedding.startswith("language_model.")


# --- adapters


def trained(base: Path, adapter: Path, seed: int = 7, **settings: Any) -> Tensor:
    """Put an adapter on `base`, and save it; what PEFT's model says with it."""
    return logits(learned(base, adapter, seed, 0.05, **{"target_modules": r".*(q_proj|v_proj)"} | settings), base)


Q = r".*(q_proj|v_proj)"
APART: dict[str, dict[str, Any]] = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head lora": {"target_modules": rf"{Q}|.*lm_head"},
    "embedding lora": {"target_modules": rf"{Q}|.*embed_tokens"},
    "both lora": {"target_modules": rf"{Q}|.*embed_tokens|.*lm_head"},
    "embedding lora, head saved": {"target_modules": rf"{Q}|.*embed_tokens", "modules_to_save": ["lm_head"]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [3, 5]}},
    "tokens of both": {"trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [3, 7]}},
    "tokens, head lora": {"target_modules": rf"{Q}|.*lm_head", "trainable_token_indices": [9, 2]},
}
TIED: dict[str, dict[str, Any]] = {
    "embedding saved, kept": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both saved, kept": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "head saved, kept": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embedding lora, kept": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [9, 2]},
    "tokens, kept": {"trainable_token_indices": [9, 2], "ensure_weight_tying": True},
}


def check_fold(base: Path, out: Path, said: Tensor, *, apart: bool) -> None:
    model = loaded(out)
    torch.testing.assert_close(logits(model, out), said, **SAME_LOGITS)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) != apart
    assert (len(load(out)) - len(load(base))) == apart
    if not apart:
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("settings", [*APART, *TIED])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_fold_says_what_peft_says(family: str, settings: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32", tie=True)
    said = trained(base, tmp_path / "adapter", **(APART | TIED)[settings])
    check_fold(base, fold(base, tmp_path / "adapter", tmp_path / "out"), said, apart=settings in APART)


@pytest.mark.parametrize("family", FAMILIES_TIED)
@pytest.mark.parametrize("layout", [None, as_2024], ids=["saved", "2024"])
def test_fold_in_families_and_layouts(family: str, layout: Any, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32", tie=True)
    if layout is not None:
        layout(base)
    said = trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    check_fold(base, out, said, apart=True)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False
    assert torch.equal(pair(out)[1], pair(base)[0])  # the head is the base's, byte for byte


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma3_text", "paligemma"])
@pytest.mark.parametrize("settings", ["both saved", "head lora", "tokens", "embedding saved, kept"])
def test_a_config_that_is_silent_ties_as_its_class_does(family: str, settings: str, tmp_path: Path) -> None:
    base = silent(build(family, tmp_path / "base", dtype="float32", tie=True))
    said = trained(base, tmp_path / "adapter", **(APART | TIED)[settings])
    check_fold(base, fold(base, tmp_path / "adapter", tmp_path / "out"), said, apart=settings in APART)


@pytest.mark.parametrize("settings", [*APART, *TIED])
@pytest.mark.parametrize("own", [False, True], ids=["copy", "own"])
def test_fold_onto_a_base_that_stores_both(own: bool, settings: str, tmp_path: Path) -> None:
    if own and settings == "tokens, head lora":
        pytest.skip("PEFT refuses it where head and embedding differ")
    plain = build("llama", tmp_path / "plain", dtype="float32", tie=True)
    base = stored_twice(plain, tmp_path / "base")
    if own:
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = trained(base, tmp_path / "adapter", **(APART | TIED)[settings])
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(loaded(out), out), said, **SAME_LOGITS)


@pytest.mark.parametrize("settings", APART)
def test_a_torch_file_whose_two_names_share_a_storage(settings: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    said = trained(base, tmp_path / "adapter", **APART[settings])
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, base / "pytorch_model.bin")
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(loaded(out), out), said, **SAME_LOGITS)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("settings", ["head lora", "embedding saved", "both saved", "embedding saved, kept", "tokens"])
@pytest.mark.parametrize("place", [0, 1], ids=["template", "other"])
def test_a_base_with_its_adapter_is_merged_as_what_it_is_folded_to(settings: str, place: int, tmp_path: Path) -> None:
    base, own = (build("qwen2_vl", tmp_path / str(n), seed=n, dtype="float32", tie=n == 1) for n in (1, 2))
    trained(base, tmp_path / "adapter", **(APART | TIED)[settings])
    there = pair(fold(base, tmp_path / "adapter", tmp_path / "folded"))
    sources = [Path(f"{base}+{tmp_path / 'adapter'}"), own]
    weights = (0.6, 0.4)
    if place:
        sources, weights = sources[::-1], (0.4, 0.6)
    plan = polymerge.plan(weighted(*sources, weights=weights))
    out = merged(weighted(*sources, weights=weights), tmp_path / "out")
    made = pair(out)
    tied = not place and settings in TIED
    for number, (ours, theirs) in enumerate(zip(there, pair(own), strict=True)):
        if not (tied and number):
            assert torch.allclose(made[number], 0.6 * ours + 0.4 * theirs, rtol=0, atol=1e-6)
    assert torch.equal(*made) == tied
    assert any("nothing of that head is in the output" in said for said in plan.warnings) == tied
    live = LiveModel(plan)
    live.set(plan)
    assert torch.equal(live.model.get_input_embeddings().weight, made[0])
    assert torch.equal(live.model.get_output_embeddings().weight, made[1])


def test_a_live_model_of_a_fold_and_a_torch_output(tmp_path: Path) -> None:
    base = as_live(build("gemma3", tmp_path / "base", dtype="float32", tie=True))
    said = trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]})
    live = LiveModel(plan)
    live.set(plan)
    torch.testing.assert_close(logits(live.model, base), said, **SAME_LOGITS)
    out = polymerge.merge(plan, tmp_path / "out", file_format="torch", shard_size="20KB").folder
    torch.testing.assert_close(logits(loaded(out), out), said, **SAME_LOGITS)


def test_exclude_keeps_the_head_that_an_adapter_parted(tmp_path: Path) -> None:
    base, own = (build("llama", tmp_path / str(n), seed=n, dtype="float32", tie=n == 1) for n in (1, 2))
    trained(base, tmp_path / "adapter", **APART["head lora"])
    there = pair(fold(base, tmp_path / "adapter", tmp_path / "folded"))
    sources = [Path(f"{base}+{tmp_path / 'adapter'}"), own]
    made = pair(merged(weighted(*sources, exclude=[HEAD]), tmp_path / "out"))
    assert torch.equal(made[1], there[1])
    assert torch.allclose(made[0], 0.7 * there[0] + 0.3 * pair(own)[0], rtol=0, atol=1e-6)


def test_a_plan_that_parts_them_can_be_stored(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]})
    assert plan.unties
    assert [step.name for step in plan.steps][-1] == "lm_head.weight"
    again = polymerge.plan(json.loads(json.dumps(plan.to_json())))
    assert (again, again.hash) == (plan, plan.hash)
    assert polymerge.plan(linear(base, base)).unties is False


# --- adapters that are merged


def peft_says(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(loaded(base), adapter).eval(), base)


@pytest.mark.parametrize("settings", [*APART, *TIED])
def test_a_merged_adapter_is_the_mean_of_what_peft_loads(settings: str, tmp_path: Path) -> None:
    """Folded as well as by PEFT: head and embedding are the means of those of the two."""
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    given = (APART | TIED)[settings]
    for number in (1, 2):
        trained(base, tmp_path / f"adapter{number}", number, **given)
    adapters = [tmp_path / f"adapter{number}" for number in (1, 2)]
    out = merged(linear(*adapters) | {"merge_method": "cat"}, tmp_path / "out")
    there = [pair(fold(base, one, tmp_path / f"folded{place}")) for place, one in enumerate(adapters)]
    made = pair(fold(base, out, tmp_path / "folded"))
    for one, other, mean in zip(*there, made, strict=True):
        assert torch.allclose(mean, (one + other) / 2, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(loaded(tmp_path / "folded"), base), peft_says(base, out), **SAME_LOGITS)


@pytest.mark.parametrize(
    ("method", "kept", "said"),
    [
        ("linear", (True, False), "'a' keeps head and embedding tied (ensure_weight_tying), 'b' does not"),
        ("dare_linear", (True, True), "dare_linear draws for each module anew"),
    ],
)
def test_adapters_that_cannot_stay_tied(method: str, kept: tuple[bool, bool], said: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    for name, ensure in zip("ab", kept, strict=True):
        settings = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": ensure}
        trained(base, tmp_path / name, **settings)
    with pytest.raises(Refused) as refused:
        polymerge.plan(linear(tmp_path / "a", tmp_path / "b") | {"merge_method": method})
    assert said in str(refused.value)
