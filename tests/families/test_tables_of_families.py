"""The tables of names against names that exist: of published checkpoints, and of tiny ones that transformers wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from polymerge.families import FAMILIES, family_of, quantization_method, splits, text_tower
from polymerge.families.resolve import Stack, map_names
from polymerge.families.rules import Family
from published import PUBLISHED, names_of
from tiny import as_2024, as_live, build, generate, load, perturbed, related_llm
from tiny_configs import CLASSLESS, LLMS, RUNNABLE, TEXT, VLMS
from tiny_trees import TREES

FORMS = {"saved": (), "2024": (as_2024,), "live": (as_live,), "live in 4.5x": (as_2024, as_live)}
"""The names that one checkpoint has had over the years, by what makes them of those that transformers 5 writes."""

ALL_PARTS = ("text", "vision", "projector", "audio")
SPLITS = {
    **splits({"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 64}),
    **dict.fromkeys(("experts_in", "experts_out"), Stack()),
}
"""Where queries, keys and values, and gate and up, lie in fused tensors; names do not depend on it."""

NEVER_TIED = ("mllama", "qwen2_audio")
"""Families whose classes know no tied head."""


@pytest.fixture(scope="session")
def tiny_names(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tensor names of a family's tiny checkpoint in one of `FORMS`, each with its shape."""

    @cache
    def names(family: str, form: str = "saved") -> dict[str, tuple[int, ...]]:
        folder = build(family, tmp_path_factory.mktemp("tiny") / family)
        for renaming in FORMS[form]:
            renaming(folder)
        return shapes_in(folder)

    return names


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load(folder).items()}


def canonical(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    mapped = map_names(family, shapes, "here", SPLITS, shapes)
    assert mapped.problems == ()
    return set(mapped.tensors)


# --- published checkpoints


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda entry: entry["checkpoint"])
def test_every_published_name_has_one_place(published: dict[str, Any]) -> None:
    family, names = family_in(published), names_of(published)
    assert len(names) == published["count"]
    mapped = map_names(family, names, published["checkpoint"], SPLITS, names)
    assert mapped.problems == ()
    assert len(mapped.layout) + len(mapped.buffers) == len(names)
    assert len(mapped.tensors) == sum(len(held) for held in mapped.layout.values())
    if family.name != "generic":
        assert {family.part_of(name) for name in mapped.tensors} <= set(ALL_PARTS)


def family_in(published: dict[str, Any]) -> Family:
    return family_of(published["config"] or {}, published["family"])


def published_names(checkpoint: str) -> tuple[Family, dict[str, tuple[int, ...]]]:
    (entry,) = (entry for entry in PUBLISHED if checkpoint in entry["checkpoint"])
    return family_in(entry), names_of(entry)


@pytest.mark.parametrize(
    ("checkpoint", "text", "vision", "projector", "audio"),
    [
        ("llava-1.5-7b-hf", 291, 391, 4, 0),
        ("DINOv2", 291, 223, 4, 0),
        ("OpenGVLab/InternVL2_5-8B", 291, 340, 6, 0),
        ("MBZUAI/AIN", 339, 385, 6, 0),
        ("Qwen2.5-VL-7B", 339, 385, 5, 0),
        ("Meta-Llama-3-8B", 291, 0, 0, 0),
        ("liuhaotian/llava-v1.5-7b", 291, 0, 4, 0),
        ("MiniCPM-V-2_6", 339, 437, 13, 0),
        ("cogvlm2-llama3-chat-19B", 611, 764, 6, 0),
        ("gemma-3-4b-it", 444, 437, 2, 0),
        ("paligemma-3b", 164, 437, 2, 0),
        ("Phi-3-vision", 291, 391, 6, 0),
        ("Mixtral-8x7B", 995, 0, 0, 0),
        ("Llama-3.2-11B-Vision", 291, 509, 106, 0),
        ("Cosmos-Reason2-8B", 399, 327, 24, 0),
        # 128 experts of three matrices in each of 48 layers, which lie in two tensors
        ("Qwen3-VL-30B-A3B", 531 + 48 * (128 * 3 - 2), 327, 24, 0),
        ("Molmo-7B-D", 339, 373, 13, 0),
        ("Qwen2.5-Omni-3B", 435, 513, 5, 489),
    ],
)
def test_parts_have_their_tensors(checkpoint: str, text: int, vision: int, projector: int, audio: int) -> None:
    family, names = published_names(checkpoint)
    parts = [family.part_of(name) for name in canonical(family, names)]
    assert [parts.count(part) for part in ALL_PARTS] == [text, vision, projector, audio]


