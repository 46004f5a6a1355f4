"""polymerge compare: the table, the averages, the gains and how sure they are."""

from __future__ import annotations

import csv
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymerge.evaluation.comparison import Comparison, compare_files
from polymerge.evaluation.comparison_text import gains_csv, scores_csv
from polymerge.evaluation.gains import interval, resampled_means
from polymerge.evaluation.results import FORMAT, VERSION
from running import cli


def task(
    samples: list[float] | None, group: str | None = "seen", score: float | None = None, **more: Any
) -> dict[str, Any]:
    shares = {str(place): share for place, share in enumerate(samples)} if samples is not None else None
    mean = 100 * sum(samples) / len(samples) if samples else None
    total = len(samples) if samples else 0
    return {"score": score if score is not None else mean, "group": group, "samples": shares, "total": total, **more}


def results(file: Path, name: str, **tasks: Any) -> Path:
    value = {"format": FORMAT, "version": VERSION, "tool": "polymerge", "model": {"name": name}, "tasks": tasks}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def marks(seed: int, share: float, count: int = 200) -> list[float]:
    dice = random.Random(seed)
    return [float(dice.random() < share) for _ in range(count)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two parents and a merged model at two seen and two unseen tasks; the merged one is better at one of them."""
    lots = {"VQAv2": "seen", "REC": "seen", "AOKVQA": "unseen", "TabMWP": "unseen"}
    shares = {"a": 0.5, "b": 0.5, "merged": 0.55}
    made = []
    for seed, (name, share) in enumerate(shares.items()):
        tasks = {
            one: task(marks(10 * seed + place, share + (0.4 if (name, one) == ("merged", "REC") else 0)), group)
            for place, (one, group) in enumerate(lots.items())
        }
        made.append(results(tmp_path / name / "results.json", name, **tasks))
    return made


def scores(compared: Comparison, model: str) -> dict[str, float | None]:
    return {column.name: compared.scores[model, column.name] for column in compared.columns}


def test_averages_are_over_seen_and_unseen_tasks(files: list[Path]) -> None:
    compared = compare_files(files)
    assert [column.name for column in compared.columns] == [
        "VQAv2", "REC", "seen", "AOKVQA", "TabMWP", "unseen",
    ]  # fmt: skip
    for model in ("a", "b", "merged"):
        found = scores(compared, model)
        assert found["seen"] == pytest.approx((found["VQAv2"] + found["REC"]) / 2)  # type: ignore[operator]
        assert found["unseen"] == pytest.approx((found["AOKVQA"] + found["TabMWP"]) / 2)  # type: ignore[operator]
    assert compared.gains == ()


def test_gains_over_the_mean_of_the_parents_and_over_the_template(files: list[Path]) -> None:
    compared = compare_files(files, parents=["a", "b"], template="a", resamples=2000)
    gains = {(gain.model, gain.column, gain.over): gain for gain in compared.gains}
    assert {model for model, _, _ in gains} == {"merged"}
    a, b, merged = (scores(compared, name) for name in ("a", "b", "merged"))
    for column in compared.columns:
        over = gains["merged", column.name, ("a", "b")]
        assert over.value == pytest.approx(merged[column.name] - (a[column.name] + b[column.name]) / 2)  # type: ignore[operator]
        assert gains["merged", column.name, ("a",)].value == pytest.approx(merged[column.name] - a[column.name])  # type: ignore[operator]
        assert over.low is not None
        assert over.high is not None
        assert over.low <= over.value <= over.high
    assert gains["merged", "REC", ("a", "b")].within_noise is False
    assert gains["merged", "TabMWP", ("a", "b")].within_noise is True
    average, single = gains["merged", "seen", ("a", "b")], gains["merged", "VQAv2", ("a", "b")]
    assert average.high - average.low < single.high - single.low  # type: ignore[operator]


def test_the_bootstrap_is_that_of_the_definition() -> None:
    few = np.array([1.0, 0.0, -1.0])
    every = [np.mean(drawn) for drawn in product(few, repeat=3)]  # all 27 resamples are equally likely
    means = resampled_means([few, 2 * few], "task", 60_000, 3)
    values, counts = np.unique(means[0].round(9), return_counts=True)
    expected = {float(value): np.mean(np.isclose(every, value)) for value in values}
    assert len(expected) == len(np.unique(np.round(every, 9)))
    for value, count in zip(values, counts, strict=True):
        assert count / 60_000 == pytest.approx(expected[float(value)], abs=0.01)
    np.testing.assert_allclose(means[1], 2 * means[0])  # the same questions for all
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    differences = np.random.default_rng(1).normal(0.1, 1, 400)
    low, high = interval(resampled_means([differences], "task")[0])
    error = differences.std() / 20
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_pairing_counts(tmp_path: Path) -> None:
    # two models that are right and wrong together: a small gain is sure, though each score alone is not
    first = marks(1, 0.5, 400)
    second = [1.0 if place % 20 == 0 else share for place, share in enumerate(first)]
    made = [results(tmp_path / f"{name}.json", name, T=task(lot, None)) for name, lot in (("a", first), ("b", second))]
    (gain,) = compare_files(made, template="a").gains
    assert 0 < gain.value < 5
    assert gain.within_noise is False
    shuffled = random.Random(1).sample(second, len(second))
    results(tmp_path / "b.json", "b", T=task(shuffled, None))
    (alone,) = compare_files(made, template="a").gains
    assert alone.value == pytest.approx(gain.value)
    assert alone.within_noise is True


def test_order_of_files_and_other_models_change_nothing(files: list[Path], tmp_path: Path) -> None:
    one = compare_files(files, parents=["a", "b"], resamples=500)
    more = results(tmp_path / "c.json", "c", VQAv2=task(marks(99, 0.5)), Other=task(marks(98, 0.5), None))
    other = compare_files([more, *files[::-1]], parents=["a", "b"], resamples=500)
    gains = {(gain.model, gain.column): gain for gain in other.gains}
    for gain in one.gains:
        assert gains[gain.model, gain.column] == gain
    assert compare_files(files, parents=["a", "b"], resamples=500, seed=2).gains != one.gains


def test_other_questions_have_no_interval(tmp_path: Path) -> None:
    made = [
        results(tmp_path / "a.json", "a", T=task(marks(1, 0.5, 20), None)),
        results(tmp_path / "b.json", "b", T=task(marks(2, 0.5, 19), None)),
        results(tmp_path / "c.json", "c", T=task(None, None, 50.0)),
    ]
    b, c = compare_files(made, template="a").gains
    assert (b.low, b.within_noise) == (None, None)
    assert b.reason == "T: b and a did not answer the same questions"
    assert c.reason == "T: c has no score for each question"
    said = cli("compare", *made, "--template", "a")
    assert "No interval: T: c has no score for each question." in said.out


def test_scores_of_the_whole_set_are_marked(tmp_path: Path) -> None:
    made = [
        results(tmp_path / "a.json", "a", Flickr30k=task(marks(1, 0.5), score=60.0)),
        results(tmp_path / "b.json", "b", Flickr30k=task(marks(2, 0.5), score=61.0)),
    ]
    (gain,) = compare_files(made, template="a").gains
    assert gain.rough
    assert gain.value == 1.0
    assert (gain.low + gain.high) / 2 == pytest.approx(1.0, abs=1.0)  # type: ignore[operator]
    assert gain.within_noise
    assert "~[" in cli("compare", *made, "--template", "a").out


def test_points_are_neither_averaged_nor_given_an_interval(tmp_path: Path) -> None:
    made = [
        results(
            tmp_path / f"{name}.json",
            name,
            mme=task(None, None, 1400.0 + place, unit="points"),
            ok=task([1.0, 0.0], None),
        )
        for place, name in enumerate("ab")
    ]
    compared = compare_files(made, template="a")
    assert [column.name for column in compared.columns] == ["mme", "ok"]
    assert [gain.low is None for gain in compared.gains] == [True, False]


def test_a_model_without_a_task_has_no_average(files: list[Path], tmp_path: Path) -> None:
    fewer = results(tmp_path / "c.json", "c", VQAv2=task(marks(5, 0.5)))
    compared = compare_files([*files, fewer], parents=["a", "b"])
    assert scores(compared, "c")["seen"] is None
    assert {gain.column for gain in compared.gains if gain.model == "c"} == {"VQAv2"}


def test_results_of_one_model_are_put_together(tmp_path: Path) -> None:
    one = results(tmp_path / "1.json", "a", VQAv2=task([1.0]))
    two = results(tmp_path / "2.json", "a", REC=task([0.0]))
    compared = compare_files([one, two])
    assert compared.models == ("a",)
    assert scores(compared, "a") == {"VQAv2": 100.0, "REC": 0.0, "seen": 50.0}
    ran = cli("compare", one, two, one)
    assert ran.status == 2
    assert "two results of the model 'a' have VQAv2" in ran.err


def test_what_is_printed_and_written(files: list[Path], tmp_path: Path) -> None:
    folders = [file.parent for file in files]
    told = ("--parents", "a,b", "--template", "a", "--resamples", "300")
    ran = cli("compare", *folders, *told, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "gain over the mean of a, b" in ran.out
    assert "gain over a" in ran.out
    assert "within noise" in ran.out
    assert "95 %, paired bootstrap over questions, 300 resamples, seed 1" in ran.out
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "compare.md", "compare.csv", "gains.csv", "compare.png", "compare.svg",
    }  # fmt: skip
    table = list(csv.reader((out / "compare.csv").read_text().splitlines()))
    compared = compare_files(folders)
    assert table[0] == ["model", "VQAv2", "REC", "seen", "AOKVQA", "TabMWP", "unseen"]
    assert [row[0] for row in table[1:]] == ["a", "b", "merged"]
    assert float(table[3][2]) == pytest.approx(compared.scores["merged", "REC"])
    gains = list(csv.DictReader((out / "gains.csv").read_text().splitlines()))
    assert len(gains) == 12
    assert {row["within_noise"] for row in gains} == {"true", "false"}
    text = (out / "compare.md").read_text()
    assert "| model | VQAv2 | REC | seen | AOKVQA | TabMWP | unseen |" in text
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert cli("compare", *folders, *told, "-o", out).status == 0
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_failed_questions_and_scores_that_could_not_be_had_are_told(tmp_path: Path) -> None:
    lot = {"VQAv2": task([1.0, 0.0], failed=1), "VizWiz": task(None, reason="Java is not there")}
    ran = cli("compare", results(tmp_path / "a.json", "a", **lot))
    assert ran.status == 0, ran.err
    assert "Note: a: VQAv2: 1 of 2 questions have no answer and count as wrong." in ran.out
    assert "Note: a: VizWiz: no score: Java is not there." in ran.out


def test_the_numbers_of_the_published_scripts(tmp_path: Path) -> None:
    made = [
        results(tmp_path / f"{n}.json", n, VQAv2=task([1.0, 0.0], as_published=70.0 + p)) for p, n in enumerate("ab")
    ]
    ran = cli("compare", *made, "--as-published", "--template", "a")
    assert "70.00" in ran.out
    assert "50.00" not in ran.out
    assert "+1.00" in ran.out
    assert "the published score is not made of samples" in ran.out


HEAD = '{"format": "polymerge results", "version": 1, "model": {"name": "a"}, "tasks": '


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is not JSON"),
        ("[]", "expected object, got array"),
        ("{}", "is no results file"),
        ('{"format": "polymerge results", "version": 9}', "is of version 9 of the format, this polymerge reads 1"),
        ('{"format": "polymerge results", "version": 1, "model": {}, "tasks": {}}', "model: name is missing"),
        (HEAD + "{}}", "tasks is empty"),
        (HEAD + '{"T": {"score": NaN}}}', "tasks['T'].score: expected float >= -1e+300, got NaN"),
        (HEAD + '{"T": 3}}', "tasks['T']: expected object, got 3"),
        (HEAD + '{"T": {"samples": {"1": "x"}}}}', "tasks['T'].samples[...]: expected float, got str"),
        (HEAD + '{"T": {"total": -1, "group": "sen"}}}', "tasks['T'].total: expected int >= 0, got -1"),
    ],
)
def test_results_that_are_broken(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(content, encoding="utf-8")
    ran = cli("compare", file)
    assert ran.status == 2
    assert told in ran.err
    assert str(file) in ran.err


def test_everything_wrong_is_said_at_once(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = cli("compare", *files, tmp_path / "none.json", tmp_path / "empty", "--parents", "a,merge", "--template", "x")
    assert ran.status == 2
    for told in (
        "none.json: cannot be read",
        "empty: has no results.json",
        "--parents: there are no results of 'merge'. Did you mean 'merged'?",
        "template: there are no results of 'x'. Known: a, b, merged.",
    ):
        assert told in ran.err


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    names = ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "\uff1dx", "plain -x", 'a,"b']
    made = [results(tmp_path / str(place), name, t=task([0.0, 1.0])) for place, name in enumerate(names)]
    better = results(tmp_path / "better", "=better", **{"=t": task([0.0, 0.0]), "t": task([0.0, 0.0])})
    compared = compare_files([*made, better], template="plain -x", resamples=20)
    head, *rows = csv.reader(scores_csv(compared).splitlines(keepends=True))
    assert head == ["model", "t", "'=t", "seen"]
    shown = [name.replace("\r", " ") for name in names]
    assert [row[0] for row in rows] == [*(f"'{name}" for name in shown[:7]), *shown[7:], "'=better"]
    gains = list(csv.DictReader(gains_csv(compared).splitlines(keepends=True)))
    assert {row["gain"] for row in gains} == {"0", "-50"}  # numbers stay numbers
    assert [row["model"] for row in gains if row["gain"] == "-50"] == ["'=better"]


def test_everything_is_printed_as_json(files: list[Path], tmp_path: Path) -> None:
    told = ("--parents", "a,b", "--template", "a")
    ran = cli("compare", *files, *told, "--json", "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    compared = compare_files(files, parents=["a", "b"], template="a")
    assert set(report["scores"]) == set(compared.models)
    for model in compared.models:
        known = {column.name: compared.scores[model, column.name] for column in compared.columns}
        assert report["scores"][model] == known
    assert len(report["gains"]) == len(compared.gains)
    assert all(gain["within_noise"] in (True, False, None) for gain in report["gains"])
    assert (report["parents"], report["template"], report["as_published"]) == (["a", "b"], "a", False)
    assert "compare.md" in ran.err  # what was written is said beside it
