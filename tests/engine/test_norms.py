"""How large a merged update is beside its adapters', against updates multiplied out, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, exact_updates, recipe, record, tensors
from running import cli, merged, recipe_file

pytestmark = PEFT_WARNINGS

TARGETS = ["q_proj", "v_proj", "down_proj"]

MERGES: dict[str, dict[str, Any]] = {
    "robustmerge": {"method": "robustmerge", "weight": None},
    "robustmerge, product": {"method": "robustmerge", "weight": None, "parameters": {"compose": "product"}},
    "linear": {"method": "linear"},
    "linear, factors": {"method": "linear", "parameters": {"space": "factors"}},
    "task_arithmetic": {"method": "task_arithmetic", "parameters": {"scale": 0.7, "rank": 2}},
    "ties": {"method": "ties", "parameters": {"density": 0.5, "rank": 9}},
    "ties, knots": {"method": "ties", "parameters": {"density": 0.5, "space": "knots"}},
    "dare_ties, core": {"method": "dare_ties", "parameters": {"density": 0.5, "space": "core"}},
    "dare_linear": {"method": "dare_linear", "parameters": {"density": 0.5}},
    "cat": {"method": "cat"},
    "svd": {"method": "svd", "parameters": {"rank": 2}},
    "tsv": {"method": "tsv", "parameters": {"rank": 3}},
    "two methods": {"method": "cat", "overrides": [{"match": "*layers.1.*", "merge_method": "tsv"}]},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that differ in size, scaling and, by a module, in what they have."""
    folder = tmp_path_factory.mktemp("adapters")
    said: list[dict[str, Any]] = [
        {"target_modules": TARGETS}, {"target_modules": TARGETS, "alpha_pattern": {"v_proj": 40}},
        {"target_modules": TARGETS[:2], "lora_alpha": 1},
    ]  # fmt: skip
    return [adapter(folder / f"number-{seed}", seed, **own) for seed, own in enumerate(said)]


def literal(out: Path, folders: Sequence[Path]) -> tuple[float, dict[str, float]]:
    """The ratio of all modules together, and of each; a module that one adapter alone has is copied, and left out."""
    found, own = exact_updates(out), [exact_updates(folder) for folder in folders]
    squares: dict[str, tuple[float, float]] = {}
    for module, update in found.items():
        parts = [float((one[module] ** 2).sum()) for one in own if module in one]
        if len(parts) > 1:
            squares[module] = float((update**2).sum()), sum(parts) / len(parts)
    whole = [sum(column) for column in zip(*squares.values(), strict=True)]
    return (whole[0] / whole[1]) ** 0.5, {module: (got / of) ** 0.5 for module, (got, of) in squares.items()}


def literal_cosines(folders: Sequence[Path]) -> dict[tuple[str, str], float]:
    cosines = {}
    for one, other in combinations(folders, 2):
        a, b = ({name: x.double() for name, x in tensors(each).items() if "lora_A" in name} for each in (one, other))
        both = [float((a[name] * b[name]).sum() / (a[name].norm() * b[name].norm())) for name in a if name in b]
        cosines[one.name, other.name] = sum(both) / len(both)
    return cosines


@pytest.mark.parametrize("name", MERGES)
def test_the_norm_is_that_of_the_updates(adapters: list[Path], name: str, tmp_path: Path) -> None:
    said = dict(MERGES[name])
    asked = recipe(said.pop("method"), adapters, said.pop("weight", 0.4), **said)
    result = polymerge.merge(asked, tmp_path / "out")
    ratio, modules = literal(result.folder, adapters)
    assert len(modules) == 6
    assert result.norms is not None
    assert result.norms.ratio == pytest.approx(ratio, rel=1e-5)
    assert result.norms.modules == pytest.approx(modules, rel=1e-5)
    assert {tuple(sorted(pair)): cosine for pair, cosine in result.norms.cosines.items()} == pytest.approx(
        literal_cosines(adapters), rel=1e-6
    )
    written = record(result.folder)["output"]
    assert written["update_norm"] == json.loads(json.dumps(result.norms.to_json()))
    assert written["update_norm"]["ratio"] == result.norms.ratio
    assert written["warnings"] == list(result.warnings) == list(result.norms.warnings)


