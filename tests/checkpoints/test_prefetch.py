"""What goes wrong on the way from the hub: processes that end, bytes that are not the listed ones, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import polymerge
from hub_standin import Standin, empty_cache, environment, xet_storage
from polymerge.checkpoints import hub_api, prefetch
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.hub_api import LastingError
from polymerge.checkpoints.prefetch import Prefetch, fetch_all, fetched
from polymerge.errors import CheckpointError, RecipeError
from running import linear, merged, weights

SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
FIRST, LAST = SHARDS[0], SHARDS[-1]
CHUNK = 10_000
HALF = 300_000
QUIET = ("--no-verify",)

CHILD = f"""
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
from polymerge.cli import main
main()
"""


def model(folder: Path, seed: int) -> Path:
    """A checkpoint of three shards of 800 kB."""
    folder.mkdir()
    generator, files = torch.Generator().manual_seed(seed), {}
    for layer, file in enumerate(SHARDS):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        files[name] = file
        save_file({name: torch.randn((20_000, 10), generator=generator)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in, which offers `a/one`, an empty cache, and nobody who waits between two tries."""
    monkeypatch.setattr(prefetch, "_PAUSE", 0.0)
    monkeypatch.setattr(hub_api, "_PAUSE", 0.0)
    model(tmp_path / "other", 2)
    with empty_cache(monkeypatch, tmp_path) as server:
        server.publish("a/one", model(tmp_path / "one", 1))
        yield server
        for thread in threading.enumerate():
            if thread.name.startswith("polymerge-fetch"):
                thread.join()


@pytest.fixture
def file(hub: Standin, tmp_path: Path) -> Path:
    """The first shard, as it is on the hub; its header is known."""
    assert hub.of(FIRST) == []
    polymerge.plan(recipe(tmp_path))
    return tmp_path / "one" / FIRST


def recipe(tmp_path: Path) -> dict[str, Any]:
    return linear("a/one", tmp_path / "other")


def expected(tmp_path: Path) -> dict[str, bytes]:
    """The merge of the two as local folders."""
    return weights(merged(linear(tmp_path / "one", tmp_path / "other"), tmp_path / "local", *QUIET))


def child(hub: Standin, tmp_path: Path, out: str) -> subprocess.Popen[str]:
    words = ["merge", "--template", "a/one", "--with", str(tmp_path / "other"), "--method", "linear"]
    words += ["--weight", "0.5,0.5", *QUIET, "-o", str(tmp_path / out)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        env=environment(hub, tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"},
        stderr=subprocess.PIPE,
        text=True,
    )


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.02)


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "models--a--one" / "blobs"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def damaged(data: bytes, place: int = HALF) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def asked(hub: Standin, name: str = FIRST) -> list[str]:
    """The parts of a file that were asked for after its header, which a plan reads."""
    return [request.range for request in hub.of(name) if not request.range.startswith("bytes=0-")]


def place(name: str = FIRST) -> Path:
    return locate("a/one") / name


# --- a process that ends


def test_the_merge_after_a_killed_one_is_whole(hub: Standin, tmp_path: Path) -> None:
    going_on = threading.Event()
    hub.held |= {FIRST: (HALF, going_on), LAST: (HALF, going_on)}
    killed = child(hub, tmp_path, "out")
    until(lambda: any(place(name).exists() for name in SHARDS))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    going_on.set()
    assert not (tmp_path / "out").exists()
    hub.held.clear()
    whole = {name for name in SHARDS if (place(name)).exists()}
    assert whole
    hub.requests.clear()
    assert weights(merged(recipe(tmp_path), tmp_path / "out", *QUIET)) == expected(tmp_path)
    assert {name for name in SHARDS if asked(hub, name)} == set(SHARDS) - whole


def test_two_merges_at_once_fetch_a_shard_once(hub: Standin, tmp_path: Path) -> None:
    going_on = threading.Event()
    hub.held[FIRST] = HALF, going_on
    children = [child(hub, tmp_path, "first"), child(hub, tmp_path, "second")]
    until(lambda: len(hub.of(FIRST, "HEAD")) >= 2)
    going_on.set()
    assert [one.communicate()[1] for one in children] == ["", ""]
    assert [len(asked(hub, name)) for name in SHARDS] == [1, 1, 1]
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == expected(tmp_path)


def test_a_silent_server_does_not_hold_up_what_failed(hub: Standin, file: Path) -> None:
    going_on, said = threading.Event(), list[BaseException]()
    hub.held[FIRST] = HALF, going_on
    hub.next[LAST] = [403] * 9
    with Prefetch([place(name) for name in SHARDS]):
        for name in (FIRST, LAST):
            with pytest.raises(RecipeError) as caught:
                fetched(place(name))
            said.append(caught.value)
        assert not place().exists()
        going_on.set()
    assert [f"'{LAST}' the hub does not let you read it" in str(error) for error in said] == [True, True]
    assert file.exists()


# --- bytes that are not the listed ones


