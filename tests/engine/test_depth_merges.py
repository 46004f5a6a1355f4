"""Merges whose numbers change by depth: the bits of the same numbers said layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge.engine.merge import merge
from running import checkpoint, raw, small_llama

LAYERS = 2
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    for seed, name in enumerate(("base", "one", "two")):
        checkpoint(folder / name, small_llama(seed), LLAMA)
    return folder


def merged(place: Path, out: Path, method: str, one: Any, parameters: Any, overrides: Any = ()) -> dict[str, bytes]:
    entries = [{"model": str(place / name), "parameters": own} for name, own in (("one", one), ("two", {"weight": 1}))]
    if method == "metagpt":
        entries = [entry | {"parameters": None} for entry in entries]
    recipe = {"merge_method": method, "base_model": str(place / "base"), "models": entries, "parameters": parameters}
    merge(recipe | {"overrides": list(overrides)}, out, check=False)
    return raw(out)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic", "breadcrumbs"])
def test_a_gradient_is_its_numbers_said_by_overrides(method: str, place: Path, tmp_path: Path) -> None:
    density = {} if method == "task_arithmetic" else {"density": [0.5, 0.9]}
    found = merged(place, tmp_path / "one", method, {"weight": [0.25, 0.75], **density}, {"scale": [1, 3]})
    last = {"weight": [0.75, 1], "scale": 3, **({"density": [0.9, 1.0]} if density else {})}
    layer = {"layers": LAYERS - 1, "parameters": last}
    first = {"weight": 0.25, **({"density": 0.5} if density else {})}
    assert found == merged(place, tmp_path / "two", method, first, None, [layer])
    assert found != merged(place, tmp_path / "none", method, first, None)


def test_a_threshold_over_the_whole_model_stays_one(place: Path, tmp_path: Path) -> None:
    whole = {"trim": "model", "density": 0.3, "normalize": "none"}
    plain = merged(place, tmp_path / "plain", "ties", {"weight": 1}, whole | {"scale": 2})
    deep = merged(place, tmp_path / "deep", "ties", {"weight": 1}, whole | {"scale": [1, 2]})
    half = merged(place, tmp_path / "half", "ties", {"weight": 1}, whole)
    for name in plain:
        assert deep[name] == (plain if f"layers.{LAYERS - 1}." in name else half)[name]


def test_weights_from_all_that_is_merged_stay_the_same(place: Path, tmp_path: Path) -> None:
    plain = merged(place, tmp_path / "plain", "metagpt", None, {"scale": 2})
    deep = merged(place, tmp_path / "deep", "metagpt", None, {"scale": [1, 2]})
    half = merged(place, tmp_path / "half", "metagpt", None, None)
    assert plain != half
    for name in plain:
        assert deep[name] == (plain if f"layers.{LAYERS - 1}." in name else half)[name]
