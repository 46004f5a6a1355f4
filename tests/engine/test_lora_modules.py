"""What a merge of adapters is, to the bit or to the rounding of float32: against PEFT and against dense matrices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import literal_methods as literal
from adapters_made import (  # fmt: skip
    PEFT_WARNINGS,
    adapter,
    close,
    config,
    exact_updates,
    loaded,
    recipe,
    record,
    tensors,
    total,
    updates,
)
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS
from running import cli, linear, merged, raw, recipe_file, two_llamas

pytestmark = PEFT_WARNINGS

KINDS: dict[str, dict[str, Any]] = {
    "odd alpha": {"r": 3, "lora_alpha": 5},
    "rank stabilized": {"r": 5, "lora_alpha": 7, "use_rslora": True, "dtype": torch.bfloat16},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\..*": 11},
    },
    "bias of the factors": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules to save": {"modules_to_save": ["lm_head"], "dtype": torch.float16},
    "tokens": {"trainable_token_indices": [5, 0, 3]},
}
SUMS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "cat", "svd", "tsv")


# --- one adapter


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_one_adapter_at_weight_one_comes_back_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By tsv too: the share of a single model is the whole rank, and orthogonal directions stay as they are."""
    one = adapter(tmp_path / "one", **settings)
    for method in SUMS:
        out = merged(recipe(method, [one]), tmp_path / method)
        assert raw(out) == raw(one), method
        before, after = config(one), config(out)
        assert {key for key in before if before[key] != after.get(key)} <= {"inference_mode"}
    close(exact_updates(out), exact_updates(one), 0.0)


@pytest.mark.parametrize("method", ["linear", "svd", "cat", "tsv", "ties"])
def test_one_adapter_at_weight_one_comes_back_where_it_is_computed(tmp_path: Path, method: str) -> None:
    """Twice a half of it is the same update, but for rounding."""
    one = adapter(tmp_path / "one", r=5, lora_alpha=7, use_rslora=True)
    two = adapter(tmp_path / "two", r=5, lora_alpha=7, use_rslora=True)
    weight = 1.0 if method in ("ties", "tsv") else 0.5
    out = merged(recipe(method, [one, two], weight, parameters={} if method != "tsv" else {"rank": 10}), tmp_path / "o")
    wanted = exact_updates(one)
    size = max(np.abs(update).max() for update in wanted.values())
    close(exact_updates(out), wanted, size)


def test_a_single_adapter_is_scaled_by_its_weight(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", r=3, lora_alpha=5)
    for method in SUMS:
        wanted = {module: 1.5 * 2 * update for module, update in exact_updates(one).items()}
        scaled = {"scale": 2} if method != "linear" else {}
        more = {"normalize": "none"} if "ties" in method else {} if method == "tsv" else {"normalize": False}
        weight = 1.5 if scaled else 3.0
        out = merged(recipe(method, [one], weight, parameters={**scaled, **more}), tmp_path / method)
        close(exact_updates(out), wanted, max(np.abs(update).max() for update in wanted.values()), 2e-6)


# --- sums


def three(folder: Path) -> list[Path]:
    """Ranks, alphas, modules, all different."""
    return [
        adapter(folder / "one", 1, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "embed_tokens"]),
        adapter(
            folder / "two",
            2,
            r=4,
            lora_alpha=7,
            use_rslora=True,
            target_modules=["q_proj", "down_proj", "lm_head"],
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
            alpha_pattern={"down_proj": 0.3},
        ),
        adapter(
            folder / "three",
            3,
            r=2,
            lora_alpha=1,
            target_modules="all-linear",
            rank_pattern={"v_proj": 6, "k_proj": 1},
            alpha_pattern={"q_proj": 9, r"layers\.0\.mlp\..*": 4},
        ),
    ]


@pytest.mark.parametrize("template", range(3))
def test_cat_is_the_weighted_sum(tmp_path: Path, template: int) -> None:
    adapters, weight = three(tmp_path), [0.5, -1.25, 2.0]
    out = merged(recipe("cat", adapters, weight, template=str(adapters[template])), tmp_path / "out")
    close(exact_updates(out), *total(adapters, weight))
    close(updates(loaded(out)), *total(adapters, weight))
    error = record(out)["output"]["relative_error"]
    assert set(error.values()) == {0.0}


@pytest.mark.parametrize("method", ["linear", "svd", "task_arithmetic"])
def test_a_sum_of_full_rank_is_the_weighted_sum(tmp_path: Path, method: str) -> None:
    adapters, weight = three(tmp_path), [0.5, 1.25, 2.0]
    parameters = {"rank": 16, "normalize": False} | ({"scale": 2} if method != "linear" else {})
    out = merged(recipe(method, adapters, weight, parameters=parameters), tmp_path / "out")
    scale = parameters.get("scale", 1)
    close(exact_updates(out), *total(adapters, [scale * one for one in weight]), 2e-6)


