"""The inputs at hand are compared with those that an output records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import polymerge
from polymerge.engine.verify_inputs import verify_inputs
from polymerge.errors import RecipeError
from running import cli, linear, two_llamas


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output of two models that a recipe named from the current folder."""
    two_llamas(tmp_path)
    monkeypatch.chdir(tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    polymerge.merge(linear(*map(Path, folders)), "out", check=False, sha256=True)
    return tmp_path / "out"


def inputs(out: Path) -> list[Path]:
    return [Path(entry["source"]) for entry in json.loads((out / "polymerge.json").read_text())["inputs"]]


def change(folder: Path, place: int) -> None:
    """Change one number of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[place] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_nothing_of_this_machine_is_recorded(made: Path) -> None:
    assert str(made.parent) not in (made / "polymerge.json").read_text()
    assert str(made.parent) not in (made / "README.md").read_text()


def test_inputs_that_are_there_pass(made: Path) -> None:
    for sha256 in (False, True):
        found = verify_inputs(made, sha256=sha256)
        assert [finding.passed for finding in found.findings] == [True, True]
        assert all(("sha256 of whole files" in finding.detail) is sha256 for finding in found.findings)
    ran = cli("verify", "--inputs", made)
    assert (ran.status, ran.out.splitlines()[0]) == (0, f"{made}: passed")


def test_another_model_in_the_place_of_one_is_found(made: Path) -> None:
    first, second = inputs(made)
    change(second, 0)
    found = verify_inputs(made)
    assert [finding.passed for finding in found.findings] == [True, False]
    assert found.findings[1].detail == f"{second}: 'model.safetensors' is not what was merged"
    ran = cli("verify", made, "--inputs", "--json")
    assert (ran.status, json.loads(ran.out)["passed"]) == (1, False)
    (first / "model.safetensors").rename(first / "moved.safetensors")
    gone = verify_inputs(made).findings[0]
    assert gone.passed is False
    assert "model.safetensors: cannot be read: No such file" in gone.detail


def test_a_record_of_sha256_alone_is_compared_by_them(made: Path) -> None:
    record = json.loads((made / "polymerge.json").read_text())
    for entry in record["inputs"]:
        entry["sha256"] = {str(made.parent / entry["source"] / name): one for name, one in entry["sha256"].items()}
        del entry["sampled"]
    (made / "polymerge.json").write_text(json.dumps(record))
    assert verify_inputs(made).passed
    change(inputs(made)[0], 0)
    assert [finding.passed for finding in verify_inputs(made).findings] == [False, True]


def test_an_adapter_and_its_base_are_told_apart(tmp_path: Path) -> None:
    base, _ = two_llamas(tmp_path)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "_proj" in name)
    rows, columns = tensors[name].shape
    (adapter := tmp_path / "adapter").mkdir()
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, columns), f"{stem}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [stem.rpartition(".")[2]]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    polymerge.fold(adapter, tmp_path / "out", base=base, check=False)
    assert verify_inputs(tmp_path / "out").passed
    factors[f"{stem}.lora_B.weight"] *= 2
    save_file(factors, adapter / "adapter_model.safetensors")
    (finding,) = verify_inputs(tmp_path / "out").findings
    assert finding.detail.endswith("'+adapter_model.safetensors' is not what was merged")


def test_what_tells_nothing_is_refused(made: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no polymerge\.json, so nothing says what it was made of"):
        verify_inputs(inputs(made)[0])
    (made / "polymerge.json").write_text("{")
    with pytest.raises(RecipeError, match="Only a whole one tells its inputs"):
        verify_inputs(made)
    ran = cli("verify", made, "--sha256")
    assert ran.status == 2
    assert "--sha256: is for `--inputs`" in ran.err
