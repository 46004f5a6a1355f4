"""Shards that were half there when a process ended: what the next one asks for, and what it makes of what it finds."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir
from safetensors.torch import save_file

import polymerge
from hub_standin import Standin, empty_cache, environment, xet_storage
from polymerge.checkpoint import hubdownload
from polymerge.checkpoint.arrivals import Arrivals
from polymerge.checkpoint.hub import locate
from polymerge.checkpoint.hubbar import Received
from polymerge.checkpoint.hubfiles import Listed, Remote
from polymerge.errors import CheckpointError, RecipeError
from running import linear, merged, weights

SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
FIRST = SHARDS[0]
CHUNK = 10_000
HALF = 300_000
QUIET = ("--no-verify",)

CHILD = f"""
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}  # what of a chunk is not here yet is lost with the process
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
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The model that is on the hub, and one that is here."""
    return model(tmp_path / "one", 1), model(tmp_path / "other", 2)


@pytest.fixture
def hub(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in, which offers `a/one`, and an empty cache."""
    with empty_cache(monkeypatch, tmp_path) as server:
        server.publish("a/one", folders[0])
        yield server


@pytest.fixture
def expected(folders: tuple[Path, Path], tmp_path: Path) -> dict[str, bytes]:
    """The merge of the two as local folders."""
    return weights(merged(linear(*folders), tmp_path / "local", *QUIET))


def recipe(tmp_path: Path) -> dict[str, Any]:
    return linear("a/one", tmp_path / "other")


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


def partials(tmp_path: Path) -> dict[str, int]:
    """What is half there: sha256 and length."""
    return {
        file.name.partition(".")[0]: file.stat().st_size for file in blobs(tmp_path).glob("*.polymerge-*.incomplete")
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def leave(tmp_path: Path, data: bytes, name: str = FIRST, mark: str = "00000000", of: str = "one") -> Path:
    """What a process that ended has left of a shard."""
    blobs(tmp_path).mkdir(parents=True, exist_ok=True)
    file = blobs(tmp_path) / f"{sha256(tmp_path / of / name)}.polymerge-{mark}.incomplete"
    file.write_bytes(data)
    return file


def damaged(data: bytes, place: int = CHUNK) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def asked(hub: Standin, name: str = FIRST) -> list[str]:
    """The parts of a file that were asked for after its header, which a plan reads."""
    return [request.range for request in hub.of(name) if not request.range.startswith("bytes=0-")]


def merged_and_told(tmp_path: Path) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    polymerge.merge(
        recipe(tmp_path), tmp_path / "out", check=False, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1][0] == told[-1][1]
    assert all(total == told[-1][1] for _, total in told)
    return told


# --- a process that ends


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_the_next_merge_asks_for_the_rest_only(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes], end: signal.Signals
) -> None:
    going_on = threading.Event()
    hub.held = dict.fromkeys(SHARDS, (HALF, going_on))
    first = child(hub, tmp_path, "out")
    until(lambda: sorted(partials(tmp_path).values()) == [HALF] * 3)
    first.send_signal(end)
    if end == signal.SIGKILL:
        first.wait()
    else:
        assert first.stderr is not None
        assert any("interrupted" in line for line in iter(first.stderr.readline, ""))
    going_on.set()
    first.communicate()
    assert first.returncode != 0
    until(lambda: all(asked(hub, name) for name in SHARDS))  # a request is written down when it has ended
    assert partials(tmp_path) == {sha256(tmp_path / "one" / name): HALF for name in SHARDS}
    hub.held.clear()
    hub.requests.clear()
    again = child(hub, tmp_path, "out")
    assert again.communicate()[1] == ""
    for name in SHARDS:
        size = (tmp_path / "one" / name).stat().st_size
        assert [(one.range, one.sent) for one in hub.of(name)] == [(f"bytes={HALF}-", size - HALF)]
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}
    (repository,) = scan_cache_dir(tmp_path / "hf").repos
    (revision,) = repository.revisions
    assert {file.file_name for file in revision.files if file.blob_path.stat().st_size > HALF} == set(SHARDS)


