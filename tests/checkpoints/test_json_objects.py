import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polymerge.checkpoints.bounds import DIGITS, JSON_VALUES, NESTING
from polymerge.checkpoints.json_objects import parse_json, read_json, read_text
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, Refused


class Model(msgspec.Struct):
    name: str
    rank: int | None = None


class Record(msgspec.Struct):
    count: int
    models: dict[str, Model] = {}
    scores: list[float] = []


def problems(text: str | bytes, kind: Any = Record) -> list[str]:
    with pytest.raises(PolymergeError) as caught:
        parse_json(text, "f.json", kind)
    assert all(type(problem) is CheckpointError for problem in caught.value.problems)
    return [str(problem).removesuffix(" Download it again.") for problem in caught.value.problems]


def test_json_becomes_a_value_of_its_type() -> None:
    record = parse_json('{"count": 1, "models": {"a": {"name": "x"}}, "scores": [1, 2.5], "more": null}', "f", Record)
    assert record == Record(1, {"a": Model("x")}, [1.0, 2.5])
    assert parse_json(b'{"a": Infinity}', "f", dict[str, Any]) == {"a": float("inf")}
    assert parse_json('{"a": 1, "a": "\\ud800"}', "f", dict[str, Any], unique_keys=False, lenient=True) == {
        "a": "\ud800"
    }


def test_every_member_that_is_wrong_is_named() -> None:
    text = '{"count": "1", "models": {"a": {"rank": true}}, "scores": [1, [], null]}'
    assert problems(text) == [
        'f.json: count: expected int, got "1".',
        "f.json: models['a'].name is missing.",
        "f.json: models['a'].rank: expected int | null, got true.",
        "f.json: scores[1]: expected float, got array.",
        "f.json: scores[2]: expected float, got null.",
    ]
    many = problems(str(["x"] * 30).replace("'", '"'), list[int])
    assert len(many) == 21
    assert many[-1] == "f.json: 10 more problems like these."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "f.json: expected object, got array."),
        ('"x"', 'f.json: expected object, got "x".'),
        ("", "f.json: is not JSON: Expecting value at column 1."),
        ('{"a":\n "b}', "f.json: is not JSON: Unterminated string starting at line 2, column 2."),
        (b'{"\xff": 1}', "f.json: is not UTF-8: byte 2 is 0xff."),
        ('{"count": 1, "count": 2}', "f.json: cannot be read: 'count' appears twice in one object."),
        ('{"count": "\\ud800"}', "f.json: holds half of a surrogate pair, which is no character."),
        ("[" * 100_000, "f.json: is nested too deeply to be read."),
        ("9" * 9000, "f.json: cannot be read: the number 99999999999999999999... has more than 300 digits"),
    ],
)
def test_what_is_no_json_is_refused(text: str | bytes, said: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(said)


def test_files_are_named_and_errors_are_those_that_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    with pytest.raises(CheckpointError, match=r"f.json: cannot be read: No such file.*\. Check the path"):
        read_json(file, Record)
    file.write_bytes(b'\xef\xbb\xbf{"count": 1}')
    assert read_json(file, Record, encoding="utf-8-sig") == Record(1)
    file.write_text("{}")
    with pytest.raises(RecipeError, match=r"f.json: count is missing\. Write it again\."):
        read_json(file, Record, error=RecipeError, then="Write it again.")
    file.write_bytes(b"{\n\xe9}")
    with pytest.raises(CheckpointError, match=r"f.json:2: is not UTF-8: byte 2 is 0xe9\. Download it again\."):
        read_text(file)


@pytest.mark.parametrize(
    ("text", "count"), [("[[], [1, {}]]", 6), ('{"a": 1, "b": [2, 3]}', 6), ('"a, b"', 1), ("[]", 1)]
)
def test_values_are_counted_before_any_is_built(text: str, count: int) -> None:
    assert parse_json(text, "f", Any, most=count) == json.loads(text)
    with pytest.raises(CheckpointError, match=f"f: cannot be read: it holds more than {count - 1} values"):
        parse_json(text, "f", Any, most=count - 1)


def test_32_megabytes_of_brackets_are_not_built() -> None:
    with pytest.raises(CheckpointError, match=f"it holds more than {JSON_VALUES} values"):
        parse_json(b"[" + b"[]," * (11 * 2**20) + b"[]]", "f", Any)


@pytest.mark.parametrize("inner", ["[%s]", '{"a": %s}', "[1, %s, 2]"])
def test_levels_are_counted(inner: str) -> None:
    text = "1"
    for _ in range(NESTING):
        text = inner % text
    assert parse_json(text, "f", Any) == json.loads(text)
    with pytest.raises(CheckpointError, match="f: is nested too deeply to be read"):
        parse_json(f"[{text}]", "f", Any)


def test_whole_numbers_have_as_many_digits_as_a_float64_holds() -> None:
    assert parse_json("-" + "9" * DIGITS, "f", int) == -int("9" * DIGITS)
    with pytest.raises(CheckpointError, match=f"has more than {DIGITS} digits"):
        parse_json("9" * (DIGITS + 2), "f", int)
    assert parse_json("9" * (DIGITS + 2), "f", int, lenient=True) == int("9" * (DIGITS + 2))
    assert parse_json('["' + "9" * 5000 + '"]', "f", list[str]) == ["9" * 5000]


def test_half_a_surrogate_pair_is_refused_where_keys_may_repeat_too() -> None:
    with pytest.raises(CheckpointError, match="half of a surrogate pair"):
        parse_json('{"a": 1, "a": "\\ud800"}', "f", dict[str, Any], unique_keys=False)


def test_messages_quote_a_line_that_can_be_shown() -> None:
    text = json.dumps({"count": "\x1b[31m\u202e" + "x" * 10_000})
    with pytest.raises(CheckpointError) as caught:
        parse_json(text, "f", Record)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


def test_many_wrong_members_are_a_few_messages() -> None:
    with pytest.raises(Refused) as caught:
        parse_json(json.dumps({str(n): "x" for n in range(20_000)}), "f", dict[str, int])
    assert len(caught.value.problems) == 21
    assert "more problems like these" in str(caught.value)
