"""docs/methods.md has every method, and its worked example merges as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_made import PEFT_WARNINGS, adapter, recipe
from literal_methods import largest, weighted
from paths import ROOT
from polymerge.methods import own, table
from polymerge.methods.method import READS, Method
from polymerge.methods.table import METHODS
from running import checkpoint, cli, merged, raw, small_llama
from tiny import load

pytestmark = PEFT_WARNINGS

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("```python\n")[1].split("```")[0]
CELLS = [line.strip("| ").split(" | ") for line in PAGE.splitlines()]
ROWS = {row[0].strip("` "): row[1:] for row in CELLS if len(row) == 6}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = dict(table._TABLE)
    monkeypatch.setattr(own, "_OWN", {})
    yield
    table._TABLE.clear()
    table._TABLE.update(rows)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_has_every_method_with_formula_needs_cost_source_and_use(name: str) -> None:
    formula, needs, cost, source, use = ROWS[name]
    assert all((formula, needs, cost, source, use))
    row = METHODS[name]
    if row.statistic == "gram":
        assert "Gram matrix" in needs
    if row.random:
        assert "random keys" in needs
    if row.entrywise:
        assert re.fullmatch(r"\d+\.\d core min, \d(\.\d)? passe?s?", cost)
    for kind in ("deltas", "factors", "matrices"):
        assert (row.on == kind) <= (kind.removesuffix("s") in needs)


def test_the_page_says_what_a_row_can_ask_for() -> None:
    for statistic in READS:
        assert f'| `statistic="{statistic}"` |' in PAGE
    asked = {"on", "takes_base", "sees_base", "by_row", "random", "statistic", "span", "models", "fewest", "refuses"}
    assert asked <= {one.name for one in fields(Method)}
    for name in asked:
        assert f"{name}=" in PAGE


def test_the_worked_example_has_fifteen_lines_and_merges(tmp_path: Path) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 15
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE)
    said = cli("methods", file)
    assert said.status == 0, said.err
    assert "trimmed_sum: trim each delta, sum what is left" in said.out
    folders = {name: checkpoint(tmp_path / name, small_llama(seed)) for seed, name in enumerate(("base", "a", "b"))}
    weight, density = (0.7, 0.4), (0.5, 0.2)
    asked: dict[str, Any] = {
        "merge_method": "trimmed_sum",
        "base_model": str(folders["base"]),
        "models": [
            {"model": str(folders[name]), "parameters": {"weight": w, "density": d}}
            for name, w, d in zip("ab", weight, density, strict=True)
        ],
        "parameters": {"scale": 0.9},
        "dtype": "float32",
    }
    found = load(merged(asked, tmp_path / "out", "--no-verify", "--methods", file))
    base, *models = (load(folder) for folder in folders.values())
    for name, start in base.items():
        flat = start.float().numpy().reshape(-1)
        trimmed = [
            largest(model[name].float().numpy().reshape(-1) - flat, share)
            for model, share in zip(models, density, strict=True)
        ]
        wanted = flat + weighted(trimmed, weight, normalize=False) * flat.dtype.type(0.9)
        assert torch.equal(found[name], torch.from_numpy(wanted).reshape(start.shape)), name


@pytest.mark.parametrize("space", ["delta", "factors", "core"])
def test_the_worked_example_merges_adapters_in_any_space(space: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE)
    adapters = [adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    said = {"density": 0.5, "space": space, "rank": 3}
    ours = merged(recipe("trimmed_sum", adapters, 0.6, parameters=said), tmp_path / "ours", "--methods", file)
    theirs = recipe("breadcrumbs", adapters, 0.6, parameters={**said, "gamma": 0.0})
    assert raw(ours) == raw(merged(theirs, tmp_path / "theirs"))
