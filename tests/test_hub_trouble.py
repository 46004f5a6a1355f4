"""What goes wrong on the way from the hub: bytes that are not the listed ones, answers that fail, a full disk."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants

import polymerge
from hub_standin import Standin, empty_cache, xet_storage
from polymerge.checkpoint import arrivals, hubdownload, hubfiles, hubparts
from polymerge.checkpoint.arrivals import Arrivals, bring_all
from polymerge.checkpoint.hub import locate
from polymerge.checkpoint.hubbar import Received
from polymerge.checkpoint.hubdownload import DamagedError
from polymerge.checkpoint.hubfiles import Remote
from polymerge.errors import CheckpointError, RecipeError
from test_hub_resume import (
    CHUNK,
    FIRST,
    HALF,
    SHARDS,
    asked,
    blobs,
    child,
    damaged,
    leave,
    model,
    partials,
    recipe,
    sha256,
    until,
)

LAST = SHARDS[-1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The stand-in, which offers `a/one`, an empty cache, and nobody who waits between two tries."""
    monkeypatch.setattr(arrivals, "_PAUSE", 0.0)
    monkeypatch.setattr(hubfiles, "_PAUSE", 0.0)
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


def place(name: str = FIRST) -> Path:
    return locate("a/one") / name


def data_of(file: Path) -> bytes:
    return file.read_bytes()


# --- bytes that are not the listed ones


@pytest.mark.parametrize("etag", ["", "a-mirror-has-its-own"])
def test_a_byte_that_turned_on_its_way_is_noticed_and_fetched_anew(hub: Standin, file: Path, etag: str) -> None:
    hub.etags[FIRST] = etag
    hub.next[FIRST] = [damaged(data_of(file), HALF)]
    bring_all([place()])
    assert data_of(place()) == data_of(file)
    until(lambda: asked(hub) == ["", ""])


@pytest.mark.parametrize("etag", ["", "a-mirror-has-its-own"])
def test_a_hub_that_has_other_bytes_than_it_lists_is_told_so(hub: Standin, file: Path, etag: str) -> None:
    hub.etags[FIRST] = etag
    hub.served[FIRST] = damaged(data_of(file), HALF)
    with pytest.raises(DamagedError, match=f"has the sha256 {sha256(file)} by the hub's list"):
        bring_all([place()])
    until(lambda: asked(hub) == ["", ""])
    assert not place().exists()
    assert not any(one.stat().st_size > HALF for one in blobs(file.parent.parent).iterdir())


