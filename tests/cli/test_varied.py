"""What is varied, its values and the folders of logs, as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge.cli.varied import log_folders, parse_knob, parse_knobs, parse_span, parse_values
from polymerge.errors import RecipeError, Refused, collecting
from polymerge.tuning.knobs import Knob


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:0.6:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("0:1:0.05", tuple(float(f"{place * 0.05:.2f}") for place in range(21))),
        ("-1:1:1", (-1.0, 0.0, 1.0)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("0.3,0,0.1", (0.3, 0.0, 0.1)),
        ("0.5", (0.5,)),
        (" 0 : 1e-1 : 0.05 ", (0.0, 0.05, 0.1)),
        ("true,false", (True, False)),
        ("none, weight", ("none", "weight")),
    ],
)
def test_values(text: str, values: tuple[float, ...]) -> None:
    assert parse_values(text) == values


@pytest.mark.parametrize(
    "text",
    ["", "0:1", "0:1:0", "0:1:-0.1", "1:0:0.1", "0:1:0.1:2", "0:q:1", "0,,1", "nan", "0,inf", "0,0.0", "0:1:1e-9",
     "0:1e999999:1", "0,1e400"],
)  # fmt: skip
def test_what_is_no_list_of_values(text: str) -> None:
    with pytest.raises(RecipeError, match="--values"):
        parse_values(text)


def test_spans() -> None:
    assert parse_span("0:0.6", "w") == (0.0, 0.6)
    assert parse_span("0:0.6:0.1", "w") is None
    assert parse_span("0,1", "w") is None
    with pytest.raises(RecipeError, match="no range"):
        parse_span("1:0", "w")


@pytest.mark.parametrize(
    ("text", "knob"),
    [
        ("weight", Knob("weight")),
        ("weight[2]", Knob("weight", model=2)),
        ("density@layers:0-5", Knob("density", layers=(0, 5))),
        ("density@layers:3", Knob("density", layers=(3, 3))),
        ("density@vision", Knob("density", part="vision")),
        ("density[1]@text.layers.*.mlp.*", Knob("density", model=1, match="text.layers.*.mlp.*")),
    ],
)
def test_knobs(text: str, knob: Knob) -> None:
    assert parse_knob(text) == knob
    assert knob.name(knob.parameter or "") == text


@pytest.mark.parametrize("text", ["density@layers:5-0", "density@layers:a"])
def test_a_range_of_layers_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError, match="no range of layers"):
        parse_knob(text)


def test_knobs_with_their_values() -> None:
    assert parse_knobs((), None) == [Knob()]
    assert parse_knobs((), "0,1") == [Knob(values=(0.0, 1.0))]
    assert parse_knobs(("scale", "weight=0:1"), None) == [Knob("scale"), Knob("weight", span=(0.0, 1.0))]
    with pytest.raises(Refused, match="say them once"):
        parse_knobs(("scale=0,1",), "0,1")


def test_a_knob_whose_values_or_layers_are_none_is_kept_to_look_it_up() -> None:
    with pytest.raises(Refused) as told, collecting():
        assert parse_knobs(("scale=0,1", "density@layers:5-0"), "0:q:1") == [
            Knob("scale", unread=True),
            Knob("density", unread=True),
        ]
    assert len(told.value.problems) == 3


def test_the_folders_of_logs(tmp_path: Path) -> None:
    assert log_folders(("logs",)) == Path("logs")
    assert log_folders(("0.4=a", "0=b=c")) == {0.4: Path("a"), 0.0: Path("b=c")}
    assert log_folders(("0.4=a",)) == {0.4: Path("a")}
    (tmp_path / "1=x").mkdir()
    assert log_folders((str(tmp_path / "1=x"),)) == tmp_path / "1=x"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (("a", "b"), "'a' is not VALUE=DIR"),
        (("0.4=a", "b"), "'b' is not VALUE=DIR"),
        (("0.4=a", "inf=b"), "'inf=b' is not VALUE=DIR"),
        (("0.4=a", ".40=b"), "0.4 is said twice"),
    ],
)
def test_folders_of_logs_that_cannot_be_told_apart(said: tuple[Any, ...], told: str) -> None:
    with pytest.raises(Refused, match=told):
        log_folders(said)