@pytest.mark.parametrize("etag", ["", "a-mirror-has-its-own"])
def test_a_hub_that_has_other_bytes_than_it_lists_is_told_so(hub: Standin, file: Path, etag: str) -> None:
    hub.etags[FIRST] = etag
    hub.served[FIRST] = damaged(file.read_bytes())
    with pytest.raises(LastingError, match=f"listed is {sha256(file)}"):
        fetch_all([place()])
    assert asked(hub) == [""]
    assert not place().exists()
    assert not any(one.stat().st_size > HALF for one in blobs(file.parent.parent).iterdir())
    hub.served.clear()
    fetch_all([place()])
    assert place().read_bytes() == file.read_bytes()


def test_a_rest_that_does_not_belong_to_the_beginning_is_noticed(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    hub.cut[FIRST] = HALF
    hub.next[FIRST] = [None, damaged(file.read_bytes(), HALF + CHUNK)]
    with pytest.raises(LastingError, match="listed is"):
        fetch_all([place()])
    assert asked(hub) == ["", f"bytes={HALF}-"]
    assert not place().exists()


def test_what_xet_has_under_the_hash_of_another_file_is_refused(
    hub: Standin, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = xet_storage(hub, tmp_path, monkeypatch)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(damaged(file.read_bytes()))
    put(FIRST, wrong)
    with pytest.raises(LastingError, match=f"listed is {sha256(file)}"):
        fetch_all([place()])
    assert not place().exists()


def test_a_file_comes_out_of_xet_storage(
    hub: Standin, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xet_storage(hub, tmp_path, monkeypatch)(FIRST, file)
    told: list[int] = []
    fetch_all([place()], lambda done, _: told.append(done))
    assert place().read_bytes() == file.read_bytes()
    assert told[-1] == file.stat().st_size
    assert asked(hub) == []


# --- answers that fail


def test_a_header_that_breaks_is_asked_for_again(hub: Standin, tmp_path: Path) -> None:
    hub.cut[FIRST] = 20_000
    polymerge.plan(recipe(tmp_path))
    assert [request.range for request in hub.of(FIRST)] == ["bytes=0-65535"] * 2


def test_a_header_that_breaks_each_time_is_said(hub: Standin, tmp_path: Path) -> None:
    hub.cut = type("", (dict,), {"pop": dict.get})({FIRST: 20_000})
    with pytest.raises(polymerge.PolymergeError, match=f"a/one: '{FIRST}' the hub did not deliver it"):
        polymerge.plan(recipe(tmp_path))
    assert len(hub.of(FIRST)) == 3


def test_a_hub_that_is_overloaded_for_a_while_is_waited_for(hub: Standin, file: Path) -> None:
    hub.next[FIRST] = [503] * (prefetch._TRIES - 1)
    told: list[int] = []
    fetch_all([place()], lambda done, _: told.append(done))
    assert place().read_bytes() == file.read_bytes()
    assert told[-1] == file.stat().st_size


def test_what_the_storage_lacks_is_tried_a_few_times_and_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def lacking(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise FileNotFoundError("no such object")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lacking)
    with pytest.raises(CheckpointError, match="the hub did not deliver it: no such object"):
        fetch_all([place()])
    assert len(tried) == prefetch._TRIES
    assert file.exists()


def test_an_answer_that_makes_no_sense_is_said(hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    hub.nameless = True
    hub.cut[FIRST] = HALF
    with pytest.raises(CheckpointError, match="huggingface_hub cannot parse its response"):
        fetch_all([place()])
    assert file.exists()


def test_a_file_too_large_for_http_is_said_to_need_hf_xet(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", HALF)
    with pytest.raises(CheckpointError, match=f"a/one: '{FIRST}' is larger than .* Install hf_xet"):
        fetch_all([place()])
    assert file.exists()


# --- this machine


def test_only_what_is_to_come_needs_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_all([place()])
    coming = sum((file.parent / name).stat().st_size for name in SHARDS[1:])
    usage = type("", (), {"free": coming})
    monkeypatch.setattr(prefetch.shutil, "disk_usage", lambda _: usage)
    assert Prefetch(place(name) for name in SHARDS).size == coming
    usage.free = coming - 1
    with pytest.raises(RecipeError, match="Set HF_HUB_CACHE to a folder with more room"):
        Prefetch(place(name) for name in SHARDS)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, r"No space left on device \(\d+ bytes"), (errno.EROFS, "")]
)
def test_a_disk_that_takes_no_more_is_not_the_hubs_fault(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(RecipeError, match=f"cannot be written to the hub's cache .*{said}.*Set HF_HUB_CACHE"):
        fetch_all([place()])
    assert asked(hub) == []
    assert file.exists()


@pytest.mark.parametrize("error", [ValueError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe"), KeyboardInterrupt()])
def test_what_a_progress_function_raises_is_raised(file: Path, error: BaseException) -> None:
    def progress(done: int, _: int) -> None:
        if done:
            raise error

    with pytest.raises(type(error)) as caught:
        fetch_all([place(name) for name in SHARDS], progress)
    assert caught.value is error
    assert file.exists()
