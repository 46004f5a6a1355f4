"""The evidence over training runs: its command on models that learn nothing, its page from its result files.

The page that is checked is that of the tiny run, and docs/evidence.md where there is one.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from paths import ROOT

EVIDENCE = ROOT / "benchmarks" / "evidence"
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
DEV = ("perception", "arithmetic", "order")
SHOWN = (*DEV, "seen")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page and the results of two seeds of the smallest size.

    One seed is run; its models answer next to nothing, so both seeds get answers that are drawn. The page is written
    from these, for which nothing is to be run.
    """
    pytest.importorskip("peft")
    room = tmp_path_factory.mktemp("evidence")
    results, page, dice = room / "results", room / "page.md", random.Random(0)
    told = _run(room, 1)
    assert told.count("processor time") == 12
    for file in results.glob("*-101.json"):
        kept = json.loads(file.read_text(encoding="utf-8"))
        for seed in (101, 102):
            kept["about"]["seed"] = seed
            text = json.dumps({**kept, "rows": [_redrawn(row, dice) for row in kept["rows"]]})
            file.with_name(file.name.replace("101", str(seed))).write_text(text, encoding="utf-8")
    assert "processor time" not in _run(room, 2)
    return page, results


def _run(room: Path, seeds: int) -> str:
    """Run the command; returns what it says of its progress."""
    command = [sys.executable, str(EVIDENCE / "run.py"), "--size", "tiny", "--seeds", str(seeds), "--jobs", "1"]
    command += ["--data", str(room / "data"), "--results", str(room / "results"), "--markdown", str(room / "page.md")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=room)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _redrawn(row: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A row with other numbers of right answers."""
    counted = [name for name in ("exam", "dev", "dev by norm") if isinstance(row.get(name), dict)]
    return {
        **row,
        **{name: {of: [dice.randint(0, asked), asked] for of, (_, asked) in row[name].items()} for name in counted},
    }


@pytest.fixture(params=["tiny", "docs"])
def found(request: pytest.FixtureRequest) -> tuple[str, dict[str, list[Rows]]]:
    """A page and its rows, by experiment and seed."""
    page, results = ROOT / "docs" / "evidence.md", EVIDENCE / "results"
    if request.param == "tiny":
        page, results = request.getfixturevalue("tiny")
    elif not page.is_file():
        pytest.skip("no whole run has been kept")
    text = page.read_text(encoding="utf-8")
    seeds = [int(seed) for seed in _cell(text, "", "seeds", 1).split(",")]
    names = ("into_vlm", "two_families", "adapters")
    files = {name: [results / f"{name}-{seed}.json" for seed in seeds] for name in names}
    rows = {name: [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in own] for name, own in files.items()}
    return text, rows


def test_the_gain_of_a_language_model_follows_from_the_results(found: tuple[str, dict[str, list[Rows]]]) -> None:
    page, rows = found
    gains = []
    for own in rows["into_vlm"]:
        tried = [row for row in own if row["merge"] == "task_arithmetic"]
        best = max(tried, key=lambda row: _mean(row["dev"], DEV))
        none = next(row for row in own if row["merge"] == "none")
        gains.append(_mean(best["exam"], DEV) - _mean(none["exam"], DEV))
    caption = "Gains over the VLM as it is at the chosen weight"
    assert _cell(page, caption, "task_arithmetic", 3) == _told(gains, "+")


def test_the_regret_of_a_choice_follows_from_the_results(found: tuple[str, dict[str, list[Rows]]]) -> None:
    page, rows = found
    regrets, count = [], 0
    for own in rows["two_families"]:
        scores = {row["weight"]: _mean(row["exam"], SHOWN) for row in own if row["what"] == "scores"}
        choice = next(row for row in own if row.get("rule") == "union" and row["step"] == 1)
        regrets.append(fmean(max(scores.values()) - scores[value] for value in choice["chosen"]))
        count = choice["prompts"]
    line = next(line for line in _lines(page, "What each rule chooses") if line[0] == "union")
    assert line[2] == str(count)
    assert line[3] == _told(regrets)


def test_a_merge_of_adapters_follows_from_the_results(found: tuple[str, dict[str, list[Rows]]]) -> None:
    page, rows = found
    tasks = ("sum", "difference", "larger", "smaller")
    merged = [
        next(row for row in own if row["start"] == "common" and row["merge"] == "task_arithmetic")
        for own in rows["adapters"]
    ]
    section = page.partition("## Adapters, common start")[2]
    line = next(line for line in _lines(section, "At the searched scale") if line[0] == "task_arithmetic")
    assert line[2] == _told([_mean(row["exam"], tasks) for row in merged])


def test_every_kind_of_merge_has_its_advice_and_its_figure(tiny: tuple[Path, Path]) -> None:
    page = tiny[0].read_text(encoding="utf-8")
    top = page.partition("## What to try first")[2].partition("\n## ")[0]
    kinds = ("A language model into", "Two architectures", "Adapters, common start", "Full fine-tunes", "Weights that")
    for kind in kinds:
        assert f"**{kind}" in top
    figures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(figures) == 7
    assert all((tiny[0].parent / figure).stat().st_size > 1000 for figure in figures)


@pytest.mark.parametrize(
    ("other", "first", "told"),
    [
        ([12.0, 13.0, 12.5], "other", ["Try `other` first; expect +12.5", "Better than `plain`: other +2.0 ± 0.0"]),
        ([5.0, 15.0, 10.0], "plain", ["Try `plain` first; expect +10.5", "Not told from it: 1 of 2"]),
    ],
)
def test_the_advice_comes_from_the_numbers(
    other: list[float], first: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    from verdicts_over_seeds import advise

    scores = {"plain": [10.0, 11.0, 10.5], "other": other, "poor": [1.0, 2.0, 1.5], "random": [20.0, 21.0, 20.5]}
    advice = advise("A kind", "plain", [0.0, 0.0, 0.0], scores, ["random"])
    assert advice.first == first
    for words in [*told, "Worse than `plain`: poor -9.0 ± 0.0", "less than the control, random"]:
        assert words in advice.text()


def test_a_loss_is_no_advice_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    from verdicts_over_seeds import advise

    assert "Leave the model as it is" in advise("A kind", "plain", [9.0, 9.5], {"plain": [1.0, 1.4]}).text()
    assert "nothing follows" in advise("A kind", "plain", [9.0], {"plain": [10.0]}).text()


def _mean(exam: dict[str, list[int]], groups: tuple[str, ...]) -> float:
    return float(100 * sum(Fraction(*exam[group]) for group in groups) / len(groups))


def _told(values: list[float], sign: str = "") -> str:
    """A mean and half its t-interval, as the page has them."""
    mean, count = f"{fmean(values):{sign}.1f}", len(values)
    return mean if count < 2 else f"{mean} ± {T[count - 1] * stdev(values) / math.sqrt(count):.1f}"


def _lines(page: str, caption: str) -> list[list[str]]:
    """The rows of the first table after a caption."""
    after = page.partition(caption)[2] if caption else page
    start = after.index("|---|")
    lines = after[start:].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _cell(page: str, caption: str, row: str, column: int) -> str:
    return next(line for line in _lines(page, caption) if line[0].strip() == row)[column]
