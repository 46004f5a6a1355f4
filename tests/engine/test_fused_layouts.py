"""Text towers that are stored fused or split, once or twice: what goes from one layout into another, and back."""

from __future__ import annotations

import json
import tempfile
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polymerge
from layouts import ATTENTION, LAYOUTS, TWICE, Sizes, load, outside, random_tower, same_bits, stored, text_of, write
from polymerge.errors import Refused
from polymerge.planning import make_plan
from polymerge.planning.text import describe

GROUPED = Sizes(heads=6, shared=2, width=2)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Any number of heads, of those that share keys, and widths; the decoder as wide as its heads, or not."""
    shared, group, width = (draw(st.integers(1, most)) for most in (3, 3, 5))
    heads = shared * group
    hidden = heads * width if draw(st.booleans()) else draw(st.integers(1, 9))
    grouped = shared if group > 1 or draw(st.booleans()) else 0
    return Sizes(
        heads, width, grouped, hidden, draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 2))
    )


def taken_over(template: Path, source: Path, out: Path) -> Path:
    """The template with the text tower of `source`."""
    recipe = {
        "merge_method": "linear",
        "template": str(template),
        "models": [{"model": str(source), "parameters": {"weight": 1}}],
    }
    return polymerge.merge(recipe, out, check=False, threads=1).folder


@pytest.mark.parametrize(("here", "there"), list(permutations(LAYOUTS, 2)))
@settings(max_examples=4, deadline=None)
@given(sizes=sizes(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), seed=st.integers(0, 99))
def test_a_text_tower_survives_every_other_layout(
    here: str, there: str, sizes: Sizes, dtype: torch.dtype, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        tower = random_tower(sizes, seed, TWICE.get(here, ()), dtype)
        source = write(here, folder / "source", tower, sizes)
        others = [
            write(
                layout, folder / f"other {place}", random_tower(sizes, seed + 100 + place, dtype=dtype), sizes, seed=1
            )
            for place, layout in enumerate((there, here))
        ]
        went = taken_over(others[0], source, folder / "went")
        back = text_of(here, taken_over(others[1], went, folder / "back"), sizes)
        held = text_of(there, went, sizes)
    for name, tensor in tower.items():
        plain, _, image = name.partition("@")
        if image and plain.split(".", 2)[-1] not in TWICE.get(there, ()):
            tensor = tower[plain]  # the other layout holds one of the two: that of the text tokens
        assert same_bits(back[name], tensor), name
    for name, tensor in held.items():
        assert same_bits(tensor, tower.get(name, tower[name.partition("@")[0]])), name


# --- merged, not only moved


@pytest.mark.parametrize(("template", "source"), [("cogvlm", "llava"), ("llava", "cogvlm"), ("cogvlm", "mplug_owl2")])
@pytest.mark.parametrize("sizes", [Sizes(), GROUPED], ids=["heads", "grouped"])
def test_each_block_of_rows_is_merged_with_its_own(template: str, source: str, sizes: Sizes, tmp_path: Path) -> None:
    towers = [random_tower(sizes, seed, TWICE.get(layout, ())) for seed, layout in ((1, template), (2, source))]
    folders = [
        write(layout, tmp_path / layout, tower, sizes, seed=place)
        for place, (layout, tower) in enumerate(zip((template, source), towers, strict=True))
    ]
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (0.25, 0.75), strict=True)]
    out = polymerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out", check=False, block=5).folder
    merged = text_of(template, out, sizes)
    for name, mine in towers[0].items():
        theirs = towers[1].get(name, towers[1][name.partition("@")[0]])
        assert same_bits(merged[name], (0.25 * mine.float() + 0.75 * theirs.float()).to(mine.dtype)), name
    before, after = load(folders[0]), load(out)
    assert set(before) == set(after)
    for name in outside(template, before):
        assert same_bits(after[name], before[name]), name


def test_methods_on_deltas_read_a_fused_base_too(tmp_path: Path) -> None:
    towers = [random_tower(GROUPED, seed, dtype=torch.float32) for seed in range(3)]
    layouts = ("llava_original", "mplug_owl2", "cogvlm")
    llava, owl, base = (
        write(layout, tmp_path / layout, tower, GROUPED) for layout, tower in zip(layouts, towers, strict=True)
    )
    recipe = {
        "merge_method": "task_arithmetic",
        "template": str(llava),
        "base_model": str(base),
        "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in (llava, owl)],
    }
    out = polymerge.merge(recipe, tmp_path / "out", check=False)
    merged = text_of("llava_original", out.folder, GROUPED)
    for name, tensor in merged.items():
        one, other, ancestor = (tower[name] for tower in towers)
        assert same_bits(tensor, ancestor + (0.5 * (one - ancestor) + 0.5 * (other - ancestor))), name


def test_random_draws_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Masks are keyed by canonical names: a fused template takes the same entries as a split one."""
    towers = [random_tower(GROUPED, seed, dtype=torch.float32) for seed in range(3)]
    kept = {}
    for layout in ("llama", "llava_original", "cogvlm"):
        one, other, base = (
            write(layout, tmp_path / layout / str(place), tower, GROUPED) for place, tower in enumerate(towers)
        )
        recipe = {
            "merge_method": "dare_linear",
            "base_model": str(base),
            "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in (one, other)],
            "parameters": {"density": 0.5},
            "parts": ["text"],
        }
        out = polymerge.merge(recipe, tmp_path / layout / "out", check=False).folder
        kept[layout] = text_of(layout, out, GROUPED)
    differing = set()
    for name, tensor in kept["llama"].items():
        assert same_bits(kept["llava_original"][name], tensor), name
        if not same_bits(kept["cogvlm"][name], tensor):
            differing.add(name.split(".", 2)[-1])
    # the experts have names of their own, and so draws of their own
    assert differing == set(TWICE["cogvlm"])


