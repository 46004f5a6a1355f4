"""How deltas lie to each other: every number against loops over all entries, whatever the layout, threads or blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from adapters_made import LAYER, PEFT_WARNINGS, adapter, exact_updates, llama, tensors
from adapters_made import recipe as adapter_recipe
from layouts import Sizes, random_tower, write
from polymerge.analysis.figures import Overlap, Row
from polymerge.analysis.overlap import overlap
from polymerge.analysis.places import place_of
from polymerge.analysis.signs import sums_of
from polymerge.errors import CheckpointError, RecipeError, Refused
from polymerge.planning import make_plan
from running import checkpoint, cli, linear, recipe_file, small_llama

pytestmark = PEFT_WARNINGS

few = settings(max_examples=25)


def on_deltas(base: Path, *models: Path, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": method, "base_model": str(base), "models": entries, **more}


# --- loops over all entries


def ranks(values: np.ndarray) -> float:
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def kept_places(delta: np.ndarray, density: float) -> set[int]:
    reach = sorted(map(abs, delta), reverse=True)[max(int(density * delta.size), 1) - 1]
    return {place for place in range(delta.size) if abs(delta[place]) >= reach and delta[place] != 0}


def literal_pair(a: np.ndarray, b: np.ndarray, density: float) -> dict[str, float | None]:
    x, y = (one.ravel().astype(float) for one in (a, b))
    met = [(p, q) for p, q in zip(x, y, strict=True) if p != 0 and q != 0]
    opposed = [(p, q) for p, q in met if (p > 0) != (q > 0)]
    mass = sum(abs(x)) + sum(abs(y))
    left, right = kept_places(a.ravel(), density), kept_places(b.ravel(), density)
    both = left & right
    length = math.sqrt(sum(x * x)) * math.sqrt(sum(y * y))
    return {
        "cosine": sum(x * y) / length if length else None,
        "met": len(met) / x.size,
        "conflict": len(opposed) / len(met) if met else None,
        # what is lost of the mass when the two are added up
        "conflict_mass": (mass - sum(abs(x + y))) / mass if mass else None,
        "common": len(both) / len(left | right) if left | right else None,
        "kept_conflict": sum((x[p] > 0) != (y[p] > 0) for p in both) / len(both) if both else None,
    }


def literal_all(deltas: Sequence[np.ndarray]) -> dict[str, float | None]:
    met = opposed = 0
    mass = lost = 0.0
    for entry in zip(*(one.ravel().astype(float) for one in deltas), strict=True):
        plus, minus = [x for x in entry if x > 0], [-x for x in entry if x < 0]
        met += len(plus) + len(minus) >= 2
        opposed += bool(plus and minus)
        mass += sum(plus) + sum(minus)
        lost += 2 * min(sum(plus), sum(minus))
    return {
        "met": met / deltas[0].size,
        "conflict": opposed / met if met else None,
        "conflict_mass": lost / mass if mass else None,
    }


def spaces(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[float, float]:
    """Mean squared cosines by way of the principal angles themselves."""
    (u, s, v), (x, t, y) = (np.linalg.svd(one.astype(float), full_matrices=False) for one in (a, b))
    count = min(rank, *(int((one > one[0] * 2.0**-23).sum()) for one in (s, t)))
    angles = [np.linalg.svd(one, compute_uv=False) for one in (u[:, :count].T @ x[:, :count], v[:count] @ y[:count].T)]
    return float((angles[0] ** 2).mean()), float((angles[1] ** 2).mean())


def check(row: Row, deltas: Sequence[np.ndarray], density: float, rank: int | None, close: float = 1e-9) -> None:
    def same(found: float | None, wanted: float | None, what: str) -> None:
        assert found == (None if wanted is None else pytest.approx(wanted, rel=close, abs=close)), (row.name, what)

    for what, wanted in literal_all(deltas).items():
        same(getattr(row, what), wanted, what)
    for found, delta in zip(row.deltas, deltas, strict=True):
        flat = delta.ravel().astype(float)
        power = float((flat * flat).sum())
        same(found.norm, math.sqrt(power), "norm")
        kept = sum(flat[place] ** 2 for place in kept_places(delta.ravel(), density))
        same(found.kept, kept / power if power else None, "kept")
        matrix = delta.ndim == 2 and rank is not None and power > 0
        wanted = ranks(np.linalg.svd(delta.astype(float), compute_uv=False)) if matrix else None
        same(found.effective_rank, wanted, "effective rank")
        same(found.rank_share, None if wanted is None else wanted / min(delta.shape), "rank share")
    for pair, (a, b) in zip(row.pairs, combinations(deltas, 2), strict=True):
        for what, wanted in literal_pair(a, b, density).items():
            same(getattr(pair, what), wanted, what)
        matrix = a.ndim == 2 and rank is not None and a.any() and b.any()
        left, right = spaces(a, b, rank or 1) if matrix else (None, None)
        same(pair.left, left, "left")
        same(pair.right, right, "right")


class Whole:
    """Deltas in memory, in blocks of one cell."""

    def __init__(self, x: np.ndarray, block: int = 65536) -> None:
        self.x, self.count, self.block = x, x.shape[1], block
        self.sizes = [min(block, self.count - start) for start in range(0, self.count, block)]

    def read(self, index: int) -> np.ndarray:
        return self.x[:, index * self.block : (index + 1) * self.block].copy()


def two(a: np.ndarray, b: np.ndarray, folder: Path, **options: Any) -> Row:
    """The overlap of two deltas of one matrix, in float32 over a base of zero."""
    zero = torch.zeros(a.shape)
    models = [
        checkpoint(folder / name, {"model.layers.0.mlp.up_proj.weight": tensor})
        for name, tensor in (("base", zero), ("a", torch.from_numpy(a)), ("b", torch.from_numpy(b)))
    ]
    (row,) = overlap(on_deltas(*models), **options).tensors
    return row


# --- small tensors


@few
@given(
    st.integers(0, 999), st.integers(1, 4), st.sampled_from([(5, 7), (8, 3), (1, 6), (6, 1), (9,), (2, 3, 4)]),
    st.sampled_from([0.01, 0.2, 0.55, 1.0]), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_every_number_is_the_one_of_loops(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    models: int,
    shape: tuple[int, ...],
    density: float,
    rank: int,
    coarse: bool,
) -> None:
    rng = np.random.default_rng(seed)
    deltas = [rng.normal(0, 1, shape).astype(np.float32) for _ in range(models)]
    if coarse:  # equal magnitudes, and zeros that density must not count
        deltas = [np.round(one).astype(np.float32) for one in deltas]
    folder = tmp_path_factory.mktemp("models")
    base = checkpoint(folder / "base", {"model.layers.0.x.weight": torch.zeros(shape)})
    tuned = [
        checkpoint(folder / str(place), {"model.layers.0.x.weight": torch.from_numpy(one)})
        for place, one in enumerate(deltas)
    ]
    found = overlap(on_deltas(base, *tuned), density=density, rank=rank)
    (row,) = found.tensors
    check(row, deltas, density, rank)
    assert (row.shape, row.entries, row.tensors, row.reference) == (shape, deltas[0].size, 1, "base")
    assert row.deltas == found.places[0].deltas == found.totals[0].deltas


@few
@given(st.integers(0, 999), st.integers(2, 12), st.integers(2, 12), st.floats(0.1, 9))
def test_equal_deltas_agree_in_everything(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, columns: int, size: float
) -> None:
    a = np.random.default_rng(seed).normal(0, 1, (rows, columns)).astype(np.float32)
    row = two(a, a * np.float32(size), tmp_path_factory.mktemp("models"), density=0.5)
    (pair,) = row.pairs
    assert pair.cosine == pytest.approx(1)
    assert pair.cosine <= 1
    assert (pair.conflict, pair.conflict_mass, pair.kept_conflict, row.conflict) == (0, 0, 0, 0)
    assert (pair.common, pair.met) == (1, 1)
    assert pair.left == pytest.approx(1)
    assert pair.right == pytest.approx(1)
    assert row.deltas[0].effective_rank == pytest.approx(row.deltas[1].effective_rank)


@few
@given(st.integers(0, 999), st.integers(2, 12), st.integers(2, 12))
def test_deltas_of_unlike_sign_cancel(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, columns: int
) -> None:
    a = np.random.default_rng(seed).normal(0, 1, (rows, columns)).astype(np.float32)
    row = two(a, -a, tmp_path_factory.mktemp("models"), density=0.5)
    (pair,) = row.pairs
    assert pair.cosine == pytest.approx(-1)
    assert pair.cosine >= -1
    assert (pair.conflict, pair.conflict_mass, pair.kept_conflict) == (1, 1, 1)
    assert (row.conflict, row.conflict_mass, pair.common) == (1, 1, 1)
    assert pair.left == pytest.approx(1)  # a direction has no sign


def test_deltas_that_never_meet(tmp_path: Path) -> None:
    a, b = np.zeros((2, 4, 6), np.float32)
    a[:2, :3], b[2:, 3:] = 1.5, -2
    row = two(a, b, tmp_path, density=1)
    (pair,) = row.pairs
    assert (pair.cosine, pair.met, pair.conflict, pair.conflict_mass) == (0, 0, None, 0)
    assert (pair.common, pair.kept_conflict, pair.left, pair.right) == (0, None, 0, 0)
    assert [delta.effective_rank for delta in row.deltas] == pytest.approx([1, 1])


def test_a_delta_of_zero_has_no_directions(tmp_path: Path) -> None:
    a = np.random.default_rng(0).normal(0, 1, (4, 6)).astype(np.float32)
    row = two(a, np.zeros_like(a), tmp_path)
    (pair,) = row.pairs
    assert (pair.cosine, pair.conflict, pair.left) == (None, None, None)
    assert (row.deltas[1].norm, row.deltas[1].kept, row.deltas[1].effective_rank) == (0, None, None)
    assert row.deltas[0].effective_rank is not None


def test_sums_of_many_cells_do_not_depend_on_blocks() -> None:
    x = np.random.default_rng(0).normal(0, 1, (3, 400_003)).astype(np.float32)
    wanted = sums_of(Whole(x, 1 << 30), 0.2, map)
    for block in (65536, 3 * 65536):
        found = sums_of(Whole(x, block), 0.2, map)
        for name, value in vars(wanted).items():
            np.testing.assert_array_equal(vars(found)[name], value, err_msg=name)
    np.testing.assert_allclose(wanted.dots, x.astype(float) @ x.T.astype(float), rtol=1e-12, atol=1e-9)
    kept = [row[np.abs(row) >= np.sort(np.abs(row))[-80_000]].astype(float) for row in x]
    np.testing.assert_allclose(wanted.kept_power, [(one**2).sum() for one in kept], rtol=1e-12)
    assert wanted.kept.tolist() == [one.size for one in kept]
    assert wanted.any_met == x.shape[1]
    assert wanted.any_opposed == int(((x > 0).any(axis=0) & (x < 0).any(axis=0)).sum())
    assert wanted.opposed[0, 2] == int((x[0] * x[2] < 0).sum())


# --- checkpoints


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    vlm = tiny.build("llava", folder / "base")
    return {
        "base": vlm,
        "a": tiny.perturbed(vlm, folder / "a", seed=1),
        "b": tiny.perturbed(vlm, folder / "b", seed=2),
        "c": tiny.perturbed(vlm, folder / "c", seed=3),
        "llm": tiny.related_llm(vlm, folder / "llm", seed=4),
    }


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in tiny.load(folder).items()}


def by_disk_name(recipe: dict[str, Any], found: Overlap) -> Iterator[tuple[str, Row]]:
    plan = make_plan(recipe)
    names = {piece.canonical: step.name for step, piece, _ in plan.merged_pieces()}
    assert {row.name for row in found.tensors} == set(names)
    for row in found.tensors:
        yield names[row.name], row


def test_fine_tunes_of_a_vlm_part_by_part(family: dict[str, Path]) -> None:
    recipe = on_deltas(family["base"], family["a"], family["b"], family["c"], method="ties")
    found = overlap(recipe, density=0.3, rank=3)
    held = {name: numbers(family[name]) for name in ("base", "a", "b", "c")}
    deltas: dict[str, list[np.ndarray]] = {}
    for name, row in by_disk_name(recipe, found):
        deltas[row.name] = [held[one][name] - held["base"][name] for one in "abc"]
        check(row, deltas[row.name], 0.3, 3)
        assert [delta.model for delta in row.deltas] == ["a", "b", "c"]
    places = [(row.part, row.layer, row.module) for row in found.places]
    assert places == sorted(places, key=lambda key: (key[0] != "text", key[0] == "projector", key[1] is None, key[1]))
    assert {("text", 0, "attention"), ("text", 1, "mlp"), ("text", None, "norm"), ("vision", None, "mlp")} < set(places)
    for row in found.places:
        own = [one for one in found.tensors if (one.part, one.layer, one.module) == (row.part, row.layer, row.module)]
        whole = [np.concatenate([deltas[one.name][model].ravel() for one in own]) for model in range(3)]
        assert (row.tensors, row.entries) == (len(own), whole[0].size)
        for what, wanted in literal_all(whole).items():
            assert getattr(row, what) == pytest.approx(wanted), what
        for pair, (x, y) in zip(row.pairs, combinations(whole, 2), strict=True):
            wanted_pair = literal_pair(x, y, 0.3)
            assert pair.cosine == pytest.approx(wanted_pair["cosine"])
            assert pair.conflict_mass == pytest.approx(wanted_pair["conflict_mass"])
        matrices = [one for one in own if len(one.shape or ()) == 2]
        for place in range(3):
            wanted_rank = np.mean([one.deltas[place].rank_share for one in matrices]) if matrices else None
            assert row.deltas[place].rank_share == (None if wanted_rank is None else pytest.approx(wanted_rank))
    (total,) = found.totals
    assert total.entries == sum(row.entries for row in found.tensors)
    assert sum(row.tensors for row in found.places) == total.tensors == len(found.tensors)


def test_without_a_base_it_is_the_difference_from_the_template(family: dict[str, Path]) -> None:
    recipe = linear(family["a"], family["b"], family["c"])
    found = overlap(recipe)
    held = {name: numbers(family[name]) for name in "abc"}
    for name, row in by_disk_name(recipe, found):
        check(row, [held[one][name] - held["a"][name] for one in "bc"], 0.2, 8)
        assert row.reference == "template"
        assert [delta.model for delta in row.deltas] == ["b", "c"]
    assert "are differences from the template ('a'), not what each model has learned" in found.notes[0]


def test_one_difference_has_nothing_to_conflict_with(family: dict[str, Path]) -> None:
    found = overlap(linear(family["base"], family["llm"]))
    assert {row.part for row in found.tensors} == {"text"}
    assert all(not row.pairs and row.conflict is None and len(row.deltas) == 1 for row in found.tensors)
    assert "one delta alone" in found.notes[1]


def test_a_template_that_is_not_among_models(family: dict[str, Path]) -> None:
    recipe = linear(family["b"], family["c"], template=str(family["a"]))
    held = {name: numbers(family[name]) for name in "abc"}
    for name, row in by_disk_name(recipe, overlap(recipe, svd=False)):
        check(row, [held[one][name] - held["a"][name] for one in "bc"], 0.2, None)


def test_a_recipe_with_both_references_keeps_them_apart(family: dict[str, Path]) -> None:
    overrides = [{"match": "text.layers.*.mlp.*", "merge_method": "linear"}]
    recipe = on_deltas(family["base"], family["a"], family["b"], overrides=overrides, template=str(family["a"]))
    found = overlap(recipe, svd=False)
    assert [(row.reference, [delta.model for delta in row.deltas]) for row in found.totals] == [
        ("base", ["a", "b"]),
        ("template", ["b"]),
    ]
    assert {row.reference for row in found.tensors if "text" in row.name and ".mlp." in row.name} == {"template"}


def test_only_the_rows_that_are_merged_count(tmp_path: Path) -> None:
    one, other = small_llama(1, rows=7), small_llama(2, rows=9)
    models = [checkpoint(tmp_path / name, held) for name, held in (("one", one), ("other", other))]
    found = overlap(linear(*models, vocab="overlap"))
    (row,) = (row for row in found.tensors if row.name == "text.embed_tokens.weight")
    name = "model.embed_tokens.weight"
    check(row, [other[name][:7].float().numpy() - one[name].float().numpy()], 0.2, 8)
    assert row.shape == (7, 6)


def test_deltas_of_float64_are_taken_before_they_are_rounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = 1 + rng.normal(size=(9, 6))
    tuned = [base + 1e-10 * rng.normal(size=base.shape) for _ in range(2)]
    models = [
        checkpoint(tmp_path / str(place), {"model.layers.0.mlp.up_proj.weight": torch.from_numpy(values)})
        for place, values in enumerate((base, *tuned))
    ]
    (row,) = overlap(on_deltas(*models)).tensors
    check(row, [one - base for one in tuned], 0.2, 8, close=1e-5)


def test_a_head_that_is_stored_beside_its_embedding_counts_once(tmp_path: Path) -> None:
    models = []
    for seed in range(3):
        tensors = small_llama(seed)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        models.append(checkpoint(tmp_path / str(seed), tensors, {"model_type": "llama", "tie_word_embeddings": True}))
    assert [row.name for row in overlap(on_deltas(*models)).tensors].count("text.embed_tokens.weight") == 1


def test_a_fused_layout_gives_the_numbers_of_a_split_one(tmp_path: Path) -> None:
    sizes = Sizes(heads=6, shared=2, width=2)
    towers = [random_tower(sizes, seed, dtype=torch.float32) for seed in range(3)]

    def rows(*layouts: str) -> dict[str, Row]:
        folder = tmp_path / "-".join(layouts)
        base, *models = (
            write(layout, folder / str(place), tower, sizes)
            for place, (layout, tower) in enumerate(zip(layouts, towers, strict=True))
        )
        found = overlap(on_deltas(base, *models, template=str(models[0])))
        return {row.name: row for row in found.tensors if row.part == "text"}

    split = rows("llama", "llama", "llama")
    assert split["text.layers.0.self_attn.k_proj.weight"].shape == (4, 12)
    for other in (rows("phi3", "phi3", "phi3"), rows("cogvlm", "llava_original", "mplug_owl2")):
        assert set(other) == set(split)
        for name, row in split.items():
            assert (other[name].deltas[0].norm, other[name].conflict) == (row.deltas[0].norm, row.conflict), name
            assert other[name].pairs[0].cosine == row.pairs[0].cosine, name
            assert other[name].pairs[0].left == row.pairs[0].left, name


def large(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """More than one cell, a matrix whose singular values are estimated, and one that is wider than tall."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up_proj": (700, 520), "down_proj": (520, 600)}
    tensors: dict[str, Tensor] = {
        f"model.layers.0.mlp.{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    return checkpoint(folder / str(seed), tensors)


def test_neither_threads_nor_blocks_change_a_bit(tmp_path: Path) -> None:
    plan = make_plan(on_deltas(*(large(tmp_path, seed) for seed in range(3))))
    found = [
        overlap(plan, threads=threads, block=block)
        for threads, block in ((1, 1 << 19), (4, 1 << 19), (3, 65536), (2, 200_000), (1, 1))
    ]
    assert len({json.dumps(one.to_json()) for one in found}) == 1
    assert any("estimates, right to about five per cent" in note for note in found[0].notes)


def test_progress_counts_tensors(family: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    found = overlap(on_deltas(family["base"], family["a"], family["b"]), svd=False,
                    progress=lambda done, total: told.append((done, total)))  # fmt: skip
    assert told == [(done + 1, len(found.tensors)) for done in range(len(found.tensors))]


# --- adapters


def test_adapters_are_compared_by_their_updates(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / str(seed), seed, target_modules=["q_proj", "down_proj"], r=rank, lora_alpha=5)
        for seed, rank in ((1, 3), (2, 5), (3, 2))
    ]
    llama().save_pretrained(tmp_path / "base")
    recipe = adapter_recipe("task_arithmetic", folders, base_model=str(tmp_path / "base"))
    found = overlap(recipe, density=0.3, rank=2)
    updates = [exact_updates(folder) for folder in folders]
    assert len(found.tensors) == 4
    for row in found.tensors:
        (module,) = (name for name in updates[0] if name.removeprefix("model.") == row.name.removeprefix("text."))
        check(row, [one[module] for one in updates], 0.3, 2, close=1e-5)
        assert row.reference == "base"
    assert {(row.layer, row.module) for row in found.places} == {
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
        (1, "mlp"),
    }


def test_full_weights_beside_factors_are_differences_from_the_first_adapter_that_has_them(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / str(seed), seed, modules_to_save=["lm_head"] if seed > 1 else None) for seed in (1, 2, 3)
    ]
    found = overlap(adapter_recipe("task_arithmetic", folders), svd=False)
    (row,) = (row for row in found.tensors if "lm_head" in row.name)
    held = [tensors(folder)["lm_head.weight"].numpy() for folder in folders[1:]]
    check(row, [held[1] - held[0]], 0.2, None)
    assert (row.reference, row.deltas[0].model) == ("template", "3")
    assert "differences from the first adapter" in found.notes[0]


