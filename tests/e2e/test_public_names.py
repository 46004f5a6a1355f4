"""`import polymerge as pm` in a notebook: what it gives, as values and as tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import polymerge as pm
from polymerge.errors import MissingExtraError
from polymerge.tables import Table
from tiny import build

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(build("llama", folder / "one")), str(build("llama", folder / "other", seed=1))


def recipe_of(models: tuple[str, str], weight: float = 0.25) -> dict[str, object]:
    one, other = (
        {"model": model, "parameters": {"weight": w}} for model, w in zip(models, (1 - weight, weight), strict=True)
    )
    return {"merge_method": "linear", "models": [one, other]}


def test_every_name_is_there_and_listed() -> None:
    for name in pm.__all__:
        assert getattr(pm, name) is not None
    assert set(pm.__all__) == set(dir(pm))
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        pm.unknown  # noqa: B018


def test_a_plan_is_carried_out_in_memory_as_on_disk(models: tuple[str, str], tmp_path: Path) -> None:
    plan = pm.plan(recipe_of(models))
    merged = pm.merge(plan, tmp_path / "out", check=False)
    assert (merged.folder, merged.plan.hash) == (tmp_path / "out", plan.hash)
    assert pm.verify(merged.folder).passed
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    with pm.live(plan) as model:
        own = model.model.state_dict()
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[name], wanted[name]) for name in wanted)
        model.set(pm.plan(recipe_of(models, 0.75)))
        assert not all(torch.equal(own[name], wanted[name]) for name in wanted)


def test_what_models_are_and_how_they_differ(models: tuple[str, str]) -> None:
    found = pm.inspect(*models)
    assert [one.family for one in found.models] == ["llama", "llama"]
    assert [one.obstacles for one in found.pairs] == [(), ()]
    overlap = pm.overlap(recipe_of(models), svd=False)
    assert isinstance(overlap, Table)
    frame = overlap.to_pandas()
    assert list(frame["part"]) == [row.part for row in overlap.places]
    assert "<th>layer</th>" in overlap._repr_html_()


class Named(Table):
    def rows(self) -> list[dict[str, object]]:
        return [{"name": "<b>", "value": 0.123456, "none": None}] * 61


def test_a_table_is_shown_safely_and_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Named()._repr_html_()
    assert "<td>&lt;b&gt;</td><td>0.1235</td><td></td>" in shown
    assert shown.endswith("</table><p>1 more rows</p>")
    assert len(Named().to_pandas()) == 61
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        Named().to_pandas()


def test_tables_of_methods_and_families() -> None:
    assert pm.METHODS["ties"].on == "deltas"
    assert pm.FAMILIES["llama"].parts == ("text",)


def test_what_is_wrong_is_one_error_with_all_of_it(models: tuple[str, str]) -> None:
    with pytest.raises(pm.PolymergeError) as raised:
        pm.plan({"merge_method": "linaer", "models": [*models, "missing"]})
    assert len(raised.value.problems) > 1
