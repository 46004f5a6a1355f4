"""Every method with its options on whole checkpoints, bit for bit against the formulas in `literal_methods.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polymerge
from literal_methods import Array, drawn, drawn_by_rank, elected, largest, most_important, on_the_arc, weighted
from running import checkpoint, linear, merged, small_llama
from tiny import load

CANONICAL = {name: f"text.{name.removeprefix('model.')}" for name in small_llama(0)}
NAMES = sorted(CANONICAL, key=lambda name: CANONICAL[name])

Tensors = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes; a bfloat16 delta takes few values, so many magnitudes are equal."""
    folder = tmp_path_factory.mktemp("family")
    base = small_llama(0)
    tensors = {"base": base}
    for seed, label in enumerate(("a", "b", "c"), 1):
        step = small_llama(seed)
        tensors[label] = {name: (base[name].float() + 0.05 * step[name].float()).bfloat16() for name in base}
    return {label: checkpoint(folder / label, own) for label, own in tensors.items()}


def flat(tensors: Tensors, name: str, kind: Any = np.float32) -> Array:
    numbers: Array = tensors[name].double().numpy().reshape(-1).astype(kind)
    return numbers


def check(out: Path, like: Tensors, compute: Callable[[str], Array]) -> None:
    """The output is what a literal computation of every tensor gives, rounded once to the template's dtype."""
    found = load(out)
    assert found.keys() == like.keys()
    for name, tensor in like.items():
        wanted = torch.from_numpy(compute(name)).to(tensor.dtype).reshape(tensor.shape)
        assert torch.equal(found[name], wanted), f"{name}: {(found[name] != wanted).sum()} of {wanted.numel()} differ"


def recipe(family: Mapping[str, Path], method: str, weight: Sequence[float], **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": str(family[label]), "parameters": {"weight": one}} for label, one in zip("abc", weight, strict=False)
    ]
    return {"merge_method": method, "models": models, "parameters": parameters, "base_model": str(family["base"])}


def run(family: Mapping[str, Path], asked: dict[str, Any], out: Path) -> tuple[Path, list[Tensors], Tensors]:
    models = [load(Path(entry["model"])) for entry in asked["models"]]
    return merged(asked, out, "--no-verify"), models, load(family["base"])


def trimmed_whole(
    models: Sequence[Tensors], base: Tensors, densities: Sequence[float], names: Sequence[str] = NAMES
) -> list[dict[str, Array]]:
    """Each model's deltas by tensor, of which the largest of the whole model are kept."""
    trimmed = []
    for model, density in zip(models, densities, strict=True):
        whole = np.concatenate([flat(model, name) - flat(base, name) for name in names])
        parts = np.split(largest(whole, density), np.cumsum([base[name].numel() for name in names]))
        trimmed.append(dict(zip(names, parts, strict=False)))
    return trimmed


