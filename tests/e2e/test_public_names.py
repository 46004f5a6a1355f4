"""`import polymerge as pm` in a notebook: what it gives, as values and as tables."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

import polymerge as pm
from adapters_made import PEFT_WARNINGS
from paths import ROOT
from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.world import load_handwriting, split_pairs
from polymerge.errors import MissingExtraError
from polymerge.tables import Table
from polymerge.tuning.outcome import SearchResult
from tiny import build

torch = pytest.importorskip("torch")
pytestmark = PEFT_WARNINGS


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


DEMO = ROOT / "src" / "polymerge" / "demo" / "checkpoints"
VLM, BASE, REASON = (DEMO / name for name in ("vlm", "base", "reason"))
DELTAS = pm.Recipe(
    "task_arithmetic",
    (pm.ModelEntry(str(VLM), {"weight": 1.0}), pm.ModelEntry(str(REASON), {"weight": 0.5})),
    base_model=str(BASE),
    parts=("text",),
)
SHORT = pm.Generation(max_new_tokens=3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the demo's questions, with their pictures beside them."""
    folder = tmp_path_factory.mktemp("questions")
    _, held_out = load_handwriting(1)
    lines = []
    for number, question in enumerate(draw_questions(split_pairs(1), held_out, 1, pictures=1)[::100]):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
        lines.append({"id": number, "text": question.prompt, "image": f"{number}.png", "answer": question.answer})
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> pm.Merged:
    return pm.merge(DELTAS, tmp_path_factory.mktemp("runs") / "merged")


def test_what_the_readme_shows_runs(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "src").symlink_to(ROOT / "src")
    for file in prompts.parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    found, merged = names["found"], names["merged"]
    assert isinstance(found, SearchResult)
    assert isinstance(merged, pm.Merged)
    assert merged.verification is not None
    assert merged.verification.folder == merged.folder
    assert found.best == {"weight": 0.5}
    assert [point.difference is None for point in found.curve] == [True, False, True]
    found.plot().save(tmp_path / "curve.svg")
    assert "How much answers change" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("verb", [pm.read_recipe, pm.plan, pm.merge, pm.live, pm.overlap, pm.search, pm.layerwise])
def test_a_recipe_has_one_name_wherever_it_is_taken(verb) -> None:
    assert next(iter(inspect.signature(verb).parameters)) == "recipe"


def test_a_recipe_made_in_python_is_the_same_and_is_checked_as_one_in_a_file() -> None:
    models = [{"model": VLM, "parameters": {"weight": 1}}, {"model": REASON, "parameters": {"weight": 0.5}}]
    mapping = {"merge_method": "task_arithmetic", "base_model": BASE, "models": models, "parts": ["text"]}
    assert pm.plan(DELTAS).hash == pm.plan(mapping).hash
    assert pm.read_recipe(DELTAS) == pm.read_recipe(mapping)
    plain = pm.Recipe("metagpt", [VLM, REASON], base_model=BASE)  # type: ignore[arg-type]
    assert pm.plan(plain).hash == pm.plan({"merge_method": "metagpt", "models": [VLM, REASON], "base_model": BASE}).hash
    with pytest.raises(pm.PolymergeError, match=r"no method 'linaer'\. Did you mean 'linear'"):
        pm.plan(pm.Recipe("linaer", DELTAS.models))
    some = pm.Override(layers=(0, 1), merge_method="linear")
    plan = pm.plan(pm.Recipe("copy", DELTAS.models, overrides=(some,), parts=("text",)))
    assert {step.canonical.split(".")[2] for step in plan.steps if step.fate == "merged"} == {"0", "1"}


def test_what_is_returned_is_shown_as_a_table(merged: pm.Merged) -> None:
    assert merged.verification is not None
    assert list(merged.verification.to_pandas()["passed"]) == [True] * 8
    assert merged.to_pandas()["merged"][0] == sum(merged.plan.to_pandas()["fate"] == "merged")
    assert "task_arithmetic" in merged.plan._repr_html_()
    assert len(repr(merged)) < 1000


def test_a_model_may_be_a_path(merged: pm.Merged, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    found = pm.inspect(VLM, tmp_path / "lora", merged.folder)
    assert [one.label for one in found.models] == ["vlm", "merged"]
    assert all(f"<th>{head}</th>" in found._repr_html_() for head in ("text tower", "obstacles", "modules"))
    folded = pm.fold(tmp_path / "lora", tmp_path / "folded", base=BASE)
    assert pm.verify(folded.folder).passed
    assert pm.verify(tmp_path / "lora", base=BASE).passed


def test_prompts_may_be_a_file_and_results_are_handed_on(merged: pm.Merged, prompts: Path, tmp_path: Path) -> None:
    one = pm.evaluate(merged.folder, {"digits": prompts}, tmp_path / "one", scorer="exact", max_new_tokens=3)
    other = pm.evaluate(VLM, {"digits": str(prompts)}, tmp_path / "other", scorer="exact", max_new_tokens=3)
    assert one.to_pandas()["task"][0] == "digits"
    assert one.folder == tmp_path / "one"
    compared = pm.compare([one, other], template="vlm")
    assert compared.gains == pm.compare([tmp_path / "one", tmp_path / "other"], template="vlm").gains
    knocked = pm.knockout(
        merged.folder, prompts, tmp_path / "k", scorer="exact", modules="mlp", group=2, generation=SHORT
    )
    assert [(cell.task, cell.module, cell.layers) for cell in knocked.cells] == [
        ("prompts", "mlp", (0, 1)),
        ("prompts", "mlp", (2, 3)),
    ]
    layers = pm.layerwise(DELTAS, prompts, tmp_path / "l", scorer="exact", ranges=["full"], generation=SHORT)
    overlap = pm.overlap(DELTAS, svd=False)
    drawn = [compared.plot(), knocked.plot(), knocked.plot(curves=True), layers.plot(), overlap.plot("sign_conflict")]
    assert [len(chart.to_dict()["vconcat"]) for chart in drawn] == [2, 1, 1, 1, 1]
    with pytest.raises(pm.PolymergeError, match=r"no measure 'conflict'\. Did you mean 'sign_conflict'"):
        overlap.plot("conflict")
    with pytest.raises(pm.PolymergeError, match="nothing to draw"):
        overlap.plot("left")
    sources = [merged, one, knocked, layers, overlap.save(tmp_path / "overlap.json")]
    data: Mapping[str, object] = pm.report(sources, tmp_path / "r.html").data
    assert all(data[name] for name in ("merges", "scores", "knockouts", "ablations", "overlaps"))
    assert pm.report(merged, tmp_path / "r.html").data["merges"]
    with pytest.raises(pm.PolymergeError, match=r"Overlap is in no folder\. Write it with its `save`"):
        pm.report([overlap], tmp_path / "r.html")
    with pytest.raises(pm.PolymergeError, match="scorer: say how the questions of digits are scored"):
        pm.evaluate(VLM, {"digits": prompts}, tmp_path / "none")
    with pytest.raises(pm.PolymergeError, match="are scored, such as exact"):
        pm.evaluate(VLM, prompts, tmp_path / "none")
