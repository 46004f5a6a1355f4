"""Under an output's name there is nothing, the earlier output or the new one, whole, whatever happens."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from faulty_output import found, write
from paths import ROOT
from polymerge import durable
from polymerge.checkpoints import output
from polymerge.checkpoints.output import output_folder
from polymerge.errors import OutputError
from running import cli, leftovers, linear, recipe_file, two_llamas


@pytest.fixture(params=["exchange", "no exchange"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that can exchange two names, and systems that cannot."""
    if request.param == "no exchange":
        monkeypatch.setattr(durable, "_renamed", lambda *_: False)
    return str(request.param)


def make(out: Path, text: str, *, force: bool = False) -> None:
    with output_folder(out, force=force) as folder:
        write(folder, text)


# --- a fault at each call to the system


@pytest.mark.parametrize("how", ["killed", "refused", "lost", "interrupted", "late"])
def test_whatever_call_fails_nothing_is_lost_and_the_next_run_succeeds(how: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/support/faulty_output.py"), str(tmp_path), how]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    *broken, cases = ran.stdout.splitlines()
    assert broken == []
    assert int(cases) > 150


# --- an earlier output


@pytest.mark.usefixtures("way")
def test_an_output_is_made_and_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out", "one")
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", "two")
    assert found(tmp_path / "out") == "one"
    make(tmp_path / "out", "two", force=True)
    assert found(tmp_path / "out") == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["file", "empty folder", "link to a folder"])
def test_whatever_has_the_name_is_replaced_on_request(kind: str, tmp_path: Path) -> None:
    out, real = tmp_path / "out", tmp_path / "real"
    if kind == "file":
        out.write_text("text")
    elif kind == "empty folder":
        out.mkdir()
    else:
        real.mkdir()
        out.symlink_to(real)
    make(out, "new", force=True)
    assert found(real if kind == "link to a folder" else out) == "new"
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_the_earlier_output_has_its_name_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", "one")
    synced: list[str] = []

    def sync(path: Path) -> None:
        synced.append(path.relative_to(tmp_path).as_posix())
        if ".polymerge-partial/new" in str(path):
            assert found(tmp_path / "out") == "one"

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(output, "sync", sync)
    make(tmp_path / "out", "two", force=True)
    new = ".out.polymerge-partial/new"
    assert {f"{new}/{name}" for name in ("a", "b", "inside/c", "inside")} | {new} <= set(synced)
    assert "." in synced[synced.index(new) + 1 :], "the name itself"


