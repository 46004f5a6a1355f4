"""What is read: regular files only, and no more of them than is stated."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from polymerge.checkpoints.bounds import HEADER_BYTES, lines_of, open_descriptor, open_regular, read_bounded
from polymerge.checkpoints.discovery import shards_of
from polymerge.checkpoints.files import check_file, read_blocks, read_config, read_file
from polymerge.checkpoints.json_objects import read_json, read_text
from polymerge.checkpoints.names import wrappers_in
from polymerge.checkpoints.tensor_info import TensorInfo
from polymerge.checkpoints.tokenizer import read_tokens
from polymerge.errors import CheckpointError, PolymergeError, collecting
from polymerge.evaluation.harness.rows import Complaints, json_lines, sheet_cells, tsv_cells
from polymerge.evaluation.predictions import read_predictions
from polymerge.inference.images import open_image
from polymerge.inference.prompts import read_prompts
from polymerge.inference.run_folder import AnswerLog
from polymerge.recipe.parsing import read_recipe
from polymerge.reporting.records import read_sources


def written(file: Path, size: int) -> Path:
    file.write_bytes(bytes(size))
    return file


def socket_at(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(file.parent)  # the path of a socket is short
        made.bind(file.name)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "it is a named pipe, no regular file"),
        (socket_at, "No such device or address"),
        (lambda file: file.symlink_to("/dev/zero"), "it is a device, no regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda _: None, "No such file or directory"),
    ],
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    make(tmp_path / "x")
    for read in (open_regular, open_descriptor, lambda file: read_bounded(file, 10)):
        with pytest.raises(OSError, match=r".") as caught:
            read(tmp_path / "x")
        assert caught.value.strerror == kind


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300])
def test_a_name_that_no_file_can_have_is_an_error_of_the_system(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"no file can have this name|File name too long"):
        open_regular(tmp_path / name)


def test_a_file_may_be_as_long_as_stated_and_no_longer(tmp_path: Path) -> None:
    file = written(tmp_path / "x", 1000)
    assert len(read_bounded(file, 1000)) == 1000
    open_regular(file, 1000).close()
    for read in (open_regular, read_bounded):
        with pytest.raises(OSError, match="it is 1000 bytes long or longer, at most 999 are read"):
            read(file, 999)


def test_a_file_of_unknown_length_is_read_up_to_the_bound() -> None:
    """Files of the kernel say that they are empty."""
    file = Path("/proc/self/status")
    assert read_bounded(file, 10**6).startswith(b"Name:")
    with pytest.raises(OSError, match="at most 20 are read"):
        read_bounded(file, 20)


def test_lines_are_bounded_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"123456789\n" * 3 + b"last")
    with open_regular(file) as stream:
        assert list(lines_of(stream, 10)) == [b"123456789\n"] * 3 + [b"last"]
    with open_regular(file) as stream, pytest.raises(OSError, match="line 1 is 10 bytes long or longer"):
        list(lines_of(stream, 9))


def sheet(file: Path) -> None:
    complaints = Complaints(file)
    sheet_cells(complaints)
    complaints.refuse()


READERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": read_file,
    "pytorch_model.bin": read_file,
    "config.json": read_config,
    "any.json": lambda file: read_json(file, dict),
    "any.txt": read_text,
    "recipe.yaml": read_recipe,
    "tokenizer.json": lambda file: read_tokens(file.parent),
    "blocks": lambda file: list(read_blocks(TensorInfo("w", "F32", (1,), file, 0, 4))),
    "prompts.jsonl": read_prompts,
    "answers.jsonl": lambda file: AnswerLog(file).read(),
    "predictions.jsonl": read_predictions,
    "search.json": lambda file: read_sources([file]),
    "checked": check_file,
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((PolymergeError, OSError)) as caught:
        READERS[name](tmp_path / name)
    assert str(tmp_path) in str(caught.value) or "named pipe" in str(caught.value)


@pytest.mark.parametrize("read", [lambda one: list(json_lines(one)), tsv_cells, sheet_cells])
def test_no_reader_of_answers_waits_for_a_pipe(tmp_path: Path, read: Callable[[Complaints], object]) -> None:
    if read is sheet_cells:
        pytest.importorskip("openpyxl")
    os.mkfifo(tmp_path / "x")
    with pytest.raises(OSError, match="named pipe"):
        read(Complaints(tmp_path / "x"))


def test_no_reader_of_images_waits_for_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="named pipe"):
        open_image(str(tmp_path / "x.png"))


def test_text_over_its_bound_is_refused_by_its_size(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(HEADER_BYTES)  # sparse, and longer than any config
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: it is 100000000 bytes long or longer"):
        read_config(file)


def test_a_model_is_wrapped_a_few_times() -> None:
    assert wrappers_in(["module." * 16 + "w"]) == ("module.",) * 16
    assert wrappers_in(["module." * 500 + "w"]) == ("module.",) * 16


def test_a_number_of_shards_is_no_length_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is one of 999999999 shards, more than any model has"):
        shards_of(tmp_path, ["model-00001-of-999999999.safetensors"])
    assert shards_of(tmp_path, ["model-00001-of-" + "9" * 5000 + ".safetensors"]) == ()
    with pytest.raises(CheckpointError, match=r"has 1 of 100000 shards .* missing are '2', '3', '4' and 99996 more"):
        shards_of(tmp_path, ["model-1-of-100000.safetensors"])


def test_the_bounds_are_the_readers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reader that was written for a smaller file takes one of that size."""
    monkeypatch.setattr("polymerge.inference.prompts.lines_of", lambda stream: lines_of(stream, 30))
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "' + "x" * 17 + '"}\n', encoding="utf-8")
    assert len(read_prompts(file)) == 1
    file.write_text('{"text": "' + "x" * 18 + '"}\n', encoding="utf-8")
    with pytest.raises(PolymergeError, match=r"line 1 is 31 bytes long or longer, at most 30 are read"), collecting():
        read_prompts(file)
