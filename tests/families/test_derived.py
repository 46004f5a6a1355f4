"""Families that no table covers are derived from transformers' class: names, parts, the cache, hostile configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny_derived
from polymerge.families import FAMILIES, blueprint, derived, family_of, splits
from polymerge.families.derived import as_table, derive
from polymerge.families.expressions import Shape
from polymerge.families.recognition import read_names
from polymerge.families.registry import GENERIC
from polymerge.families.resolve import map_names
from polymerge.families.rules import Family, Rule
from running import loaded_by
from tiny import as_2024, as_live, build, load
from tiny_configs import RUNNABLE

Config = dict[str, Any]
OWN_LAYERS = ("mllama",)
"""Families whose tables number the layers of the plain decoder without those in between, which no class tells."""


def contents(folder: Path) -> tuple[Config, dict[str, Shape]]:
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, {name: tuple(tensor.shape) for name, tensor in load(folder).items()}


def tiny(kind: str, folder: Path, class_name: str | None = None) -> tuple[Config, dict[str, Shape]]:
    return contents(tiny_derived.build(tiny_derived.tiny_config(kind), folder / kind, class_name=class_name))


def derived_family(config: Config, shapes: dict[str, Shape]) -> Family:
    found = derive(config, shapes, splits(config))
    assert found.family is not None, found.why
    return found.family


def canonical(family: Family, config: Config, shapes: dict[str, Shape]) -> dict[str, Any]:
    mapped = map_names(family, shapes, "here", splits(config, family), shapes)
    assert mapped.problems == ()
    return dict(mapped.tensors)


# --- beside the tables


@pytest.mark.parametrize("form", ["saved", "2024", "live"])
@pytest.mark.parametrize("name", [name for name in RUNNABLE if name not in OWN_LAYERS])
def test_a_table_and_the_derivation_agree(name: str, form: str, tmp_path: Path) -> None:
    """To the last tensor, and to the rows that each is in a fused one."""
    folder = build(name, tmp_path / name)
    renamed: dict[str, Callable[[Path], Path]] = {"2024": as_2024, "live": as_live}
    if form in renamed:
        renamed[form](folder)
    config, shapes = contents(folder)
    found = derived_family(config, shapes)
    assert canonical(found, config, shapes) == canonical(family_of(config), config, shapes)
    assert found.parts == FAMILIES[name].parts


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_a_table_knows_more_where_layers_lie_between(name: str, tmp_path: Path) -> None:
    config, shapes = contents(build(name, tmp_path / name))
    ours, theirs = (canonical(family, config, shapes) for family in (derived_family(config, shapes), family_of(config)))
    assert {one for one in ours if not one.startswith("text.layers.")} == {
        one for one in theirs if not one.startswith(("text.layers.", "projector.cross_layers."))
    }


def test_a_text_tower_has_the_names_of_its_language_model(tmp_path: Path) -> None:
    vlm_config = tiny_derived.tiny_config("qwen3_5")
    folder = tiny_derived.build(vlm_config, tmp_path / "vlm", class_name="Qwen3_5ForConditionalGeneration")
    vlm, llm = contents(folder), tiny("qwen3_5_text", tmp_path)
    towers = [
        {name for name in canonical(derived_family(*one), *one) if name.startswith("text.")} for one in (vlm, llm)
    ]
    assert towers[0] == towers[1]
    assert {"text.embed_tokens.weight", "text.lm_head.weight", "text.norm.weight"} <= towers[0]
    assert derived_family(*vlm).parts == ("text", "vision", "projector")
    assert derived_family(*llm).parts == ("text",)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt2", {"text.layers.0.attn.c_attn.weight", "text.embed_tokens.weight", "text.wpe.weight"}),
        ("olmoe", {"text.layers.1.mlp.experts.3.gate_proj.weight", "text.layers.0.mlp.gate.weight"}),
        ("glm4", {"text.layers.0.mlp.gate_proj.weight", "text.layers.0.mlp.up_proj.weight"}),
        ("bloom", {"text.layers.0.mlp.dense_h_to_4h.weight", "text.embed_tokens.weight"}),
    ],
)
def test_language_models_have_the_names_of_a_plain_decoder_as_far_as_they_are_one(
    kind: str, names: set[str], tmp_path: Path
) -> None:
    config, shapes = tiny(kind, tmp_path)
    assert names <= canonical(derived_family(config, shapes), config, shapes).keys()


# --- what is stored and not loaded, and the other way round


def qwen(tmp_path: Path) -> tuple[Config, dict[str, Shape]]:
    return tiny("qwen3_5_text", tmp_path)


def test_what_transformers_does_not_load_is_known_and_never_merged(tmp_path: Path) -> None:
    config, shapes = qwen(tmp_path)
    more = shapes | {"mtp.layers.0.q.weight": (2, 2), "mtp.norm.weight": (2,)}
    family = derived_family(config, more)
    assert family.unloaded == ("mtp.{rest}",)
    assert map_names(family, more, "here", splits(config), more).buffers == ("mtp.layers.0.q.weight", "mtp.norm.weight")
    assert family.why_unmerged("mtp.norm.weight") == "transformers does not load it, so it is never merged"
    assert canonical(family, config, more).keys() == canonical(derived_family(config, shapes), config, shapes).keys()


def test_a_checkpoint_that_lacks_tensors_may_not_have_strange_ones(tmp_path: Path) -> None:
    config, shapes = qwen(tmp_path)
    del shapes["model.norm.weight"]
    assert derived_family(config, shapes)  # what is missing is told by what it is merged with
    shapes["norm_of_another.weight"] = (32,)
    found = derive(config, shapes, splits(config))
    assert found.family is None
    assert found.why == (
        f"Qwen3_5ForCausalLM has no place for 1 of its {len(shapes)} tensors, such as 'norm_of_another.weight', and 1 "
        "of its own are not there, such as 'model.norm.weight'"
    )
    reading = read_names(config, shapes)
    assert (reading.family, reading.why) == (GENERIC, found.why)


def test_whole_numbers_are_never_merged(tmp_path: Path) -> None:
    config, shapes = tiny("lfm2", tmp_path)
    assert not [name for name in shapes if derived_family(config, shapes).is_buffer(name)]
    moved = shapes | {"model.rotary_emb.inv_freq": (4,)}
    assert derived_family(config, moved).why_unmerged("model.rotary_emb.inv_freq").startswith("a buffer")


def test_trainers_prefixes_and_missing_ones_are_read(tmp_path: Path) -> None:
    config, shapes = qwen(tmp_path)
    plain = canonical(derived_family(config, shapes), config, shapes)
    wrapped = {f"_orig_mod.module.{name}": shape for name, shape in shapes.items()}
    reading = read_names(config, wrapped)
    assert reading.by == f"transformers {transformers.__version__}'s Qwen3_5ForCausalLM"
    assert reading.wrappers
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    family = derived_family(config, bare)
    assert canonical(family, config, bare).keys() == plain.keys()
    assert all(rule.pattern != "{rest}" for rule in family.rules)


# --- the cache


def test_a_second_plan_imports_neither_torch_nor_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny("qwen3_5_text", tmp_path)
    code = f"import polymerge; polymerge.inspect({str(tmp_path / 'qwen3_5_text')!r})"
    assert {"torch", "transformers"} <= loaded_by(code)
    assert not {"torch", "transformers"} & loaded_by(code)


def test_a_broken_entry_of_the_cache_is_derived_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, shapes = qwen(tmp_path)
    right = derived_family(config, shapes)
    (note,) = (tmp_path / "cache" / "polymerge" / "families").glob("*.json")
    kept = note.read_bytes()
    wrong = kept.replace(b"text.{rest}", b"text.{i}")
    for broken in (b"", b"[]", kept[:100], b'{"family": {"name": "x", "rules": []}}', wrong):
        note.write_bytes(broken)
        assert derived_family(config, shapes) == right
        assert note.read_bytes() == kept
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the cache should be", encoding="utf-8")
    assert derived_family(config, shapes) == right


def test_another_version_of_transformers_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes = qwen(tmp_path)
    asked: list[Config] = []

    def counted(told: Config, tensors: int) -> Any:
        asked.append(told)
        return blueprint.blueprint(told, tensors)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(derived, "blueprint", counted)
    for version in ("5.0.0", "5.0.0", "5.0.1"):
        monkeypatch.setattr(derived, "version", lambda _, version=version: version)
        assert derive(config, shapes, splits(config)).by == f"transformers {version}'s Qwen3_5ForCausalLM"
    assert len(asked) == 2


def test_without_transformers_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes = qwen(tmp_path)

    def missing(_: str) -> str:
        raise derived.PackageNotFoundError

    monkeypatch.setattr(derived, "version", missing)
    assert derive(config, shapes, splits(config)).why.endswith("pip install 'polymerge[transformers]'")


# --- hostile and strange configs


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_experts": 10**12}, "num_experts 1000000000000"),
        ({"num_hidden_layers": 10**6, "layer_types": None}, "more than 20000 tensors"),
        ({"text_config": {"depths": [1, 10**9]}}, "depths 1000000000"),
        ({"hidden_size": -1}, "transformers cannot build it"),
        ({"hidden_size": "wide"}, "transformers cannot build it"),
    ],
)
def test_a_config_that_asks_for_too_much_is_not_built(more: Config, why: str) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, **more}
    with pytest.raises(blueprint.NotBuiltError, match=why):
        blueprint.blueprint(config)


def test_large_sizes_take_no_memory() -> None:
    config = {"model_type": "llama", "hidden_size": 2**18, "intermediate_size": 2**20, "num_attention_heads": 4,
              "num_hidden_layers": 2, "vocab_size": 2**30}  # fmt: skip
    assert blueprint.blueprint(config).shapes["lm_head.weight"] == (2**30, 2**18)


def test_names_that_a_pattern_cannot_hold_are_not_derived(tmp_path: Path) -> None:
    config, shapes = qwen(tmp_path)
    assert derive(config, shapes | {"model.{rest}": (1,)}, {}).why == "its tensor names have braces"


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    config, shapes = qwen(tmp_path)
    told = config | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    assert derived_family(told, shapes).architectures == ("Qwen3_5ForCausalLM",)
    strange = told | {"model_type": "evil"}
    assert derive(strange, shapes, {}).why == f"transformers {transformers.__version__} has no model_type 'evil'"


# --- as a table


def test_the_rules_are_printed_as_a_table_that_can_be_added(tmp_path: Path) -> None:
    config, shapes = tiny("olmoe", tmp_path)
    family = derived_family(config, shapes)
    made: dict[str, Any] = {"Family": Family, "Rule": Rule}
    exec(as_table(family), made)
    again = made["OLMOE"]
    assert again.rules == family.rules
    assert canonical(again, config, shapes) == canonical(family, config, shapes)