def test_a_merge_that_fails_keeps_what_it_has(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)

    def stop(done: int, _: int) -> None:
        if done > HALF:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        polymerge.merge(recipe(tmp_path), tmp_path / "out", check=False, progress=stop)
    for thread in threading.enumerate():
        if thread.name.startswith("polymerge-fetch"):
            thread.join()
    left = partials(tmp_path)
    assert sum(left.values()) > 0
    hub.requests.clear()
    assert weights(merged(recipe(tmp_path), tmp_path / "out", *QUIET)) == expected
    whole = sum((tmp_path / "one" / name).stat().st_size for name in SHARDS)
    assert sum(request.sent for name in SHARDS for request in hub.of(name)) == whole - sum(left.values())


def test_two_merges_at_once_fetch_a_shard_once(hub: Standin, tmp_path: Path, expected: dict[str, bytes]) -> None:
    going_on = threading.Event()
    hub.held[FIRST] = HALF, going_on
    children = [child(hub, tmp_path, "first"), child(hub, tmp_path, "second")]
    until(lambda: HALF in partials(tmp_path).values() and len(hub.of(FIRST, "HEAD")) >= 2)
    going_on.set()
    assert [one.communicate()[1] for one in children] == ["", ""]
    assert [len([one for one in hub.of(name) if not one.range]) for name in SHARDS] == [1, 1, 1]
    assert not any(asked(hub, name) != [""] for name in SHARDS)
    assert weights(tmp_path / "first") == weights(tmp_path / "second") == expected


def test_two_that_no_lock_holds_apart_leave_a_whole_file(
    hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(hubdownload, "locked", lambda *_: nullcontext())
    file = tmp_path / "one" / FIRST
    remote = Remote("a/one", locate("a/one").name, FIRST)
    listed = Listed(file.stat().st_size, sha256(file))
    going_on, here = threading.Event(), list[Path]()
    hub.held[FIRST] = HALF, going_on

    def fetch() -> None:
        here.append(hubdownload.download(remote, listed, Received(lambda _: None)))

    slow = threading.Thread(target=fetch)
    slow.start()
    until(lambda: HALF in partials(tmp_path).values())
    hub.held.clear()
    fetch()
    going_on.set()
    slow.join()
    assert len(here) == 2
    assert [place.read_bytes() == file.read_bytes() for place in here] == [True, True]
    assert sorted(asked(hub)) == ["", f"bytes={HALF}-"]
    assert partials(tmp_path) == {}


# --- what is found


def test_progress_counts_what_is_here_from_before(hub: Standin, tmp_path: Path, expected: dict[str, bytes]) -> None:
    for name in SHARDS:
        leave(tmp_path, (tmp_path / "one" / name).read_bytes()[:HALF], name)
    told = merged_and_told(tmp_path)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][1] == sum((tmp_path / "one" / name).stat().st_size for name in SHARDS) + 3 * 20_000 * 10 * 4
    assert [asked(hub, name) for name in SHARDS] == [[f"bytes={HALF}-"]] * 3
    assert weights(tmp_path / "out") == expected


def test_only_what_is_to_come_needs_room(hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one" / FIRST
    link = locate("a/one") / FIRST
    missing = file.stat().st_size - HALF
    leave(tmp_path, file.read_bytes()[:HALF])
    room = [missing]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": room[0]}))
    with Arrivals([link]) as arrivals:
        assert arrivals.size == file.stat().st_size
        room[0] -= 1
        with pytest.raises(RecipeError, match="have to be fetched"):
            Arrivals([link])
        arrivals.finish()
    assert link.read_bytes() == file.read_bytes()
    assert asked(hub) == [f"bytes={HALF}-"]


def test_a_damaged_part_is_noticed_and_fetched_anew(hub: Standin, tmp_path: Path, expected: dict[str, bytes]) -> None:
    data = (tmp_path / "one" / FIRST).read_bytes()
    leave(tmp_path, damaged(data)[:HALF])
    merged_and_told(tmp_path)
    assert asked(hub) == [f"bytes={HALF}-", ""]
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}


def test_a_file_that_is_wrong_on_the_hub_is_said_and_not_kept(hub: Standin, tmp_path: Path) -> None:
    plan = polymerge.plan(recipe(tmp_path))
    file = tmp_path / "one" / FIRST
    hub.served[FIRST] = damaged(file.read_bytes(), HALF + CHUNK)
    leave(tmp_path, file.read_bytes()[:HALF])
    with pytest.raises(CheckpointError) as caught:
        polymerge.merge(plan, tmp_path / "out", check=False)
    assert f"a/one: '{FIRST}' has the sha256 {sha256(file)} by the hub's list" in str(caught.value)
    assert hashlib.sha256(hub.served[FIRST]).hexdigest() in str(caught.value)
    assert asked(hub) == [f"bytes={HALF}-", ""]
    assert not list(blobs(tmp_path).glob(f"{sha256(file)}*"))
    assert not (tmp_path / "out").exists()


