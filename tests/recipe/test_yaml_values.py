"""YAML of recipes: plain values, within bounds, and one kind of error for whatever else it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymerge.checkpoints.bounds import DIGITS, NESTING, RECIPE_BYTES, RECIPE_VALUES
from polymerge.errors import RecipeError
from polymerge.recipe.yaml_values import parse_yaml, read_documents


def test_plain_values_are_what_yaml_says() -> None:
    text = "a: &x {b: 1}\nc: *x\nd: [1, 2.5, yes, null, 2024-01-13, .inf, 0x1F]\ne: {<<: *x, f: 'g'}"
    assert parse_yaml(text, "f")["e"] == {"b": 1, "f": "g"}
    assert parse_yaml(text, "f")["c"] == {"b": 1}
    assert parse_yaml(text, "f")["d"][:3] == [1, 2.5, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!bool maybe", "'maybe' is no bool"),
        ("!!timestamp x", "'x' is no timestamp"),
        ("!!int ''", "'' is no int"),
        ("2024-13-01", "month must be in 1..12"),
        ("9" * (DIGITS + 1), f"more than {DIGITS} digits"),
        (":".join(["1"] * 400), f"more than {DIGITS} digits"),
        ('"\\UFFFFFFFF"', "invalid YAML"),
        ('"\\uD800"', "'\\\\ud800' is no str"),
        ("&a [*a]", "an alias for what it is part of"),
        ("&a {b: *a}", "an alias for what it is part of"),
        ("&a {<<: *a}", "an alias for what it is part of"),
        ("<<: 3", "expected a mapping or list of mappings for merging"),
        ("{[1]: 2}", "found unhashable key"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: 1\na: 2", "'a' is written twice"),
        ("a: [", "invalid YAML"),
        ("\0", "special characters are not allowed"),
        ("- " * 5000, f"more than {NESTING} levels"),
        ("[" * 5000, f"more than {NESTING} levels"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        parse_yaml(text, "r.yaml")
    assert str(caught.value).startswith("r.yaml: invalid YAML: ")
    assert len(str(caught.value)) < 1000


def test_numbers_may_have_as_many_digits_as_a_float64_holds() -> None:
    assert parse_yaml("9" * DIGITS, "f") == int("9" * DIGITS)


def test_values_are_counted() -> None:
    assert len(parse_yaml("[" + "1," * (RECIPE_VALUES - 1) + "]", "f")) == RECIPE_VALUES - 1
    with pytest.raises(RecipeError, match=f"more than {RECIPE_VALUES} values"):
        parse_yaml("[" + "1," * RECIPE_VALUES + "]", "f")


def test_what_aliases_repeat_is_counted_again() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    parse_yaml("\n".join(lines[:4]), "f")
    with pytest.raises(RecipeError, match=f"more than {RECIPE_VALUES} values"):
        parse_yaml("\n".join(lines), "f")


def test_levels_are_counted() -> None:
    parse_yaml("[" * (NESTING - 1) + "1" + "]" * (NESTING - 1), "f")
    with pytest.raises(RecipeError, match=f"more than {NESTING} levels"):
        parse_yaml("[" * NESTING + "1" + "]" * NESTING, "f")


def test_a_file_may_be_as_long_as_stated(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"a: 1\n#".ljust(RECIPE_BYTES, b"x"))
    assert read_documents(file) == [{"a": 1}]
    file.write_bytes(b"a: 1\n#".ljust(RECIPE_BYTES + 1, b"x"))
    with pytest.raises(OSError, match=f"at most {RECIPE_BYTES} are read"):
        read_documents(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8 at byte 0"):
        read_documents(file)
