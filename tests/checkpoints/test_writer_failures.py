"""A merge that fails or is stopped, wherever that happens, leaves nothing under the output's name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import torch

import polymerge
from polymerge.engine.executor import Execution
from polymerge.engine.norms import ModuleNorms
from polymerge.errors import OutputError
from running import checkpoint, cli, leftovers, linear, raw, recipe_file, small_llama, two_llamas

FAILING = (
    "polymerge.engine.writers.lay_out",
    "polymerge.engine.executor.Execution.run",
    "polymerge.engine.executor.kernels.encode",
    "polymerge.checkpoints.writer.os.pwrite",
    "polymerge.engine.writers.copy_files",
    "polymerge.engine.merge.provenance",
    "polymerge.engine.merge.verify",
    "polymerge.engine.provenance.sampled_digest",
)

SLOW = """
import os, sys, time
from polymerge.cli import main
write, count = os.pwrite, 0
def slow(*arguments):
    global count
    count += 1
    if count == 3:
        print("half way", flush=True)
    if count >= 3:
        time.sleep(0.5)
    return write(*arguments)
os.pwrite = slow
sys.argv = ["polymerge", "merge", *sys.argv[1:], "--no-verify", "--threads", "2"]
main()
"""


def nothing_is_left(folder: Path) -> None:
    assert not (folder / "out").exists()
    assert leftovers(folder) == []


@pytest.mark.parametrize("place", FAILING)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, OSError, MemoryError])
def test_whatever_fails_leaves_nothing(
    place: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise kind(errno.ENOSPC, "No space left on device")

    models = two_llamas(tmp_path)
    monkeypatch.setattr(place, fail)
    outside = place.endswith("lay_out")  # before there is a folder
    expected = OutputError if kind is OSError and not outside else kind
    with pytest.raises(expected, match="No space left"):
        polymerge.merge(linear(*models), tmp_path / "out")
    nothing_is_left(tmp_path)


def test_ctrl_c_ends_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    monkeypatch.setattr("polymerge.engine.executor.Execution.run", interrupt)
    ran = cli("merge", asked, "-o", tmp_path / "out")
    assert (ran.status, ran.out) == (1, "")
    assert (
        ran.err.strip() == "polymerge: interrupted; no half-written output stands under its name"
    )  # click ends the line of a ^C
    nothing_is_left(tmp_path)


def half_way(models: tuple[Path, Path], folder: Path) -> subprocess.Popen[str]:
    """A merge in a process of its own that has written a part of its output, and takes its time for the rest."""
    asked = recipe_file(linear(*models), folder / "r.yaml")
    command = [sys.executable, "-c", SLOW, str(asked), "-o", str(folder / "out")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "half way\n"
    return running


def test_after_sigkill_a_second_run_cleans_up_and_succeeds(tmp_path: Path) -> None:
    models = two_llamas(tmp_path)
    with half_way(models, tmp_path) as running:
        assert leftovers(tmp_path) == [".out.polymerge-partial"]
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == [".out.polymerge-partial"]
    (tmp_path / ".out.polymerge-partial/garbage").write_text("must not come along")
    polymerge.merge(linear(*models), tmp_path / "out", check=False)
    assert raw(tmp_path / "out").keys() == raw(models[0]).keys()
    assert not (tmp_path / "out/garbage").exists()
    assert leftovers(tmp_path) == []


def test_sigterm_is_an_orderly_end(tmp_path: Path) -> None:
    with half_way(two_llamas(tmp_path), tmp_path) as running:
        running.terminate()
        _, said = running.communicate(timeout=30)
    assert running.returncode == 1
    assert said.strip() == "polymerge: interrupted; no half-written output stands under its name"
    nothing_is_left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room for a file")
def test_a_full_disk_is_found_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("polymerge.engine.executor.Execution.run", lambda *_, **__: pytest.fail("computed in vain"))
    ran = cli("merge", asked, "-o", tmp_path / "out")
    assert ran.status == 1
    assert ran.err.startswith("polymerge: ")
    assert "cannot make room" in ran.err
    assert "No space left on device" in ran.err
    nothing_is_left(tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = two_llamas(tmp_path)
    monkeypatch.setattr("polymerge.checkpoints.target.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match=r"the disk has 10 B free"):
        polymerge.merge(linear(*models), tmp_path / "out")
    nothing_is_left(tmp_path)


def test_an_unfinished_output_is_removed_before_the_room_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run is refused then, of which an earlier output knows nothing."""
    models = two_llamas(tmp_path)
    polymerge.merge(linear(*models), tmp_path / "out", check=False)
    before = raw(tmp_path / "out")
    work = tmp_path / ".out.polymerge-partial"
    (work / "new").mkdir(parents=True)
    (work / "lock").touch()
    (work / "new/model.safetensors").write_bytes(bytes(1000))

    def usage(_: Path) -> Any:
        assert not (work / "new/model.safetensors").exists()
        return type("Usage", (), {"free": 10})()

    monkeypatch.setattr("polymerge.checkpoints.target.shutil.disk_usage", usage)
    with pytest.raises(OutputError, match="the disk has 10 B free"):
        polymerge.merge(linear(*models), tmp_path / "out", check=False, force=True)
    assert raw(tmp_path / "out") == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("file_format", "room"), [("safetensors", 1), ("torch", 2)])