def test_weights_are_normalised_among_those_that_have_a_module(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    out = merged(recipe("linear", adapters, [1, 2, 3], parameters={"rank": 16}), tmp_path / "out")
    one, two, last = map(exact_updates, adapters)
    got = exact_updates(out)
    module = "model.layers.0.self_attn.v_proj"  # of the first and the last
    wanted = (one[module] + 3 * last[module]) / 4
    np.testing.assert_allclose(got[module], wanted, atol=2e-6 * np.abs(wanted).max())
    module = "lm_head"  # of the second alone: as it was
    np.testing.assert_allclose(got[module], two[module], atol=1e-6 * np.abs(two[module]).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_are_summed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    adapters = [adapter(tmp_path / str(seed), seed, dtype, r=3, lora_alpha=5 + seed) for seed in range(2)]
    wide = merged(recipe("cat", adapters, [0.3, 0.7], dtype="float32"), tmp_path / "wide")
    close(exact_updates(wide), *total(adapters, [0.3, 0.7]))
    assert {tensor.dtype for tensor in tensors(wide).values()} == {torch.float32}
    narrow = merged(recipe("cat", adapters, [0.3, 0.7]), tmp_path / "narrow")
    assert {tensor.dtype for tensor in tensors(narrow).values()} == {dtype}
    assert all(torch.equal(tensor, tensors(wide)[name].to(dtype)) for name, tensor in tensors(narrow).items())


def alike(folder: Path, count: int = 3, rank: int = 3, **settings: Any) -> list[Path]:
    """Adapters of one rank and one scaling."""
    kept = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "down_proj"]} | settings
    return [adapter(folder / str(seed), seed, **kept) for seed in range(count)]


ORDERED = [
    ("linear", {}), ("task_arithmetic", {"scale": 0.5}), ("cat", {}), ("svd", {}), ("tsv", {}),
    ("ties", {"density": 0.5}), ("ties", {"density": 0.5, "space": "knots"}), ("ties", {"space": "core"}),
    ("ties", {"space": "factors"}), ("robustmerge", {}), ("robustmerge", {"compose": "product", "floor": None}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters"), ORDERED, ids=lambda value: str(value))
def test_the_order_of_the_adapters_does_not_matter(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    adapters, weight = alike(tmp_path), [0.5, 0.75, 1.0]
    found = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 1)]):
        said = [None if method == "robustmerge" else weight[place] for place in order]
        turned = recipe(method, [adapters[place] for place in order], said, parameters=parameters)
        found.append(exact_updates(merged(turned | {"template": str(adapters[0])}, tmp_path / f"out{number}")))
    size = max(np.abs(update).max() for update in found[0].values())
    close(found[1], found[0], size, 5e-6)


# --- PEFT's own


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_s_weighted_adapter(tmp_path: Path, kind: str) -> None:
    """PEFT's svd counts the scaling of each adapter twice, so that it is right where that is 1."""
    alphas = (3, 3) if kind == "svd" else (5, 8)
    adapters = [adapter(tmp_path / str(n), n, r=3, lora_alpha=alpha) for n, alpha in enumerate(alphas)]
    weight = [0.5, 1.5]
    wanted = by_peft(adapters, weight, kind, **({"svd_rank": 4} if kind == "svd" else {}))
    parameters = {"rank": 4} if kind == "svd" else {}
    out = merged(recipe(kind, adapters, weight, parameters=parameters), tmp_path / "out")
    close(exact_updates(out), wanted, largest(wanted), 5e-6)


def by_peft(adapters: Sequence[Path], weight: Sequence[float], kind: str, **more: Any) -> dict[str, Any]:
    """The updates of PEFT's weighted adapter."""
    model = loaded(adapters[0])
    names = ["default", *(f"other{number}" for number in range(1, len(adapters)))]
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), name)
    model.add_weighted_adapter(names, list(weight), "all", combination_type=kind, **more)
    return {
        name.removeprefix("base_model.model."): one.get_delta_weight("all").detach().double().numpy()
        for name, one in model.named_modules()
        if hasattr(one, "lora_A") and "all" in one.lora_A
    }


def largest(updates: dict[str, Any]) -> float:
    return float(max(np.abs(update).max() for update in updates.values()))


CONVENTIONS = {
    "linear": ({}, {"normalize": False}, lambda weight, count: weight * count**2),
    "ties": ({"density": 0.5}, {"elect": "unweighted", "normalize": "count"}, lambda weight, _count: weight),
}
"""By PEFT's name: the parameters of both, those that make ours PEFT's, how often as large PEFT's is without them."""


