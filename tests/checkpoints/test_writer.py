"""What lies in an output folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import polymerge
from polymerge.checkpoints.identity import file_digest
from polymerge.checkpoints.writer import copy_companions
from running import checkpoint, cli, linear, merged, raw, small_llama, two_llamas
from tiny import build, generate, related_llm


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    vlm = build("llava", folder / "vlm")
    return vlm, related_llm(vlm, folder / "llm", seed=1)


# --- what it holds


def as_in_the_hub_s_cache(folder: Path, repository: Path) -> Path:
    """The folder as a snapshot: every file a link to a blob that is named by its sha256."""
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots/0123abcd"
    for file in folder.rglob("*"):
        if file.is_file():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_everything_beside_the_weights_comes_along_as_real_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    template = shutil.copytree(pair[0], tmp_path / "template")
    (template / "modeling_mine.py").write_text("CODE = 1\n")
    (template / "additional").mkdir()
    (template / "additional/chat.jinja").write_text("{{ messages }}")
    (template / "additional/picture.png").write_bytes(b"PNG")
    (template / "README.md").write_text("the template's own card")
    (template / ".gitattributes").write_text("*")
    for weight in ("training_args.bin", "consolidated.pth", "tf_model.h5"):
        (template / weight).write_bytes(b"weights of something else")
    out = merged(linear(as_in_the_hub_s_cache(template, tmp_path / "models--a--b"), pair[1]), tmp_path / "out")
    found = {str(file.relative_to(out)): file for file in out.rglob("*") if file.is_file()}
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    kept |= {"modeling_mine.py", "additional/chat.jinja", "generation_config.json"}
    assert set(found) == kept | {"model.safetensors", "README.md", "polymerge.json"}
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert all(found[name].read_bytes() == (template / name).read_bytes() for name in kept)
    assert "the template's own card" not in (out / "README.md").read_text()
    generate(out, tokens=1)


NEEDED = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tekken.json", "qwen.tiktoken", "modeling_x.py", "sub/modeling_y.py", "logger.py", "LICENSE",
    "LICENSE.txt", "NOTICE", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "scheduler/scheduler_config.json", "args.json", "spk_dict.pt", "glossary.txt",
    "selected_tags.csv", "dataset_statistics.json", "catalog.json", "changelog.txt", "checkpoint.py",
)  # fmt: skip
TRAINED = (
    "trainer_state.json", "trainer_log.jsonl", "running_log.txt", "train.log", "log.txt", "logs.json", "nohup.out",
    "slurm-17.err", "logging.jsonl", "generated_predictions.jsonl", "events.out.tfevents.1.h", "all_results.json",
    "train_results.json", "eval_results.txt", "metrics.json", "training_loss.png", "training_eval_loss.png",
    "training_args.bin", "training_args.yaml", "llamaboard_config.yaml", "ds_config.json", "ds_z3_offload_config.json",
    "deepspeed_zero3.json", "zero2.json", "accelerate_config.yaml", "hparams.yaml", "latest", "latest_checkpointed.txt",
    "zero_to_fp32.py", "optimizer.pt", "optimizer.bin", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata",
    "pytorch_model_fsdp_0/a.json", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_3.pth",
    "random_states_0.pkl",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step5/mp_rank_00_model_states.pt", "global_step5/a.json",
    "checkpoint-100/config.json", "checkpoint-100/tokenizer.json", "last-checkpoint/a.json",
    "checkpoints/e1/config.json",
    "runs/Sep01/a.txt", "wandb/run-1/files/config.json", "swanlog/a.json", "logs/a.txt", "tensorboard/a.json",
    "lightning_logs/version_0/hparams.txt", "__pycache__/a.py",
)  # fmt: skip


def test_what_training_left_stays_behind_and_what_loading_needs_does_not(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    for name in (*NEEDED, *TRAINED):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name, encoding="utf-8")
    copied = copy_companions(model, folder)
    assert sorted(copied) == sorted(NEEDED)
    assert all((folder / name).read_text(encoding="utf-8") == name for name in NEEDED)
    shallow = tmp_path / "adapter"
    shallow.mkdir()
    assert sorted(copy_companions(model, shallow, deep=False)) == sorted(name for name in NEEDED if "/" not in name)


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


# --- digests


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    assert file_digest(file) == hashlib.sha256(b"first").hexdigest()
    monkeypatch.setattr("polymerge.checkpoints.identity.sha256_of", lambda _: "computed again")
    assert file_digest(file) == hashlib.sha256(b"first").hexdigest()
    stat = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_digest(file) == "computed again"


def test_a_digest_survives_a_broken_note_and_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"bytes")
    digest = hashlib.sha256(b"bytes").hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert file_digest(file) == digest
    (note,) = (tmp_path / "cache/polymerge/sha256").iterdir()
    for text in ("", "[]", '{"seen": null}'):
        note.write_text(text)
        assert file_digest(file) == digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert file_digest(file) == digest


def test_a_blob_of_the_hub_is_not_read_for_its_digest(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"anything")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert file_digest(link) == "ab" * 32


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
