"""What lies in an object store is read by ranges, and is told by its tags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save

from polymerge.checkpoints import open_checkpoint, stores
from polymerge.checkpoints.files import read_blocks
from polymerge.checkpoints.folder import bring
from polymerge.checkpoints.hub import locate, restore, split_revision
from polymerge.checkpoints.identity import changed_since, content_digest, file_digest, sampled_digest, sha256_of
from polymerge.checkpoints.ranges import opened_ranges
from polymerge.checkpoints.stores import is_url, locate_stored, stored_at, view_of
from polymerge.errors import CheckpointError, MissingExtraError, RecipeError

TENSORS = {"a": torch.arange(3000, dtype=torch.float32), "b": torch.ones(4, 5, dtype=torch.bfloat16)}


@pytest.fixture
def bucket() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/model/model.safetensors", save(TENSORS))
    fs.pipe_file("/bucket/model/config.json", b'{"model_type": "llama"}')
    fs.pipe_file("/bucket/model/optimizer.pt", b"of training")
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.mark.usefixtures("bucket")
def test_a_url_stands_for_a_folder_with_small_files_and_links(tmp_path: Path) -> None:
    folder = locate("memory://bucket/model/")
    assert sorted(path.name for path in folder.iterdir()) == [".objects.json", "config.json", "model.safetensors"]
    stored = stored_at(folder / "model.safetensors")
    assert stored is not None
    assert (stored.url, stored.size) == ("memory://bucket/model/model.safetensors", len(save(TENSORS)))
    assert stored_at(folder / "config.json") is None
    assert view_of(folder) == (folder, "memory://bucket/model")
    assert view_of(tmp_path) is None
    assert folder == locate_stored("memory://bucket/model")


@pytest.mark.usefixtures("bucket")
def test_headers_and_values_are_those_of_a_local_copy(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(TENSORS))
    near = open_checkpoint("near", tmp_path)
    far = open_checkpoint("far", locate_stored("memory://bucket/model"))
    assert far.config == {"model_type": "llama"}
    assert [(one.name, one.shape, one.start) for one in far.entries.values()] == [
        (one.name, one.shape, one.start) for one in near.entries.values()
    ]
    for name, entry in near.entries.items():
        read = b"".join(map(bytes, read_blocks(far.entries[name], 1000)))
        assert read == b"".join(map(bytes, read_blocks(entry, 1000)))
    files = near.files[0], far.files[0]
    for digest in (sampled_digest, sha256_of, file_digest):
        assert digest(files[0]) == digest(files[1])


@pytest.mark.usefixtures("bucket")
def test_reads_cross_chunks_and_end_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymerge.checkpoints.ranges._CHUNK", 1000)
    monkeypatch.setattr("polymerge.checkpoints.ranges._KEPT", 3)
    content, file = save(TENSORS), locate_stored("memory://bucket/model") / "model.safetensors"
    with opened_ranges(file) as ranges:
        for start, count in ((0, 10), (995, 2010), (len(content) - 5, 5)):
            buffer, done = bytearray(count), 0
            while done < count:
                done += ranges.read_into(memoryview(buffer)[done:], start + done)
            assert bytes(buffer) == content[start : start + count]
        assert ranges.read_into(memoryview(bytearray(5)), len(content)) == 0
        assert list(ranges.pread_all([(3, 4), (len(content) - 2, 9)])) == [content[3:7], content[-2:]]


def test_what_is_replaced_is_noticed(bucket: Any) -> None:
    folder = locate_stored("memory://bucket/model")
    checkpoint, before = open_checkpoint("far", folder), content_digest([folder])
    assert not list(changed_since(checkpoint.stamps))
    bucket.pipe_file("/bucket/model/model.safetensors", save({**TENSORS, "a": TENSORS["a"] + 1}))
    (error,) = changed_since(checkpoint.stamps)
    assert "model.safetensors: was replaced in its store while" in str(error)
    with pytest.raises(CheckpointError, match="memory://bucket/model: what lies there has changed since"):
        restore(folder)
    again = locate_stored("memory://bucket/model")
    assert again != folder
    assert content_digest([again]) != before
    bucket.rm_file("/bucket/model/model.safetensors")
    assert "was taken away" in str(next(changed_since(checkpoint.stamps)))


def test_torch_files_come_as_a_whole_and_a_file_can_be_named(bucket: Any, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.bin")
    bucket.put_file(str(tmp_path / "x.bin"), "/bucket/old/pytorch_model.bin")
    opened = open_checkpoint("old", locate("memory://bucket/old"))
    assert set(opened.entries) == {"a", "b"}
    assert stored_at(opened.files[0]) is None
    assert not list(changed_since(opened.stamps))
    folder = locate("memory://bucket/model")
    before = open_checkpoint("far", folder)
    bring("memory://bucket/model", folder)
    assert (folder / "model.safetensors").read_bytes() == save(TENSORS)
    assert not list(changed_since(before.stamps))
    one = open_checkpoint("file", locate("memory://bucket/model/model.safetensors"))
    assert set(one.entries) == {"a", "b"}


@pytest.mark.usefixtures("bucket")
def test_what_cannot_be_found_or_opened_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"memory://bucket/nothing: is not there"):
        locate("memory://bucket/nothing")
    with pytest.raises(RecipeError, match="fsspec cannot open it: Protocol not known: nope"):
        locate("nope://bucket/model")
    with pytest.raises(RecipeError, match="is not the URL of a folder in a store"):
        locate("memory://bucket/../model")

    def no_such(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", no_such)
    with pytest.raises(MissingExtraError, match=r"access S3\. For s3 and gs: pip install 'polymerge\[stores"):
        locate("s3://bucket/model")


def test_a_store_that_fails_is_asked_again(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fails, ask = locate_stored("memory://bucket/model"), [2], type(bucket).cat_file

    def failing(*arguments: Any, **named: Any) -> bytes:
        fails[0] -= 1
        if fails[0] >= 0:
            raise ConnectionResetError("reset by peer")
        return bytes(ask(*arguments, **named))

    monkeypatch.setattr(type(bucket), "cat_file", failing)
    monkeypatch.setattr(stores, "_PAUSE", 0)
    stored = stored_at(folder / "model.safetensors")
    assert stored is not None
    assert stores.read_range(stored, 2, 5) == save(TENSORS)[2:5]
    fails[0] = 99
    with pytest.raises(CheckpointError, match=r"the store failed \(ConnectionResetError: reset by peer\)"):
        stores.read_range(stored, 2, 5)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(bucket), "cat_file", forbidden)
    with pytest.raises(RecipeError, match=r"may not be read \(Forbidden\). Check the credentials"):
        stores.read_range(stored, 2, 5)


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/a b")
    assert not any(map(is_url, ("owner/name", "/a/b", "s3:/bucket", "C:\\models", "host:6379", "://x")))
    assert split_revision("https://me@host/model") == ("https://me@host/model", None)