@pytest.mark.parametrize("kind", CONVENTIONS)
@pytest.mark.parametrize(("count", "weight"), [(2, 0.5), (3, 1.0)])
def test_how_often_as_large_peft_s_is(tmp_path: Path, kind: str, count: int, weight: float) -> None:
    """PEFT puts the root of a weight on both factors and does not divide by the weights: docs/methods.md."""
    both, _, factor = CONVENTIONS[kind]
    adapters = alike(tmp_path, count)
    out = merged(recipe(kind, adapters, weight, parameters={"space": "factors", **both}), tmp_path / "out")
    wanted = by_peft(adapters, [weight] * count, kind, **both)
    found = {name: factor(weight, count) * update for name, update in exact_updates(out).items()}
    close(found, wanted, largest(wanted), 5e-6)


@pytest.mark.parametrize("kind", CONVENTIONS)
def test_roots_of_the_weights_make_ours_peft_s(tmp_path: Path, kind: str) -> None:
    both, ours, _ = CONVENTIONS[kind]
    adapters, weight = alike(tmp_path), [0.25, 1.0, 2.25]
    roots = [one**0.5 for one in weight]
    out = merged(recipe(kind, adapters, roots, parameters={"space": "factors", **both, **ours}), tmp_path / "out")
    wanted = by_peft(adapters, weight, kind, **both)
    close(exact_updates(out), wanted, largest(wanted), 5e-6)


# --- the same bits


def every_recipe(adapters: Sequence[Path]) -> dict[str, dict[str, Any]]:
    found = {
        method: recipe(method, adapters, None if method == "robustmerge" else 0.7)
        for method in ("linear", "cat", "svd", "tsv", "robustmerge")
    }
    half = {"density": 0.5}
    found |= {f"ties-{space}": recipe("ties", adapters, 0.7, parameters=half | {"space": space}) for space in SPACES}
    found |= {method: recipe(method, adapters, 0.7, parameters=half, seed=3) for method in ("dare_ties", "della")}
    return found


SPACES = ("delta", "factors", "knots", "core")
MERGE_ALL = """
import sys
from pathlib import Path
import polymerge
for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    polymerge.merge(file, Path(sys.argv[2]) / file.stem, threads=2, check=False)
"""


def test_threads_and_hash_seed_do_not_change_a_bit(tmp_path: Path) -> None:
    adapters = alike(tmp_path / "in", target_modules="all-linear", modules_to_save=["norm"])
    recipes = every_recipe(adapters)
    for folder in ("recipes", "one", "two", "other"):
        (tmp_path / folder).mkdir()
    for name, said in recipes.items():
        file = recipe_file(said, tmp_path / "recipes" / f"{name}.yaml")
        for folder, threads in (("one", 1), ("two", 2)):
            ran = cli("merge", file, "-o", tmp_path / folder / name, "--threads", threads)
            assert ran.status == 0, ran.err
    words = [sys.executable, "-c", MERGE_ALL, str(tmp_path / "recipes"), str(tmp_path / "other")]
    subprocess.run(words, check=True, timeout=120, env=os.environ | {"PYTHONHASHSEED": "4711"})
    for name in recipes:
        folders = [tmp_path / folder / name for folder in ("one", "two", "other")]
        for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            assert len({(folder / file).read_bytes() for folder in folders}) == 1, (name, file)
        assert len({record(folder)["plan_hash"] for folder in folders}) == 1
    assert len({(tmp_path / "one" / name / "adapter_model.safetensors").read_bytes() for name in recipes}) == len(
        recipes
    )


