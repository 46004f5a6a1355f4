"""Merges from the hub where other things go on: another cache, files that are gone, little room, old trainings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import polymerge
from hub_standin import NAMES, Standin, empty_cache, shard, sharded
from polymerge.checkpoints import beside, prefetch
from polymerge.checkpoints import hub as hub_module
from polymerge.checkpoints.folder import bring
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.prefetch import Prefetch
from polymerge.engine.opening import beside_template, fetch, files_read, opened
from polymerge.errors import PolymergeError
from polymerge.planning import Plan
from running import linear


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    with empty_cache(monkeypatch, tmp_path) as server:
        for seed, name in enumerate(("one", "other")):
            server.publish(f"a/{name}", sharded(tmp_path / name, seed))
        yield server


@pytest.fixture
def made(hub: Standin) -> Plan:  # noqa: ARG001 (it has to be there)
    plan = polymerge.plan(linear("a/one", "a/other"))
    assert isinstance(plan, Plan)
    return plan


def test_another_cache_does_not_turn_the_links_of_a_merge_that_is_running(
    made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(made)
    first = Path(made.inputs[0].path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    hub_module._seen.clear()
    second = locate("a/one")
    assert first != second
    for name in ("config.json", "tokenizer.json", shard(NAMES[0])):
        assert (first / name).is_file()
    assert not (second / shard(NAMES[0])).exists()


@pytest.mark.parametrize("local", [True, False])
def test_an_output_is_not_made_without_a_file_that_is_gone(
    made: Plan, tmp_path: Path, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = polymerge.plan(linear(str(tmp_path / "one"), "a/other")) if local else made
    place = Path(plan.inputs[0].path) / "tokenizer.json"
    copy = beside.copy_files

    def late(*arguments: Any) -> None:
        place.unlink()
        place.symlink_to(tmp_path / "nowhere")
        copy(*arguments)

    monkeypatch.setattr("polymerge.engine.writers.copy_files", late)
    with pytest.raises(PolymergeError, match=r"tokenizer.json: is a broken link"):
        polymerge.merge(plan, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [shard(NAMES[0]), "tokenizer.json", "config.json"])
def test_a_blob_that_changes_after_it_was_fetched_ends_the_merge(
    made: Plan, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(made.inputs[0].path) / name
    count = prefetch.Prefetch.finish

    def late(self: Prefetch) -> None:
        count(self)
        file.write_bytes(file.read_bytes()[:-1] + b" ")

    monkeypatch.setattr(prefetch.Prefetch, "finish", late)
    with pytest.raises(PolymergeError, match=f"{name}: was written to while"):
        polymerge.merge(made, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_what_training_left_is_neither_fetched_nor_copied(hub: Standin, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "trained", 1)
    left = ("checkpoint-500/tokenizer.json", "last-checkpoint/global_step100/states.pt", "rng_state_0.pth",
            "trainer_state.json", "runs/events.json")  # fmt: skip
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    hub.publish("a/trained", folder)
    bring("a/trained", locate("a/trained"))
    for source in (str(folder), "a/trained"):
        out = polymerge.merge(linear(source, source), tmp_path / source.replace("/", "_"), check=False).folder
        assert (out / "tokenizer.json").is_file()
        assert not [name for name in left if (out / name).exists()]
    assert not [request.path for request in hub.requests for name in left if request.path.endswith(name)]


def test_one_disk_has_to_hold_what_is_fetched_and_what_is_written(
    made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [*beside_template(made), *files_read(made, [opened(entry).entries for entry in made.inputs])]
    coming = Prefetch(files).size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=coming + made.size // 2))
    with pytest.raises(PolymergeError, match="kB for what is fetched to the same disk"):
        polymerge.merge(made, tmp_path / "out", check=False)
    usage = usage._replace(free=coming + 4 * made.size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    polymerge.merge(made, tmp_path / "out", check=False)
