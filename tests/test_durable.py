"""Files and names that appear whole or not at all, and are on the disk before anybody is told so."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from polymerge import durable
from polymerge.durable import UNFINISHED, begin_flush, exchange, rename_new, sync_tree, write_file
from polymerge.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("content", ["häuser\n", b"\0\1\2", "", "x" * 3_000_000])
def test_a_file_is_written_and_replaced(content: str | bytes, tmp_path: Path) -> None:
    for _ in range(2):
        assert write_file(tmp_path / "a", content) == tmp_path / "a"
        data = content.encode() if isinstance(content, str) else content
        assert (tmp_path / "a").read_bytes() == data
        assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_sweep", durable._sweep.__wrapped__)  # once in each process
    left, held, young, other = (f".{number:016x}{UNFINISHED}" for number in range(4))
    foreign = [f".notes{UNFINISHED}", f"{0:016x}{UNFINISHED}", f".{0:016x}{UNFINISHED}.txt", f".{'g' * 16}{UNFINISHED}"]
    for name in (left, held, young, other, *foreign):
        (tmp_path / name).write_text("a part")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / young)
    (tmp_path / f".{5:016x}{UNFINISHED}").mkdir()
    (tmp_path / f".{6:016x}{UNFINISHED}").symlink_to(left)
    mine = os.geteuid()
    with (tmp_path / held).open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        write_file(tmp_path / "a", "text")
        assert left in names(tmp_path)  # somebody else's
        monkeypatch.setattr(os, "geteuid", lambda: mine)
        before = names(tmp_path)
        write_file(tmp_path / "a", "text")
        assert set(before) - set(names(tmp_path)) == {left, other}
    write_file(tmp_path / "a", "text")
    assert held not in names(tmp_path)
    assert young in names(tmp_path)


def test_a_file_is_locked_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def look(_: int) -> None:
        for name in names(tmp_path):
            looked.append(name)
            with (tmp_path / name).open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monkeypatch.undo()

    monkeypatch.setattr(durable, "flush", look)
    write_file(tmp_path / "a", "text")
    assert [name.endswith(UNFINISHED) for name in looked] == [True]
    assert names(tmp_path) == ["a"]


def test_half_a_surrogate_pair_is_written_as_json_has_it(tmp_path: Path) -> None:
    assert write_file(tmp_path / "a", '"\ud800"').read_bytes() == b'"\\ud800"'


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_file_has_the_mode_of_any_other_programs(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        write_file(tmp_path / "a", "text")
        (tmp_path / "b").write_text("text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("call", ["os.fsync", "Path.replace", "os.open"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_the_earlier_file_stays_where_the_new_one_cannot_be_written(
    call: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise kind(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_file(tmp_path / "a", "before")
    monkeypatch.setattr(f"polymerge.durable.{call}", fail)
    expected = OutputError if kind is OSError else kind
    with pytest.raises(expected, match="No space left on device"):
        write_file(tmp_path / "a", "after")
    monkeypatch.undo()
    # os.open is last called for the folder, when the new file has its name
    assert (tmp_path / "a").read_text() == ("after" if call == "os.open" else "before")
    assert names(tmp_path) == ["a"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(sys, "platform", "linux")
    write_file(tmp_path / "a", "12345")
    assert calls == ["5", "replace", "folder"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone/a", "No such file or directory. Make its folder first"),
        ("file/a", "Not a directory. Its parent is no folder"),
        ("n" * 300, "File name too long. Choose a shorter name"),
        ("circle/a", "links.* Its links lead in a circle"),
        ("a\0b", "null (byte|character).* Choose another name"),
        ("folder", "Is a directory. Choose another place"),
    ],
)
def test_every_refusal_says_why_and_what_to_do(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OutputError, match=f"cannot be written: .*{said}"):
        write_file(tmp_path / name, "text")
    assert names(tmp_path) == ["circle", "file", "folder"]


def test_a_device_a_pipe_or_a_link_is_written_through(tmp_path: Path) -> None:
    write_file(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    code = "from pathlib import Path; from polymerge.durable import write_file; write_file(Path('/dev/stdout'), 'told')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "told"


def test_folders_of_filesystems_without_fsync_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    monkeypatch.setattr(sys, "platform", "linux")
    write_file(tmp_path / "a", "text")
    sync_tree(tmp_path)


def test_all_of_a_folder_is_synced_each_folder_after_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one/two").mkdir(parents=True)
    for name in ("a", "one/b", "one/two/c"):
        (tmp_path / name).write_text("text")
    (tmp_path / "link").symlink_to("/dev/full")
    os.mkfifo(tmp_path / "pipe")  # which an open would wait for
    seen: list[str] = []
    monkeypatch.setattr(durable, "sync", lambda path: seen.append(path.relative_to(tmp_path).as_posix()))
    sync_tree(tmp_path)
    assert sorted(seen) == [".", "a", "one", "one/b", "one/two", "one/two/c"]
    assert seen.index("one/two/c") < seen.index("one/two") < seen.index("one") < seen.index(".")


@pytest.fixture(params=["the system's call", "without"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without":
        monkeypatch.setattr(durable, "_renamed", lambda *_: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("there", ["folder", "full folder", "file", "link"])
def test_a_new_name_replaces_nothing(there: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    if there == "link":
        target.symlink_to("nowhere")
    elif there == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").mkdir() if there == "full folder" else None
    inode = target.lstat().st_ino
    with pytest.raises(FileExistsError):
        rename_new(source, target)
    assert target.lstat().st_ino == inode
    assert source.is_dir()
    rename_new(source, tmp_path / "free")
    assert (tmp_path / "free").is_dir()
    assert not source.exists()


def test_two_names_are_exchanged_or_nothing_is_done(way: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").write_text("text")
    done = exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other").is_dir() == done == (tmp_path / "one").is_file()
    if way == "without":
        assert not done
    elif done:
        (tmp_path / "one").unlink()
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "one", tmp_path / "other")


def test_what_a_killed_process_leaves_is_hidden_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: names(tmp_path)[0].endswith(UNFINISHED) or pytest.fail("named"))
    write_file(tmp_path / "a", "text")
    (left,) = names(tmp_path)
    assert left.startswith(".")


@pytest.mark.parametrize(
    ("start", "stop", "asked"),
    [(0, 8192, [(0, 8192)]), (1, 8192, [(4096, 4096)]), (4096, 12287, [(4096, 4096)]), (5, 8191, []), (7, 7, [])],
)
def test_only_full_pages_are_sent_to_the_disk_ahead(
    start: int, stop: int, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(durable, "PAGESIZE", 4096)
    monkeypatch.setattr(durable, "_sync_file_range", lambda: lambda *given: seen.append(given))
    begin_flush(3, start, stop)
    assert seen == [(3, first, size, 2) for first, size in asked]


def test_a_file_that_is_sent_ahead_is_as_it_was_written(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    with (tmp_path / "a").open("wb", buffering=0) as file:
        for start in range(0, len(data), 700_001):
            file.write(data[start : start + 700_001])
            begin_flush(file.fileno(), start, min(start + 700_001, len(data)))
    assert (tmp_path / "a").read_bytes() == data
    begin_flush(9999, 0, 1 << 20)  # what the system refuses is no matter of a hint


def test_a_system_without_the_call_waits_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda _: object())
    assert durable._sync_file_range.__wrapped__() is None