def test_an_adapter_that_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    file = folders[1] / "adapter_model.safetensors"
    held = load_file(file)
    held[min(held)][0, 0] = math.nan
    save_file(held, file)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity\. Repair the adapter"):
        overlap(adapter_recipe("task_arithmetic", folders))


def test_a_template_with_an_adapter_has_to_be_among_models(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    others = [tiny.perturbed(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    template = f"{base}+{adapter(tmp_path / 'adapter')}"
    with pytest.raises(RecipeError, match="stands with an adapter and is not among models"):
        overlap(linear(*others, template=template), svd=False)
    found = overlap(linear(template, *others, template=template), svd=False)
    (row,) = (row for row in found.tensors if row.name == "text.layers.0.self_attn.q_proj.weight")
    name = LAYER.format(0, "q_proj")
    held = [tiny.load(folder)[f"{name}.weight"].double().numpy() for folder in (base, *others)]
    start = held[0] + exact_updates(tmp_path / "adapter")[name]
    check(row, [one - start for one in held[1:]], 0.2, None, close=1e-4)


# --- places


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("text.layers.11.self_attn.q_proj.weight", ("text", 11, "attention")),
        ("text.layers.3.self_attn.q_norm.weight", ("text", 3, "norm")),
        ("text.layers.3.post_attention_layernorm.weight", ("text", 3, "norm")),
        ("text.layers.3.mlp.experts.7.up_proj.weight@image", ("text", 3, "mlp")),
        ("text.layers.3.self_attn.q_proj+text.layers.3.self_attn.k_proj", ("text", 3, "attention")),
        ("text.embed_tokens.weight", ("text", None, "other")),
        ("vision.blocks.2.attn.qkv.bias", ("vision", None, "attention")),
        ("vision.encoder.layers.0.layer_norm1.bias", ("vision", None, "norm")),
        ("projector.ln_q.weight", ("projector", None, "norm")),
        ("model.layers.0.feed_forward.w1.weight", ("unknown", None, "mlp")),
    ],
)
def test_where_a_tensor_belongs(name: str, place: tuple[str, int | None, str]) -> None:
    assert tuple(place_of(name)) == place


# --- refusals


def test_everything_wrong_with_the_options_is_said_at_once() -> None:
    with pytest.raises(Refused) as refused:
        overlap({}, density=0, rank=0, threads=0, block=0)
    for said in ("density: 0 is not above 0", "rank: 0", "threads: 0", "block: 0"):
        assert said in str(refused.value)
    with pytest.raises(Refused, match="density: nan"):
        overlap({}, density=math.nan)
    with pytest.raises(Refused, match=r"density: 1\.5"):
        overlap({}, density=1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    models = [checkpoint(tmp_path / str(seed), small_llama(seed)) for seed in range(2)]
    broken = small_llama(2)
    broken["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    recipe = on_deltas(*models, checkpoint(tmp_path / "broken", broken))
    with pytest.raises(CheckpointError, match=r"text\.layers\.1\.mlp\.up_proj\.weight of 'broken' holds NaN"):
        overlap(recipe)


def test_a_delta_beyond_float32_is_refused(tmp_path: Path) -> None:
    models = [{name: tensor.float() * 0 for name, tensor in small_llama(0).items()} for _ in range(3)]
    models[0]["model.norm.weight"][:] = -3e38
    models[1]["model.norm.weight"][:] = 3e38
    recipe = on_deltas(*(checkpoint(tmp_path / str(place), one) for place, one in enumerate(models)))
    with pytest.raises(CheckpointError, match=r"text\.norm\.weight: a delta is too large"):
        overlap(recipe)


def test_tiny_and_huge_deltas_are_no_trouble(tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).normal(0, 1, (2, 8, 6))
    wanted = two(a.astype(np.float32), b.astype(np.float32), tmp_path / "plain")
    for power in (-100, 100):
        found = two(*(np.ldexp(one.astype(np.float32), power) for one in (a, b)), tmp_path / str(power))
        assert found.pairs == wanted.pairs
        assert [one.effective_rank for one in found.deltas] == [one.effective_rank for one in wanted.deltas]


def test_one_model_alone(family: dict[str, Path]) -> None:
    found = overlap(on_deltas(family["base"], family["a"]), svd=False)
    assert all(len(row.deltas) == 1 and not row.pairs and row.deltas[0].norm > 0 for row in found.tensors)
    with pytest.raises(RecipeError, match="nothing to compare"):
        overlap(linear(family["a"]))


# --- the command


def test_the_command_prints_a_table_and_writes_json(family: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_file(on_deltas(family["base"], family["a"], family["b"], method="ties"), tmp_path / "r.yaml")
    ran = cli("overlap", recipe, "--json", tmp_path / "o.json", "--density", "0.4", "--rank", "2")
    assert (ran.status, ran.err) == (0, "")
    data = json.loads((tmp_path / "o.json").read_text())
    assert data == json.loads(cli("overlap", recipe, "--json", "-", "--density", "0.4", "--rank", "2").out)
    assert (data["density"], data["rank"]) == (0.4, 2)
    lines = ran.out.splitlines()
    assert lines[0] == "deltas, in this order: a, b"
    head = lines[2].split()
    assert head[:3] == ["where", "module", "entries"]
    (line,) = (line for line in lines if line.startswith("text 1") and " mlp " in line)
    (row,) = (row for row in data["places"] if (row["layer"], row["module"]) == (1, "mlp"))
    for number in (row["pairs"][0]["cosine"], row["conflict"], row["conflict_mass"], row["pairs"][0]["left"]):
        assert f" {number:.3f}" in line
    assert f"{row['deltas'][0]['norm']:.3g}, {row['deltas'][1]['norm']:.3g}" in line
    assert "share that both keep (0.25 by chance)" in ran.out


def test_the_lines_with_most_conflict_come_first(family: dict[str, Path]) -> None:
    words = ("--template", family["a"], "--with", family["b"], "--base", family["base"], "--method", "task_arithmetic",
             "--weight", "0.5,0.5", "--no-svd")  # fmt: skip
    ran = cli("overlap", *words, "--sort", "conflict")
    assert ran.status == 0, ran.err
    lines = ran.out.splitlines()[3:]
    table = lines[: lines.index("")]
    shares = [float(line.split()[-4]) for line in table[:-1]]
    assert shares == sorted(shares, reverse=True)
    assert table[-1].startswith("all ")
    assert "eff. rank" not in ran.out


def test_what_is_wrong_is_2_and_a_folder_that_is_not_there_is_found_first(
    family: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_file(on_deltas(family["base"], family["a"], family["b"]), tmp_path / "r.yaml")
    ran = cli("overlap", recipe, "--density", "7")
    assert ran.status == 2
    assert "density: 7.0 is not above 0 and up to 1" in ran.err
    assert cli("overlap", tmp_path / "none.yaml").status == 2
    ran = cli("overlap", recipe, "--no-svd", "--json", tmp_path / "none" / "o.json")
    assert (ran.status, ran.out) == (2, "")
    assert f"there is no folder {tmp_path / 'none'}. Make it first" in ran.err