def test_an_output_moved_aside_by_a_killed_run_gets_its_name_back(tmp_path: Path) -> None:
    work = tmp_path / ".out.polymerge-partial"
    write(work / "old", "one")
    write(work / "new", "two")
    (work / "lock").touch()
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", "three")
    assert found(tmp_path / "out") == "one"
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_one_that_is_removed_in_part_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "one")

    def stop(path: Path, **_: object) -> NoReturn:
        (path / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out", "two", force=True)
    assert found(tmp_path / "out") == "two"
    (tmp_path / "out").rename(tmp_path / "moved")
    make(tmp_path / "out", "three")
    assert (found(tmp_path / "out"), found(tmp_path / "moved")) == ("three", "two")
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_an_earlier_output_that_cannot_be_removed_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a file that is immutable, or somebody else's."""
    make(tmp_path / "out", "one")
    inode = (tmp_path / "out/inside/c").stat().st_ino
    unlink = os.unlink

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino == inode:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OutputError, match=r"is complete, but the earlier one cannot be removed: .*/inside/c \(Op"):
        make(tmp_path / "out", "two", force=True)
    assert found(tmp_path / "out") == "two"
    with pytest.raises(OutputError, match=r"a killed run left what cannot be removed: .*/inside/c \(.* Remove it"):
        make(tmp_path / "out", "three", force=True)
    assert found(tmp_path / "out") == "two"
    monkeypatch.undo()
    make(tmp_path / "out", "three", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what comes under the name meanwhile


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_comes_under_the_name_is_left_alone_and_the_output_kept(earlier: bool, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if earlier:
        make(out, "one")
    (tmp_path / "out-1").mkdir()

    def replaced() -> None:
        with output_folder(out, force=earlier) as folder:
            write(folder, "two")
            if earlier:
                out.rename(tmp_path / "moved")
            if kind == "folder":
                write(out, "foreign")
            elif kind == "file":
                out.write_text("foreign")
            else:
                out.symlink_to("nowhere")

    with pytest.raises(OutputError, match=rf"something else came .* finished output is in {tmp_path}/out-2: rename"):
        replaced()
    assert found(tmp_path / "out-2") == "two"
    assert kind != "folder" or found(out) == "foreign"
    assert kind != "file" or out.read_text() == "foreign"
    assert kind != "link" or out.is_symlink()
    assert not earlier or found(tmp_path / "moved") == "one"
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_a_new_folder_with_the_inode_of_the_earlier_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """Filesystems give a freed inode to the next folder that is made."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="something else came"), output_folder(out, force=True):  # noqa: PT012
        out.rmdir()
        out.mkdir()
    assert out.is_dir()
    assert list(out.iterdir()) == []


@pytest.mark.usefixtures("way")
def test_an_earlier_output_may_be_gone_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "out", "one")
    with output_folder(tmp_path / "out", force=True) as folder:
        (tmp_path / "out").rename(tmp_path / "moved")
        write(folder, "two")
    assert (found(tmp_path / "out"), found(tmp_path / "moved")) == ("two", "one")


def test_a_name_that_cannot_be_given_does_not_cost_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "one")

    def refuse(*_: Path) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(output, "exchange", refuse)
    with pytest.raises(OutputError, match=rf"could not get this name: Invalid cross-device.*in {tmp_path}/out-1"):
        make(tmp_path / "out", "two", force=True)
    assert (found(tmp_path / "out"), found(tmp_path / "out-1")) == ("one", "two")
    assert leftovers(tmp_path) == []


def test_an_earlier_output_that_cannot_be_put_back_is_told_of_and_put_back_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", "one")
    monkeypatch.setattr(durable, "_renamed", lambda *_: False)
    rename, calls = Path.rename, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        with pytest.raises(OutputError, match=r"The earlier output is in .*\.out\.polymerge-partial/old: rename it"):
            make(tmp_path / "out", "two", force=True)
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", "three")
    assert found(tmp_path / "out") == "one"
    assert leftovers(tmp_path) == []


# --- two runs


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    with output_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        for _ in range(2):  # being refused must not take the lock away
            ran = cli("merge", asked, "-o", tmp_path / "out", "--no-verify")
            assert ran.status == 1
            assert "another run of polymerge is writing it" in ran.err
            assert (folder / "half").exists()
    assert (tmp_path / "out/half").read_text() == "written"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("looks", [1, 2])
def test_a_run_that_ends_between_two_looks_is_not_foreign(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is seen with a file in it, and its lock is gone by then."""
    work = tmp_path / ".out.polymerge-partial"
    work.mkdir()
    seen, ways = [work / "new"] * looks, Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([seen.pop()]) if path == work and seen else ways(path))
    if looks == 2:
        with pytest.raises(OutputError, match="no run of polymerge made it"):
            make(tmp_path / "out", "one")
    else:
        make(tmp_path / "out", "one")
        assert found(tmp_path / "out") == "one"


def test_a_lock_whose_file_was_taken_away_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits at the door while another one ends: what it then locks is no longer the file of that name."""
    import fcntl

    locked: list[int] = []
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not locked:
            (tmp_path / ".out.polymerge-partial/lock").unlink()
        locked.append(descriptor)

    monkeypatch.setattr("fcntl.flock", late)
    with output_folder(tmp_path / "out"):
        assert len(locked) == 2
        with pytest.raises(OutputError, match="another run"), output_folder(tmp_path / "out"):
            pytest.fail("two runs hold one lock")


# --- modes


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_modes_that_the_umask_gives(mask: int, tmp_path: Path) -> None:
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    before = os.umask(mask)
    try:
        assert cli("merge", asked, "-o", tmp_path / "out", "--no-verify").status == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_a_folder_s_group_is_inherited_where_it_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o2755)
    with output_folder(tmp_path / "out") as folder:
        (folder / "inside").mkdir()
    assert (tmp_path / "out").stat().st_mode & (tmp_path / "out/inside").stat().st_mode & stat.S_ISGID
