"""Scored searches with one of Optuna's samplers, which go on as if they had not been stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import polymerge
from polymerge.tuning import trials
from polymerge.tuning.knobs import Knob
from polymerge.tuning.space import Space, make_space
from polymerge.tuning.trials import SAMPLERS, Scoring, run_trials
from running import recipe_file
from search_made import done, outcome, prompts_file, recipe, refused, words


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path / "prompts", 6)


def test_another_scorer_or_other_values_begin_a_study_of_their_own(prompts: Path, tmp_path: Path) -> None:
    random = ("--sampler", "random", "--trials", "2")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0,1.5", *random))
    first = outcome(tmp_path / "run")
    done(*words(tmp_path, prompts, "--scorer", "letter", "--vary", "weight=0,1.5", *random))
    assert outcome(tmp_path / "run")["scorer"] == "letter"
    assert outcome(tmp_path / "run")["scores"] != first["scores"]
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0.2,0.4", *random))
    assert set(outcome(tmp_path / "run")["values"]) <= {0.2, 0.4}
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0,1.5", *random))
    assert outcome(tmp_path / "run") == first


def test_searches_that_share_a_storage_do_not_share_scores(prompts: Path, tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--sampler", "random", "--trials", "2")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0:1", *storage, run="one"))
    recipe_file(recipe("dare_linear", parameters={"density": 0.1}), tmp_path / "recipe.yaml")
    done(*words(tmp_path, prompts, "--scorer", "exact", "--vary", "weight=0:1", *storage, run="two"))
    assert len(list((tmp_path / "two" / "candidates").iterdir())) == 2


@pytest.mark.parametrize("storage", ["foo", "sqlite:////nowhere/x.db"])
def test_a_storage_that_cannot_be_opened(storage: str, prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--sampler", "random", "--vary", "weight=0:1", "--storage", storage)
    refused(f"--storage {storage}", *words(tmp_path, prompts, *more))


def space_of(**spans: tuple[float, float]) -> Space:
    knobs = [Knob(name, span=span) for name, span in spans.items()]
    return make_space(polymerge.read_recipe(recipe("ties")), knobs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_as_if_it_had_not_been_stopped(sampler: str, tmp_path: Path) -> None:
    space = space_of(weight=(0, 1), density=(0.1, 1))

    def objective(point: tuple[Any, ...]) -> float:
        return -((point[0] - 0.3) ** 2) - (point[1] - 0.7) ** 2

    def stop(_: tuple[Any, ...]) -> float:
        raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    few, more, every = (Scoring("exact", sampler, count) for count in (5, 6, 14))
    expected = run_trials(space, every, objective, name="n", folder=whole)
    run_trials(space, few, objective, name="n", folder=parts)
    with pytest.raises(KeyboardInterrupt):
        run_trials(space, more, stop, name="n", folder=parts)
    assert run_trials(space, every, objective, name="n", folder=parts) == expected
    assert len(expected) == 14


def test_a_sampler_s_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "find_spec", lambda name: None if name == "cmaes" else name)
    with pytest.raises(polymerge.PolymergeError, match=r"needs cmaes: pip install 'polymerge\[optuna\]'"):
        run_trials(space_of(weight=(0, 1)), Scoring("exact", "cmaes", 1), lambda _: 0.0, name="n", folder=tmp_path)


def test_both_ends_of_a_range_are_planned_before_anything_is_drawn(prompts: Path, tmp_path: Path) -> None:
    recipe_file(recipe("ties"), tmp_path / "recipe.yaml")
    more = ("--scorer", "exact", "--sampler", "random", "--vary", "density=0.1:3")
    refused("density", *words(tmp_path, prompts, *more))
    assert not (tmp_path / "run").exists()


def test_a_sampler_goes_on_as_if_it_had_not_been_stopped(prompts: Path, tmp_path: Path) -> None:
    more = ("--vary", "weight=0:1.5", "--vary", "scale=0.5:1.5:0.25", "--vary", "normalize=true,false", "--scorer",
            "exact", "--sampler", "tpe", "--samples", "6")  # fmt: skip
    done(*words(tmp_path, prompts, *more, "--trials", "5", run="whole"))
    done(*words(tmp_path, prompts, *more, "--trials", "2", run="parts"))
    done(*words(tmp_path, prompts, *more, "--trials", "5", run="parts"))
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole == parts
    assert len(whole["scores"]) == 5
    assert whole["chosen"] == whole["values"][whole["scores"].index(max(whole["scores"]))]


def test_a_trial_that_was_killed_under_way_is_done_again(prompts: Path, tmp_path: Path) -> None:
    import optuna

    more = ("--vary", "weight=0:1.5", "--scorer", "exact", "--sampler", "random", "--samples", "6", "--trials", "3")
    done(*words(tmp_path, prompts, *more, run="whole"))
    done(*words(tmp_path, prompts, *more[:-1], "1", run="parts"))
    journal = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "parts" / "optuna.journal"))
    )
    (name,) = optuna.get_all_study_names(journal)
    study = optuna.load_study(study_name=name, storage=journal, sampler=optuna.samplers.RandomSampler(seed=3))
    study.ask().suggest_float("weight", 0.0, 1.5)  # begun, and never told of
    done(*words(tmp_path, prompts, *more, run="parts"))
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")
