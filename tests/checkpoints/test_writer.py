"""What lies in an output folder."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import polymerge
from polymerge.checkpoints.identity import sampled_digest
from running import checkpoint, cli, linear, merged, raw, small_llama, two_llamas
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
        assert entry["sampled"] == {"model.safetensors": sampled_digest(folder / "model.safetensors")}
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
