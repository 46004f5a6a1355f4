"""Broken and hostile checkpoints through the command line: a clear message, a status, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from running import cli, leftovers, linear, recipe_file, small_llama, two_llamas

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def sharded(folder: Path) -> dict[str, str]:
    """The checkpoint in two shards with an index; its weight map."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    tensors = list(small_llama(2).items())
    for number, part in enumerate((tensors[:3], tensors[3:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        weight_map |= {name: file for name, _ in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def truncated_shard(folder: Path) -> list[str]:
    sharded(folder)
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 3)
    return [str(file)]


def shorter_than_its_header(folder: Path) -> list[str]:
    os.truncate(folder / "model.safetensors", 60)
    return [str(folder / "model.safetensors")]


def header_longer_than_the_file(folder: Path) -> list[str]:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    return [str(file)]


def offsets_beyond_the_end(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        header["lm_head.weight"]["data_offsets"] = [0, 1 << 40]

    edit_header(folder, change)
    return [str(folder / "model.safetensors"), "lm_head.weight"]


def shape_that_its_bytes_do_not_fill(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        header[NORM]["shape"] = [7]

    edit_header(folder, change)
    return [str(folder / "model.safetensors"), NORM]


def overlapping_tensors(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        header[NORM]["data_offsets"] = [0, 12]

    edit_header(folder, change)
    return [str(folder / "model.safetensors"), NORM]


def negative_shape(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        header[NORM]["shape"] = [-2, -3]

    edit_header(folder, change)
    return [str(folder / "model.safetensors"), NORM]


def unknown_dtype(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        header[NORM]["dtype"] = "BF17"

    edit_header(folder, change)
    return [str(folder / "model.safetensors"), NORM, "BF17"]


def name_written_twice(folder: Path) -> list[str]:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].replace(b"lm_head.weight", NORM.encode())
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return [str(file), NORM]


def name_in_two_shards(folder: Path) -> list[str]:
    sharded(folder)
    twice = small_llama(2)
    save_file({name: twice[name] for name in (NORM, "lm_head.weight", "model.embed_tokens.weight")},
              folder / "model-00002-of-00002.safetensors")  # fmt: skip
    return ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.embed_tokens.weight"]


def missing_index_entry(folder: Path) -> list[str]:
    weight_map = sharded(folder)
    del weight_map[NORM]
    write_index(folder, weight_map)
    return [str(folder / INDEX), NORM, "does not list"]


def tensor_missing_in_its_shard(folder: Path) -> list[str]:
    weight_map = sharded(folder)
    write_index(folder, weight_map | {"model.layers.1.input_layernorm.weight": "model-00001-of-00002.safetensors"})
    return [str(folder / INDEX), "model.layers.1.input_layernorm.weight", "does not hold"]


def shard_that_is_not_there(folder: Path) -> list[str]:
    sharded(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    return [str(folder / "model-00001-of-00002.safetensors"), "missing"]


def path_outside_of_the_folder(folder: Path) -> list[str]:
    weight_map = sharded(folder)
    save_file({NORM: small_llama(2)[NORM]}, folder.parent / "secret.safetensors")
    write_index(folder, weight_map | {NORM: "../secret.safetensors"})
    return [str(folder / INDEX), "../secret.safetensors", NORM]


def absolute_path(folder: Path) -> list[str]:
    weight_map = sharded(folder)
    write_index(folder, weight_map | {NORM: "/etc/hosts.safetensors"})
    return [str(folder / INDEX), "/etc/hosts.safetensors"]


def index_that_is_no_json(folder: Path) -> list[str]:
    sharded(folder)
    (folder / INDEX).write_text('{"weight_map": {')
    return [str(folder / INDEX)]


def config_that_is_no_json(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{model_type: llama}")
    return [str(folder / "config.json")]


def pointer_of_git_lfs(folder: Path) -> list[str]:
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    return [str(file), "git lfs pull"]


def no_weights_at_all(folder: Path) -> list[str]:
    (folder / "model.safetensors").unlink()
    return [str(folder), "has no weights"]


class Code:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def pickle_with_code(folder: Path) -> list[str]:
    (folder / "model.safetensors").unlink()
    torch.save({NORM: small_llama(2)[NORM], "x": Code(folder.parent / "executed")}, folder / "pytorch_model.bin")
    return [str(folder / "pytorch_model.bin")]


def bare_pickle_with_code(folder: Path) -> list[str]:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code(folder.parent / "executed")))
    return [str(folder / "pytorch_model.bin")]


BROKEN = [
    truncated_shard, shorter_than_its_header, header_longer_than_the_file, offsets_beyond_the_end,
    shape_that_its_bytes_do_not_fill, overlapping_tensors, negative_shape, unknown_dtype, name_written_twice,
    name_in_two_shards, missing_index_entry, tensor_missing_in_its_shard, shard_that_is_not_there,
    path_outside_of_the_folder, absolute_path, index_that_is_no_json, config_that_is_no_json, pointer_of_git_lfs,
    no_weights_at_all, pickle_with_code, bare_pickle_with_code,
]  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_a_broken_checkpoint(command: str, which: int, broken: Callable[[Path], list[str]], tmp_path: Path) -> None:
    models = two_llamas(tmp_path)
    expected = broken(models[which])
    asked = recipe_file(linear(*models), tmp_path / "r.yaml")
    ran = cli(command, asked, *(("-o", tmp_path / "out") if command == "merge" else ()))
    assert ran.status == (2 if broken is no_weights_at_all else 1), ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for words in expected:
        assert words in ran.err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_all_broken_files_are_listed_at_once(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    expected = truncated_shard(one) + offsets_beyond_the_end(other) + config_that_is_no_json(other)
    ran = cli("plan", recipe_file(linear(one, other), tmp_path / "r.yaml"))
    assert ran.status == 1
    assert all(words in ran.err for words in expected)
    assert "3 problems" in ran.err
