"""Each family: a real tiny checkpoint, merged by the command line, loaded strictly, run, and merged again by hand.

Those that transformers has no class of cannot be loaded and run: they are compared by names and values instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from running import cli, merged, raw, recipe_file
from tiny import as_2024, as_live, build, generate, is_buffer, load, perturbed, related_llm
from tiny_classless import joined
from tiny_configs import CLASSLESS, LLMS, RUNNABLE, TEXT, VLMS
from tiny_trees import TREES
from whole_merges import average, check_fates, in_memory, literal_merge, recipe, same

FORMS: dict[str, Callable[[Path], Path]] = {"saved": lambda folder: folder, "2024": as_2024, "live": as_live}
LLAVAS = ("llava", "llava_next", "llava_onevision")
CASES = [
    *((family, "saved") for family in VLMS if family not in CLASSLESS),
    *((family, "2024") for family in (*LLAVAS, "qwen3_vl_moe")),
    *((family, "live") for family in (*LLAVAS, "qwen2_vl", "qwen2_5_vl", "internvl", "mllama")),
]
WITHOUT_CLASS = [(family, text) for family in CLASSLESS for text in TREES[family]]
"""Families that transformers has no class of, with each decoder that they have been published with."""

ALSO_SAID: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    # the queries, keys and values of its image tokens have biases, those of a Llama have none
    ("cogvlm", "llama3"): ({"exclude": ["*.bias@image"]}, {}),
    # a MiniCPM has the names of a Llama and no family of its own
    ("minicpm_v", "minicpm"): ({}, {"family": "llama"}),
}
"""What a recipe has to say of such a pair: at the root, and of the language model."""


@pytest.mark.parametrize(("family", "form"), CASES)
def test_an_llm_joins_the_text_tower_of_every_family(family: str, form: str, tmp_path: Path) -> None:
    vlm = FORMS[form](build(family, tmp_path / "vlm"))
    llm = related_llm(vlm, tmp_path / "llm", seed=1) if form == "saved" else related_of(family, tmp_path)
    asked = recipe_file(recipe(vlm, llm), tmp_path / "recipe.yaml")
    made = json.loads(cli("plan", asked, "--json", "-").out)
    out = merged(recipe(vlm, llm), tmp_path / "out")
    check_fates(made, {0: vlm, 1: llm}, out)
    literal = literal_merge(vlm, llm, tmp_path / "literal")
    assert same(in_memory(out), in_memory(literal))
    logits = generate(out, tokens=2)
    if form == "saved":
        assert torch.equal(logits, generate(literal, tokens=2))
        assert not torch.equal(logits, generate(vlm, tokens=2))


def related_of(family: str, tmp_path: Path) -> Path:
    """The related model, which is read off the names that transformers writes."""
    return related_llm(build(family, tmp_path / "as saved"), tmp_path / "llm", seed=1)


@pytest.mark.parametrize(("family", "text"), [case for case in WITHOUT_CLASS if case[0] in VLMS])
def test_an_llm_joins_the_text_tower_of_every_family_without_a_class(family: str, text: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm", text=text)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    outer, inner = ALSO_SAID.get((family, text), ({}, {}))
    said = {**recipe(vlm, llm, **inner), **outer}
    made = json.loads(cli("plan", recipe_file(said, tmp_path / "recipe.yaml"), "--json", "-").out)
    out = merged(said, tmp_path / "out")
    check_fates(made, {0: vlm, 1: llm}, out)
    expected, before = joined(vlm, llm, average), load(vlm)
    assert same(load(out), expected)
    assert any(not torch.equal(before[name], tensor) for name, tensor in expected.items())
    check_companions(vlm, out)


def check_companions(template: Path, out: Path) -> None:
    """Config, tokenizer and the code that the config points to came along."""
    beside = {file.name for file in template.iterdir() if file.suffix != ".safetensors"}
    code = json.loads((template / "config.json").read_text()).get("auto_map", {})
    assert {"config.json", "tokenizer.json", *(f"{place.partition('.')[0]}.py" for place in code.values())} <= beside
    for name in beside:
        assert (out / name).read_bytes() == (template / name).read_bytes(), name


@pytest.mark.parametrize(("family", "text"), [*((family, None) for family in RUNNABLE), *WITHOUT_CLASS])
def test_fine_tunes_of_one_model_merge_in_all_parts(family: str, text: str | None, tmp_path: Path) -> None:
    model = build(family, tmp_path / "model", text=text)
    tuned = perturbed(model, tmp_path / "tuned", seed=5)
    out = merged(recipe(model, tuned), tmp_path / "out")
    ours, theirs = load(model), load(tuned)
    buffers = [name for name in ours if is_buffer(name)]
    assert same(
        load(out), {name: ours[name] if name in buffers else average(ours[name], theirs[name]) for name in ours}
    )
    fates = {"merged": len(ours) - len(buffers)} | ({"copied": len(buffers)} if buffers else {})
    assert json.loads((out / "polymerge.json").read_text())["output"]["tensors"] == fates
    if family in LLMS and family in RUNNABLE:
        assert not torch.equal(generate(out, tokens=1), generate(model, tokens=1))


def test_an_internlm2_tower_merges_with_a_llama_of_its_shapes(tmp_path: Path) -> None:
    vlm = build("internvl_chat", tmp_path / "vlm", text="internlm2")
    llm = build("llama", tmp_path / "llm")
    made = json.loads(cli("plan", recipe_file(recipe(vlm, llm), tmp_path / "r.yaml"), "--json", "-").out)
    assert any("is a internlm2" in warning for warning in made["warnings"])
    ours, split = load(vlm), load(llm)
    found = load(merged(recipe(vlm, llm), tmp_path / "joined"))
    # two queries of 8 rows, the keys that they share, and their values
    fused = [split[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    rows = torch.cat([block for group in range(2) for block in
                      (fused[0][16 * group :][:16], fused[1][8 * group :][:8], fused[2][8 * group :][:8])])  # fmt: skip
    name = "language_model.model.layers.0.attention.wqkv.weight"
    assert torch.equal(found[name], average(ours[name], rows))
    assert same(found, joined(vlm, llm, average))


def test_the_installed_command_makes_the_same(tmp_path: Path) -> None:
    vlm = build("llava_next", tmp_path / "vlm")
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    here = merged(recipe(vlm, llm), tmp_path / "here")
    words = ["--template", vlm, "--with", llm, "--method", "linear", "--weight", "0.7,0.3", "-o", tmp_path / "there"]
    program = Path(sys.executable).with_name("polymerge")
    done = subprocess.run([program, "merge", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert raw(tmp_path / "there") == raw(here)
    assert json.loads((tmp_path / "there/polymerge.json").read_text())["command"][:2] == ["polymerge", "merge"]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "idefics2"])
def test_a_tied_head_stays_tied(family: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm", tie=True)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    out = merged(recipe(vlm, llm), tmp_path / "out")
    assert load(out).keys() == load(vlm).keys()
    assert not any("lm_head" in name for name in load(out))
    literal = literal_merge(vlm, llm, tmp_path / "literal")
    assert torch.equal(generate(out, tokens=2), generate(literal, tokens=2))


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_vl"])
def test_a_head_that_is_stored_is_a_head_where_the_flags_differ(family: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm")
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    config = json.loads((vlm / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True  # as transformers 5 writes what the class has for it
    (vlm / "config.json").write_text(json.dumps(config))
    out = merged(recipe(vlm, llm), tmp_path / "out")
    assert torch.equal(load(out)["lm_head.weight"], average(load(vlm)["lm_head.weight"], load(llm)["lm_head.weight"]))
    assert torch.equal(generate(out, tokens=1), generate(literal_merge(vlm, llm, tmp_path / "literal"), tokens=1))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_tied_template_has_no_place_for_a_head_and_says_so(family: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm", tie=True)
    llm = build(TEXT[family], tmp_path / "llm", seed=3)
    assert "lm_head.weight" in load(llm)
    asked = recipe_file(recipe(vlm, llm), tmp_path / "recipe.yaml")
    made = json.loads(cli("plan", asked, "--json", "-").out)
    assert {"input": 1, "name": "lm_head.weight"}.items() <= made["left_out"][0].items()
    assert any("has a head of its own" in warning for warning in made["warnings"])
    generate(merged(recipe(vlm, llm), tmp_path / "out"), tokens=1)