def test_a_seed_draws_other_numbers(tmp_path: Path) -> None:
    adapters = alike(tmp_path, 2)
    half = {"density": 0.5}
    first, again, other = (
        raw(merged(recipe("dare_linear", adapters, 1.0, parameters=half, seed=seed), tmp_path / name))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again != other


# --- spaces, literally

WHOLE = ("breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl")
"""Methods that are called here with all of a matrix at once."""


def flat_method(method: str, weight: Sequence[float], density: float, name: str) -> Callable[[Any, int], Any]:
    """A method on flat rows [model, n] of matrices of a width, entry by entry in Python."""

    def join(rows: Any, width: int) -> Any:
        if method in ("linear", "task_arithmetic"):
            return literal.weighted(rows, weight, method == "linear")
        if method == "ties":
            return literal.elected([literal.largest(row, density) for row in rows], weight, "weighted", "weight")
        if method in WHOLE:  # which their own tests hold against literal loops
            own = {"weight": weight, "density": density} if "breadcrumbs" in method else {}
            return method_function(METHODS[method])(np.stack(rows), **own)
        if "della" in method:
            ranked = [literal.drawn_by_rank(row, width, density, 0.15, True, 7, n, name) for n, row in enumerate(rows)]
            if method == "della_linear":
                return literal.weighted(ranked, weight, False)
            return literal.elected(ranked, weight, "weighted", "weight")
        thin = [literal.drawn(row, density, True, 7, n, name) for n, row in enumerate(rows)]
        if method == "dare_linear":
            return literal.weighted(thin, weight, False)
        return literal.elected(thin, weight, "weighted", "none")

    return join


def in_space(space: str, pairs: Any, join: Callable[[str], Callable[[Any, int], Any]], canonical: str) -> np.ndarray:
    """The merged update of one module; pairs are (b, a), with all scalings in b."""

    def joined(stack: Any, number: int | None) -> np.ndarray:
        name = canonical if number is None else f"{canonical}#{number}"
        rows = [np.asarray(one, np.float64).reshape(-1) for one in stack]
        return join(name)(rows, np.shape(stack[0])[-1]).reshape(np.shape(stack[0]))

    if space == "delta":
        return joined([b @ a for b, a in pairs], None)
    if space == "factors":
        return joined([b for b, _ in pairs], 1) @ joined([a for _, a in pairs], 0)
    if space == "knots":
        u, s, v = signed_svd(np.concatenate([b @ a for b, a in pairs], axis=1))
        width = pairs[0][1].shape[1]
        return u * s @ joined([v[:, n * width : (n + 1) * width] for n in range(len(pairs))], 0)
    u, _, _ = signed_svd(np.concatenate([b for b, _ in pairs], axis=1))
    v, _, _ = signed_svd(np.concatenate([a for _, a in pairs]).T)
    return u @ joined([u.T @ b @ a @ v for b, a in pairs], 0) @ v.T


def signed_svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, v = np.linalg.svd(x, full_matrices=False)
    count = int((s > 1e-12 * s[0]).sum())
    signs = np.sign([column[np.abs(column).argmax()] for column in u.T])[:count]
    return u[:, :count] * signs, s[:count], v[:count] * signs[:, None]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", *WHOLE]
)
def test_spaces_literally(tmp_path: Path, space: str, method: str) -> None:
    adapters = alike(tmp_path, 2, rank=3, lora_alpha=6, target_modules=["q_proj"])
    weight: Sequence[float] | None = None if method in ("sce", "ram", "ramplus_tl") else [0.4, 1.1]
    density, alone = 0.6, method in ("linear", "task_arithmetic")
    scale = 1.0 if method == "linear" else 0.5
    parameters: dict[str, Any] = {"space": space} | ({} if scale == 1 else {"scale": scale})
    if not alone and weight is not None:
        parameters["density"] = density
    held = [tensors(one) for one in adapters]
    for rank in (16, 5, 2):
        said = recipe(method, adapters, weight, parameters=parameters | {"rank": rank}, seed=7)
        out = merged(said, tmp_path / f"rank-{rank}")
        got, errors, most = exact_updates(out), record(out)["output"]["relative_error"], rank
        if space == "factors":
            most = min(rank, 3)
        elif alone or space != "delta":
            most = min(rank, 6)  # the sum of the ranks, beyond which there is nothing
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn.q_proj"
            pairs = [tuple(one[f"{module}.lora_{end}.weight"].double().numpy() for end in "BA") for one in held]
            whole = in_space(space, pairs, lambda name: flat_method(method, weight or (), density, name), module)
            # 2 is alpha / r of each adapter; scale multiplies what is merged, in the space of factors each of them
            wanted = 2 * scale ** (2 if space == "factors" else 1) * whole
            u, s, v = np.linalg.svd(wanted)
            kept = (u[:, :most] * s[:most]) @ v[:most]
            assert tensors(out)[f"{module}.lora_A.weight"].shape == (most, 16)
            np.testing.assert_allclose(got[module], kept, atol=5e-6 * np.abs(wanted).max())
            lost = np.linalg.norm(wanted - got[module]) / np.linalg.norm(wanted)
            np.testing.assert_allclose(errors[module], lost, atol=1e-6)
            if rank == 2:
                assert lost > 0.01


# --- what the last bits depend on


def test_the_record_names_the_blas_of_merged_factors_and_of_nothing_else(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    found = json.loads((merged(recipe("svd", [one, other]), tmp_path / "out") / "polymerge.json").read_text())["blas"]
    assert len(found) >= 1
    assert all(entry.keys() == {"name", "version", "architecture"} and all(entry.values()) for entry in found)
    alone = merged(recipe("linear", [one]), tmp_path / "alone")
    models = merged(linear(*two_llamas(tmp_path)), tmp_path / "models", "--no-verify")
    assert all("blas" not in json.loads((out / "polymerge.json").read_text()) for out in (alone, models))
