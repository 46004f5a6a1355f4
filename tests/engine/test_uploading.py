"""An output in an object store has the bytes of one in a folder, gets its name last, and is gone on with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import save_file

import polymerge
from polymerge.checkpoints.upload import Upload
from polymerge.errors import OutputError, PolymergeError, RecipeError, StoppedError
from polymerge.paths import own_cache
from running import cli, leftovers, recipe_file
from tiny import build, load, perturbed

OUT = "memory://bucket/models/merged"
PARTIAL = "/bucket/models/.merged.polymerge-partial"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


@pytest.fixture
def store() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def recipe(models: list[Path], **parameters: Any) -> dict[str, Any]:
    given = {"weight": 0.6, "density": 0.5, "trim": "model", **parameters}
    told = [{"model": str(one)} for one in models[1:]]
    return {"merge_method": "ties", "base_model": str(models[0]), "models": told, "parameters": given}


def merge(recipe: Any, out: str | Path, **more: Any) -> Any:
    return polymerge.merge(recipe, out, **{"check": False, "shard_size": "10KB", "command": ["x"], **more})


def stored(fs: Any, root: str = "/bucket/models/merged") -> dict[str, str]:
    return {path.removeprefix(f"{root}/"): digest(fs.cat_file(path)) for path in fs.find(root)}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lying(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in folder.rglob("*")}


def test_the_bytes_are_those_of_a_folder(models: list[Path], store: Any, tmp_path: Path) -> None:
    near = lying(merge(recipe(models), tmp_path / "merged").folder)
    made = merge(recipe(models), OUT, check=True)
    assert made.folder == OUT
    assert made.verification is not None
    assert made.verification.passed
    far = stored(store)
    assert far.keys() == near.keys()
    assert {name for name in near if near[name] != far[name]} <= {"polymerge.json"}  # the moment that it was made
    assert len([name for name in near if name.endswith(".safetensors")]) > 3
    assert store.find(PARTIAL) == []
    assert not [path for path in own_cache("uploads").rglob("*") if path.is_file()]
    reading = {**recipe(models), "template": OUT, "base_model": OUT}
    for place in (OUT, f"{OUT}/inside", "memory://bucket/models"):
        with pytest.raises(OutputError, match=f"is, holds or lies in the input {OUT}"):
            merge(reading, place, force=True)
    again = merge(reading, tmp_path / "again")
    assert again.plan.inputs[0].source == OUT


def test_it_gets_its_name_last(models: list[Path], store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order, copy = list[str](), type(store).cp_file

    def copying(self: Any, one: str, other: str, **more: Any) -> None:
        order.append(other.rpartition("/")[2])
        copy(self, one, other, **more)

    monkeypatch.setattr(type(store), "cp_file", copying)
    merge(recipe(models), OUT)
    weights = [name for name in order if name.endswith(".safetensors")]
    assert set(order[: len(weights)]) == set(weights)
    assert order[-2:] == ["model.safetensors.index.json", "config.json"]


def test_a_run_that_was_stopped_goes_on(
    models: list[Path], store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near, put, sent = lying(merge(recipe(models), tmp_path / "merged").folder), type(store).put_file, list[str]()

    def failing(self: Any, file: str, place: str, **more: Any) -> None:
        if len(sent) == 3:
            raise ConnectionResetError("reset by peer")
        sent.append(place)
        put(self, file, place, **more)

    monkeypatch.setattr("polymerge.engine.finished.YOUNG", 0)  # so that the inputs count as written long ago
    monkeypatch.setattr(type(store), "put_file", failing)
    with pytest.raises(StoppedError, match=r"reset by peer.*what is finished is kept in .*the same merge goes on"):
        merge(recipe(models), OUT)
    assert not store.exists("/bucket/models/merged")
    assert {place.rpartition("/")[0] for place in sent} == {PARTIAL}
    monkeypatch.setattr(type(store), "put_file", put)
    made = merge(recipe(models), OUT)
    assert made.resumed == 3
    far = stored(store)
    assert {name for name in near if near[name] != far[name]} <= {"polymerge.json"}
    assert store.find(PARTIAL) == []


def test_a_run_that_was_stopped_while_publishing_goes_on(
    models: list[Path], store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = type(store).cp_file

    def failing(self: Any, one: str, other: str, **more: Any) -> None:
        if other.endswith("index.json"):
            raise ConnectionResetError("reset by peer")
        copy(self, one, other, **more)

    monkeypatch.setattr("polymerge.engine.finished.YOUNG", 0)
    monkeypatch.setattr(type(store), "cp_file", failing)
    with pytest.raises(StoppedError, match="the same merge goes on"):
        merge(recipe(models), OUT)
    assert not store.exists("/bucket/models/merged/config.json")
    monkeypatch.setattr(type(store), "cp_file", copy)
    made = merge(recipe(models), OUT)
    assert made.resumed == len([name for name in stored(store) if name.endswith(".safetensors")])
    assert store.exists("/bucket/models/merged/config.json")


def test_what_fails_leaves_nothing(models: list[Path], store: Any, tmp_path: Path) -> None:
    bad, tensors = tmp_path / "bad", load(models[1])
    shutil.copytree(models[1], bad)
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolymergeError, match="NaN"):
        merge(recipe([models[0], models[2], bad]), OUT)
    told = [{"model": str(one), "parameters": {"weight": 0.5}} for one in (bad, models[2])]
    copied = {"merge_method": "linear", "models": told, "exclude": ["text.norm*"]}
    with pytest.raises(OutputError, match=r"did not pass its check and was removed: NaN or infinity in 1 tensor"):
        merge(copied, OUT)
    assert not store.exists("/bucket/models/merged")
    assert not store.exists(PARTIAL)
    assert not [path for path in own_cache("uploads").rglob("*") if path.is_file()]


def test_an_earlier_output_is_replaced_only_if_asked_for(models: list[Path], store: Any) -> None:
    store.pipe_file("/bucket/models/merged/config.json", b"{}")
    store.pipe_file("/bucket/models/merged/old.safetensors", b"old")
    with pytest.raises(OutputError, match=f"{OUT}: exists already"):
        merge(recipe(models), OUT)
    merge(recipe(models), OUT, force=True)
    assert "old.safetensors" not in stored(store)
    assert store.cat_file("/bucket/models/merged/config.json") != b"{}"


def test_a_run_of_another_machine_is_left_alone(models: list[Path], store: Any) -> None:
    store.pipe_file(f"{PARTIAL}/owner", b"elsewhere /home/me")
    with pytest.raises(OutputError, match="a run on machine elsewhere writes it, or was killed"):
        merge(recipe(models), OUT)
    merge(recipe(models), OUT, force=True)
    assert not store.exists(PARTIAL)


def test_what_cannot_be_uploaded_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="torch files are converted from whole safetensors files"):
        merge(recipe(models), OUT, file_format="torch")
    first = {**recipe(models), "name": "first"}
    with pytest.raises(RecipeError, match="the outputs of stages need a disk"):
        merge(
            {
                "stages": [
                    first,
                    {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1}}]},
                ]
            },
            OUT,
        )
    with pytest.raises(RecipeError, match="is not the URL of a folder in a bucket"):
        Upload.to("s3://bucket", force=False)
    told = cli("merge", recipe_file(recipe(models), tmp_path / "recipe.yaml"), "-o", "nope://bucket/out")
    assert told.status == 2
    assert "nope://bucket/out: fsspec cannot open it: Protocol not known: nope" in told.err
    assert leftovers(tmp_path) == []
