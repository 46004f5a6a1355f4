"""Adapters that make another model of their base: a resized vocabulary, and LLaVA's, trained on a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import polymerge
import tiny
from adapters_made import PEFT_WARNINGS
from layouts import Sizes, config_of, random_tower, stored
from misplaced import CLOSE, adapter, factors, raw_tensors
from polymerge.errors import CheckpointError
from polymerge.families import with_rows
from polymerge.inference.live import LiveModel
from running import checkpoint, cli, fold, raw
from tiny import build
from tiny_configs import ROWS

pytestmark = PEFT_WARNINGS

Q0 = "model.layers.0.self_attn.q_proj"
WORDS = torch.tensor([[1, 5, 9, 13, 20]])


def resized(base: Path, folder: Path, rows: int, **settings: Any) -> Tensor:
    """Train an adapter after the vocabulary of `base` was given `rows` rows; what PEFT's model says with it."""
    vlm = "vision_config" in json.loads((base / "config.json").read_text())
    auto = AutoModelForImageTextToText if vlm else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 6, "init_lora_weights": False} | settings
        peft = get_peft_model(model, LoraConfig(**settings)).eval()
        with torch.no_grad():
            for _, parameter in sorted(peft.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    peft.save_pretrained(folder, save_embedding_layers=True)
    with torch.no_grad():
        says = peft(input_ids=WORDS).logits  # a merge would add to what is tied as well
    assert isinstance(says, Tensor)
    return says


def says(folder: Path) -> Tensor:
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model.eval()(input_ids=WORDS).logits
    assert isinstance(found, Tensor)
    return found


WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
RESIZED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "grown, saved whole": ("llama", 4, WHOLE),
    "shrunk, saved whole": ("llama", -4, WHOLE),
    "grown, saved since it was resized": ("llama", 4, {}),
    "grown, rows trained": ("llama", 2, {"trainable_token_indices": [3, ROWS, ROWS + 1]}),
    "grown, factors on both": ("llama", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "a multimodal model": ("llava", 4, WHOLE),
    "with a nested config": ("qwen3_vl", 8, WHOLE),
}


@pytest.mark.parametrize(("family", "more", "settings"), RESIZED.values(), ids=RESIZED)
def test_the_output_has_the_vocabulary_of_the_adapter(
    family: str, more: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = build(family, tmp_path / "base", dtype="float32")
    rows = raw_rows(base) + more
    want = resized(base, tmp_path / "adapter", rows, **settings)
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    assert raw_rows(out) == rows
    config = json.loads((out / "config.json").read_text())
    assert config.get("text_config", config)["vocab_size"] == rows
    torch.testing.assert_close(says(out), want, rtol=1e-4, atol=2e-5)


def raw_rows(folder: Path) -> int:
    (rows,) = {
        len(tensor) for name, tensor in raw_tensors(folder).items() if "embed_tokens" in name or "lm_head" in name
    }
    return rows


ON_HEAD, ON_EMBEDDING = {"target_modules": r".*(q_proj|lm_head)"}, {"target_modules": r".*(q_proj|embed_tokens)"}
ROWS_TRAINED = {"trainable_token_indices": [3, ROWS, ROWS + 1]}
TIED: dict[str, tuple[int, dict[str, Any], bool]] = {
    "all of it saved": (2, {}, False),
    "rows trained": (2, ROWS_TRAINED, False),
    "rows trained, kept tied": (2, {**ROWS_TRAINED, "ensure_weight_tying": True}, False),
    "rows trained, factors on the head": (2, {**ROWS_TRAINED, **ON_HEAD}, True),
    "grown, factors on the head": (2, ON_HEAD, True),
    "grown, factors on the embedding": (2, ON_EMBEDDING, True),
    "shrunk, factors on the head": (-2, ON_HEAD, True),
    "shrunk, factors on the embedding": (-2, ON_EMBEDDING, True),
    "embedding trained": (2, {"modules_to_save": ["embed_tokens"]}, True),
    "both trained": (2, WHOLE, True),
}


@pytest.mark.parametrize(("more", "settings", "apart"), TIED.values(), ids=TIED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_tied_has_the_new_rows_of_either(
    family: str, more: int, settings: dict[str, Any], apart: bool, tmp_path: Path
) -> None:
    """What PEFT saves of one is of both as far as it was not trained; in a live model too."""
    base = build(family, tmp_path / "base", dtype="float32", tie=True)
    want = resized(base, tmp_path / "adapter", ROWS + more, **settings)
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]})
    out = polymerge.merge(plan, tmp_path / "out").folder
    assert raw_rows(out) == ROWS + more
    assert (len(raw_tensors(out)) - len(raw_tensors(base))) == apart
    torch.testing.assert_close(says(out), want, rtol=1e-4, atol=2e-5)
    live = LiveModel(plan)
    live.set(plan)
    with torch.no_grad():
        assert torch.equal(live.model(input_ids=WORDS).logits, says(out))


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("settings", [{}, ON_HEAD, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_a_base_that_stores_what_is_tied_as_its_head(settings: dict[str, Any], more: int, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    want = resized(base, tmp_path / "adapter", ROWS + more, **settings)
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]})
    assert any(f"{ROWS + more} rows, {ROWS} in its base" in said for said in plan.warnings) == bool(more)
    out = polymerge.merge(plan, tmp_path / "out").folder
    torch.testing.assert_close(says(out), want, rtol=1e-4, atol=2e-5)
    live = LiveModel(plan)
    live.set(plan)
    with torch.no_grad():
        assert torch.equal(live.model(input_ids=WORDS).logits, says(out))