# --- what the config has to say


def mended(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_heads_that_do_not_make_up_the_rows_are_refused(tmp_path: Path) -> None:
    cog = mended(write("cogvlm", tmp_path / "cog", random_tower(Sizes(), 1), Sizes()), num_multi_query_heads=2)
    llava = write("llava", tmp_path / "llava", random_tower(Sizes(), 2), Sizes())
    with pytest.raises(Refused, match=r"language_expert_query_key_value.weight has 36 rows, but the heads .* imply 24"):
        make_plan({"merge_method": "linear", "models": [str(cog), str(llava)], "parameters": {"weight": 1}})


def test_fused_tensors_of_unknown_heads_are_one_problem(tmp_path: Path) -> None:
    cog = mended(write("cogvlm", tmp_path / "cog", random_tower(Sizes(), 1), Sizes()), num_attention_heads=None)
    llava = write("llava", tmp_path / "llava", random_tower(Sizes(), 2), Sizes())
    with pytest.raises(Refused) as refused:
        make_plan({"merge_method": "linear", "models": [str(llava), str(cog)], "parameters": {"weight": 1}})
    (unknown,) = (str(problem) for problem in refused.value.problems if "how many heads" in str(problem))
    assert "_expert_query_key_value.weight' (3 more like it) is fused by 'qkv', and config.json does not say" in unknown


def test_towers_whose_keys_are_shared_differently_do_not_fit(tmp_path: Path) -> None:
    plain, grouped = Sizes(heads=6, width=2), GROUPED
    cog = write("cogvlm", tmp_path / "cog", random_tower(plain, 1), plain)
    llava = write("llava", tmp_path / "llava", random_tower(grouped, 2), grouped)
    with pytest.raises(Refused) as refused:
        make_plan({"merge_method": "linear", "models": [str(cog), str(llava)], "parameters": {"weight": 1}})
    said = str(refused.value)
    for part in "kv":
        assert f"text.layers.{{i}}.self_attn.{part}_proj.weight" in said
    assert "'llava' is [4, 12], template 'cog' is [12, 12]" in said
    assert "q_proj" not in said


# --- what the plan says


def plan_text(template: Path, source: Path) -> str:
    recipe = {"merge_method": "linear", "models": [str(template), str(source)], "parameters": {"weight": 0.5}}
    return describe(make_plan(recipe))


def test_the_plan_shows_what_a_fused_tensor_is_made_of(tmp_path: Path) -> None:
    cog = write("cogvlm", tmp_path / "cog", random_tower(GROUPED, 1), GROUPED)
    owl = write("mplug_owl2", tmp_path / "owl", random_tower(GROUPED, 2), GROUPED)
    into_cog, into_owl = plan_text(cog, owl), plan_text(owl, cog)
    layer = "model.layers.{i}.self_attn."
    for expert, way in (("language", 0), ("vision", 1)):
        assert (
            f"{layer}{expert}_expert_query_key_value.weight [0] <- cog; owl cat({layer}q_proj.weight, "
            f"{layer}k_proj.multiway.{way}.weight, {layer}v_proj.multiway.{way}.weight), i = 0-1\n"
        ) in into_cog
    fused = f"{layer}language_expert_query_key_value.weight"
    assert f"{layer}q_proj.weight [0] <- owl; cog {fused}[0:12], i = 0-1\n" in into_owl
    assert f"{layer}k_proj.multiway.0.weight [0] <- owl; cog {fused}[12:16], i = 0-1\n" in into_owl
    image = f"{layer}vision_expert_query_key_value.weight"
    assert f"{layer}v_proj.multiway.1.weight [0] <- owl; cog {image}[16:20], i = 0-1\n" in into_owl


def test_the_plan_shows_what_is_not_merged_on_either_side(tmp_path: Path) -> None:
    cog = write("cogvlm", tmp_path / "cog", random_tower(Sizes(), 1), Sizes())
    llava = write("llava_original", tmp_path / "llava", random_tower(Sizes(), 2), Sizes())
    copied, _, left = plan_text(cog, llava).partition("copied: 4 tensors")[2].partition("left out of the inputs: 4")
    assert "a buffer that is computed from the config, never merged: 2 (model.layers" in copied
    assert "part vision is not merged: 1 (model.vision.boi)" in copied
    assert "part projector is not merged: 1 (model.vision.linear_proj.norm1.bias)" in copied
    assert "llava: a buffer that is computed from the config, never merged: 2" in left
    assert "llava: part projector is not merged: 2 (model.mm_projector.0." in left

    _, _, left = plan_text(llava, cog).partition("left out of the inputs:")
    assert "cog: part vision is not merged: 1" in left
    # seven of the vision experts' tensors are in five stored ones, twice
    assert "cog: the template has no branch @image of it: 10" in left


def test_stored_and_cut_are_inverse() -> None:
    """The helper itself: what it writes, it reads."""
    tower = random_tower(GROUPED, 3, TWICE["cogvlm"])
    disk = stored("cogvlm", tower, GROUPED)
    assert disk["model.layers.0.self_attn.vision_expert_query_key_value.weight"].shape == (20, 12)
    assert {f"layers.1.{name}@image" for name in ATTENTION} < tower.keys()
