"""Errors are gathered, so that all of them are said at once, and none is lost on the way."""

from __future__ import annotations

import pickle

import pytest

from polymerge.errors import CheckpointError, PolymergeError, RecipeError, Refused, collecting, human_size, refuse


def test_a_block_raises_all_that_it_gathered_together() -> None:
    with pytest.raises(Refused) as raised, collecting() as found:  # noqa: PT012 (it raises at its end)
        refuse(RecipeError("one"), CheckpointError("two"))
        assert [str(one) for one in found] == ["one", "two"]
        raise RecipeError("three")
    assert [str(one) for one in raised.value.problems] == ["one", "two", "three"]
    assert raised.value.exit_status == 2


def test_a_block_inside_another_hands_on_and_goes_on() -> None:
    went_on = False
    with pytest.raises(Refused) as raised, collecting():  # noqa: PT012 (it raises at its end)
        with collecting() as inner:
            raise Refused([RecipeError("one"), RecipeError("two")])
        went_on = bool(inner)
        refuse(RecipeError("three"))
    assert went_on
    assert [str(one) for one in raised.value.problems] == ["one", "two", "three"]


def test_nothing_gathered_is_nothing_raised() -> None:
    with collecting() as found:
        pass
    assert found == []


def test_other_exceptions_go_through_and_leave_nothing_open() -> None:
    with pytest.raises(ZeroDivisionError), collecting():  # noqa: PT012
        refuse(RecipeError("one"))
        raise ZeroDivisionError
    with pytest.raises(RecipeError, match="two"):
        refuse(RecipeError("two"))


def test_outside_of_a_block_errors_are_raised() -> None:
    refuse()
    with pytest.raises(CheckpointError, match="one"):
        refuse(CheckpointError("one"))
    with pytest.raises(PolymergeError) as raised:
        refuse(CheckpointError("one"), RecipeError("two"))
    assert len(raised.value.problems) == 2


def test_a_nested_block_whose_result_is_needed_raises_and_is_collected_once() -> None:
    went_on = False
    with pytest.raises(Refused) as raised, collecting() as outer:  # noqa: PT012 (it raises at its end)
        with collecting(needed=True):
            refuse(RecipeError("one"), RecipeError("two"))
        went_on = True
    assert not went_on
    assert [str(one) for one in outer] == ["one", "two"]
    assert [str(one) for one in raised.value.problems] == ["one", "two"]


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (16.1e9, "16.1 GB"),
                                            (2e6, "2.0 MB"), (4e12, "4000.0 GB")])  # fmt: skip
def test_sizes_are_written_as_people_write_them(size: float, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a\\x00b"), ("\x1b[31mred", "\\x1b[31mred"), ("two\nlines", "two\\nlines"), ("\x9b0m", "\\x9b0m"),
        ("\ud800", "\\ud800"), ("\u202egpj", "\\u202egpj"), ("\u2028", "\\u2028"), ("ß☃𝒳 \u200d", "ß☃𝒳 \u200d"),
    ],
)  # fmt: skip
def test_a_message_is_one_line_that_can_be_shown(text: str, shown: str) -> None:
    error = CheckpointError(f"model.safetensors: '{text}' is no tensor. Download it again.")
    assert str(error) == f"model.safetensors: '{shown}' is no tensor. Download it again."
    assert str(Refused([error])).splitlines()[1:] == [f"  1. {error}"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_message_has_an_end() -> None:
    error = RecipeError("recipe: " + "x" * 10_000 + ". Say less.")
    assert len(str(error)) < 4001
    assert str(error).startswith("recipe: xxx")
    assert str(error).endswith("xxx. Say less.")
