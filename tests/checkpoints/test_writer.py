"""What lies in an output folder, and where none may be made."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import polymerge
from polymerge.checkpoints.writer import output_folder
from polymerge.errors import OutputError
from running import checkpoint, cli, leftovers, linear, merged, raw, recipe_file, small_llama, two_llamas, weights
from tiny import build, related_llm


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    vlm = build("llava", folder / "vlm")
    return vlm, related_llm(vlm, folder / "llm", seed=1)


# --- what it holds


def test_the_card_can_be_read_by_the_hub(tmp_path: Path) -> None:
    models = two_llamas(tmp_path)
    out = merged(linear(*models, seed=7), tmp_path / "Merged", "--no-verify")
    card = (out / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "polymerge"]}
    assert body.startswith("\n# Merged\n")
    shown = re.search(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert shown is not None
    again = yaml.safe_load(shown[1])
    assert raw(merged(again, tmp_path / "again", "--no-verify")) == raw(out)


def test_the_card_of_hub_models_names_them_without_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = dict(zip(("owner/vlm", "owner/llm@v1.0"), two_llamas(tmp_path), strict=True))
    config = {"model_type": "llava", "vision_config": {}}
    shutil.rmtree(models["owner/vlm"])
    tower = {f"language_model.{name}": tensor for name, tensor in small_llama(1).items()}
    checkpoint(models["owner/vlm"], tower, config)
    monkeypatch.setattr("polymerge.planning.inputs.locate", lambda source: models[source])
    out = merged(linear(*models), tmp_path / "out", "--no-verify")
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == ["owner/vlm", "owner/llm"]
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "owner/llm@v1.0" in (out / "README.md").read_text()


def test_the_record_holds_what_it_takes_to_repeat_the_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = linear(*pair, seed=11, exclude=["text.lm_head.*"])
    out = merged(recipe, tmp_path / "out", "--shard-size", "40KB")
    record = json.loads((out / "polymerge.json").read_text())
    assert record["recipe"]["seed"] == record["seed"] == 11
    assert record["recipe"]["exclude"] == ["text.lm_head.*"]
    assert record["plan_hash"] == polymerge.plan(recipe).hash == polymerge.plan(record["recipe"]).hash
    assert [entry["role"] for entry in record["inputs"]] == [["template", "models[0]"], ["models[1]"]]
    for entry, folder in zip(record["inputs"], pair, strict=True):
        file = folder / "model.safetensors"
        assert entry["sha256"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert record["output"]["files"] == {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    words = ["merge", str(tmp_path / "out.yaml"), "-o", str(out), "--shard-size", "40KB"]
    assert record["command"] == ["polymerge", *words]
    assert record["versions"].keys() >= {"python", "numpy", "numba"}
    merged_names = set(record["output"]["merged"])
    assert record["output"]["tensors"] == {"merged": len(merged_names), "copied": len(raw(out)) - len(merged_names)}


def test_the_record_lists_no_code_among_the_weights(tmp_path: Path) -> None:
    vlm = build("internvl_chat", tmp_path / "vlm")
    out = merged(linear(vlm, related_llm(vlm, tmp_path / "llm", seed=1)), tmp_path / "out")
    assert (out / "modeling_internvl_chat.py").is_file()
    assert list(json.loads((out / "polymerge.json").read_text())["output"]["files"]) == ["model.safetensors"]


# --- where it may be made


def test_an_existing_folder_is_kept_unless_force_is_said(tmp_path: Path) -> None:
    models = two_llamas(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    asked = recipe_file(linear(*models), tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 1
    assert "exists already" in ran.err
    assert "--force" in ran.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert cli("merge", asked, "-o", tmp_path / "out", "--no-verify", "--force").status == 0
    assert not (tmp_path / "out/mine.txt").exists()
    assert weights(tmp_path / "out").keys() == {"model.safetensors"}
    assert leftovers(tmp_path) == []


def test_force_keeps_the_old_output_when_the_new_one_fails(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    out = merged(linear(one, other), tmp_path / "out", "--no-verify")
    before = weights(out)
    broken = small_llama(3)
    broken["lm_head.weight"][2, 3] = float("nan")
    asked = recipe_file(linear(one, checkpoint(tmp_path / "broken", broken)), tmp_path / "r.yaml")
    assert cli("merge", asked, "-o", out, "--no-verify", "--force").status == 1
    assert weights(out) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("target", ["one", ".", "one/merged", "one/deep/merged", "link"])
def test_an_output_may_not_touch_an_input(target: str, tmp_path: Path) -> None:
    models = two_llamas(tmp_path / "models")
    (models[0] / "deep").mkdir()
    (tmp_path / "models/link").symlink_to(models[0])
    before = {folder: raw(folder) for folder in models}
    asked = recipe_file(linear(*models), tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "models" / target, "--force", "--no-verify")
    assert ran.status == 1
    assert "Choose another folder" in ran.err
    assert {folder: raw(folder) for folder in models} == before


def test_an_output_may_lie_beside_a_bare_file(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    out = merged(linear(one / "model.safetensors", other / "model.safetensors"), one / "merged", "--no-verify")
    assert raw(out) == raw(merged(linear(one, other), tmp_path / "out", "--no-verify"))


def test_neither_the_working_folder_nor_a_missing_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is or contains the current folder" in cli("merge", asked, "-o", ".", "--force").err
    ran = cli("merge", asked, "-o", tmp_path / "no/such/out")
    assert ran.status == 1
    assert f"parent folder {tmp_path}/no/such does not exist" in ran.err


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    with output_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        for _ in range(2):  # being refused must not take the lock away
            ran = cli("merge", asked, "-o", tmp_path / "out", "--no-verify")
            assert ran.status == 1
            assert "another run of polymerge is writing it" in ran.err
            assert (folder / "half").exists()
    assert (tmp_path / "out/half").read_text() == "written"
    assert leftovers(tmp_path) == []


def test_a_lock_whose_file_was_taken_away_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits at the door while another one ends: what it then locks is no longer the file of that name."""
    import fcntl

    locked: list[int] = []
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not locked:
            (tmp_path / ".out.polymerge-lock").unlink()
        locked.append(descriptor)

    monkeypatch.setattr("fcntl.flock", late)
    with output_folder(tmp_path / "out"):
        assert len(locked) == 2
        with pytest.raises(OutputError, match="another run"), output_folder(tmp_path / "out"):
            pytest.fail("two runs hold one lock")


# --- no network


def test_a_merge_of_local_folders_never_asks_the_network(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out = merged(linear(*pair), tmp_path / "out")
    assert cli("verify", out).status == 0
