"""The files beside the weights: which an output takes over, and which are refused before it exists."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, llama
from polymerge.checkpoints.beside import companion_files, copy_files
from polymerge.errors import CheckpointError, PolymergeError, RecipeError
from running import cli, leftovers, linear, merged, recipe_file, two_llamas
from tiny import build, generate, related_llm

pytestmark = PEFT_WARNINGS

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    vlm = build("llava", folder / "vlm")
    return vlm, related_llm(vlm, folder / "llm", seed=1)


def in_the_hub_s_cache(folder: Path, cache: Path, *, shared: bool = False) -> Path:
    """The folder as a snapshot: every file a link to a blob, which may be a link to what repositories share."""
    snapshot = cache / "models--a--b/snapshots/0123abcd"
    blobs = cache / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for file in folder.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            place = cache / "blobs" / digest[:2] / digest if shared else blobs / digest
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if shared and not (blobs / digest).is_symlink():
                (blobs / digest).symlink_to(os.path.relpath(place, blobs))
            link.symlink_to(os.path.relpath(blobs / digest, link.parent))
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
    out = merged(linear(in_the_hub_s_cache(template, tmp_path / "hub"), pair[1]), tmp_path / "out")
    found = {str(file.relative_to(out)): file for file in out.rglob("*") if file.is_file()}
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    kept |= {"modeling_mine.py", "additional/chat.jinja", "generation_config.json"}
    assert set(found) == kept | {"model.safetensors", "README.md", "polymerge.json"}
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert all(found[name].read_bytes() == (template / name).read_bytes() for name in kept)
    assert "the template's own card" not in (out / "README.md").read_text()
    generate(out, tokens=1)


def test_what_training_left_stays_behind_and_what_loading_needs_does_not(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    for name in (*NEEDED, *TRAINED):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name, encoding="utf-8")
    found = companion_files(model)
    assert list(found) == sorted(NEEDED)
    copy_files(found, folder)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == sorted(NEEDED)
    assert all((folder / name).read_text(encoding="utf-8") == name for name in NEEDED)
    assert list(companion_files(model, deep=False)) == sorted(name for name in NEEDED if "/" not in name)
    assert list(companion_files(model, ["LICENSE"], deep=False)) == list(companion_files(model, deep=False))[1:]


# --- what may lie there


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_s_cache_to_its_own_blobs_are_followed(shared: bool, tmp_path: Path) -> None:
    (tmp_path / "model/sub").mkdir(parents=True)
    for name in ("config.json", "sub/modeling.py"):
        (tmp_path / "model" / name).write_text(name)
    snapshot = in_the_hub_s_cache(tmp_path / "model", tmp_path / "hub", shared=shared)
    (tmp_path / "out").mkdir()
    copy_files(companion_files(snapshot), tmp_path / "out")
    assert (tmp_path / "out/sub/modeling.py").read_text() == "sub/modeling.py"
    assert not (tmp_path / "out/config.json").is_symlink()
    assert list(companion_files(snapshot / "sub")) == ["modeling.py"]


@pytest.mark.parametrize("blobs", ["as a link", "a blob as a link", "of another repository", "another folder"])
def test_a_cache_whose_blobs_lie_elsewhere_is_no_cache(blobs: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    snapshot = in_the_hub_s_cache(tmp_path / "model", tmp_path / "hub")
    secret = tmp_path / "keys/secret"
    secret.parent.mkdir()
    secret.write_text("secret")
    repository, link = tmp_path / "hub/models--a--b", snapshot / "special.txt"
    if blobs == "as a link":
        shutil.rmtree(repository / "blobs")
        (repository / "blobs").symlink_to(secret.parent)
        (snapshot / "config.json").unlink()
        link.symlink_to("../../blobs/secret")
    elif blobs == "a blob as a link":
        (repository / "blobs/secret").symlink_to(secret)
        link.symlink_to("../../blobs/secret")
    elif blobs == "of another repository":
        (tmp_path / "hub/models--a--c/blobs").mkdir(parents=True)
        (tmp_path / "hub/models--a--c/blobs/secret").write_text("secret")
        link.symlink_to("../../../models--a--c/blobs/secret")
    else:
        (tmp_path / "hub/blobs").mkdir()
        (tmp_path / "hub/blobs/secret").write_text("secret")
        link.symlink_to("../../../blobs/secret")
    with pytest.raises(CheckpointError, match=r"special\.txt: is a link out of its folder"):
        companion_files(snapshot)


def test_a_link_to_a_file_of_the_same_folder_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "model/templates").mkdir(parents=True)
    (tmp_path / "model/templates/chat.jinja").write_text("{{ messages }}")
    (tmp_path / "model/chat_template.jinja").symlink_to("templates/chat.jinja")
    (tmp_path / "model/latest").symlink_to("templates")
    os.link(tmp_path / "model/templates/chat.jinja", tmp_path / "model/hard.jinja")
    assert list(companion_files(tmp_path / "model")) == ["chat_template.jinja", "hard.jinja", "templates/chat.jinja"]
    (tmp_path / "model/.env").write_text("TOKEN=secret")
    (tmp_path / "model/notes.txt").symlink_to(".env")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link out of its folder, to \.env\."):
        companion_files(tmp_path / "model")


def test_everything_that_cannot_be_taken_over_is_named_at_once_before_there_is_an_output(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "code").mkdir()
    (one / "special_tokens.txt").symlink_to(tmp_path / "secret")
    (one / "modeling").symlink_to(tmp_path / "code")
    (one / "merges.txt").symlink_to(tmp_path / "nowhere")
    (one / "vocab.json").symlink_to("vocab.json")
    os.mkfifo(one / "tokens.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(one / "talk.txt"))
    problems = {
        "special_tokens.txt": "is a link out of its folder",
        "modeling": "Put the folder itself in its place",
        "merges.txt": "is a broken link",
        "vocab.json": "is a broken link",
        "tokens.txt": "is a named pipe and no file",
        "talk.txt": "is a socket and no file",
    }
    for words in (["plan"], ["merge", "-o", tmp_path / "out", "--no-verify"]):
        ran = cli(words[0], recipe_file(linear(one, other), tmp_path / "r.yaml"), *words[1:])
        assert ran.status == 1
        assert "6 problems, nothing was written" in ran.err
        said = {line.split(f"{one}/")[1].split(":")[0]: line for line in ran.err.splitlines() if f"{one}/" in line}
        assert said.keys() == problems.keys()
        assert all(problems[name] in line for name, line in said.items())
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []
    # of the other model nothing but its weights is taken, and these may lie anywhere
    (other / "merges.txt").symlink_to(tmp_path / "nowhere")
    for file in one.iterdir():
        if file.name in problems:
            file.unlink()
    (one / "model.safetensors").rename(tmp_path / "moved.safetensors")
    (one / "model.safetensors").symlink_to(tmp_path / "moved.safetensors")
    merged(linear(one, other), tmp_path / "out", "--no-verify")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_found_first(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two_llamas(tmp_path)
    (one / "sub").mkdir()
    (one / "sub/modeling.py").write_text("CODE = 1")
    closed = str(one / "sub/modeling.py" if what == "file" else one / "sub")

    def refusing(real: object) -> object:
        def call(path: object, *arguments: object) -> object:
            if str(path) == closed:
                raise PermissionError(13, "Permission denied", closed)
            return real(path, *arguments)  # type: ignore[operator]

        return call

    # by permissions alone nothing is closed to root, as whom tests may run
    name = "open" if what == "file" else "scandir"
    monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(PolymergeError, match=f"{closed}: cannot be read: Permission denied"):
        polymerge.plan(linear(one, other))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_the_files_of_an_adapter_are_held_to_the_same(name: str, tmp_path: Path) -> None:
    base, one, other = tmp_path / "base", adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    llama().save_pretrained(base)
    (tmp_path / "elsewhere").write_text("{}")
    (one / name).symlink_to(tmp_path / "elsewhere")
    folding = {"merge_method": "copy", "models": [f"{base}+{one}"]}
    for recipe in (linear(one, other), folding):
        with pytest.raises(PolymergeError, match=f"{one / name}: is a link out of its folder"):
            polymerge.plan(recipe)
    (one / name).unlink()
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PolymergeError, match=f"{base / name}: is a link out of its folder"):
        polymerge.plan(folding)
    (one / name).write_text("{}")  # which the output takes in place of the base's
    out = polymerge.merge(folding, tmp_path / "out", check=False).folder
    assert (out / name).read_text() == "{}"


def test_a_written_plan_takes_files_from_no_other_folder(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    plan = polymerge.plan(linear(one, other)).to_json()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/secret").write_text("secret")
    plan["companions"] = [
        {"kind": "tokenizer", "folder": str(tmp_path / "keys"), "files": ["secret"], "dropped": [], "why": "asked"}
    ]
    with pytest.raises(RecipeError, match="cannot take files from"):
        polymerge.merge(json.loads(json.dumps(plan)), tmp_path / "out", check=False)


def test_a_file_that_is_gone_when_it_is_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PolymergeError, match=r"vocab.json: is no longer there"):
        copy_files({"vocab.json": tmp_path / "vocab.json"}, tmp_path / "out")
