"""Paths as people write them: what nobody could open is refused where it is given."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from polymerge.errors import RecipeError
from polymerge.paths import because, exists, given_path


def test_a_path_that_may_be_made_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~odd").mkdir()
    (tmp_path / "broken").symlink_to("gone")
    assert given_path("~/x") == tmp_path / "x"
    assert given_path(tmp_path / "gone" / "deep") == tmp_path / "gone" / "deep"
    assert given_path("~odd") == Path("~odd")
    assert given_path("./~nobody") == Path("~nobody")
    assert given_path("broken") == Path("broken")
    assert given_path("x" * 255) == Path("x" * 255)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", "a path is empty"),
        ("a\0b", "a\\x00b: has a NUL character"),
        ("\udcff", "\\udcff: its full path is not UTF-8"),
        ("x" * 256, "File name too long. Take a shorter one"),
        ("x/" * 4000, "File name too long"),
        ("circle", "circle: Too many levels of symbolic links. Its links lead in a circle"),
        ("circle/x", "circle/x: Too many levels"),
        ("~nosuchuser/x", "~nosuchuser/x: nobody here has this home folder. For such a name, write ./~nosuchuser/x"),
    ],
)
def test_what_nobody_could_open(said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(RecipeError) as refused:
        given_path(said)
    assert told in str(refused.value)
    assert not exists(said)


def test_in_a_folder_that_is_not_utf8_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "\udcff"
    with suppress(OSError):  # of macOS, which has no such names
        folder.mkdir()
    if folder.is_dir():
        monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match="its full path is not UTF-8"):
        given_path("x" if folder.is_dir() else folder)


def test_a_reason_has_a_next_step() -> None:
    assert because(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith("No space left on device. Make room")
    assert because(OSError(errno.EDOM, "out of range")) == "out of range"
    assert because(OSError("what\n a library says")) == "what a library says"
