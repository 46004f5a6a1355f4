"""Where an output may be made, and what it may replace; asked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polymerge.checkpoints.output import output_folder
from polymerge.checkpoints.target import check_target
from polymerge.errors import OutputError
from running import checkpoint, cli, leftovers, linear, merged, raw, recipe_file, small_llama, two_llamas, weights


def test_an_existing_folder_is_kept_unless_force_is_said(tmp_path: Path) -> None:
    models = two_llamas(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    asked = recipe_file(linear(*models), tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 1
    assert "exists already" in ran.err
    assert "--force" in ran.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert cli("merge", asked, "-o", tmp_path / "out", "--no-verify", "--force").status == 0
    assert not (tmp_path / "out/mine.txt").exists()
    assert weights(tmp_path / "out").keys() == {"model.safetensors"}
    assert leftovers(tmp_path) == []


def test_force_keeps_the_old_output_when_the_new_one_fails(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    out = merged(linear(one, other), tmp_path / "out", "--no-verify")
    before = weights(out)
    broken = small_llama(3)
    broken["lm_head.weight"][2, 3] = float("nan")
    asked = recipe_file(linear(one, checkpoint(tmp_path / "broken", broken)), tmp_path / "r.yaml")
    assert cli("merge", asked, "-o", out, "--no-verify", "--force").status == 1
    assert weights(out) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("target", ["one", ".", "one/merged", "one/deep/merged", "link"])
def test_an_output_may_not_touch_an_input(target: str, tmp_path: Path) -> None:
    models = two_llamas(tmp_path / "models")
    (models[0] / "deep").mkdir()
    (tmp_path / "models/link").symlink_to(models[0])
    before = {folder: raw(folder) for folder in models}
    asked = recipe_file(linear(*models), tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "models" / target, "--force", "--no-verify")
    assert ran.status == 1
    assert "Choose another folder" in ran.err
    assert {folder: raw(folder) for folder in models} == before


def test_an_output_may_lie_beside_a_bare_file(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    out = merged(linear(one / "model.safetensors", other / "model.safetensors"), one / "merged", "--no-verify")
    assert raw(out) == raw(merged(linear(one, other), tmp_path / "out", "--no-verify"))


def test_neither_the_working_folder_nor_a_missing_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is or contains the current folder" in cli("merge", asked, "-o", ".", "--force").err
    ran = cli("merge", asked, "-o", tmp_path / "no/such/out")
    assert ran.status == 1
    assert f"parent folder {tmp_path}/no/such does not exist" in ran.err


LONGEST = 255 - len("..polymerge-partial")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("circle", "links.*Its links lead in a circle"),
        ("circle/out", "links.*Its links lead in a circle"),
        ("o" * 256, "File name too long.*Choose a shorter name"),
        ("o" * (LONGEST + 1), "File name too long.*Choose a shorter name"),
        ("a\0b", "null (byte|character).* Choose another name"),
        ("file/out", "Not a directory"),
        ("gone/out", "its parent folder .*gone does not exist. Make it first"),
    ],
)
def test_a_name_that_no_output_can_have_is_refused_before_anything_is_read(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(OutputError, match=f"(?s)out|o+|circle|null.*{said}") as raised:
            check_target(tmp_path / name, (), force)
        assert "Errno" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "file"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    out = tmp_path / ("o" * LONGEST)
    check_target(out, (), force=False)
    with output_folder(out):
        pass
    assert out.is_dir()


@pytest.mark.parametrize("refused", ["parent", "inside"])
def test_what_may_not_be_written_is_refused_at_once(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a read-only disk, of which the system says the same."""
    (tmp_path / "out/inside").mkdir(parents=True)
    place = tmp_path if refused == "parent" else tmp_path / "out/inside"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    with pytest.raises(OutputError, match=rf"{place}.* Choose another folder"):
        check_target(tmp_path / "out", (), force=True)


def test_a_mount_point_is_not_replaced() -> None:
    with pytest.raises(OutputError, match=r"/proc: is a mount point, which cannot be replaced\. Choose another folder"):
        check_target(Path("/proc"), (), force=True)


@pytest.mark.parametrize("kind", ["file", "link", "folder", "folder with a lock that is a link"])
def test_what_no_run_made_is_neither_followed_nor_removed(kind: str, tmp_path: Path) -> None:
    work, elsewhere = tmp_path / ".out.polymerge-partial", tmp_path / "elsewhere"
    if kind == "file":
        work.write_text("mine")
    elif kind == "link":
        elsewhere.mkdir()
        work.symlink_to(elsewhere)
    else:
        work.mkdir()
        (work / "mine").write_text("mine")
        if "lock" in kind:
            (work / "lock").symlink_to(elsewhere)
    before = work.lstat().st_ino
    for refuse in (lambda: check_target(tmp_path / "out", (), force=True), output_folder(tmp_path / "out").__enter__):
        with pytest.raises(OutputError, match=rf"{work} is in the way, .* Move it, or choose another name"):
            refuse()
    assert work.lstat().st_ino == before
    assert kind == "file" or kind == "link" or (work / "mine").read_text() == "mine"
    assert kind == "link" or not elsewhere.exists()
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_user_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / ".out.polymerge-partial"
    work.mkdir()
    (work / "lock").touch()
    monkeypatch.setattr(os, "geteuid", lambda: work.stat().st_uid + 1)
    with pytest.raises(OutputError, match=rf"{work} belongs to another user, .* choose another name"):
        check_target(tmp_path / "out", (), force=False)


@pytest.mark.parametrize("name", [".out.polymerge-old", ".out.polymerge-lock"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_other_names_are_nobodys_business(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    with output_folder(tmp_path / "out"):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name, "out"]


# --- inputs


def a_folder(path: Path) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("way", ["link", "links in a row", "hard link", "the folder is a link", "file in it"])
def test_an_input_whose_files_are_in_the_output_is_not_replaced(way: str, tmp_path: Path) -> None:
    out, one = a_folder(tmp_path / "out"), tmp_path / "one"
    if way == "the folder is a link":
        (out / "inside").mkdir()
        (out / "model.safetensors").rename(out / "inside/model.safetensors")
        one.symlink_to(out / "inside")
    elif way == "file in it":
        one = out / "model.safetensors"
    else:
        one.mkdir()
        if way == "hard link":
            (one / "model.safetensors").hardlink_to(out / "model.safetensors")
        elif way == "link":
            (one / "model.safetensors").symlink_to(out / "model.safetensors")
        else:
            (tmp_path / "blob").write_bytes(b"weights")
            (out / "model.safetensors").unlink()
            (out / "model.safetensors").symlink_to("../blob")
            (one / "model.safetensors").symlink_to("../out/model.safetensors")
    with pytest.raises(OutputError, match=f"{out}: .*holds .* of the input {one}|is or holds the input {one}"):
        check_target(out, [one], force=True)


def test_an_input_that_shares_only_what_the_output_links_to_is_no_reason_to_refuse(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"weights")
    for name in ("out", "one"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").symlink_to(blob)
    (tmp_path / "one/broken").symlink_to("nowhere")
    (tmp_path / "one/circle").symlink_to("circle")
    check_target(tmp_path / "out", [tmp_path / "one"], force=True)


def test_an_output_inside_of_an_input_by_another_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(a_folder(tmp_path / "one"))
    with pytest.raises(OutputError, match="lies inside of the input"):
        check_target(tmp_path / "one/out", [tmp_path / "link"], force=False)