def test_a_resized_embedding_without_the_head_that_it_leaves_behind_is_refused(tmp_path: Path) -> None:
    """PEFT's head is the embedding as it was before training, whose new rows nothing holds."""
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    learned = adapter(
        tmp_path / "adapter", {"model.embed_tokens.weight": torch.zeros(ROWS + 2, 32)}, modules_to_save=["embed_tokens"]
    )
    ran = cli("fold", learned, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 2
    assert f"model.embed_tokens.weight with {ROWS + 2} rows, its base {ROWS}, and lm_head.weight would have" in ran.err


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_what_lies_beside_is_of_both_unless_both_lie_there(both: bool, tmp_path: Path) -> None:
    """Other trainers save the parameters that they train, of which a tied model has one."""
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    learned = adapter(tmp_path / "adapter", factors({Q0: (32, 32)})[0])
    embedding, head = torch.randn((2, ROWS + 3, 32), generator=torch.Generator().manual_seed(2)).unbind()
    trained = {"model.embed_tokens.weight": embedding.clone()} | ({"lm_head.weight": head.clone()} if both else {})
    torch.save({f"base_model.model.{name}": tensor for name, tensor in trained.items()},
               learned / "non_lora_state_dict.bin")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(fold(base, learned, tmp_path / "out"))
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_output_embeddings().weight, head if both else embedding)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is not both


def test_a_live_model_is_not_the_base_of_what_an_adapter_makes_of_it(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    learned = adapter(
        tmp_path / "adapter",
        factors({Q0: tuple(raw_tensors(base)[f"{Q0}.weight"].shape)})[0]  # type: ignore[dict-item]
        | {"model.mm_projector.weight": torch.ones(32, 8)},
    )
    (learned / "config.json").write_text(
        json.dumps({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]})
    )
    with pytest.raises(CheckpointError, match=r"another model \(model.mm_projector.weight is of that\)"):
        LiveModel(polymerge.plan({"merge_method": "copy", "models": [f"{base}+{learned}"]}))


