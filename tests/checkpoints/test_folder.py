import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, Refused

INDEX = "model.safetensors.index.json"


def shard(path: Path, names: list[str], cut: int = 0) -> Path:
    """A safetensors file of one float32 element a tensor."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names) - cut))
    return path


def indexed(folder: Path, weight_map: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened(path: Path) -> Checkpoint:
    return open_checkpoint("it", path)


def names_in(path: Path) -> list[str]:
    return list(opened(path).entries)


def refusal(path: Path) -> list[PolymergeError]:
    with pytest.raises(PolymergeError) as caught:
        opened(path)
    problems = caught.value.problems if isinstance(caught.value, Refused) else (caught.value,)
    assert all(str(problem).endswith((".", "?")) for problem in problems)
    return list(problems)


def test_a_sharded_folder(tmp_path: Path) -> None:
    shard(tmp_path / "model-00002-of-00002.safetensors", ["a"])
    shard(tmp_path / "model-00001-of-00002.safetensors", ["z", "b"])
    shard(tmp_path / "consolidated.safetensors", ["other.layout"])
    (tmp_path / "config.json").write_text('{"model_type": "llava", "rope": Infinity}')
    indexed(
        tmp_path, {"a": "model-00002-of-00002.safetensors"} | dict.fromkeys("zb", "model-00001-of-00002.safetensors")
    )
    checkpoint = opened(tmp_path)
    assert checkpoint.source == "it"
    assert checkpoint.folder == tmp_path.resolve()
    assert checkpoint.config["model_type"] == "llava"
    assert checkpoint.layout == "safetensors"
    assert [file.name for file in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert list(checkpoint.entries) == ["z", "b", "a"]
    first = checkpoint.entries["z"]
    assert first == TensorInfo("z", "F32", (1,), checkpoint.files[0], checkpoint.files[0].stat().st_size - 8, 4)
    assert (checkpoint.aliases, checkpoint.skipped) == ({}, {})


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "adapter_model.safetensors", "extra.safetensors"], ["model.safetensors"]),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["consolidated.safetensors", "weights.safetensors"], ["weights.safetensors"]),
        (["m-1-of-2.safetensors", "m-2-of-2.safetensors"], ["m-1-of-2.safetensors", "m-2-of-2.safetensors"]),
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            ["adapter_model.safetensors", "pytorch_model.bin", "training_args.bin", "optimizer.pt"],
            ["pytorch_model.bin"],
        ),
        (["pytorch_model-1-of-1.bin", "x.pth"], ["pytorch_model-1-of-1.bin"]),
        (["model.pth", "rng_state_0.pth", "scheduler.pt", "optimizer.pt", "mm_projector.bin"], ["model.pth"]),
        (["a.pt"], ["a.pt"]),
    ],
)
def test_which_files_are_the_weights(tmp_path: Path, files: list[str], chosen: list[str]) -> None:
    for name in files:
        if name.endswith(".safetensors"):
            shard(tmp_path / name, [name])
        else:
            torch.save({name: torch.ones(1)}, tmp_path / name)
    checkpoint = opened(tmp_path)
    assert [file.name for file in checkpoint.files] == chosen
    assert list(checkpoint.entries) == chosen
    assert checkpoint.config == {}


def test_an_index_of_torch_files(tmp_path: Path) -> None:
    tied = torch.ones(3)
    torch.save({"a": tied, "b": tied, "step": 3}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"c": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {"a": "00001", "b": "00001", "c": "00002"}
    weight_map = {name: f"pytorch_model-{number}-of-00002.bin" for name, number in files.items()}
    indexed(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = opened(tmp_path)
    assert checkpoint.layout == "torch"
    assert list(checkpoint.entries) == ["a", "b", "c"]
    assert checkpoint.aliases == {"b": "a"}
    assert checkpoint.skipped == {"step": "is of type int, not a tensor"}


def test_a_single_file(tmp_path: Path) -> None:
    shard(tmp_path / "x" / "part.safetensors", ["a"])
    torch.save({"b": torch.ones(1)}, tmp_path / "x" / "mm_projector.bin")
    (tmp_path / "x" / "config.json").write_text('{"k": 1}')
    checkpoint = opened(tmp_path / "x" / "part.safetensors")
    assert (list(checkpoint.entries), checkpoint.config["k"], checkpoint.folder.name) == (["a"], 1, "x")
    assert names_in(tmp_path / "x" / "mm_projector.bin") == ["b"]
    (problem,) = refusal(tmp_path / "x" / "config.json")
    assert isinstance(problem, RecipeError)
    assert "is neither a folder nor a readable weight file (.safetensors, .bin, .pth, .pt)" in str(problem)


def test_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    shard(tmp_path / "blobs" / "0a1b", ["a"])
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model-1-of-1.safetensors").symlink_to("../../blobs/0a1b")
    indexed(snapshot, {"a": "model-1-of-1.safetensors"})
    for path in (snapshot, snapshot / "model-1-of-1.safetensors"):
        assert opened(path).files == (snapshot.resolve() / "model-1-of-1.safetensors",)
    (tmp_path / "blobs" / "0a1b").unlink()
    (problem,) = refusal(snapshot)
    assert "model-1-of-1.safetensors: is a link to ../../blobs/0a1b, which is not there" in str(problem)
    (problem,) = refusal(snapshot / "model-1-of-1.safetensors")
    assert "which is not there" in str(problem)


# paths that are no checkpoint


def test_a_missing_path_names_what_lies_there(tmp_path: Path) -> None:
    shard(tmp_path / "llava-next" / "model.safetensors", ["a"])
    (problem,) = refusal(tmp_path / "lava-next" / "sub")
    assert isinstance(problem, RecipeError)
    assert str(problem) == f"model 'it': {tmp_path} has no 'lava-next'. Did you mean 'llava-next'?"
    (problem,) = refusal(tmp_path / "qwen")
    assert str(problem).endswith("has no 'qwen'. Known: llava-next.")
    (problem,) = refusal(tmp_path / "llava-next" / "model.safetensors" / "x")
    assert "model.safetensors is a file, not a folder" in str(problem)
    (tmp_path / "empty").mkdir()
    (problem,) = refusal(tmp_path / "empty" / "x")
    assert str(problem).endswith("has no 'x'. That folder is empty.")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no weights (*.safetensors, pytorch_model*.bin, *.pth, *.pt). It is empty"),
        (["config.json", "training_args.bin"], "has no weights"),
        (["mm_projector.bin"], "It holds 'mm_projector.bin'. Name another folder, or the file itself"),
        (["adapter_config.json"], "is an adapter, not a model. Write BASE+"),
        (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"], "is an adapter"),
        (["a.safetensors", "b.safetensors"], "has 2 weight files and no index: 'a.safetensors', 'b.safetensors'"),
        (["a-1-of-2.safetensors", "b-2-of-2.safetensors"], "has 2 weight files and no index"),
        (["a.pt", "b.pth"], "has 2 weight files and no index"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "has 2 indexes"),
    ],
)
def test_a_folder_without_a_clear_model_is_refused(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    (problem,) = refusal(tmp_path)
    assert isinstance(problem, RecipeError)
    assert str(tmp_path) in str(problem)
    assert said in str(problem)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    for number in (2, 4):
        shard(tmp_path / f"model-0000{number}-of-00004.safetensors", [str(number)])
    (problem,) = refusal(tmp_path)
    assert isinstance(problem, CheckpointError)
    assert "has 2 of 4 shards" in str(problem)
    assert "missing are '1', '3'" in str(problem)


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "model-1-of-1.safetensors", ["a"])
    shard(tmp_path / "model.safetensors", ["a"])
    indexed(tmp_path, {"a": "model-1-of-1.safetensors"})
    (problem,) = refusal(tmp_path)
    assert "has both 'model.safetensors' and 'model.safetensors.index.json'" in str(problem)
    indexed(tmp_path, {"a": "model.safetensors"})
    assert names_in(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_said(tmp_path: Path) -> None:
    shard(tmp_path / "x" / "model.safetensors", ["a"]).chmod(0)
    assert "Permission denied" in str(refusal(tmp_path / "x")[0])
    (tmp_path / "x").chmod(0)
    assert "Permission denied" in str(refusal(tmp_path / "x")[0])
    (tmp_path / "x").chmod(0o700)


# what is wrong inside


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            '{"a": 1,\n  b}',
            "config.json: is not JSON: Expecting property name enclosed in double quotes at line 2, column 3",
        ),
        ("[]", "config.json: expected object, got array"),
        ("3", "config.json: expected object, got 3"),
        ("version https://git-lfs.github.com/spec/v1\n", "config.json: is a Git LFS pointer"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, config: str, said: str) -> None:
    shard(tmp_path / "model.safetensors", ["a"])
    (tmp_path / "config.json").write_text(config)
    (problem,) = refusal(tmp_path)
    assert isinstance(problem, CheckpointError)
    assert said in str(problem)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "expected object, got array"),
        ("{}", "has no 'weight_map'"),
        ('{"weight_map": {}}', "has no 'weight_map'"),
        ('{"weight_map": ["a"]}', "has no 'weight_map'"),
        ('{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', "'a' appears twice"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / INDEX).write_text(text)
    (problem,) = refusal(tmp_path)
    assert isinstance(problem, CheckpointError)
    assert str(tmp_path / INDEX) in str(problem)
    assert said in str(problem)


@pytest.mark.parametrize(
    "name",
    [
        "/m.safetensors",
        "../m.safetensors",
        "x/../m.safetensors",
        "./m.safetensors",
        "x//m.safetensors",
        "C:m.safetensors",
        "C:/m.safetensors",
        "x\\m.safetensors",
        "x\0m.safetensors",
        "",
        "x",
        "m.bin",
        ["m.safetensors"],
        None,
    ],
)
def test_an_index_stays_in_its_folder(tmp_path: Path, name: Any) -> None:
    shard(tmp_path / "m.safetensors", ["a"])
    shard(tmp_path / "x" / "m.safetensors", ["a"])
    indexed(tmp_path / "x", {"a": name, "b": name})
    (problem,) = refusal(tmp_path / "x")
    assert "for 'a', 'b', only plain paths below its own folder that end in .safetensors are followed" in str(problem)


def test_an_index_may_name_files_in_folders_below(tmp_path: Path) -> None:
    shard(tmp_path / "text" / "m.safetensors", ["a"])
    indexed(tmp_path, {"a": "text/m.safetensors"})
    assert names_in(tmp_path) == ["a"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    """One folder in which nearly everything is wrong."""
    files = {number: f"m-{number}.safetensors" for number in range(1, 7)}
    shard(tmp_path / files[1], ["kept", "twice", "unlisted.1", "unlisted.2", "misplaced"])
    shard(tmp_path / files[2], ["twice"])
    shard(tmp_path / files[3], ["cut"], cut=1)
    (tmp_path / files[5]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / files[6]).mkdir()
    weight_map = {
        "kept": files[1],
        "twice": files[1],
        "cut": files[3],
        "gone": files[4],
        "lfs": files[5],
        "dir": files[6],
    }
    weight_map |= {f"absent.{number}": files[2] for number in range(300)} | {"misplaced": files[2]}
    indexed(tmp_path, weight_map)
    (tmp_path / "config.json").write_text("{,}")
    messages = [str(problem) for problem in refusal(tmp_path)]
    expected = [
        f"{tmp_path / 'config.json'}: is not JSON",
        f"{files[3]}: is truncated",
        f"{files[4]}: is missing",
        f"{files[5]}: is a Git LFS pointer, not the file itself. Run `git lfs pull` there",
        f"{files[6]}: is not a file",
        f"'{files[1]}' and '{files[2]}' both hold 'twice'",
        f"does not list 2 tensors ('unlisted.1', 'unlisted.2') that '{files[1]}' holds",
        f"places 301 tensors ('absent.0', 'absent.1', 'absent.2' and 298 more) in '{files[2]}' that the file does not "
        f"hold; some are in '{files[1]}'",
    ]
    assert len(messages) == len(expected)
    for message, said in zip(messages, expected, strict=True):
        assert said in message


def test_shards_without_an_index_share_no_tensor(tmp_path: Path) -> None:
    shard(tmp_path / "m-1-of-2.safetensors", ["a", "b"])
    shard(tmp_path / "m-2-of-2.safetensors", ["b", "c"])
    (problem,) = refusal(tmp_path)
    assert "'m-1-of-2.safetensors' and 'm-2-of-2.safetensors' both hold 'b'" in str(problem)


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    (problem,) = refusal(tmp_path)
    assert "no tensors in 'x.pt'. Left out: 'epoch'" in str(problem)


def test_many_headers_are_read_in_a_moment(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for number in range(1, 51):
        name = f"model-{number:05}-of-00050.safetensors"
        names = [f"model.layers.{number}.block.{row}.weight" for row in range(300)]
        shard(tmp_path / name, names)
        weight_map |= dict.fromkeys(names, name)
    indexed(tmp_path, weight_map)
    began = time.process_time()
    assert len(opened(tmp_path).entries) == 15_000
    assert time.process_time() - began < 2  # about 0.2; the bound leaves room for slow machines
