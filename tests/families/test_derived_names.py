"""Derived families and the names that exist: of every model type as its conversion tables write it, of published
checkpoints, and beside the tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

import tiny_derived
from polymerge.families import Reading, blueprint, family_of, read_names, splits
from polymerge.families.derived import derive
from polymerge.families.expressions import Shape
from polymerge.families.names_on_disk import as_published
from polymerge.families.registry import GENERIC, claimed
from polymerge.families.resolve import map_names
from polymerge.families.rules import Family
from published import DERIVED, PUBLISHED, names_of

Config = dict[str, Any]
Shapes = dict[str, Shape]

MULTIMODAL, TEXT = tiny_derived.multimodal_types(), tiny_derived.text_types()
CLASSES = TEXT | MULTIMODAL
"""Every model type that transformers has a class of images, sound or text for, each with the class."""

NOT_BUILT = ("fast_vlm", "gemma3n", "perception_lm", "shieldgemma2")
"""Types that need packages which tests do not ask for (timm); and a class whose names in memory are not its own."""

OTHERWISE = {"ernie4_5_vl_moe", "inkling2", "inkling_mm_model"}
"""Types of which files hold some tensors otherwise than memory, by more than moving rows and experts."""

TABLED = [kind for kind, named in CLASSES.items() if claimed({"architectures": [named]}) is not GENERIC]
OWN_LAYERS = ("mllama",)
"""Types whose tables number the layers of the plain decoder without those in between, which no class tells."""


@cache
def names_of_type(kind: str) -> tuple[Config, Shapes, Shapes]:
    """The config of a tiny model, its tensors in memory, and as transformers writes them; nothing is drawn."""
    config = tiny_derived.tiny_config(kind)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[kind])(config)
    tied = model.all_tied_weights_keys or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    told: Config = json.loads(config.to_json_string()) | {"architectures": [CLASSES[kind]]}
    return told, _shapes(state), _shapes(revert_weight_conversion(model, dict(state)))


def _shapes(state: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def derived_family(config: Config, shapes: Shapes) -> Family:
    found = derive(config, shapes, splits(config))
    assert found.family is not None, found.why
    return found.family


def canonical(family: Family, config: Config, shapes: Shapes) -> dict[str, Any]:
    mapped = map_names(family, shapes, "here", splits(config, family), shapes)
    assert mapped.problems == ()
    return dict(mapped.tensors)


@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if kind not in NOT_BUILT])
def test_a_type_is_read_under_the_names_that_its_conversion_tables_give(kind: str) -> None:
    """The names and forms that transformers saves are those of published checkpoints, wherever it converts them."""
    config, live, saved = names_of_type(kind)
    family = derived_family(config, saved)
    found = canonical(family, config, saved)
    assert family.unloaded == ()
    assert any(name.startswith("text.layers.") for name in found) or kind in ("pix2struct", "udop") or len(found) > 20
    assert (found.keys() == canonical(derived_family(config, live), config, live).keys()) == (kind not in OTHERWISE)


@pytest.mark.parametrize("kind", [kind for kind in TABLED if kind not in (*NOT_BUILT, *OWN_LAYERS)])
def test_a_table_and_the_derivation_agree_on_every_type_of_the_table(kind: str) -> None:
    config, live, saved = names_of_type(kind)
    for shapes in (live, saved):
        assert canonical(derived_family(config, shapes), config, shapes) == canonical(family_of(config), config, shapes)


@pytest.mark.parametrize("kind", [kind for kind in TABLED if kind not in NOT_BUILT])
def test_a_table_s_published_names_are_those_of_transformers_reverse_conversion(kind: str) -> None:
    """But for Qwen3-VL-MoE, whose published experts lie transposed against what transformers writes."""
    config, live, saved = names_of_type(kind)
    found = derive(config, live, splits(config))
    assert found.family is not None
    asked = as_published(config, Reading(found.family, by="its class", published=found.published), live)
    for shapes in (live, saved):
        told = as_published(config, read_names(config, shapes), shapes)
        assert told.shapes.keys() == asked.shapes.keys()
        assert (told.shapes == asked.shapes) == (kind != "qwen3_vl_moe")
        again = as_published(config, read_names(config, told.shapes), told.shapes)
        assert (dict(again.names), again.why) == ({}, "")


@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if kind not in (*NOT_BUILT, *TABLED)])
def test_published_names_of_a_derived_family_hold_what_memory_has_or_are_refused(kind: str) -> None:
    config, live, _ = names_of_type(kind)
    told = as_published(config, read_names(config, live), live)
    if kind not in OTHERWISE:
        assert told.why == ""
        held = canonical(derived_family(config, told.shapes), config, told.shapes)
        assert held.keys() == canonical(derived_family(config, live), config, live).keys()


def shapes_of(config: Config, names: Mapping[str, object]) -> Shapes:
    """The shapes that tensors of these names have where transformers loads them as they are."""
    built = blueprint.blueprint(config, len(names))
    landed = {name: built.land(name) for name in names}
    return {
        name: built.shapes[one.targets[0]] if one is not None and one.operations in ((), ("Transpose",)) else (4, 4)
        for name, one in landed.items()
    }


@pytest.mark.parametrize("published", DERIVED, ids=lambda entry: entry["checkpoint"])
def test_published_names_without_a_table_are_explained(published: dict[str, Any]) -> None:
    config, names = published["config"], names_of(published)
    assert len(names) == published["count"]
    assert claimed(config) is GENERIC
    shapes = shapes_of(config, names)
    family = derived_family(config, shapes)
    found = canonical(family, config, shapes)
    assert family.name == published["family"]
    assert family.unloaded == ()
    assert {"text.embed_tokens.weight", "text.layers.0.input_layernorm.weight"} <= found.keys()
    assert len(found) >= published["count"]


COMPLETE = (
    "llava-hf/llava-1.5-7b-hf", "MBZUAI/AIN, a fine-tune of Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct",
    "Llama-2-7B, .bin files with buffers", "meta-llama/Llama-3.2-3B-Instruct (tied)", "mistralai/Devstral-Small-2507",
    "Qwen2.5-14B, a fine-tune", "Qwen/Qwen3-1.7B (tied)", "google/gemma-2b", "google/gemma-3-4b (its text alone)",
    "google/paligemma-3b-pt-224", "microsoft/Phi-3-mini-128k-instruct",
    "mistralai/Mixtral-8x7B-v0.1, a fine-tune", "nvidia/Cosmos-Reason2-8B, a fine-tune of Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen2.5-Omni-7B (names that its class gives, of layer 0)",
    "deepseek-community/deepseek-vl-7b-chat (names that its class gives, of layer 0)",
)  # fmt: skip
"""The lists of published names whose config is whole enough to build the class from."""


@pytest.mark.parametrize("checkpoint", COMPLETE)
def test_a_table_and_the_derivation_agree_on_published_names(checkpoint: str) -> None:
    (published,) = (entry for entry in PUBLISHED if entry["checkpoint"] == checkpoint)
    config = published["config"]
    shapes = shapes_of(config, names_of(published))
    assert canonical(derived_family(config, shapes), config, shapes) == canonical(family_of(config), config, shapes)


@pytest.mark.parametrize("checkpoint", [one for one in COMPLETE if "alone" not in one and "its class gives" not in one])
def test_names_in_memory_become_those_that_are_published(checkpoint: str) -> None:
    (published,) = (entry for entry in PUBLISHED if entry["checkpoint"] == checkpoint)
    config, names = published["config"], names_of(published)
    built = blueprint.blueprint(config, len(names))
    landed = [one for name in names if (one := built.land(name)) is not None]
    live = {target: built.shapes[target] for one in landed for target in one.targets}
    told = as_published(config, read_names(config, live), live)
    assert told.shapes.keys() == {name for name in names if built.land(name) is not None}