def test_a_tied_head_grows_with_its_embedding(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    rows = torch.randn((raw_rows(base) + 3, 32), generator=torch.Generator().manual_seed(1))
    learned = adapter(tmp_path / "adapter", {"model.embed_tokens.weight": rows})
    out = fold(base, learned, tmp_path / "out")
    assert torch.equal(raw_tensors(out)["model.embed_tokens.weight"], rows)
    assert says(out).shape[-1] == len(rows)


def test_new_rows_alone_are_put_below_those_of_the_base(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32", tie=True)
    count = raw_rows(base)
    trained = torch.ones(3, 32)
    token = {"model.embed_tokens.token_adapter.trainable_tokens_delta": trained}
    learned = adapter(tmp_path / "adapter", token, trainable_token_indices={"embed_tokens": [count + 1, 2, count]})
    found = raw_tensors(fold(base, learned, tmp_path / "out"))["model.embed_tokens.weight"]
    want = torch.cat([raw_tensors(base)["model.embed_tokens.weight"], trained[:2]])
    want[2] = 1
    assert torch.equal(found, want)


def test_rows_that_nobody_has_are_said(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    count = raw_rows(base)
    tensors = {"model.embed_tokens.lora_embedding_A": torch.ones(3, count + 2),
               "model.embed_tokens.lora_embedding_B": torch.ones(32, 3)}  # fmt: skip
    ran = cli("fold", adapter(tmp_path / "adapter", tensors), "--base", base, "--dry-run")
    assert ran.status == 2
    assert (
        f"is for [{count + 2}, 32], model.embed_tokens.weight of its base is [{count}, 32]. The vocabulary was"
        in ran.err
    )
    assert f"name the base with {count + 2} rows" in ran.err


def test_a_tokenizer_that_does_not_fit_the_rows_is_said(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    resized(base, tmp_path / "adapter", 30, **WHOLE)
    ran = cli("fold", tmp_path / "adapter", "--base", base, "--dry-run")
    assert f"its adapter resized the vocabulary: 30 rows, {ROWS} in its base" in ran.out
    assert "has tokens up to number" in ran.out
    assert "the embedding 30 rows" in ran.out


def test_as_one_model_of_a_merge(tmp_path: Path) -> None:
    """The template's adapter brings the vocabulary; what both have merges row by row."""
    base = build("llama", tmp_path / "base", dtype="float32")
    other = tiny.perturbed(base, tmp_path / "other", seed=3)
    resized(base, tmp_path / "adapter", ROWS + 4, **WHOLE)
    folded = raw_tensors(fold(base, tmp_path / "adapter", tmp_path / "folded"))["model.embed_tokens.weight"]
    models = [f"{base}+{tmp_path / 'adapter'}", str(other)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "vocab": "overlap"}
    out = polymerge.merge(recipe, tmp_path / "out").folder
    found, theirs = raw_tensors(out)["model.embed_tokens.weight"], raw_tensors(other)["model.embed_tokens.weight"]
    torch.testing.assert_close(found[:ROWS], (folded[:ROWS] + theirs) / 2, **CLOSE)
    assert torch.equal(found[ROWS:], folded[ROWS:])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == ROWS + 4


def test_adapters_whose_vocabularies_were_resized_apart_are_told_so(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    for more in (2, 4):
        resized(base, tmp_path / f"plus {more}", ROWS + more, **WHOLE)
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "plus 2"), str(tmp_path / "plus 4")]}
    with pytest.raises(
        polymerge.PolymergeError, match=rf"'plus 2' is \[{ROWS + 2}, 32\].*were resized apart: fold each"
    ):
        polymerge.plan(recipe | {"parameters": {"weight": 0.5}, "base_model": str(base)})


def test_every_level_of_a_config_that_says_a_vocabulary_says_the_new_one() -> None:
    assert with_rows({"vocab_size": 64}, 64, 68) == {"vocab_size": 68}
    assert with_rows({"vocab_size": 68}, 64, 68) == {"vocab_size": 68}
    nested = {"vocab_size": 64, "text_config": {"vocab_size": 64, "model_type": "llama"}, "a": 1}
    assert with_rows(nested, 64, 60) == {
        "vocab_size": 60,
        "text_config": {"vocab_size": 60, "model_type": "llama"},
        "a": 1,
    }
    implied = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    assert with_rows(implied, 32000, 32002)["text_config"] == {"model_type": "llama", "vocab_size": 32002}
    beyond = {"architectures": ["MllamaForConditionalGeneration"], "text_config": {"vocab_size": 64}}
    assert with_rows(beyond, 72, 76)["text_config"] == {"vocab_size": 68}


# --- LLaVA's adapters on the language model that they were trained from

SIZES = Sizes(heads=4, width=6, hidden=24, inner=10)
PROJECTORS = {
    "mlp2x_gelu": {"0.weight": (24, 10), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)},
    "linear": {"weight": (24, 10), "bias": (24,)},
}


def of_llava(folder: Path, kind: str) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """An adapter as LLaVA writes it, its updates and its projector."""
    tensors, updates = factors({f"model.layers.{layer}.self_attn.q_proj": (24, 24) for layer in (0, 1)})
    adapter(folder, tensors)
    generator = torch.Generator().manual_seed(9)
    projector = {f"model.mm_projector.{name}": torch.randn(shape, generator=generator).half()
                 for name, shape in PROJECTORS[kind].items()}  # fmt: skip
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()}, folder / "non_lora_trainables.bin"
    )
    config = config_of("llama", SIZES)
    config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    config |= {"mm_projector_type": kind, "mm_vision_tower": "openai/clip-vit-large"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, updates, projector


@pytest.mark.parametrize("kind", PROJECTORS)
def test_on_its_language_model_it_gives_the_llava_that_the_two_are(kind: str, tmp_path: Path) -> None:
    tower = stored("llama", random_tower(SIZES, seed=1, dtype=torch.float16), SIZES)
    base = checkpoint(tmp_path / "vicuna", tower, config_of("llama", SIZES))
    learned, updates, projector = of_llava(tmp_path / "lora", kind)
    ran = cli("fold", learned, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert (
        "the output is that model, in its own layout; its vision tower, openai/clip-vit-large, is not in it" in ran.err
    )
    found = raw_tensors(tmp_path / "out")
    assert found.keys() == tower.keys() | projector.keys()
    for name, tensor in found.items():
        update = updates.get(name.removesuffix(".weight"))
        if update is None:
            assert torch.equal(tensor, (tower | projector)[name]), name
        else:
            torch.testing.assert_close(tensor, (tower[name].double() + update).half(), rtol=2**-10, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (learned / "config.json").read_text()
    )
    card = json.loads((tmp_path / "out" / "polymerge.json").read_text())
    assert card["inputs"][0]["family"] == "llava_original"


def test_it_counts_as_that_llava_in_a_merge(tmp_path: Path) -> None:
    tower = stored("llama", random_tower(SIZES, seed=1, dtype=torch.float32), SIZES)
    base = checkpoint(tmp_path / "vicuna", tower, config_of("llama", SIZES))
    learned, _, projector = of_llava(tmp_path / "lora", "mlp2x_gelu")
    folded = fold(base, learned, tmp_path / "folded")
    other = {name: tensor + 1 for name, tensor in raw_tensors(folded).items()}
    llava = checkpoint(tmp_path / "other", other, json.loads((learned / "config.json").read_text()))
    made = []
    for name, model in (("at once", f"{base}+{learned}"), ("after", str(folded))):
        recipe = {"merge_method": "linear", "models": [model, str(llava)], "parameters": {"weight": 0.5}}
        made.append(raw(polymerge.merge(recipe, tmp_path / name, check=False).folder))
    assert made[0] == made[1]
    assert made[0].keys() == tower.keys() | projector.keys()


def test_a_base_with_a_projector_of_another_kind_is_told_so(tmp_path: Path) -> None:
    tower = stored("llama", random_tower(SIZES, seed=1, dtype=torch.float32), SIZES)
    learned, _, projector = of_llava(tmp_path / "lora", "mlp2x_gelu")
    config = json.loads((learned / "config.json").read_text())
    linear = {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in PROJECTORS["linear"].items()}
    wide = {name: torch.zeros([2 * size for size in tensor.shape]) for name, tensor in projector.items()}
    of_wide = (
        "model.mm_projector.0.weight of the adapter is for [24, 10] (3 more like it), model.mm_projector.0.weight of "
        "its base is [48, 20]. The projectors differ in kind"
    )
    of_linear = "does not have: its projector is of another kind. Name a base whose projector has the layers"
    for label, own, words in (("linear", linear, of_linear), ("wide", wide, of_wide)):
        base = checkpoint(tmp_path / label, tower | own, config)
        ran = cli("fold", learned, "--base", base, "--dry-run")
        assert ran.status == 2
        assert "1 problem" in ran.err
        assert words in ran.err
        assert "or the language model whose module names the adapter has" in ran.err
    other = checkpoint(tmp_path / "other", tower | linear, config | {"architectures": ["LlavaMistralForCausalLM"]})
    ran = cli("fold", learned, "--base", other, "--dry-run")  # no second projector beside its own
    assert of_linear in ran.err
    (learned / "config.json").unlink()
    vicuna = checkpoint(tmp_path / "vicuna", tower, config_of("llama", SIZES))
    ran = cli("fold", learned, "--base", vicuna, "--dry-run")
    assert "put the config.json of the model that was trained beside the adapter" in ran.err