def test_torch_files_need_room_for_a_shard_twice(
    file_format: Literal["safetensors", "torch"], room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = two_llamas(tmp_path)
    size = (models[0] / "model.safetensors").stat().st_size
    with monkeypatch.context() as patched:
        patched.setattr(
            "polymerge.checkpoints.target.shutil.disk_usage", lambda _: type("Usage", (), {"free": room * size - 1})()
        )
        with pytest.raises(OutputError, match=r"out: needs .*B, the disk has .*B free\. Make room on it"):
            polymerge.merge(linear(*models), tmp_path / "out", check=False, file_format=file_format)
    nothing_is_left(tmp_path)
    polymerge.merge(linear(*models), tmp_path / "out", check=False, file_format=file_format)


FULL = """
import errno, os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
save = torch.save
def into_little_room(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    try:
        save(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.save = into_little_room
from polymerge.cli import main
sys.argv = ["polymerge", "merge", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("options", [["--format", "torch"], ["--format", "torch", "--shard-size", "200B"]])
def test_a_disk_that_fills_up_while_torch_writes_is_an_error_in_words(options: list[str], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of a disk."""
    asked = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "r.yaml")
    command = [sys.executable, "-c", FULL, str(asked), "-o", str(tmp_path / "out"), "--no-verify", *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    (said,) = ran.stderr.splitlines()
    assert said.startswith(f"polymerge: {tmp_path}/out: not completed, and nothing of it was left: File too large")
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_or_infinity_in_what_is_merged(value: float, which: int, tmp_path: Path) -> None:
    tensors = [small_llama(1), small_llama(2)]
    tensors[which]["model.layers.1.mlp.up_proj.weight"][8, 5] = value
    models = [checkpoint(tmp_path / label, own) for label, own in zip(("one", "two"), tensors, strict=True)]
    ran = cli("merge", recipe_file(linear(*models), tmp_path / "r.yaml"), "-o", tmp_path / "out", "--no-verify")
    assert (ran.status, ran.out) == (1, "")
    label = models[which].name
    assert f"{models[which]}/model.safetensors: text.layers.1.mlp.up_proj.weight of '{label}' holds NaN" in ran.err
    nothing_is_left(tmp_path)


def test_nan_in_a_copied_tensor_is_found_by_the_check_at_the_end(tmp_path: Path) -> None:
    one, other = small_llama(1), small_llama(2)
    one["lm_head.weight"][0, 0] = float("nan")
    models = [checkpoint(tmp_path / label, own) for label, own in (("one", one), ("other", other))]
    recipe = recipe_file(linear(*models, exclude=["text.lm_head.weight"]), tmp_path / "r.yaml")
    ran = cli("merge", recipe, "-o", tmp_path / "out")
    assert ran.status == 1
    assert "did not pass its check" in ran.err
    assert "NaN or infinity in 1 tensor(s), first lm_head.weight" in ran.err
    nothing_is_left(tmp_path)
    assert cli("merge", recipe, "-o", tmp_path / "out", "--no-verify").status == 0


def test_results_too_large_for_their_dtype_are_found(tmp_path: Path) -> None:
    tensors = [{name: torch.full_like(t, 60_000) for name, t in small_llama(s, torch.float16).items()} for s in (1, 2)]
    models = [checkpoint(tmp_path / label, own) for label, own in zip(("one", "two"), tensors, strict=True)]
    recipe = {**linear(*models), "parameters": {"weight": 1, "normalize": False}}
    for unchecked in ([], ["--no-verify"]):
        ran = cli("merge", recipe_file(recipe, tmp_path / "r.yaml"), "-o", tmp_path / "out", *unchecked)
        assert ran.status == 1
        assert "198 numbers in 5 tensors overflow in this merge" in ran.err
    nothing_is_left(tmp_path)


def test_an_input_that_shrinks_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two_llamas(tmp_path)
    run = Execution.run

    def shrink_and_run(*arguments: Any, **named: Any) -> list[ModuleNorms]:
        os.truncate(other / "model.safetensors", 600)
        return run(*arguments, **named)

    monkeypatch.setattr(Execution, "run", shrink_and_run)
    ran = cli("merge", recipe_file(linear(one, other), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 1
    assert "it was truncated since it was planned" in ran.err
    nothing_is_left(tmp_path)


def test_a_plan_whose_input_has_changed_since_is_refused(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    plan = polymerge.plan(linear(one, other))
    checkpoint(other, small_llama(2, rows=9))
    with pytest.raises(polymerge.PolymergeError, match="have changed since it was planned"):
        polymerge.merge(plan, tmp_path / "out")
    nothing_is_left(tmp_path)