@pytest.mark.parametrize("weight", [(0.3, 0.7), (0.5, 0.25, 0.9), (1.4, -0.6, 0.1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(family: dict[str, Path], weight: Sequence[float], normalize: bool, tmp_path: Path) -> None:
    out, models, _ = run(family, recipe(family, "linear", weight, normalize=normalize), tmp_path / "out")
    check(out, models[0], lambda name: weighted([flat(model, name) for model in models], weight, normalize))


@pytest.mark.parametrize(("normalize", "scale"), [(False, 1.0), (True, 0.3), (False, -1.7)])
def test_task_arithmetic(family: dict[str, Path], normalize: bool, scale: float, tmp_path: Path) -> None:
    weight = (0.9, 0.2, -0.3)
    asked = recipe(family, "task_arithmetic", weight, normalize=normalize, scale=scale)
    out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start = flat(base, name)
        return start + np.float32(scale) * weighted([flat(model, name) - start for model in models], weight, normalize)

    check(out, models[0], compute)


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("normalize", ["weight", "count", "none"])
@pytest.mark.parametrize("weight", [(1.6, 0.2), (0.5, -0.4, 0.3)])
def test_ties_trims_each_tensor(
    family: dict[str, Path], elect: str, normalize: str, weight: Sequence[float], tmp_path: Path
) -> None:
    asked = recipe(family, "ties", weight, density=0.35, elect=elect, normalize=normalize, scale=0.8)
    out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start = flat(base, name)
        deltas = [flat(model, name) - start for model in models]
        trimmed = [largest(delta, 0.35) for delta in deltas]
        return start + np.float32(0.8) * elected(trimmed, weight, elect, normalize)

    check(out, models[0], compute)


@pytest.mark.parametrize("densities", [(0.2, 0.2), (0.07, 0.6, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("block", [None, "many"])
def test_ties_trims_each_model(
    family: dict[str, Path], densities: Sequence[float], block: str | None, tmp_path: Path
) -> None:
    weight = (0.9, 0.4, 0.7)[: len(densities)]
    asked = recipe(family, "ties", weight, trim="model")
    for entry, density in zip(asked["models"], densities, strict=True):
        entry["parameters"]["density"] = density
    if block:
        out = polymerge.merge(asked, tmp_path / "out", check=False, block=10).folder
        models, base = [load(Path(entry["model"])) for entry in asked["models"]], load(family["base"])
    else:
        out, models, base = run(family, asked, tmp_path / "out")
    trimmed = trimmed_whole(models, base, densities)

    def compute(name: str) -> Array:
        return flat(base, name) + elected([own[name] for own in trimmed], weight, "weighted", "weight")

    check(out, models[0], compute)


@pytest.mark.parametrize(("rescale", "normalize", "seed"), [(True, False, 42), (False, True, 7)])
def test_dare_linear(family: dict[str, Path], rescale: bool, normalize: bool, seed: int, tmp_path: Path) -> None:
    weight, density = (0.8, 0.5, 0.3), (0.3, 0.8, 1.0)
    asked = recipe(family, "dare_linear", weight, rescale=rescale, normalize=normalize, scale=1.1) | {"seed": seed}
    for entry, own in zip(asked["models"], density, strict=True):
        entry["parameters"]["density"] = own
    out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start = flat(base, name)
        thinned = [
            drawn(flat(model, name) - start, own, rescale, seed, place, CANONICAL[name])
            for place, (model, own) in enumerate(zip(models, density, strict=True))
        ]
        return start + np.float32(1.1) * weighted(thinned, weight, normalize)

    check(out, models[0], compute)


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize(("normalize", "rescale"), [("weight", True), ("count", False), ("none", True)])
def test_dare_ties(family: dict[str, Path], elect: str, normalize: str, rescale: bool, tmp_path: Path) -> None:
    weight = (0.8, 0.5, 0.3)
    asked = recipe(family, "dare_ties", weight, density=0.4, rescale=rescale, elect=elect, normalize=normalize)
    out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start = flat(base, name)
        thinned = [
            drawn(flat(model, name) - start, 0.4, rescale, 42, place, CANONICAL[name])
            for place, model in enumerate(models)
        ]
        return start + elected(thinned, weight, elect, normalize)

    check(out, models[0], compute)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(("rescale", "normalize"), [(True, True), (False, False)])
@pytest.mark.parametrize("block", [None, 10])
def test_della(
    family: dict[str, Path], method: str, rescale: bool, normalize: bool, block: int | None, tmp_path: Path
) -> None:
    weight, density, epsilon = (0.8, 0.5, 0.3), (0.3, 0.8, 1.0), (0.2, 0.0, 0.15)
    asked = recipe(family, method, weight, rescale=rescale, normalize=normalize, scale=1.1) | {"seed": 7}
    for entry, own, away in zip(asked["models"], density, epsilon, strict=True):
        entry["parameters"] |= {"density": own, "epsilon": away}
    if block:
        out = polymerge.merge(asked, tmp_path / "out", check=False, block=block, threads=3).folder
        models, base = [load(Path(entry["model"])) for entry in asked["models"]], load(family["base"])
    else:
        out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start, width = flat(base, name), base[name].shape[-1]
        thinned = [
            drawn_by_rank(flat(model, name) - start, width, own, away, rescale, 7, place, CANONICAL[name])
            for place, (model, own, away) in enumerate(zip(models, density, epsilon, strict=True))
        ]
        if method == "della_linear":
            return start + np.float32(1.1) * weighted(thinned, weight, normalize)
        return start + np.float32(1.1) * elected(thinned, weight, "weighted", "weight" if normalize else "none")

    check(out, models[0], compute)


@pytest.mark.parametrize("block", [None, 10])
def test_arcee_fusion(family: dict[str, Path], block: int | None, tmp_path: Path) -> None:
    asked = {"merge_method": "arcee_fusion", "base_model": str(family["base"]), "models": [str(family["a"])]}
    out = polymerge.merge(asked, tmp_path / "out", check=False, **({"block": block} if block else {})).folder
    model, base = load(family["a"]), load(family["base"])

    def compute(name: str) -> Array:
        start = flat(base, name)
        return start + most_important(flat(model, name) - start, start, base[name].shape[-1])

    check(out, model, compute)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, None])
def test_slerp(t: float | None, tmp_path: Path) -> None:
    one, other = small_llama(1), small_llama(2)
    other["model.norm.weight"] = one["model.norm.weight"] * 2  # parallel, where the arc has no length
    models = [{"model": str(checkpoint(tmp_path / label, own))} for label, own in (("one", one), ("other", other))]
    asked: dict[str, Any] = {"merge_method": "slerp", "models": models}
    if t is None:
        models[0]["parameters"], models[1]["parameters"] = {"weight": 3}, {"weight": 1}  # type: ignore[assignment]
    else:
        asked["parameters"] = {"t": t}
    out = merged(asked, tmp_path / "out", "--no-verify")
    share = 0.25 if t is None else t
    check(out, one, lambda name: on_the_arc([flat(one, name), flat(other, name)], share))


def test_overrides_by_layer_and_by_name(family: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(family, "task_arithmetic", (0.5, 0.5)) | {"template": str(family["a"])}
    asked["overrides"] = [
        {"layers": 0, "merge_method": "copy"},
        {"match": "text.layers.*.mlp.*", "parameters": {"weight": [0.2, 0.9], "scale": 2.0}},
        {"match": "text.norm.weight", "merge_method": "linear", "parameters": {"weight": [1, 3]}},
    ]
    asked["exclude"] = ["text.lm_head.*"]
    out, models, base = run(family, asked, tmp_path / "out")

    def compute(name: str) -> Array:
        start, own = flat(base, name), [flat(model, name) for model in models]
        deltas = [row - start for row in own]
        match name:
            case "model.layers.0.mlp.up_proj.weight" | "lm_head.weight":
                return own[0]
            case "model.layers.1.mlp.up_proj.weight":
                return start + np.float32(2) * weighted(deltas, (0.2, 0.9), False)
            case "model.norm.weight":
                return weighted(own, (1, 3), True)
            case _:
                return start + weighted(deltas, (0.5, 0.5), False)

    check(out, models[0], compute)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize(("ours", "theirs"), [(7, 5), (5, 7)])
def test_overlapping_vocabularies(dtype: str | None, ours: int, theirs: int, tmp_path: Path) -> None:
    one, other = small_llama(1, rows=ours), small_llama(2, rows=theirs)
    models = [str(checkpoint(tmp_path / label, own)) for label, own in (("one", one), ("other", other))]
    asked = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "vocab": "overlap"}
    out = merged(asked | ({"dtype": dtype} if dtype else {}), tmp_path / "out", "--no-verify")
    like = {name: tensor.to(getattr(torch, dtype)) if dtype else tensor for name, tensor in one.items()}

    def compute(name: str) -> Array:
        mine, yours = one[name].float(), other[name].float()
        rows = min(len(mine), len(yours))
        merged_rows = np.float32(0.5) * mine[:rows].numpy() + np.float32(0.5) * yours[:rows].numpy()
        result: Array = np.concatenate([merged_rows, mine[rows:].numpy()]).reshape(-1)
        return result

    check(out, like, compute)


def test_vocabularies_that_differ_keep_the_template_s_unless_told(tmp_path: Path) -> None:
    one, other = small_llama(1, rows=7), small_llama(2, rows=5)
    models = [str(checkpoint(tmp_path / label, own)) for label, own in (("one", one), ("other", other))]
    out = merged(linear(*models), tmp_path / "out", "--no-verify")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(load(out)[name], one[name])


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_float64_checkpoints_are_computed_in_float64(method: str, tmp_path: Path) -> None:
    labels = {label: small_llama(seed, torch.float64) for seed, label in enumerate(("base", "a", "b"))}
    tensors = {label: {n: t + torch.pi * 1e-9 * t for n, t in own.items()} for label, own in labels.items()}
    family = {label: checkpoint(tmp_path / label, own) for label, own in tensors.items()}
    weight = (0.3, 0.6)
    density = {} if method == "linear" else {"density": 0.5}
    out, models, base = run(family, recipe(family, method, weight, **density), tmp_path / "out")

    def compute(name: str) -> Array:
        start = flat(base, name, np.float64)
        own = [flat(model, name, np.float64) for model in models]
        if method == "linear":
            return weighted(own, weight, True)
        deltas = [row - start for row in own]
        if method == "ties":
            return start + elected([largest(d, 0.5) for d in deltas], weight, "weighted", "weight")
        thinned = [drawn(delta, 0.5, True, 42, place, CANONICAL[name]) for place, delta in enumerate(deltas)]
        return start + weighted(thinned, weight, False)

    assert load(out)["lm_head.weight"].dtype == torch.float64
    check(out, models[0], compute)
    rounded = {name: torch.from_numpy(flat(models[0], name)).double() for name in NAMES}
    assert not torch.equal(rounded["lm_head.weight"], models[0]["lm_head.weight"].reshape(-1))


def test_a_tied_head_that_is_stored_twice_counts_once_and_stays_equal(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    tensors = {}
    for seed, label in enumerate(("base", "a", "b")):
        own = small_llama(seed)
        tensors[label] = {**own, "lm_head.weight": own["model.embed_tokens.weight"].clone()}
    family = {label: checkpoint(tmp_path / label, own, config) for label, own in tensors.items()}
    asked = recipe(family, "ties", (0.5, 0.5), density=0.3, trim="model")
    out, models, base = run(family, asked, tmp_path / "out")
    trimmed = trimmed_whole(models, base, (0.3, 0.3), [name for name in NAMES if name != "lm_head.weight"])

    def compute(name: str) -> Array:
        name = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        return flat(base, name) + elected([own[name] for own in trimmed], (0.5, 0.5), "weighted", "weight")

    check(out, models[0], compute)
