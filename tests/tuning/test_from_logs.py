"""Answers that exist already: which folder has which value, and what is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logged import put
from polymerge.errors import RecipeError, Refused
from polymerge.tuning.from_logs import choose_from_logs, value_folders

ANSWERS = {0.0: "aaaa", 0.1: "aaab", 0.2: "aabb", 0.3: "aabb", 0.4: "abbb"}


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir()
    return root


def answered(folder: Path, texts: str) -> Path:
    rows = [{"id": place, "answer": text} for place, text in enumerate(texts)]
    put(folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight-0.3", 0.3),
        ("llava-v1.5-7b_alpha-0.4", 0.4),
        ("0919_mplugowl2cogvlm_interpolation_alpha-0.3", 0.3),
        ("Qwen2.5-VL-7B_weight=0.25", 0.25),
        ("llava-1.5-7b_0.4", 0.4),
        ("merged, coef 0.7", 0.7),
        ("ALPHA=.5", 0.5),
        ("x_10.4", 10.4),
        ("run-0", 0.0),
        ("alpha-1", 1.0),
        ("0.25", 0.25),
        ("-0.1", -0.1),
        ("weight=-0.1", -0.1),
        ("weight--0.1", -0.1),
        ("weight-1e-05", 1e-05),
    ],
)
def test_the_number_at_the_end_of_a_name_is_the_value(name: str, value: float, tmp_path: Path) -> None:
    assert value_folders(folders(tmp_path, name)) == ({value: tmp_path / name}, [])


@pytest.mark.parametrize(
    "name",
    ["llava-v1.5-7b", "Qwen2.5-VL", "alpha", "0606_interp_0.4_mme", "alpha-0.4_llava-v1.5-7b", "alpha-1.5.2", "w0.3",
     "w4a16", "alpha-0.4x", "alpha-inf", "alpha-1e999"],
)  # fmt: skip
def test_a_name_without_a_number_at_its_end_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"no folder has a value at the end of its name: '{name}'.*VALUE=DIR"):
        value_folders(folders(tmp_path, name))


@pytest.mark.parametrize(
    "name", ["run_-0.1", "weight_2_-0.3", "merged -0.1", "alpha_0_4", "alpha-0,4", "weight_0_5", "alpha-1_0919"]
)
def test_a_sign_or_a_dash_decimals_or_a_number(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"more than one way from the names '{name}'.*`value_pattern`"):
        value_folders(folders(tmp_path, name, "alpha-0.3"))


def test_folders_without_a_value_are_told(tmp_path: Path) -> None:
    found, notes = value_folders(folders(tmp_path, "alpha-0.4", "alpha-0", "plots", "base_llava-1.5-7b", ".cache"))
    assert list(found.items()) == [(0.0, tmp_path / "alpha-0"), (0.4, tmp_path / "alpha-0.4")]
    assert notes == ["passed over 'base_llava-1.5-7b', 'plots': no value in the name"]


def test_a_pattern_finds_the_value(tmp_path: Path) -> None:
    found, notes = value_folders(folders(tmp_path, "a_0_4", "a4e-1_v1.5", "b"), r"a(?:_0_|)([0-9e-]+)")
    assert list(found.items()) == [(0.4, tmp_path / "a4e-1_v1.5"), (4.0, tmp_path / "a_0_4")]
    assert notes == ["passed over 'b': no value in the name"]


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (r"\d", "has 0 groups"),
        (r"(\d)(\.)", "has 2 groups"),
        (r"(", "no regular expression"),
        (r"alpha-(.*)", "no finite number: '0.4x' in 'alpha-0.4x'"),
        (r"alpha-(inf)", "no folder has a value"),
        (r"(zzz)?alpha", "no folder has a value"),
    ],
)
def test_a_pattern_that_does_not_work(pattern: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        value_folders(folders(tmp_path, "alpha-0.4x"), pattern)


@pytest.mark.parametrize("text", ["inf", "nan", "1e999", "0_4", ""])
def test_a_group_that_is_no_finite_number(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"no finite number: '{text}' in 'alpha-{text}'"):
        value_folders(folders(tmp_path, f"alpha-{text}"), "alpha-(.*)")


def test_two_folders_of_one_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"0\.4 in 'alpha-0\.4', 'alpha-0\.40'"):
        value_folders(folders(tmp_path, "alpha-0.4", "alpha-0.5", "alpha-0.40"))


def test_a_directory_without_folders(tmp_path: Path) -> None:
    for place, told in (
        (tmp_path / "no", "No such file"),
        (put(tmp_path / "file", ""), "Not a"),
        (tmp_path, "holds no"),
    ):
        with pytest.raises(RecipeError, match=told):
            value_folders(place)


def test_the_choice_as_values(tmp_path: Path) -> None:
    for value, texts in ANSWERS.items():
        answered(tmp_path / f"alpha-{value}", texts)
    found = choose_from_logs(tmp_path)
    assert found.best == {"value": 0.2}
    assert [(point.value["value"], point.difference, point.score) for point in found.curve] == [
        (0.0, None, None),
        (0.1, 2, None),
        (0.2, 1, None),
        (0.3, 1, None),
        (0.4, None, None),
    ]


def test_folders_that_are_given_by_value_may_have_any_name(tmp_path: Path) -> None:
    given = {value: answered(tmp_path / f"{place}x", texts) for place, (value, texts) in enumerate(ANSWERS.items())}
    named = {value: answered(tmp_path / "named" / f"run-{value}", texts) for value, texts in ANSWERS.items()}
    by_value = choose_from_logs(dict(reversed(given.items()))).outcome
    by_name = choose_from_logs(tmp_path / "named").outcome
    assert by_value == {**by_name, "files": [str(folder / "answers.jsonl") for folder in given.values()]}
    assert len(named) == len(by_value["values"])
    with pytest.raises(Refused, match="value_pattern: the folders are given by value"):
        choose_from_logs(given, value_pattern="(.)")
