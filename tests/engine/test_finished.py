"""What a killed merge of whole matrices has finished is not computed again, and comes out bit for bit the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import matrix_methods
import polymerge
from killed_merge import killed
from matrix_methods import ROW, known
from polymerge.checkpoints.identity import YOUNG
from polymerge.engine import finished
from polymerge.engine.merge import Merged
from polymerge.errors import CheckpointError
from polymerge.planning.matrix_costs import decomposed
from running import cli, leftovers, raw, recipe_file
from tiny import as_2024, build, perturbed

CALLS: list[tuple[int, ...]] = []


def in_stages(models: list[Path]) -> dict[str, Any]:
    """An average, a merge of matrices of it, and another one of that."""
    base, one, other = map(str, models)
    average = {"name": "average", "merge_method": "linear", "models": [one, other], "parameters": {"weight": 0.5}}
    first = {**asked([models[0], models[1]]), "name": "first"}
    first["models"] = [*first["models"], {"model": "average"}]
    return {"stages": [average, first, {**asked(models), "base_model": base, "models": ["first", other]}]}


def interrupt(_: tuple[int, ...]) -> None:
    if len(CALLS) == 6:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The calls of the method's function are in CALLS; files may be as young as those of a test are."""
    CALLS.clear()
    monkeypatch.setattr(matrix_methods, "CALLED", [CALLS.append])
    monkeypatch.setattr(finished, "YOUNG", 0)
    with known(ROW):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of it, old enough for their stamps to tell what is written to them."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


def asked(models: list[Path], **more: Any) -> dict[str, Any]:
    base, *tuned = map(str, models)
    return {"merge_method": "levelled", "base_model": base, "models": [{"model": one} for one in tuned], **more}


def merge(recipe: dict[str, Any], out: Path, **more: Any) -> Merged:
    return polymerge.merge(recipe, out, check=False, **more)