def test_buffers_are_known_and_not_merged() -> None:
    family, names = published_names(".bin files with buffers")
    buffers = map_names(family, names, "llama").buffers
    assert sorted(buffers) == sorted(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32))
    assert FAMILIES["llava"].is_buffer("vision_tower.vision_model.embeddings.position_ids")
    assert FAMILIES["qwen2_vl"].is_buffer("visual.rotary_pos_emb.inv_freq")


@pytest.mark.parametrize(
    ("vlm", "llm"),
    [
        ("llava-1.5-7b-hf", "Meta-Llama-3-8B"),
        ("OpenGVLab/InternVL2_5-8B", "InternLM2-7B"),
        # a Llama whose queries, keys and values are fused
        ("OpenGVLab/InternVL2_5-8B", "Meta-Llama-3-8B"),
        ("Phi-3-vision", "Phi-3-mini"),
        ("gemma-3-4b-it", "gemma-3-4b (its text"),
        ("paligemma-3b", "gemma-2b"),
        # the layers that look at the image are not among them
        ("Llama-3.2-11B-Vision", "Meta-Llama-3-8B"),
        # both a Qwen2 7B
        ("Molmo-7B-D", "MiniCPM-V-2_6"),
    ],
)
def test_a_vlm_and_the_llm_it_grew_from_share_their_text(vlm: str, llm: str) -> None:
    texts = [
        {name for name in canonical(family, names) if family.part_of(name) == "text"}
        for family, names in map(published_names, (vlm, llm))
    ]
    assert texts[0] == texts[1]


def test_experts_are_found_one_by_one() -> None:
    mixtral = canonical(*published_names("Mixtral-8x7B"))
    assert "text.layers.31.mlp.experts.7.down_proj.weight" in mixtral
    assert "text.layers.0.mlp.gate.weight" in mixtral
    live = FAMILIES["mixtral"].canonical("model.layers.3.mlp.experts.gate_up_proj")
    assert live == tuple(f"text.layers.3.mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_rule_is_needed_by_a_name_that_exists(name: str, tiny_names: Any) -> None:
    family = FAMILIES[name]
    names = {tensor for entry in PUBLISHED if entry["family"] == name for tensor in names_of(entry)}
    if name in (*VLMS, *LLMS):
        names.update(tensor for form in FORMS for tensor in tiny_names(name, form))
    # any decoder may have experts, which some files hold as transformers 5 has them in memory
    layers = [rule.pattern for rule in family.rules if rule.canonical == "text.layers.{i}.{rest}"]
    for tensor in ("gate_up_proj", "down_proj"):
        names.update(layer.format(i=0, rest=f"mlp.experts.{tensor}") for layer in layers)
    if family.boxed:  # transformers 5 writes a model that was not read from a file without that level
        names.add(f"{family.boxed}post_layernorm.weight")
    assert set(family.rules) == {family.rule(tensor) for tensor in names if not family.is_buffer(tensor)}


# --- tiny checkpoints


@pytest.mark.parametrize(
    ("family", "text"), [(family, text) for family in TREES for text, tree in TREES[family].items() if tree.published]
)
def test_a_tiny_checkpoint_without_a_class_has_all_published_names_and_no_others(
    family: str, text: str, tmp_path: Path
) -> None:
    """Whatever the number of layers and blocks; all other numbers count."""
    (published,) = (entry for entry in PUBLISHED if entry["checkpoint"] == TREES[family][text].published)
    folder = build(family, tmp_path / "vlm", text=text)
    wanted, found = (
        {re.sub(r"\b(layers|blocks|resblocks)\.\d+", r"\1.{i}", name) for name in names}
        for names in (names_of(published), load(folder))
    )
    assert found == wanted
    assert published["family"] == family_of(config_of(folder)).name == family


def test_every_family_is_built_and_those_without_a_class_are_known() -> None:
    assert {*VLMS, *LLMS} == {name for name in FAMILIES if name != "generic"}
    assert {name for name in (*VLMS, *LLMS) if name in TREES} == set(CLASSLESS)
    assert all(TEXT.get(name, name) == next(iter(TREES[name])) for name in CLASSLESS)
    for name in CLASSLESS:  # as soon as transformers has a class, it is to be built with that
        for tree in TREES[name].values():
            assert not hasattr(transformers, tree.config["architectures"][0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*VLMS, *LLMS])
def test_all_spellings_of_a_checkpoint_mean_the_same(name: str, form: str, tiny_names: Any) -> None:
    saved = canonical(FAMILIES[name], tiny_names(name))
    assert canonical(FAMILIES[name], tiny_names(name, form)) == saved
    assert {FAMILIES[name].part_of(tensor) for tensor in saved} == set(FAMILIES[name].parts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, None) for name in VLMS),
        ("llava_next", "mistral"),
        ("paligemma", "gemma2"),
        # of all decoders that have a family of their own; the first is that of the line above
        *((name, text) for name in CLASSLESS if name in VLMS for text in list(TREES[name])[1:] if text in LLMS),
    ],
)
def test_the_plain_llm_of_a_vlm_has_its_text_names(name: str, text: str | None, tmp_path: Path) -> None:
    vlm = build(name, tmp_path / "vlm", text=text)
    llm = related_llm(vlm, tmp_path / "llm")
    inside, outside = (family_of(config_of(folder)) for folder in (llm, vlm))
    named = {tensor for tensor in canonical(outside, shapes_in(vlm)) if outside.part_of(tensor) == "text"}
    assert canonical(inside, shapes_in(llm)) == {tensor.partition("@")[0] for tensor in named}
    assert {tensor.partition("@")[2] for tensor in named} <= {"", "text", "image"}
    assert text_tower(config_of(llm)).model_type == inside.name
    # one model type for three decoders, and nothing in its config that tells them apart
    assert text_tower(config_of(vlm)).model_type == (None if name == "minicpm_v" else inside.name)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize(
    ("name", "tie"),
    [(name, tie) for name in (*VLMS, *LLMS) for tie in (False, True) if not (tie and name in NEVER_TIED)],
)
def test_the_config_says_what_was_built(name: str, tie: bool, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name, layers=3, tie=tie, vocab=72)
    config = config_of(folder)
    assert family_of(config).name == name
    tower = text_tower(config)
    assert (tower.layers, tower.hidden_size, tower.vocab_size, tower.ties_head) == (3, 32, 72, tie)
    assert ("text.lm_head.weight" in canonical(FAMILIES[name], shapes_in(folder))) != tie
    assert quantization_method(config) is None


