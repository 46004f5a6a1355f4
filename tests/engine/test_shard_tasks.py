"""Shards made one by one are those of a whole merge, and what a task must not trust is made again."""

from __future__ import annotations

from dataclasses import replace
from math import fsum
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import polymerge
from polymerge.checkpoints.identity import sha256_of
from polymerge.engine.opening import opened_inputs
from polymerge.engine.shard_tasks import Job, ShardMaker, looked_at, packages_of
from polymerge.engine.statistics import _terms, added_up
from polymerge.engine.uploading import steps_of
from polymerge.engine.whole_models import Wholes
from polymerge.engine.writers import writer_of
from polymerge.errors import OutputError
from polymerge.planning import make_plan
from running import checkpoint, small_llama

NOTHING = Wholes({}, {})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    one, other = (checkpoint(tmp_path / name, small_llama(seed)) for seed, name in enumerate(("one", "other")))
    plan = make_plan({"merge_method": "linear", "models": [str(one), str(other)], "parameters": {"weight": 0.5}})
    shards = writer_of(plan, opened_inputs(plan), 150, as_torch=False).shards
    for name in ("parts", "new"):
        (tmp_path / name).mkdir()
    return Job(plan, shards, tmp_path / "parts", tmp_path / "new", "cpu", 1, 1 << 20, ())


def test_shards_made_apart_are_those_of_a_merge(job: Job, tmp_path: Path) -> None:
    whole = polymerge.merge(job.plan, tmp_path / "whole", shard_size="150B", check=False).folder
    maker = ShardMaker(job)
    assert len(job.shards.names) > 2
    steps = [steps_of(job.plan, job.shards, shard) for shard in range(len(job.shards.names))]
    assert [step for of in steps for step in of] == list(job.plan.steps)
    for shard, name in enumerate(job.shards.names):
        made = maker.make(shard, NOTHING, None)
        assert made.file is not None
        assert made.file.read_bytes() == (whole / name).read_bytes()
        assert made.digest == sha256_of(whole / name)


def test_an_earlier_attempt_is_taken_away(job: Job) -> None:
    first, second = (ShardMaker(job).make(0, NOTHING, None).file for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.exists(), second.exists()) == (False, True)


def test_a_file_is_taken_only_with_its_digest(job: Job) -> None:
    made = ShardMaker(job).make(1, NOTHING, None)
    assert made.file is not None
    place = made.file.replace(job.folder / made.file.name)
    assert ShardMaker(job).make(1, NOTHING, made.digest) == made._replace(file=None, again=True)
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    assert ShardMaker(job).make(1, NOTHING, made.digest).file is not None


def test_a_machine_without_the_folders_says_which(job: Job, tmp_path: Path) -> None:
    blind = replace(job, parts=tmp_path / "nowhere")
    assert blind.unseen() == [tmp_path / "nowhere"]
    with pytest.raises(OutputError, match=r"there is no .*nowhere here, which every machine has to see"):
        ShardMaker(blind)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert job.unseen() == [tmp_path / "one"]


def test_scipy_is_compared_where_eigenvectors_decide(job: Job, tmp_path: Path) -> None:
    assert looked_at(job, packages_of(job.plan))[1].keys() == {"polymerge", "numpy"}
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("one", "other")]
    plan = make_plan({"merge_method": "iso_c", "base_model": str(tmp_path / "one"), "models": models[1:]})
    assert looked_at(job, packages_of(plan))[1].keys() == {"polymerge", "numpy", "scipy"}


def test_terms_of_parts_add_up_to_the_sum_of_all() -> None:
    random = Random(5)
    numbers = [random.uniform(-1, 1) * 2.0 ** random.randint(-80, 80) for _ in range(3000)]
    parts = [numbers[:7], numbers[7:1900], numbers[1900:]]
    terms = [_terms(part) for part in parts]
    assert all(len(of) < 12 for of in terms)
    assert fsum(one for of in terms for one in of) == fsum(numbers)
    tiny = 2.0**-70
    assert fsum(map(fsum, ([1.0, tiny], [-1.0]))) == 0  # as rounded sums would
    assert fsum([*_terms([1.0, tiny]), *_terms([-1.0])]) == tiny
    assert _terms([0.5, -0.5]) == [0.0]
    cells: Any = [np.full((2, 2), number) for number in numbers]
    assert added_up(cells)[0, 1] == fsum(numbers)
