"""The choice without labels: the paper's counts, and what holds for any answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from logged import SEARCH, laid_out
from polymerge.errors import RecipeError
from polymerge.tuning.criterion import CRITERIA, Judging, choose, judge
from polymerge.tuning.from_logs import choose_from_logs

TOY_VALUES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TOY = [list(word) for word in ("aaaa", "aaab", "aabb", "aabb", "abbb", "cbbb", "dbbb")]


@pytest.mark.parametrize(
    ("criterion", "differences"),
    [("union", (2, 1, 1, 2, 1)), ("sum", (2, 1, 1, 2, 2)), ("backward", (1, 1, 0, 1, 1, 1))],
)
def test_a_toy_counted_by_hand(criterion: str, differences: tuple[float, ...]) -> None:
    choice = choose(TOY_VALUES, TOY, criterion)
    assert choice.differences == differences
    assert choice.candidates == (TOY_VALUES[1:-1] if criterion != "backward" else TOY_VALUES[1:])


def test_of_several_minima_the_smallest_is_chosen_and_all_are_told() -> None:
    choice = choose(TOY_VALUES, TOY, "union")
    assert choice.minima == (0.2, 0.3, 0.5)
    assert choice.chosen == 0.2


@pytest.mark.parametrize("case", sorted(path.stem for path in SEARCH.glob("*.json")))
@pytest.mark.parametrize("smooth", [0, 1])
def test_the_paper_s_scripts_count_and_choose_the_same(case: str, smooth: int, tmp_path: Path) -> None:
    golden, root = laid_out(case, tmp_path)
    backward = case.startswith("diff2")
    # the second script has its smoothing commented out: what it prints for 1 is what it prints for 0
    judging = Judging("backward" if backward else "union", smooth=0 if backward else smooth)
    found = choose_from_logs(root, task=golden["task"], judging=judging).outcome
    expected = golden["expected"][f"smooth{smooth}"]
    assert found["differences"] == pytest.approx(expected["differences"], rel=1e-12, abs=0)
    assert found["candidates"] == [float(alpha) for alpha in expected["candidates"]]
    assert found["minima"] == [float(alpha) for alpha in expected["chosen_alphas"]]
    assert found["chosen"] == found["minima"][0]


def literal_union(answers: Sequence[Sequence[str]]) -> list[int]:
    """Prompt by prompt, as appendix B says it."""
    counts = []
    for place in range(1, len(answers) - 1):
        count = 0
        for prompt, answer in enumerate(answers[place]):
            same_before = answers[place - 1][prompt].lower() == answer.lower()
            same_after = answers[place + 1][prompt].lower() == answer.lower()
            count += not (same_before and same_after)
        counts.append(count)
    return counts


table = some.integers(1, 6).flatmap(
    lambda prompts: some.lists(
        some.lists(some.sampled_from(["a", "A", "b", "", "no"]), min_size=prompts, max_size=prompts),
        min_size=3,
        max_size=8,
    )
)


@given(table)
def test_union_is_the_literal_count(answers: list[list[str]]) -> None:
    assert list(choose(range(len(answers)), answers).differences) == literal_union(answers)


@given(table, some.sampled_from(sorted(CRITERIA)), some.integers(0, 3), some.randoms())
def test_what_always_holds(answers: list[list[str]], criterion: str, smooth: int, dice) -> None:
    values = [place / 10 for place in range(len(answers))]
    choice = choose(values, answers, criterion, smooth=smooth)
    assert values[0] not in choice.candidates
    assert (values[-1] in choice.candidates) == (criterion == "backward")
    assert choice.chosen == min(choice.minima)
    order = list(range(len(answers[0])))
    dice.shuffle(order)
    shuffled = [[row[place] for place in order] for row in answers]
    assert choose(values, shuffled, criterion, smooth=smooth) == choice  # the order of prompts does not matter
    louder = [[text.upper() for text in row] for row in answers]
    assert choose(values, louder, criterion, smooth=smooth) == choice  # nor does case
    constant = choose(values, [answers[0]] * len(answers), criterion, smooth=smooth)
    assert set(constant.differences) == {0.0}
    assert constant.minima == constant.candidates


@given(table)
def test_union_lies_between_the_larger_change_and_the_sum(answers: list[list[str]]) -> None:
    values = range(len(answers))
    union, both = choose(values, answers).differences, choose(values, answers, "sum").differences
    backward = choose(values, answers, "backward").differences
    for place, count in enumerate(union):
        assert max(backward[place], backward[place + 1]) <= count <= both[place]
        assert both[place] == backward[place] + backward[place + 1]


def test_smoothing_takes_what_there_is_at_the_ends() -> None:
    plain = choose(TOY_VALUES, TOY, "union").differences
    smooth = choose(TOY_VALUES, TOY, "union", smooth=1).differences
    assert smooth[0] == (plain[0] + plain[1]) / 2
    assert smooth[2] == (plain[1] + plain[2] + plain[3]) / 3


@pytest.mark.parametrize(("criterion", "count"), [("union", 2), ("sum", 2), ("backward", 1)])
def test_too_few_values_are_refused(criterion: str, count: int) -> None:
    with pytest.raises(RecipeError, match=f"needs {count + 1} values, got {count}"):
        choose(range(count), [["a"]] * count, criterion)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(RecipeError, match="no prompts"):
        choose(range(3), [[], [], []])


def test_a_missing_answer_is_an_error_and_never_counts_as_equal() -> None:
    answers = [{1: "a", 2: "b"}, {1: "a"}, {1: "a", 2: "b"}]
    with pytest.raises(RecipeError, match=r"0\.1 lacks 1 of 2, the first of them 2"):
        judge((0.0, 0.1, 0.2), answers, [1, 2], Judging())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"criterion": "onion"}, "Did you mean 'union'"),
        ({"compare": "fuzzy"}, "there is no 'fuzzy'"),
        ({"smooth": -1}, "-1 is no number"),
    ],
)
def test_settings_that_are_not_there(said: dict, told: str) -> None:
    (problem,) = Judging(**said).problems()
    assert told in str(problem)
    assert problem.exit_status == 2