@pytest.mark.parametrize("name", RUNNABLE)
def test_tiny_checkpoints_say_the_same_under_all_their_names(name: str, tmp_path: Path) -> None:
    saved = build(name, tmp_path / "saved", seed=5)
    logits, spellings = generate(saved), [shapes_in(saved)]
    for form, renamings in FORMS.items():
        folder = build(name, tmp_path / form, seed=5, shard=True) if renamings else saved
        for renaming in renamings:
            renaming(folder)
        if shapes_in(folder) not in spellings:
            spellings.append(shapes_in(folder))
            assert generate(folder).equal(logits), form


def test_tiny_checkpoints_follow_from_their_seed(tmp_path: Path) -> None:
    one, two, three = (build("llava", tmp_path / str(place), seed=seed) for place, seed in enumerate((7, 7, 8)))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert not any(tensor.equal(load(three)[name]) for name, tensor in load(one).items())
    first, second = (load(perturbed(one, tmp_path / f"tuned{place}", seed=1)) for place in range(2))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("vocab", [56, 64, 72])
def test_a_tiny_llm_is_near_its_vlm(vocab: int, tmp_path: Path) -> None:
    vlm = build("qwen2_vl", tmp_path / "vlm", dtype="float16", tie=True)
    near, far = load(related_llm(vlm, tmp_path / "llm", vocab=vocab, size=0.001)), load(vlm)
    assert near["model.embed_tokens.weight"].shape == (vocab, 32)
    for name, tensor in near.items():
        rows = min(len(tensor), len(far[name]))
        assert tensor.dtype == far[name].dtype
        assert 0 < (tensor[:rows].float() - far[name][:rows].float()).abs().max() < 0.01, name


def test_a_tiny_internvl_may_have_an_internlm2_decoder(tmp_path: Path) -> None:
    folder = build("internvl_chat", tmp_path / "vlm", text="internlm2")
    assert text_tower(config_of(folder)).model_type == "internlm2"
    assert "text.layers.1.self_attn.k_proj.weight" in canonical(FAMILIES["internvl_chat"], shapes_in(folder))


def test_pixtral_is_a_llava_with_another_tower(tmp_path: Path) -> None:
    eyes = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "head_dim": 8, "image_size": 16, "patch_size": 8}  # fmt: skip
    text = {"model_type": "mistral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9, "pad_token_id": 0}  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text, vision_config=eyes, image_token_index=8)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    family = family_of(config_of(tmp_path))
    assert (family.name, text_tower(config_of(tmp_path)).model_type) == ("llava", "mistral")
    assert "vision.transformer.layers.0.attention.k_proj.weight" in canonical(family, shapes_in(tmp_path))


# --- which family


@pytest.mark.parametrize("published", [entry for entry in PUBLISHED if entry["config"]], ids=lambda e: e["checkpoint"])
def test_published_configs_name_their_family(published: dict[str, Any]) -> None:
    assert family_of(published["config"]).name == published["family"]


def test_generic_names_stand_for_themselves() -> None:
    generic = FAMILIES["generic"]
    assert canonical(generic, dict.fromkeys(["vision.w", "a.b.0.c"], (1,))) == {"vision.w", "a.b.0.c"}
    assert generic.parts == ()
