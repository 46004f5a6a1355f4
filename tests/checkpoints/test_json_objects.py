from pathlib import Path
from typing import Any

import msgspec
import pytest

from polymerge.checkpoints.json_objects import parse_json, read_json, read_text
from polymerge.errors import CheckpointError, PolymergeError, RecipeError


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
