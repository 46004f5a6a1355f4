"""Several merges as one: the bits of the merges one by one, nothing left of the stages, errors before any output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymerge.engine import in_stages
from polymerge.engine.merge import merge
from polymerge.errors import OutputError, PolymergeError, RecipeError, Refused
from polymerge.planning import make_plan
from polymerge.planning.text import describe
from running import checkpoint, cli, leftovers, raw, recipe_file, small_llama

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("base", "a", "b", "c")):
        checkpoint(folder / name, small_llama(seed), LLAMA)
    checkpoint(folder / "wide", small_llama(7, rows=9), LLAMA)
    return folder


def stage(place: Path, name: str | None, method: str, *models: str, **more: Any) -> dict[str, Any]:
    def found(model: str) -> str:
        return str(place / model) if (place / model).is_dir() else model

    entries = [{"model": found(model), "parameters": {"weight": 0.5 + number}} for number, model in enumerate(models)]
    bases = {field: found(more.pop(field)) for field in ("base_model", "template") if field in more}
    return {"merge_method": method, "models": entries, **bases, **more} | ({} if name is None else {"name": name})


def three(place: Path) -> list[dict[str, Any]]:
    return [
        stage(place, "first", "linear", "a", "b", dtype="float32"),
        stage(place, "second", "task_arithmetic", "first", "c", base_model="base", overrides=[
            {"layers": 1, "parameters": {"weight": [0.25, 1]}}]),
        stage(place, None, "ties", "second", "a", base_model="first", parameters={"density": 0.4}),
    ]  # fmt: skip


def one_by_one(place: Path, folder: Path) -> dict[str, bytes]:
    first, second, last = three(place)
    folder.mkdir()
    merge(first, folder / "first", check=False)
    second["models"][0]["model"] = last["base_model"] = str(folder / "first")
    merge(second, folder / "second", check=False)
    last["models"][0]["model"] = str(folder / "second")
    merge(last, folder / "last", check=False)
    return raw(folder / "last")


def test_stages_give_the_bits_of_the_merges_one_by_one(place: Path, tmp_path: Path) -> None:
    expected = one_by_one(place, tmp_path / "apart")
    told: list[tuple[int, int]] = []
    made = merge({"stages": three(place)}, tmp_path / "out", check=False, progress=lambda *said: told.append(said))
    assert raw(tmp_path / "out") == expected
    assert made.folder == tmp_path / "out"
    assert told[-1][0] == told[-1][1] == sum(one.size for one in (*made.plan.stages, made.plan))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert leftovers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "out"]


def test_progress_counts_the_matrices_of_all_stages(place: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []

    class Progress:
        def __call__(self, done: int, total: int) -> None:
            pass

        def matrices(self, done: int, total: int, share: float) -> None:
            told.append((done, total, share))

    first, second, last = three(place)
    first = stage(place, "first", "iso_c", "a", "b", base_model="base")
    last = stage(place, None, "iso_c", "second", "a", base_model="first")
    del first["models"][0]["parameters"], first["models"][1]["parameters"]
    del last["models"][0]["parameters"], last["models"][1]["parameters"]
    merge({"stages": [first, second, last]}, tmp_path / "out", check=False, progress=Progress(), threads=1)
    assert {total for _, total, _ in told} == {told[-1][0]}
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert [share for _, _, share in told] == sorted(share for _, _, share in told)
    assert told[-1][2] == pytest.approx(1)
    assert any(share == pytest.approx(0.5) for _, _, share in told)


def test_the_record_tells_of_every_stage(place: Path, tmp_path: Path) -> None:
    merge({"stages": three(place)}, tmp_path / "out", check=False)
    text = (tmp_path / "out/polymerge.json").read_text()
    assert "polymerge-partial" not in text
    record = json.loads(text)
    assert [one["recipe"].get("name") for one in record["stages"]] == ["first", "second"]
    inputs = {one["label"]: one for one in record["inputs"]}
    assert inputs["second"]["source"] == "second"
    assert list(inputs["second"]["sampled"]) == ["model.safetensors"]
    assert [one["name"] for one in record["recipe"]["stages"]] == ["first", "second"]
    assert record["plan"]["version"] == 1
    again = merge(record["recipe"], tmp_path / "again", check=False)
    assert raw(again.folder) == raw(tmp_path / "out")


def test_a_plan_of_stages_is_made_from_headers_and_carried_out_as_json(place: Path, tmp_path: Path) -> None:
    plan = make_plan({"stages": three(place)})
    assert [one.name for one in plan.stages] == ["first", "second"]
    assert [one.path for one in plan.inputs if one.source == "second"] == [""]
    assert {step.dtype for step in plan.stages[0].steps} == {"F32"}
    text = describe(plan)
    assert (
        text.index("--- stage first\nlinear of 2 models") < text.index("--- stage second\n") < text.index("--- output")
    )
    size = sum(one.size for one in plan.stages)
    assert f"stages: 2, whose outputs take {size / 1000:.1f} kB on the disk until the output is complete\n" in text
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**plan.to_json(), "hash": plan.hash}))
    assert make_plan(file) == plan
    other = make_plan({"stages": [three(place)[0] | {"seed": 3}, *three(place)[1:]]})
    assert other.hash != plan.hash
    merge(file, tmp_path / "out", check=False)
    merge({"stages": three(place)}, tmp_path / "same", check=False)
    assert raw(tmp_path / "out") == raw(tmp_path / "same")


def test_by_the_command_line(place: Path, tmp_path: Path) -> None:
    file = recipe_file({"stages": three(place)}, tmp_path / "recipe.yaml")
    ran = cli("plan", file)
    assert ran.status == 0, ran.err
    assert "--- stage second" in ran.out
    ran = cli("merge", file, "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 0, ran.err
    assert raw(tmp_path / "out") == one_by_one(place, tmp_path / "apart")


def test_a_stage_may_be_the_template_with_a_vocabulary_of_its_own(place: Path, tmp_path: Path) -> None:
    first = stage(place, "first", "linear", "wide", "a", template="wide")
    merge(
        {"stages": [first, stage(place, None, "linear", "first", "b", template="first")]}, tmp_path / "out", check=False
    )
    assert raw(tmp_path / "out")["lm_head.weight"].startswith(b"BF16[9, 6]")


def test_what_is_wrong_in_a_stage_is_said_with_its_name_before_any_output(place: Path, tmp_path: Path) -> None:
    first, second, last = three(place)
    second["overrides"] = [{"layers": 7, "parameters": {"weight": 1}}]
    with pytest.raises(Refused) as refused:
        merge({"stages": [first, second, last]}, tmp_path / "out", check=False)
    (problem,) = refused.value.problems
    assert str(problem) == "stage 'second': recipe: overrides[0]: layers 7-7, but template 'base' has layers 0-1"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_not_replaced_unless_it_is_said(place: Path, tmp_path: Path) -> None:
    recipe = {"stages": three(place)}
    merge(recipe, tmp_path / "out", check=False)
    with pytest.raises(OutputError, match="exists already"):
        merge(recipe, tmp_path / "out", check=False)
    merge(recipe, tmp_path / "out", check=False, force=True)
    assert leftovers(tmp_path) == []


def test_stages_that_fail_leave_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sorted(path.name for path in tmp_path.iterdir())
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1500))
    with pytest.raises(OutputError, match=r"needs .* of which for outputs of stages until it is complete"):
        merge({"stages": three(place)}, tmp_path / "out", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    monkeypatch.undo()
    monkeypatch.setattr(in_stages, "_add", lambda *_: (tmp_path / "none").stat())
    with pytest.raises(OutputError, match="not completed, and nothing of it was left"):
        merge({"stages": three(place)}, tmp_path / "out", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_what_a_killed_run_left_is_removed(place: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.polymerge-partial"
    (left / "stages/first").mkdir(parents=True)
    (left / "stages/first/model.safetensors").write_bytes(b"half")
    (left / "lock").touch()
    merge({"stages": three(place)}, tmp_path / "out", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["stages"][0]["recipe"].pop("name"), "its stages have names of their own"),
        (lambda plan: plan["stages"][0]["recipe"].update(name=".."), "name has to be one that a folder can have"),
        (lambda plan: plan["stages"][1].update(stages=plan["stages"][:1]), "its stages are merges of checkpoints"),
        (lambda plan: plan["stages"][0].update(seed=7), "was modified"),
    ],
)
def test_a_plan_of_stages_that_was_changed_is_refused(
    change: Callable[[Any], None], message: str, place: Path, tmp_path: Path
) -> None:
    plan = make_plan({"stages": three(place)})
    data = json.loads(json.dumps({**plan.to_json(), "hash": plan.hash}))
    change(data)
    with pytest.raises(PolymergeError, match=message):
        merge(data, tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []


def test_what_works_on_one_merge_refuses_stages(place: Path) -> None:
    from polymerge.inference.live import live

    with pytest.raises(RecipeError, match="stages: their outputs are not there yet"), live({"stages": three(place)}):
        pass