def test_a_server_that_sends_whole_files_only_is_taken_at_its_word(hub: Standin, tmp_path: Path) -> None:
    hub.ranges = False
    file, link, told = tmp_path / "one" / FIRST, locate("a/one") / FIRST, list[int]()
    leave(tmp_path, file.read_bytes()[:HALF])
    with Arrivals([link], told.append) as arrivals:
        arrivals.finish()
    assert link.read_bytes() == file.read_bytes()
    assert asked(hub) == [f"bytes={HALF}-"]
    assert all(request.sent == file.stat().st_size for request in hub.of(FIRST) if request.range in asked(hub))
    assert told[:2] == [HALF, -HALF]
    assert max(accumulate(told)) == sum(told) == file.stat().st_size


def test_a_server_that_refuses_the_rest_is_asked_for_all(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.unsatisfiable.add(FIRST)
    leave(tmp_path, (tmp_path / "one" / FIRST).read_bytes()[:HALF])
    merged_and_told(tmp_path)
    assert asked(hub) == [f"bytes={HALF}-", ""]
    assert weights(tmp_path / "out") == expected


def test_what_is_left_of_another_commit_is_not_used(hub: Standin, tmp_path: Path, expected: dict[str, bytes]) -> None:
    older = leave(tmp_path, (model(tmp_path / "older", 3) / FIRST).read_bytes()[:HALF], of="older")
    merged_and_told(tmp_path)
    assert asked(hub) == [""]
    assert weights(tmp_path / "out") == expected
    assert older.stat().st_size == HALF


def test_what_is_longer_than_the_file_is_dropped(hub: Standin, tmp_path: Path, expected: dict[str, bytes]) -> None:
    leave(tmp_path, (tmp_path / "one" / FIRST).read_bytes() + b"?")
    merged_and_told(tmp_path)
    assert asked(hub) == [""]
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}


def test_the_longest_of_several_is_used_and_the_others_go(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    data = (tmp_path / "one" / FIRST).read_bytes()
    for length in (CHUNK, HALF, 0, len(data) + 1):
        leave(tmp_path, (data + b"?")[:length], mark=f"{length:08}")
    merged_and_told(tmp_path)
    assert asked(hub) == [f"bytes={HALF}-"]
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}


def test_what_is_whole_but_for_its_name_is_checked_and_not_fetched(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for name in SHARDS[:2]:
        data = (tmp_path / "one" / name).read_bytes()
        leave(tmp_path, data if name == FIRST else damaged(data), name)
    merged_and_told(tmp_path)
    assert [asked(hub, name) for name in SHARDS] == [[], [""], [""]]
    assert weights(tmp_path / "out") == expected


def test_what_another_program_has_fetched_since_is_used(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    from huggingface_hub import hf_hub_download

    plan = polymerge.plan(recipe(tmp_path))
    leave(tmp_path, (tmp_path / "one" / FIRST).read_bytes()[:HALF])
    hf_hub_download("a/one", FIRST)
    polymerge.merge(plan, tmp_path / "out", check=False)
    assert asked(hub) == [""]
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}


# --- Xet


@pytest.mark.parametrize("left", [0, HALF])
def test_a_file_in_xet_storage_is_taken_up_too(
    hub: Standin, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    hubdownload._xet_session.cache_clear()
    xet_storage(hub, tmp_path, monkeypatch)(FIRST, tmp_path / "one" / FIRST)
    begun: list[int] = []
    pieces = hubdownload._xet_pieces

    def seen(xet: Any, start: int, size: int, received: Received) -> Any:
        begun.append(start)
        return pieces(xet, start, size, received)

    monkeypatch.setattr(hubdownload, "_xet_pieces", seen)
    if left:
        leave(tmp_path, (tmp_path / "one" / FIRST).read_bytes()[:left])
    told = merged_and_told(tmp_path)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert begun == [left]
    assert asked(hub) == []
    assert weights(tmp_path / "out") == expected
    assert partials(tmp_path) == {}
    hubdownload._xet_session.cache_clear()