@pytest.mark.parametrize(("calls", "threads"), [(1, 1), (2, 1), (9, 1), (14, 1), (9, 3)])
def test_a_killed_merge_goes_on(calls: int, threads: int, models: list[Path], tmp_path: Path) -> None:
    whole = raw(merge(asked(models), tmp_path / "whole").folder)
    assert len(CALLS) == 14
    CALLS.clear()
    killed(asked(models), tmp_path / "out", calls, threads)
    done = merge(asked(models), tmp_path / "out")
    assert raw(done.folder) == whole
    assert done.resumed == 14 - len(CALLS)
    assert done.resumed == calls - 1 if threads == 1 else done.resumed <= calls - 1
    assert leftovers(tmp_path) == []
    assert sorted(path.name for path in done.folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_it_is_killed_twice_and_goes_on_all_the_same(models: list[Path], tmp_path: Path) -> None:
    for calls in (4, 6):
        killed(asked(models), tmp_path / "out", calls)
    done = merge(asked(models), tmp_path / "out")
    assert (done.resumed, len(CALLS)) == (3 + 5, 6)
    assert raw(done.folder) == raw(merge(asked(models), tmp_path / "whole").folder)


def test_other_settings_take_nothing(models: list[Path], tmp_path: Path) -> None:
    killed(asked(models), tmp_path / "out", 9)
    done = merge(asked(models, parameters={"scale": 0.5}), tmp_path / "out")
    assert (done.resumed, len(CALLS)) == (0, 14)
    assert leftovers(tmp_path) == []
    killed(asked(models), tmp_path / "again", 9)
    assert merge(asked(models), tmp_path / "again", shard_size="20KB").resumed == 0
    killed(asked(models), tmp_path / "another", 9)
    linear = {**asked(models), "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    assert merge(linear, tmp_path / "another").resumed == 0
    assert leftovers(tmp_path) == []


def test_another_content_of_an_input_takes_nothing_of_it(models: list[Path], tmp_path: Path) -> None:
    own = [perturbed(model, tmp_path / model.name, seed=7) for model in models]
    killed(asked(own), tmp_path / "out", 9)
    file = own[1] / "model.safetensors"
    stamp = file.stat()
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 2
    with file.open("r+b") as stream:  # the same file, of the same size and time
        save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
        stream.write((tmp_path / "changed").read_bytes())
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = merge(asked(own), tmp_path / "out")
    assert (done.resumed, len(CALLS)) == (0, 14)
    assert raw(done.folder) == raw(merge(asked(own), tmp_path / "whole").folder)


def test_what_a_power_cut_kept_from_the_disk_is_computed_again(models: list[Path], tmp_path: Path) -> None:
    work = killed(asked(models), tmp_path / "out", 9)
    journal = (work / "finished").read_bytes()
    assert journal.count(b"\n") == 8
    (work / "finished").write_bytes(journal[:-10])
    data = (work / "new/model.safetensors").read_bytes()
    tensors = load_file(work / "new/model.safetensors")
    first, second = (json.loads(line)[0][0] for line in journal.splitlines()[1:3])
    tensors[first][0, 0] += 1
    zeros = torch.zeros_like(tensors[second])
    save_file({**tensors, second: zeros}, work / "new/model.safetensors", metadata={"format": "pt"})
    assert len((work / "new/model.safetensors").read_bytes()) == len(data)
    done = merge(asked(models), tmp_path / "out")
    assert (done.resumed, len(CALLS)) == (5, 9)
    assert raw(done.folder) == raw(merge(asked(models), tmp_path / "whole").folder)


def test_files_too_young_for_their_stamps_are_not_noted(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(asked(models), tmp_path / "out", 9)
    monkeypatch.setattr(finished, "YOUNG", 10**18)
    assert merge(asked(models), tmp_path / "out").resumed == 0
    assert YOUNG == 2 * 10**9


def test_matrices_of_experts_that_lie_transposed_go_on(tmp_path: Path) -> None:
    base = as_2024(build("qwen3_vl_moe", tmp_path / "base"))
    own = [base, *(perturbed(base, tmp_path / f"{seed}", seed=seed) for seed in (1, 2))]
    whole = merge(asked(own), tmp_path / "whole").folder
    total = len(CALLS)
    for calls in range(2, total, 5):
        CALLS.clear()
        killed(asked(own), tmp_path / f"out{calls}", calls)
        done = merge(asked(own), tmp_path / f"out{calls}")
        assert raw(done.folder) == raw(whole)
        assert done.resumed == total - len(CALLS) > 0 or calls == 2


def test_an_interrupted_merge_says_that_it_goes_on(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(matrix_methods, "CALLED", [CALLS.append, interrupt])
        with pytest.raises(KeyboardInterrupt, match=r"kept in .*\.out\.polymerge-partial: the same merge goes on"):
            merge(asked(models), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    CALLS.clear()
    done = merge(asked(models), tmp_path / "out")
    assert done.resumed == 5
    assert len(CALLS) == 9


def test_the_command_line_says_so_too(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_methods, "CALLED", [CALLS.append, interrupt])
    recipe = recipe_file(asked(models), tmp_path / "recipe.yaml")
    ran = cli("merge", recipe, "-o", tmp_path / "out", "--no-verify", "--threads", "1")
    assert ran.status == 1
    assert f"interrupted; what is finished is kept in {tmp_path}/.out.polymerge-partial: the same merge goes" in ran.err
    again = cli("merge", recipe, "-o", tmp_path / "out", "--no-verify")
    assert again.status == 0, again.err
    assert "went on where it was stopped: 5 matrices were finished" in again.out


@pytest.mark.parametrize(("calls", "stages", "matrices"), [(1, 1, 0), (6, 1, 0), (15, 2, 0), (20, 2, 5)])
def test_stages_that_were_killed_go_on(
    calls: int, stages: int, matrices: int, models: list[Path], tmp_path: Path
) -> None:
    whole = raw(merge(in_stages(models), tmp_path / "whole").folder)
    assert len(CALLS) == 28
    CALLS.clear()
    killed(in_stages(models), tmp_path / "out", calls)
    told = Told()
    done = merge(in_stages(models), tmp_path / "out", progress=told)
    assert raw(done.folder) == whole
    assert (done.resumed_stages, done.resumed) == (stages, matrices)
    assert len(CALLS) == 28 - (calls - 1), "also the matrices of a stage that was not finished"
    assert leftovers(tmp_path) == []
    assert told.bytes[-1][0] == told.bytes[-1][1]
    assert [done for done, _, _ in told.of_matrices] == sorted(done for done, _, _ in told.of_matrices)
    assert told.of_matrices[-1] == (28, 28, pytest.approx(1))


def test_stages_that_were_killed_begin_anew_where_something_changed(models: list[Path], tmp_path: Path) -> None:
    own = [perturbed(model, tmp_path / model.name, seed=7) for model in models]
    for number, change in enumerate(("settings", "an input of the first", "an output")):
        CALLS.clear()
        out = tmp_path / f"out{number}"
        work, recipe = killed(in_stages(own), out, 20), in_stages(own)
        if change == "settings":
            recipe["stages"][2]["parameters"] = {"scale": 0.5}
        elif change == "an input of the first":
            file = own[1] / "model.safetensors"
            save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        else:
            (work / "stages/first/model.safetensors").write_bytes(b"half")
        done = merge(recipe, out)
        assert (done.resumed_stages, done.resumed) == (1 if change == "an output" else 0, 0), change
        assert raw(done.folder) == raw(merge(recipe, tmp_path / f"whole{number}").folder), change
        assert not list(tmp_path.glob(".out*"))


def test_stages_that_are_interrupted_say_what_they_keep(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_methods, "CALLED", [CALLS.append, interrupt])
    recipe = recipe_file(in_stages(models), tmp_path / "recipe.yaml")
    ran = cli("merge", recipe, "-o", tmp_path / "out", "--no-verify", "--threads", "1")
    assert ran.status == 1
    kept = f"interrupted; what is finished is kept in {tmp_path}/.out.polymerge-partial: the same merge goes on"
    assert kept in " ".join(ran.err.split())
    again = cli("merge", recipe, "-o", tmp_path / "out", "--no-verify")
    assert again.status == 0, again.err
    assert "went on where it was stopped: 1 stage was finished" in again.out
    monkeypatch.setattr("polymerge.engine.executor.Execution.run", lambda *_: interrupt_at_once())
    assert cli("merge", recipe, "-o", tmp_path / "other", "--no-verify").status == 1
    assert not list(tmp_path.glob(".other*")), "nothing was finished"


def interrupt_at_once() -> None:
    raise KeyboardInterrupt


class Told:
    """A progress that hears of matrices, too."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []
        self.of_matrices: list[tuple[int, int, float]] = []

    def __call__(self, done: int, total: int) -> None:
        self.bytes.append((done, total))

    def matrices(self, done: int, total: int, share: float) -> None:
        self.of_matrices.append((done, total, share))


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_is_told_matrix_by_matrix(threads: int, models: list[Path], tmp_path: Path) -> None:
    told = Told()
    plan = merge(asked(models), tmp_path / "out", progress=told, threads=threads).plan
    assert told.bytes[-1] == (plan.size, plan.size)
    counts, shares = [done for done, _, _ in told.of_matrices], [share for _, _, share in told.of_matrices]
    assert counts == [*range(15)]
    assert {total for _, total, _ in told.of_matrices} == {14}
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, pytest.approx(1))
    if threads == 1:
        each = [one.seconds / one.count for _, one in decomposed(plan) for _ in range(one.count)]
        assert len(set(each)) > 1
        assert shares[1:] == pytest.approx([sum(each[:count]) / sum(each) for count in range(1, 15)])


def test_what_an_earlier_run_finished_tells_nothing_of_the_time_left(models: list[Path], tmp_path: Path) -> None:
    killed(asked(models), tmp_path / "out", 9)
    told = Told()
    merge(asked(models), tmp_path / "out", progress=told, threads=1)
    assert [done for done, _, _ in told.of_matrices] == [*range(15)]
    assert [share for _, _, share in told.of_matrices][:9] == [0.0] * 9
    assert 0 < told.of_matrices[9][2] < told.of_matrices[10][2] < 1
    assert told.of_matrices[-1][2] == pytest.approx(1)


def test_the_command_line_shows_matrices(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymerge.cli.progress._SECONDS_BETWEEN_LINES", 0.0)
    ran = cli("merge", recipe_file(asked(models), tmp_path / "recipe.yaml"), "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 0, ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("merging: ")]
    assert lines[0] == "merging: 0 of 14 matrices"
    assert [line for line in lines if line.startswith("merging: 7 of 14 matrices, ") and line.endswith(" left")]


def test_an_error_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    own = [models[0], models[1], perturbed(models[2], tmp_path / "spoilt", seed=3)]
    tensors = load_file(own[2] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, own[2] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN"):
        merge(asked(own), tmp_path / "out")
    assert leftovers(tmp_path) == []
