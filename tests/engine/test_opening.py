"""An input that changes while it is merged ends the merge, whatever it is and however it changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

import polymerge
from adapters_made import PEFT_WARNINGS, adapter
from folded import learned
from polymerge.errors import CheckpointError, PolymergeError
from running import checkpoint, leftovers, linear, small_llama, two_llamas
from tiny import build

pytestmark = PEFT_WARNINGS


def during(monkeypatch: pytest.MonkeyPatch, place: str, do: Callable[[], object]) -> None:
    """Do something once, when the function at `place` is called."""
    real = resolve_name(place)
    done: list[bool] = []

    def call(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            do()
        return real(*arguments, **options)

    monkeypatch.setattr(place, call)


def in_place(file: Path) -> None:
    """Another content, at the same time and of the same size."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def replaced(file: Path) -> None:
    stat = file.stat()
    shutil.copy2(file, file.with_name("fresh"))
    in_place(file.with_name("fresh"))
    os.utime(file.with_name("fresh"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    file.with_name("fresh").replace(file)


def longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b" ")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    one, other = two_llamas(tmp_path)
    (one / "vocab.json").write_text("{}")
    return one, other


WHEN = (
    "polymerge.engine.executor.Execution.run",
    "polymerge.engine.writers.copy_files",
    "polymerge.engine.merge.delta_norms",
)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", [in_place, replaced, longer])
@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "vocab.json"])
def test_a_change_during_the_merge_leaves_no_output(
    what: str,
    change: Callable[[Path], None],
    when: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    during(monkeypatch, when, lambda: change(models[0] / what))
    with pytest.raises(PolymergeError, match=f"{models[0] / what}: .* while it was being read"):
        polymerge.merge(linear(*models), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_a_change_of_any_model_counts_and_all_are_named(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both() -> None:
        in_place(models[0] / "model.safetensors")
        (models[1] / "model.safetensors").unlink()

    during(monkeypatch, "polymerge.engine.merge.delta_norms", both)
    with pytest.raises(PolymergeError) as caught:
        polymerge.merge(linear(*models), tmp_path / "out", check=False)
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 2
    assert "was written to while" in said[0]
    assert "was taken away while" in said[1]


@pytest.mark.parametrize("when", WHEN[:2])
def test_a_file_beside_the_weights_that_vanishes_is_an_error(
    when: str, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, when, (models[0] / "vocab.json").unlink)
    with pytest.raises(PolymergeError, match=r"vocab\.json: (is no longer there|was taken away)"):
        polymerge.merge(linear(*models), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_what_comes_into_the_folder_meanwhile_stays_out_of_the_output(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, WHEN[0], lambda: (models[0] / "late.json").write_text("{}"))
    assert not (polymerge.merge(linear(*models), tmp_path / "out", check=False).folder / "late.json").exists()


def test_a_plan_is_carried_out_with_values_written_since_but_not_with_another_config(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = polymerge.plan(linear(*models))
    checkpoint(models[0], small_llama(9))
    now = polymerge.merge(linear(*models), tmp_path / "now", check=False).folder
    assert (polymerge.merge(plan, tmp_path / "out", check=False).folder / "model.safetensors").read_bytes() == (
        now / "model.safetensors"
    ).read_bytes()
    longer(models[0] / "config.json")  # to the same effect
    polymerge.merge(plan, tmp_path / "same", check=False)
    text = (models[0] / "config.json").read_text()
    (models[0] / "config.json").write_text(text.replace('"model_type"', '"rope_theta": 5, "model_type"'))
    with pytest.raises(CheckpointError, match="its config has changed since it was planned"):
        polymerge.merge(plan, tmp_path / "other", check=False)


def retouched(file: Path) -> None:
    """The same content, written again."""
    file.write_bytes(file.read_bytes())


@pytest.mark.parametrize("written", [False, True], ids=["this process", "a written plan"])
@pytest.mark.parametrize("where", [0, 1], ids=["template", "source"])
def test_what_lies_beside_the_weights_is_as_it_was_when_it_was_planned(
    where: int, written: bool, models: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = models[where]
    (folder / "tokenizer.json").write_text("{}")
    made = polymerge.plan(linear(*models))
    (tmp_path / "plan.json").write_text(json.dumps(made.to_json()))
    plan: Any = tmp_path / "plan.json" if written else made
    (folder / "train.log").write_text("a trainer's, of no concern")
    for file in ("tokenizer.json", "config.json"):
        retouched(folder / file)
    polymerge.merge(plan, tmp_path / "same", check=False)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(
        CheckpointError,
        match=r"'added_tokens\.json', 'tokenizer\.json' beside its weights has changed since it was planned",
    ):
        polymerge.merge(plan, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["config.json", "adapter_config.json", "+tokenizer.json"])
def test_a_written_plan_is_of_the_configs_that_were_there(change: str, tmp_path: Path) -> None:
    base, own = build("llama", tmp_path / "base"), tmp_path / "adapter"
    learned(base, own)
    (own / "tokenizer.json").write_text("{}")
    recipe = {"merge_method": "copy", "models": [f"{base}+{own}"]}
    plan = json.loads(json.dumps(polymerge.plan(recipe).to_json()))
    file = own / change.strip("+") if "config" not in change or change.startswith("adapter") else base / change
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text), indent=7))  # to the same effect
    if "config" in change:
        polymerge.merge(plan, tmp_path / "same", check=False)
    file.write_text(json.dumps(json.loads(text) | {"revision": "another"}))
    said = "its config has changed" if "config" in change else r"'\+tokenizer.json' beside its weights has changed"
    with pytest.raises(CheckpointError, match=f"{said} since it was planned. Plan again"):
        polymerge.merge(plan, tmp_path / "out", check=False)


@pytest.mark.parametrize("what", ["adapter_config.json", "tokenizer.json"])
def test_a_plan_of_adapters_is_as_well(what: str, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)]
    (adapters[0] / "tokenizer.json").write_text("{}")
    plan = polymerge.plan(linear(*adapters)).to_json()
    polymerge.merge(plan, tmp_path / "same", check=False)
    held = json.loads((adapters[0] / what).read_text())
    (adapters[0] / what).write_text(json.dumps(held | {"revision": "another"}))
    with pytest.raises(CheckpointError, match="has changed since it was planned"):
        polymerge.merge(plan, tmp_path / "out", check=False)


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "adapter_config.json"])
def test_adapters_are_watched_as_well(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    during(monkeypatch, WHEN[0], lambda: in_place(adapters[1] / what))
    with pytest.raises(CheckpointError, match=f"{adapters[1] / what}: was written to while"):
        polymerge.merge(linear(*adapters), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_overlap_is_not_measured_of_two_states(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, "polymerge.analysis.overlap.sums_of", lambda: in_place(models[1] / "model.safetensors"))
    with pytest.raises(CheckpointError, match="was written to while"):
        polymerge.overlap(linear(*models), svd=False)
