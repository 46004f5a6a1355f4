"""docs/pairs.md says which families can be joined, computed from the tables."""

from __future__ import annotations

from itertools import permutations

import pytest

from paths import ROOT
from polymerge import read_recipe
from polymerge.families import FAMILIES
from polymerge.families.rules import Family, counterpart

DOCUMENT = (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8")
KNOWN = [family for family in FAMILIES.values() if family.decoders]

DECODER = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def layer_names(family: Family) -> set[str]:
    """What a family's rules make of a Llama-like layer, with whatever names they give it on disk."""
    names = set()
    for rule in family.rules:
        for canonical in rule.names:
            if not canonical.startswith("text.layers.{i}."):
                continue
            for inner in DECODER:
                tail = canonical.removeprefix("text.layers.{i}.")
                whole, _, branch = tail.partition("@")
                stem = whole.removesuffix("{rest}")
                if inner == whole or ("{rest}" in whole and inner.startswith(stem)):
                    names.add(f"text.layers.0.{inner}" + (f"@{branch}" if branch else ""))
    return names


def shared(template: Family, source: Family) -> list[str]:
    """The lineages that both have decoders of, if every tensor of the template's layer has its counterpart."""
    ours, theirs = layer_names(template), layer_names(source)
    if not ours or not all(counterpart(name, theirs) for name in ours):
        return []
    return [lineage for lineage in template.decoders if lineage in source.decoders]


def table() -> str:
    """A row for each lineage that several families have, and one for the families that stand alone."""
    lines = ["| lineage of the decoder | families of it |", "|---|---|"]
    lineages = dict.fromkeys(lineage for family in KNOWN for lineage in family.decoders)
    members = {lineage: [one.name for one in KNOWN if lineage in one.decoders] for lineage in lineages}
    lines += [f"| {lineage} | {', '.join(names)} |" for lineage, names in members.items()]
    return "\n".join(lines)


def test_the_document_has_the_table_that_follows_from_the_families() -> None:
    assert table() in DOCUMENT, table()


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_every_family_explains_a_whole_llama_like_layer(family: Family) -> None:
    explained = {name.removeprefix("text.layers.0.").partition("@")[0] for name in layer_names(family)}
    assert explained == set(DECODER)


def test_joining_is_symmetric_in_the_lineages() -> None:
    for one, other in permutations(KNOWN, 2):
        assert set(shared(one, other)) == set(shared(other, one))


def test_the_six_pairs_of_the_paper_have_a_recipe_each() -> None:
    pairs = set()
    for path in (ROOT / "recipes").glob("adamms-*.yaml"):
        recipe = read_recipe(path)
        if recipe.merge_method == "linear":
            pairs.add((recipe.models[1].model, recipe.template))
    llava, owl, cog = "liuhaotian/llava-v1.5-7b", "MAGAer13/mplug-owl2-llama2-7b", "THUDM/cogvlm-chat-hf"
    assert pairs == {
        (llava, cog),
        (owl, cog),
        (owl, llava),
        (llava, owl),
        (cog, owl),
        ("lmms-lab/llava-onevision-qwen2-7b-si", "Qwen/Qwen2-VL-7B-Instruct"),
    }