def test_a_rest_that_does_not_belong_to_the_beginning_is_noticed(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    hub.cut[FIRST] = HALF
    hub.next[FIRST] = [None, damaged(data_of(file), HALF + CHUNK)]
    bring_all([place()])
    assert data_of(place()) == data_of(file)
    until(lambda: asked(hub) == ["", f"bytes={HALF}-", ""])


@pytest.mark.parametrize("left", [0, HALF])
def test_only_what_was_here_before_is_read(file: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    read: list[int] = []
    summed = hubparts._summed

    def seen(part: Path, length: int, looked: Callable[[], None]) -> Any:
        read.append(length)
        return summed(part, length, looked)

    monkeypatch.setattr(hubparts, "_summed", seen)
    if left:
        leave(file.parent.parent, data_of(file)[:left])
    bring_all([place()])
    assert read == [left]
    assert data_of(place()) == data_of(file)


def test_more_than_is_listed_is_not_taken(hub: Standin, file: Path) -> None:
    told: list[int] = []
    hub.next[FIRST] = [data_of(file) + b"?" * CHUNK] * 3
    with pytest.raises(DamagedError, match="longer by what it delivered"):
        bring_all([place()], lambda done, _: told.append(done))
    until(lambda: asked(hub) == [""])
    assert max(told) <= file.stat().st_size
    assert partials(file.parent.parent) == {}


# --- Xet


@pytest.fixture
def stored(hub: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts a file into a Xet storage, as what the hub has of the first shard."""
    hubdownload._xet_session.cache_clear()
    yield partial(xet_storage(hub, tmp_path, monkeypatch), FIRST)
    hubdownload._xet_session.cache_clear()


def test_what_xet_has_under_the_hash_of_another_file_is_refused(
    file: Path, tmp_path: Path, stored: Callable[[Path], None]
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(damaged(data_of(file), HALF))
    stored(wrong)
    with pytest.raises(DamagedError, match="has the sha256"):
        bring_all([place()])


def test_an_hf_xet_without_with_will_do(
    file: Path, stored: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_xet = pytest.importorskip("hf_xet")
    session = hf_xet.XetSession
    stored(file)

    class Older:
        """The groups of hf_xet 1.6 are no context managers, and cannot be aborted."""

        def __init__(self) -> None:
            self._session = session()

        def new_download_stream_group(self, **options: Any) -> Any:
            group = self._session.new_download_stream_group(**options)
            return type("Group", (), {"download_stream": staticmethod(group.download_stream)})()

    monkeypatch.setattr(hf_xet, "XetSession", Older)
    hubdownload._xet_session.cache_clear()
    bring_all([place()])
    assert data_of(place()) == data_of(file)


def test_three_threads_open_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_xet = pytest.importorskip("hf_xet")
    made: list[int] = []

    class Group:
        def download_stream(self, *_: Any, **__: Any) -> Any:
            return type("Stream", (), {"__iter__": lambda _: iter([b"x"]), "cancel": lambda _: None})()

    class Slow:
        def __init__(self) -> None:
            time.sleep(0.1)
            made.append(1)

        def new_download_stream_group(self, **_: Any) -> Group:
            return Group()

    monkeypatch.setattr(hf_xet, "XetSession", Slow)
    hubdownload._xet_session.cache_clear()
    xet = type("", (), {"refresh_route": "", "file_hash": "0" * 64})

    def fetch() -> None:
        assert list(hubdownload._xet_pieces(xet, 0, 1, Received(lambda _: None))) == [b"x"]

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    hubdownload._xet_session.cache_clear()


def test_what_the_storage_lacks_is_not_taken_for_a_lost_part(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def lacking(*_: Any) -> None:
        tried.append(1)
        raise FileNotFoundError("no such object")

    monkeypatch.setattr(hubdownload, "_by_http", lacking)
    with pytest.raises(CheckpointError, match="the hub did not deliver it: no such object"):
        bring_all([place()])
    assert len(tried) == arrivals._TRIES
    until(lambda: asked(hub) == [])
    assert file.exists()


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
    hub.next[FIRST] = [503] * (arrivals._TRIES - 1)
    bring_all([place()])
    assert data_of(place()) == data_of(file)


class Waits(threading.Event):
    """Notes how long it is waited for, and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0)
        return self.is_set()


@pytest.mark.parametrize(
    ("brings", "waits"), [((), [1, 2, 4, 8, 16]), ((0, 3, 4, 5, 6, 7), [1, 2, 4, 1, 1, 1, 1, 1, 2, 4, 8, 16])]
)
def test_tries_are_counted_anew_when_bytes_came(
    file: Path, monkeypatch: pytest.MonkeyPatch, brings: tuple[int, ...], waits: list[float]
) -> None:
    monkeypatch.setattr(arrivals, "_PAUSE", 1.0)
    received, tried = Received(lambda _: None), iter(range(100))

    def broken(*_: Any) -> Path:
        if next(tried) in brings:
            received.add(1)
        raise OSError("reset by peer")

    monkeypatch.setattr(arrivals, "download", broken)
    stop = Waits()
    with pytest.raises(CheckpointError, match="reset by peer"):
        arrivals._download(place(), Remote("a/one", place().parent.name, FIRST), received, stop)
    assert stop.seconds == waits
    assert file.exists()


def test_an_address_that_has_expired_is_asked_for_once_more(hub: Standin, file: Path) -> None:
    hub.next[FIRST] = [403]
    bring_all([place()])
    assert data_of(place()) == data_of(file)


def test_a_file_that_may_not_be_read_is_asked_for_twice(hub: Standin, file: Path) -> None:
    hub.next[FIRST] = [403] * 9
    with pytest.raises(RecipeError, match="does not let you read it"):
        bring_all([place()])
    assert len(hub.next[FIRST]) == 7
    assert file.exists()


def test_the_first_error_ends_the_wait_for_all(hub: Standin, file: Path) -> None:
    going_on, said = threading.Event(), list[BaseException]()
    hub.held[FIRST] = HALF, going_on
    hub.next[LAST] = [403] * 9
    with Arrivals([place(name) for name in SHARDS]):
        for name in (FIRST, LAST):
            with pytest.raises(RecipeError) as caught:
                arrivals.arrive(place(name))
            said.append(caught.value)
        assert not place().exists()
        going_on.set()
    assert [f"'{LAST}' the hub does not let you read it" in str(error) for error in said] == [True, True]
    assert file.exists()


def test_a_range_of_an_unknown_whole_is_no_range(hub: Standin, file: Path) -> None:
    hub.nameless = True
    leave(file.parent.parent, data_of(file)[:HALF])
    bring_all([place()])
    assert data_of(place()) == data_of(file)
    until(lambda: asked(hub) == [f"bytes={HALF}-", ""])


def test_an_answer_that_makes_no_sense_is_said(hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    hub.nameless = True
    hub.cut[FIRST] = HALF
    with pytest.raises(CheckpointError, match="huggingface_hub makes nothing of its answer"):
        bring_all([place()])
    assert file.exists()


def test_a_file_too_large_for_http_is_said_to_need_hf_xet(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", HALF)
    with pytest.raises(CheckpointError, match=f"a/one: '{FIRST}' is larger than .* Install hf_xet"):
        bring_all([place()])
    assert file.exists()


# --- this machine


def test_a_part_that_is_somebody_elses_is_not_used(hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = leave(file.parent.parent, data_of(file)[:HALF])
    opened = Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path == foreign:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    bring_all([place()])
    assert data_of(place()) == data_of(file)
    until(lambda: asked(hub) == [""])


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, r"No space left on device \(\d+ bytes"), (errno.EROFS, "")]
)
def test_a_disk_that_takes_no_more_is_not_the_hubs_fault(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hubparts.Part, "write", full)
    with pytest.raises(RecipeError, match=f"cannot be written to the hub's cache .*{said}.*Set HF_HUB_CACHE"):
        bring_all([place()])
    assert len(hub.of(FIRST, "HEAD")) == 1
    assert file.exists()


@pytest.mark.parametrize("error", [ValueError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe"), KeyboardInterrupt()])
def test_what_a_progress_function_raises_is_raised(hub: Standin, file: Path, error: BaseException) -> None:
    def progress(done: int, _: int) -> None:
        if done:
            raise error

    with pytest.raises(type(error)) as caught:
        bring_all([place(name) for name in SHARDS], progress)
    assert caught.value is error
    assert len(hub.of(FIRST, "HEAD")) <= 1
    assert file.exists()


def test_a_silent_server_does_not_hold_up_the_end(hub: Standin, file: Path, tmp_path: Path) -> None:
    silent = threading.Event()
    hub.held = dict.fromkeys(SHARDS, (HALF, silent))
    running = child(hub, tmp_path, "out")
    until(lambda: sorted(partials(tmp_path).values()) == [HALF] * 3)
    running.send_signal(signal.SIGINT)
    try:
        assert "interrupted" in running.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
        raise
    finally:
        silent.set()
    assert running.returncode != 0
    assert file.exists()


def test_who_waits_for_another_process_says_so(
    hub: Standin, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hubparts, "_LOOK", 0.05)
    monkeypatch.setattr(hubparts, "_QUIET", 0.1)
    lock = blobs(file.parent.parent).parents[1] / ".locks" / "models--a--one" / f"{sha256(file)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with caplog.at_level(logging.WARNING, "polymerge"), Arrivals([place()]) as coming:
        with FileLock(lock):
            until(lambda: str(lock) in caplog.text)
        coming.finish()
    assert caplog.text.count(str(lock)) == 1
    assert data_of(place()) == data_of(file)
    until(lambda: asked(hub) == [""])


def test_bytes_beyond_the_length_are_not_told() -> None:
    told: list[int] = []
    received = Received(told.append, 10)
    for more in (6, 6, 6):
        received.add(more)
    received.stands_at(3)
    assert list(accumulate(told)) == [6, 10, 10, 3]
    assert received.most == 10