def same_start(folder: Path, count: int, alike: bool = True) -> list[Path]:
    """Adapters whose A's are those of one seed with a little training, or each of a seed of its own."""
    made = []
    for number in range(count):
        out = adapter(folder / f"number-{number}", number + 1, target_modules=TARGETS)
        if alike:
            held = load_file(out / "adapter_model.safetensors")
            for place, (name, tensor) in enumerate(held.items()):
                if "lora_A" in name:
                    dice = torch.Generator().manual_seed(place)
                    held[name] = torch.randn(tensor.shape, generator=dice) + 0.3 * tensor
            save_file(held, out / "adapter_model.safetensors")
        made.append(out)
    return made


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("robustmerge", {}),
        ("robustmerge", {"compose": "product", "density": 1, "scale": 9}),
        ("task_arithmetic", {"scale": 2}),
        ("task_arithmetic", {"space": "factors"}),
        ("ties", {"space": "core", "normalize": "none", "scale": -3}),
        ("cat", {"scale": 2}),
    ],
)
def test_the_scale_that_is_named_makes_it_as_large_as_theirs(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    folders = same_start(tmp_path, 4)
    asked = recipe(method, folders, None if method == "robustmerge" else 1.0, parameters=parameters)
    ran = cli("merge", recipe_file(asked, tmp_path / "recipe.yaml"), "-o", tmp_path / "large")
    assert ran.status == 0
    ratio, modules = literal(tmp_path / "large", folders)
    worst = max(modules, key=lambda module: modules[module])
    assert f"  norm of the merged update: {ratio:.2f} of the adapters' (root mean square), " in ran.out
    assert f"{modules[worst]:.2f} at most ({worst})" in ran.out
    (told,) = re.findall(rf"note: {method}: the norm of the merged update is {ratio:.2f} times .*", ran.err)
    (scale,) = re.findall(r"`scale: (\S+)` makes it about as large as theirs", told)
    again = asked | {"parameters": {**parameters, "scale": float(scale)}}
    result = polymerge.merge(again, tmp_path / "as large")
    assert literal(result.folder, folders)[0] == pytest.approx(1, abs=0.06)
    assert result.warnings == ()


def test_what_has_no_scale_names_a_method_that_has_one(tmp_path: Path) -> None:
    asked = recipe("linear", same_start(tmp_path, 2), 1.0, parameters={"normalize": False, "space": "factors"})
    (told,) = polymerge.merge(asked, tmp_path / "out").warnings
    assert told.endswith("linear has no `scale`: task_arithmetic has one")


@pytest.mark.parametrize(
    ("method", "parameters", "advice"),
    [
        ("robustmerge", {"scale": 1}, "robustmerge, compose: factors: .* Set compose: product"),
        ("robustmerge", {"scale": 1, "compose": "product"}, None),
        ("linear", {"space": "factors"}, "linear, space: factors: .* Set space: delta"),
        ("linear", {}, None),
        ("ties", {"space": "factors"}, "ties, space: factors: .* Set space: delta"),
        ("ties", {"space": "core"}, None),
    ],
)
def test_a_factors_that_are_unlike_advise_against_joining_them(
    method: str, parameters: dict[str, Any], advice: str | None, tmp_path: Path
) -> None:
    for alike in (True, False):
        folders = same_start(tmp_path / f"alike {alike}", 3, alike)
        asked = recipe(method, folders, None if method == "robustmerge" else 0.3, parameters=parameters)
        out = merged(asked, tmp_path / f"merged {alike}", "--no-verify")
        told = record(out)["output"]["warnings"]
        cosines = literal_cosines(folders)
        assert all((cosine > 0.8) == alike for cosine in cosines.values())
        if alike or advice is None:
            assert told == []
            continue
        (said,) = told
        least = min(cosines, key=lambda pair: cosines[pair])
        assert re.match(advice, said)
        assert f"those of '{least[0]}' and '{least[1]}' have a cosine of {cosines[least]:.2f}, below 0.5" in said


def test_updates_of_zero_have_no_ratio(tmp_path: Path) -> None:
    folders = same_start(tmp_path, 2)
    for folder in folders:
        held = load_file(folder / "adapter_model.safetensors")
        save_file({n: torch.zeros_like(x) if "lora_B" in n else x for n, x in held.items()},
                  folder / "adapter_model.safetensors")  # fmt: skip
    ran = cli("merge", recipe_file(recipe("cat", folders), tmp_path / "r.yaml"), "-o", tmp_path / "out", "--json")
    found = json.loads(ran.out)["update_norm"]
    assert (found["ratio"], found["modules"]) == (None, {})
    assert np.allclose([one["cosine"] for one in found["a_cosines"]], [*literal_cosines(folders).values()])
