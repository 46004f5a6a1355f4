"""Digests and stamps of files: none that could be false is remembered, and every change is noticed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from polymerge.checkpoints import identity
from polymerge.checkpoints.identity import changed_since, content_digest, file_digest, sampled_digest, stamps_of
from polymerge.errors import CheckpointError


def grown_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten seconds pass, as far as digests are concerned."""
    monkeypatch.setattr(identity.time, "time_ns", lambda now=time.time_ns: now() + 10**10)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    grown_old(monkeypatch)
    assert file_digest(file) == hashlib.sha256(b"first").hexdigest()
    monkeypatch.setattr(identity, "sha256_of", lambda _: "computed again")
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
    grown_old(monkeypatch)
    digest = hashlib.sha256(b"bytes").hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert file_digest(file) == digest
    (note,) = (tmp_path / "cache/polymerge/sha256").iterdir()
    for text in ("", "[]", '{"seen": null}'):
        note.write_text(text)
        assert file_digest(file) == digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert file_digest(file) == digest


def test_a_digest_of_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    assert file_digest(file) == hashlib.sha256(b"first").hexdigest()
    assert not (tmp_path / "cache").exists()


def same_but_content(file: Path) -> None:
    stat = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replaced(file: Path) -> None:
    stat = file.stat()
    fresh = file.with_name("fresh")
    fresh.write_bytes(b"other")
    os.utime(fresh, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fresh.replace(file)


@pytest.mark.parametrize("change", [same_but_content, replaced])
def test_a_change_that_keeps_size_and_time_is_noticed(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    grown_old(monkeypatch)
    assert file_digest(file) == hashlib.sha256(b"first").hexdigest()
    wait_for_the_clock(file)
    change(file)
    assert file_digest(file) == hashlib.sha256(b"other").hexdigest()


def wait_for_the_clock(file: Path) -> None:
    """Return once the filesystem tells what is written from now on by its time."""
    beside = file.with_name("clock")
    while True:
        beside.write_bytes(b"")
        if beside.stat().st_ctime_ns > file.stat().st_ctime_ns:
            return


def test_the_name_of_a_file_proves_nothing(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b/blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"anything")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert file_digest(link) == hashlib.sha256(b"anything").hexdigest()


@pytest.mark.parametrize("place", range(40))
def test_samples_tell_a_fine_tune_of_any_tensor(place: int, tmp_path: Path) -> None:
    tensors = {f"layer.{number}": np.full((300 + number, 70), 0.5, np.float32) for number in range(40)}
    tensors |= {f"norm.{number}": np.ones(3, np.float32) for number in range(40)}
    save_file(tensors, tmp_path / "before.safetensors")
    for kind in ("layer", "norm"):
        save_file({**tensors, f"{kind}.{place}": tensors[f"{kind}.{place}"] + 1e-6}, tmp_path / "after.safetensors")
        assert sampled_digest(tmp_path / "after.safetensors") != sampled_digest(tmp_path / "before.safetensors")


def test_samples_tell_files_of_other_headers_sizes_and_kinds(tmp_path: Path) -> None:
    held = np.zeros(5000, np.float32)
    digests = set()
    for number, tensors in enumerate(
        ({"a": held}, {"b": held}, {"a": held.reshape(50, 100)}, {"a": held.view(np.int32)}, {"a": held[:-1]})
    ):
        save_file(tensors, file := tmp_path / f"{number}.safetensors")
        digests.add(sampled_digest(file))
    for number, content in enumerate(
        (b"", b"1", b"2", bytes(4096), bytes(4097), bytes(10**6), bytes(10**6 - 1) + b"1")
    ):
        (file := tmp_path / f"{number}.bin").write_bytes(content)
        (same := tmp_path / "same.bin").write_bytes(content)
        assert sampled_digest(same) == sampled_digest(file)
        digests.add(sampled_digest(file))
    assert len(digests) == 12


def test_samples_of_what_is_no_safetensors_file_are_those_of_any_file(tmp_path: Path) -> None:
    for name in ("broken.safetensors", "broken.bin"):
        (tmp_path / name).write_bytes(b"no header" * 1000)
    assert sampled_digest(tmp_path / "broken.safetensors") == sampled_digest(tmp_path / "broken.bin")
    with pytest.raises(CheckpointError, match="none: cannot be read: No such file"):
        sampled_digest(tmp_path / "none")


def test_a_copy_of_a_folder_has_the_same_content(tmp_path: Path) -> None:
    save_file({"a": np.ones(9, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = content_digest([tmp_path])
    os.utime(tmp_path / "config.json", ns=(1, 1))
    (tmp_path / "polymerge.json").write_text("{}")
    assert content_digest([tmp_path]) == before
    (tmp_path / "config.json").write_text("[]")
    assert content_digest([tmp_path]) != before


def test_a_file_that_changes_while_its_digest_is_computed_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"first")

    def late(_: Path) -> str:
        file.write_bytes(b"longer")
        return "of two states"

    monkeypatch.setattr(identity, "sha256_of", late)
    with pytest.raises(CheckpointError, match="changed from 5 to 6 bytes while it was being read"):
        file_digest(file)


def test_a_change_is_told_by_what_it_is(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("kept", "gone", "replaced", "written", "longer", "touched", "coming")]
    for file in files[:-1]:
        file.write_text("text")
    files[-1].symlink_to(tmp_path / "not here yet")
    before = stamps_of([*files, tmp_path / "nothing"])
    assert list(before) == files
    wait_for_the_clock(files[-2])
    files[1].unlink()
    (tmp_path / "fresh").write_text("text")
    (tmp_path / "fresh").rename(files[2])
    files[3].write_text("TEXT")
    files[4].write_text("longer")
    files[5].chmod(0o600)
    (tmp_path / "not here yet").write_text("now")
    assert [str(error).removeprefix(f"{tmp_path}/").partition(" while")[0] for error in changed_since(before)] == [
        "gone: was taken away",
        "replaced: was replaced by another file",
        "written: was written to",
        "longer: changed from 4 to 6 bytes",
        "touched: was touched (its time of change differs)",
    ]


def test_a_file_that_its_filesystem_numbers_anew_is_still_the_same(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("text")
    ((_, stamp),) = stamps_of([file]).items()
    assert stamp is not None
    assert not list(changed_since({file: stamp._replace(inode=stamp.inode + 1, device=stamp.device + 1)}))
