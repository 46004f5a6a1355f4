"""The table of methods: rows agree with their functions, and a method is one function and one row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, recipe, tensors
from polymerge.checkpoints.loading import load_model
from polymerge.errors import Refused
from polymerge.inference.live import LiveModel
from polymerge.methods import table
from polymerge.methods.kernels import Block, weighted_sum
from polymerge.methods.lora import Factors, stack, truncate
from polymerge.methods.method import Method, Parameter, keywords_of, method_function
from polymerge.methods.table import METHODS, SHARED
from running import cli, merged, raw, same_weights
from tiny import build, perturbed

pytestmark = PEFT_WARNINGS


BLOCKS = {"deltas": "deltas", "matrices": "deltas", "weights": "models", "factors": "pairs"}
UNSAID = {"stepwise"}
"""Keywords that no row asks for: what only plans say."""
FUNCTIONS = [(row, False) for row in METHODS.values() if not row.copies]
FUNCTIONS += [(row, True) for row in METHODS.values() if row.of_factors]


@pytest.mark.parametrize(("row", "of_factors"), FUNCTIONS, ids=lambda one: getattr(one, "name", one))
def test_a_row_and_its_function_agree(row: Method, of_factors: bool) -> None:
    function = inspect.signature(method_function(row, of_factors=of_factors)).parameters
    block, *others = function
    assert block == BLOCKS["factors" if of_factors else row.on]
    by_keyword = [name for name in others if function[name].kind is inspect.Parameter.KEYWORD_ONLY]
    own = [p for p in row.parameters if p.name not in SHARED or (p.name == "scale" and row.scales)]
    assert [name for name in others if name not in by_keyword] == [parameter.name for parameter in own]
    wanted = keywords_of(row, of_factors=of_factors)
    assert [name for name in by_keyword if name in wanted or name not in UNSAID] == wanted
    for parameter in own:
        default = function[parameter.name].default
        needed = parameter.default is None and not parameter.optional
        assert default == (inspect.Parameter.empty if needed else parameter.default), parameter.name
        assert type(default) is type(parameter.default) or parameter.default is None


def test_what_has_a_merged_delta_has_a_scale_for_it() -> None:
    for row in METHODS.values():
        assert ("scale" in {parameter.name for parameter in row.parameters}) == (
            row.on in ("deltas", "matrices", "factors")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": (), "statistic": "cutoff"}, "cutoff follows from `density`, and it has no such parameter"),
        ({"statistic": "rescaling"}, "rescaling follows from `epsilon`"),
        ({"statistic": "cutof"}, "statistic cannot be 'cutof', only None, cutoff, gram"),
        ({"on": "delta"}, "on cannot be 'delta', only weights, deltas"),
        ({"needs_rank": True}, "only methods on factors know of ranks"),
        ({"sees_base": True}, "only methods on the deltas of a number of checkpoints see their base"),
        ({"scales": True}, "only methods on factors apply `scale` themselves"),
        ({"adds_ranks": True}, "only methods on factors or matrices add ranks"),
        ({"decomposes": (1, 2)}, "says of itself what only methods on matrices have"),
        ({"on": "matrices"}, "a function of whole matrices needs nothing beside them"),
    ],
)
def test_a_row_that_cannot_work_is_refused_where_it_is_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(METHODS["ties"], **change)


def test_one_row_has_no_function_and_copies() -> None:
    assert [(row.name, row.parameters) for row in METHODS.values() if not row.function] == [("copy", ())]
    assert METHODS["copy"].copies


# --- a method is one function and one row


def damped(deltas: Block, weight: Sequence[float], damping: float = 0.5) -> Any:
    """A method that nobody needs: a weighted sum of deltas, damped."""
    return weighted_sum(deltas, [number * (1 - damping) for number in weight])


def first_directions(pairs: Sequence[Factors], weight: Sequence[float], rank: int) -> Factors:
    """Another one, on factors: the weighted sum, of which one direction stays."""
    return truncate(stack(pairs, weight), min(rank, 1))[0]


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = table.WEIGHT, table.SCALE
    damping = Parameter("damping", "number", 0.5, low=0.0, high=1.0)
    for row in (
        Method(
            "damped", "a damped sum", "nowhere", "deltas", f"{__name__}:damped", parameters=(weight, damping, scale)
        ),
        Method(
            "first_directions",
            "one direction of a sum",
            "nowhere",
            "factors",
            f"{__name__}:first_directions",
            parameters=(weight, scale),
            needs_rank=True,
        ),
    ):
        monkeypatch.setitem(table._TABLE, row.name, row)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


def asked(models: Sequence[Path], method: str, weight: float, **parameters: float) -> dict[str, Any]:
    base, *tuned = map(str, models)
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": one, "parameters": {"weight": weight}} for one in tuned],
        "parameters": parameters,
    }


@pytest.mark.usefixtures("new")
def test_a_new_method_is_listed_and_its_parameters_are_checked(models: list[Path]) -> None:
    said = cli("methods").out
    assert "damped: a damped sum\n  from: nowhere\n  works on: deltas\n" in said
    assert "  damping: 0 to 1, default 0.5\n" in said
    with pytest.raises(Refused) as refused:
        polymerge.plan(asked(models, "damped", 0.5, dampng=0.5) | {"base_model": None, "vocab": "all"})
    assert [str(problem) for problem in refused.value.problems] == [
        "recipe: parameters: no method has a parameter 'dampng'. Did you mean 'damping'?",
        "recipe: vocab has to be template, overlap or by-token, got 'all'",
        "damped works on deltas and needs base_model, their common ancestor",
    ]
    with pytest.raises(Refused, match=r"damping of damped has to be from 0 to 1, got 2"):
        polymerge.plan(asked(models, "damped", 0.5, damping=2))
    with pytest.raises(Refused, match=r"ties has no parameter 'damping'"):
        polymerge.plan(asked(models, "ties", 0.5, damping=0.5))


@pytest.mark.usefixtures("new")
def test_a_new_method_merges_on_disk_and_in_a_loaded_model(models: list[Path], tmp_path: Path) -> None:
    ours = merged(asked(models, "damped", 1.0, damping=0.75, scale=0.5), tmp_path / "ours")
    theirs = merged(asked(models, "task_arithmetic", 0.25, scale=0.5), tmp_path / "theirs")
    assert raw(ours) == raw(theirs) != raw(models[0])
    live = LiveModel(polymerge.plan(asked(models, "damped", 0.25)))
    live.set(polymerge.plan(asked(models, "damped", 1.0, damping=0.75, scale=0.5)))
    same_weights(live.model, load_model(ours))


@pytest.mark.usefixtures("new")
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_a_new_method_merges_adapters_in_any_space(space: str, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    ours = recipe("damped", adapters, 1.0, parameters={"damping": 0.75, "space": space, "rank": 3})
    theirs = recipe("dare_linear", adapters, 0.25, parameters={"space": space, "rank": 3})
    assert raw(merged(ours, tmp_path / "ours")) == raw(merged(theirs, tmp_path / "theirs"))


@pytest.mark.usefixtures("new")
def test_a_new_method_on_factors_gets_the_rank_of_the_output(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    found = tensors(merged(recipe("first_directions", adapters, parameters={"rank": 4}), tmp_path / "out"))
    b = next(tensor for name, tensor in found.items() if "lora_B" in name)
    assert b.shape[1] == 4
    assert int(torch.linalg.matrix_rank(b)) == 1
    assert np.isfinite(b.numpy()).all()
    with pytest.raises(Refused, match="first_directions merges adapters"):
        polymerge.plan(recipe("first_directions", [build("llama", tmp_path / name) for name in ("one", "two")]))
