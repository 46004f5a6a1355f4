"""Rules, read expressions and the mapping of whole checkpoints, on names made up for the purpose."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymerge.errors import CheckpointError, RecipeError
from polymerge.families.expressions import (
    Adapted,
    Concat,
    Expr,
    Read,
    Rows,
    expr_from_json,
    expr_to_json,
    names_read,
    replace_reads,
    rows_of,
    shape_of,
)
from polymerge.families.resolve import apart, map_names
from polymerge.families.rules import Family, Rule, counterpart, text_layer

TOY = Family(
    "toy",
    rules=(
        Rule("eye.joint.{rest}", "projector.{rest}"),
        Rule("eye.{rest}", "vision.{rest}"),
        Rule("layers.{i}.{rest}", "text.layers.{i}.{rest}"),
        Rule("head", "text.lm_head.weight"),
        Rule("old_head", "text.lm_head.weight"),
    ),
)

# --- rules


def test_a_rule_matches_whole_names_only() -> None:
    rule = Rule("layers.{i}.w", "text.layers.{i}.w")
    assert rule.apply("layers.3.w") == ("text.layers.3.w",)
    for name in ("layers.3.w.bias", "model.layers.3.w", "layers.x.w", "layers..w", "layers.3aw", "layers.3.4.w"):
        assert rule.apply(name) is None, name


def test_rest_is_never_empty_and_may_hold_dots() -> None:
    rule = Rule("a.{rest}", "b.{rest}")
    assert rule.apply("a.x.0.y") == ("b.x.0.y",)
    assert rule.apply("a.") is None
    assert rule.apply("a") is None


def test_dots_and_braces_in_names_are_only_text() -> None:
    assert Rule("a.b", "c").apply("axb") is None
    assert Rule("a.{rest}", "b.{rest}").apply("a.{i}{rest}") == ("b.{i}{rest}",)


@pytest.mark.parametrize(
    ("pattern", "canonical"), [("a.{rest}", "b.{i}"), ("a.{i}.{i}", "b.{i}"), ("a.{n}", "b.{n}"), ("a", "{rest}")]
)
def test_a_rule_that_cannot_work_is_refused_where_it_is_written(pattern: str, canonical: str) -> None:
    with pytest.raises(ValueError, match="may stand once"):
        Rule(pattern, canonical)


@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6))
def test_layer_numbers_are_kept_apart(first: int, second: int) -> None:
    names = [name for number in (first, second) for name in TOY.canonical(f"layers.{number}.mlp.w")]
    assert [text_layer(name) for name in names] == [first, second]
    assert (names[0] == names[1]) == (first == second)


def test_only_the_text_towers_layers_are_layers() -> None:
    assert text_layer("text.layers.10.mlp.w") == 10
    for name in ("vision.layers.1.w", "text.norm.weight", "text.layers.1", "projector.0.text.layers.1.w"):
        assert text_layer(name) is None, name


def test_the_first_rule_that_matches_wins_and_is_applied_once() -> None:
    assert TOY.canonical("eye.joint.w") == ("projector.w",)
    assert TOY.canonical("eye.joints.w") == ("vision.joints.w",)
    looping = Family("loop", rules=(Rule("a.{rest}", "b.{rest}"), Rule("b.{rest}", "a.{rest}")))
    assert looping.canonical("a.a.w") == ("b.a.w",)


@given(st.permutations([*TOY.rules, Rule("{rest}", "vision.{rest}")]), st.sampled_from(["eye.joint.w", "layers.4.w"]))
def test_order_decides_among_the_rules_that_match(rules: list[Rule], name: str) -> None:
    matches = [rule.apply(name) for rule in rules]
    assert Family("any", tuple(rules)).canonical(name) == next(match for match in matches if match)


# --- whole checkpoints


def test_every_name_gets_its_place() -> None:
    mapped = map_names(TOY, ["eye.w", "layers.0.w", "layers.0.rotary_emb.inv_freq", "eye.position_ids"], "ckpt")
    assert mapped.tensors == {"vision.w": Read("eye.w"), "text.layers.0.w": Read("layers.0.w")}
    assert mapped.layout == {"eye.w": (("vision.w", ()),), "layers.0.w": (("text.layers.0.w", ()),)}
    assert mapped.buffers == ("layers.0.rotary_emb.inv_freq", "eye.position_ids")
    assert mapped.problems == ()


FUSED = Family(
    "fused", rules=(Rule("qkv.{i}", tuple(f"text.layers.{{i}}.{part}@text" for part in "qkv"), split="qkv"), *TOY.rules)
)


def test_a_fused_tensor_is_several_canonical_ones_in_its_rows() -> None:
    assert FUSED.canonical("qkv.3") == tuple(f"text.layers.3.{part}@text" for part in "qkv")
    ranges = (((0, 4),), ((4, 6),), ((6, 8), (9, 10)))
    mapped = map_names(FUSED, ["qkv.0", "eye.w"], "ckpt", {"qkv": ranges})
    assert mapped.tensors == {
        "text.layers.0.q@text": Rows(Read("qkv.0"), 0, 4),
        "text.layers.0.k@text": Rows(Read("qkv.0"), 4, 6),
        "text.layers.0.v@text": Concat((Rows(Read("qkv.0"), 6, 8), Rows(Read("qkv.0"), 9, 10))),
        "vision.w": Read("eye.w"),
    }
    assert mapped.layout["qkv.0"] == tuple(zip(FUSED.canonical("qkv.0"), ranges, strict=True))
    assert mapped.problems == ()


def test_rows_in_pairs_are_read_in_the_order_of_memory() -> None:
    """In every head the first of all pairs, then the second; another order is other content."""
    fused, turned = Rule("qv", ("vision.q", "vision.v"), split="rows 8@4:2"), Rule("k", "vision.k", split="rows 4@4")
    family = Family("turned", (fused, turned, Rule("plain", "vision.k")))
    mapped = map_names(family, ["qv", "k"], "ckpt", {}, {"qv": (10, 3), "k": (4,)})
    assert mapped.problems == ()
    rows = [start for start, stop in dict(mapped.layout["qv"])["vision.q"] if stop == start + 1]
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]
    assert mapped.tensors["vision.v"] == Rows(Read("qv"), 8, 10)
    assert mapped.tensors["vision.k"] == Concat(tuple(Rows(Read("k"), row, row + 1) for row in (0, 2, 1, 3)))
    assert family.joint("k") != family.joint("plain") == "vision.k"


def test_a_fused_tensor_whose_split_is_not_known_is_an_error() -> None:
    for splits in (None, {}, {"gate_up": (((0, 1),),)}):
        mapped = map_names(FUSED, ["qkv.0", "eye.w"], "ckpt", splits)
        (problem,) = mapped.problems
        assert "ckpt: 'qkv.0' is fused by 'qkv', and config.json does not say how many heads" in str(problem)
        assert set(mapped.layout) == {"eye.w"}


def test_a_split_belongs_to_several_names_or_all_experts_and_to_no_single_one() -> None:
    for pattern, canonical, split in (("qkv", ("q", "k"), ""), ("qkv", "q", "qkv"), ("all", "expert.{e}", "")):
        with pytest.raises(ValueError, match="or all experts, need a split; one name has none"):
            Rule(pattern, canonical, split=split)
    Rule("all", "expert.{e}", split="experts")


@pytest.mark.parametrize(
    ("asked", "held", "given"),
    [
        ("k", ["k", "k@text"], "k"),
        ("k", ["k@image", "k@text"], "k@text"),
        ("k", ["k@image"], None),
        ("k@image", ["k@text", "k@image"], "k@image"),
        ("k@image", ["k"], "k"),
        ("k@image", ["k@text"], None),
        ("k@text", ["k"], "k"),
    ],
)
def test_what_stands_in_for_a_branch(asked: str, held: list[str], given: str | None) -> None:
    assert counterpart(asked, held) == given


def test_two_names_for_one_tensor_are_an_error_that_shows_both() -> None:
    (problem,) = map_names(TOY, ["head", "old_head"], "ckpt").problems
    assert "ckpt: 'head' and 'old_head' both mean text.lm_head.weight" in str(problem)


def test_unknown_names_are_one_error_that_says_how_to_leave_them_out() -> None:
    names = [f"blocks.{block}.w" for block in range(40)] + ["ear.w", "eye.w"]
    mapped = map_names(TOY, names, "ckpt")
    (problem,) = mapped.problems
    assert str(problem).startswith(
        "ckpt: no rule of family 'toy' explains 41 of its 42 tensors: 'blocks.0.w' (39 more like it), 'ear.w'. "
    )
    assert '`ignore: ["blocks.*", "ear.*"]`' in str(problem)
    assert str(problem).endswith("(Whoever adds names to the family: a Rule in its table in polymerge/families/tables)")
    assert mapped.unknown == tuple(names[:-1])


@pytest.mark.parametrize(
    ("some", "others", "globs"),
    [
        (["mtp.fc.w", "mtp.layers.0.w"], ["model.norm.w"], ["mtp.*"]),
        (["model.mtp.w", "model.layers.61.w"], ["model.layers.0.w"], ["model.mtp.*", "model.layers.61.*"]),
        # what begins like one of the others is none of what is below it
        (["head", "head2.w", "head.x"], ["head.w"], ["head", "head2.*", "head.x"]),
    ],
)
def test_globs_that_name_some_and_none_of_the_others(some: list[str], others: list[str], globs: list[str]) -> None:
    assert apart(some, others) == globs
    assert all(any(fnmatchcase(name, glob) for glob in globs) for name in some)
    assert not any(fnmatchcase(name, glob) for glob in globs for name in others)


def test_parts_come_from_the_rules() -> None:
    assert TOY.parts == ("text", "vision", "projector")
    assert TOY.part_of("vision.w") == "vision"
    plain = Family("plain", rules=(Rule("{rest}", "{rest}"),))
    assert plain.parts == ()
    assert plain.part_of("vision.w") is None


# --- read expressions

names = st.text("abc.01", min_size=1, max_size=8)


def _grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    rows = st.builds(Rows, inner, st.integers(0, 9), st.integers(10, 20))
    adapted = st.builds(
        Adapted, inner, st.none() | names, names, st.floats(allow_nan=False, allow_infinity=False), st.booleans()
    )
    return rows | adapted | st.builds(Concat, st.lists(inner, min_size=1, max_size=3).map(tuple))


@given(st.recursive(st.builds(Read, names), _grown, max_leaves=6))
def test_expressions_survive_json(expr: Expr) -> None:
    assert expr_from_json(json.loads(json.dumps(expr_to_json(expr)))) == expr


def test_the_json_of_expressions_is_fixed() -> None:
    expr = Concat((Read("q"), Rows(Read("kv"), 0, 4)))
    assert expr_to_json(expr) == {"concat": ["q", {"rows": [0, 4], "of": "kv"}]}
    adapted = {"adapted": "q", "a": "A", "b": "B", "scale": 0.5, "transposed": True}
    assert expr_to_json(Adapted(Read("q"), "A", "B", 0.5, True)) == adapted
    assert expr_to_json(Adapted(Read("q"), None, "B", 2.0)) == adapted | {"a": None, "scale": 2.0, "transposed": False}


ADAPTED = {"adapted": "q", "a": "A", "b": "B", "scale": 0.5, "transposed": False}


@pytest.mark.parametrize(
    "value",
    [
        3, None, {}, [], {"rows": [1], "of": "x"}, {"rows": [0, 1]}, {"concat": []}, {"concat": ["a"], "b": 1},
        ADAPTED | {"a": 1}, ADAPTED | {"b": None}, ADAPTED | {"scale": "0.5"}, ADAPTED | {"transposed": 0},
        ADAPTED | {"more": 1}, ADAPTED | {"adapted": None}, {"adapted": "q", "a": "A", "b": "B", "scale": 0.5},
    ],
)  # fmt: skip
def test_anything_else_is_no_expression(value: object) -> None:
    with pytest.raises(RecipeError, match="not a read expression"):
        expr_from_json(value)


def test_each_name_is_read_once() -> None:
    fused = Read("qkv")
    assert names_read(Concat((Rows(fused, 0, 2), Read("b"), Rows(fused, 4, 6)))) == ("qkv", "b")
    adapted = Adapted(fused, "A", "B", 1.0)
    assert names_read(adapted) == ("qkv", "A", "B")
    assert names_read(Adapted(Rows(adapted, 0, 2), None, "bias", 1.0)) == ("qkv", "A", "B", "bias")
    assert names_read(Concat((Rows(adapted, 0, 2), Rows(adapted, 4, 6)))) == ("qkv", "A", "B")


def test_what_an_adapter_changes_stands_where_it_is_read() -> None:
    adapted = Adapted(Read("qkv"), "A", "B", 1.0)
    change = {"qkv": adapted, "v": Read("new")}
    expr = Concat((Rows(Read("qkv"), 0, 2), Read("b"), Adapted(Read("v"), None, "c", 2.0, True)))
    expected = Concat((Rows(adapted, 0, 2), Read("b"), Adapted(Read("new"), None, "c", 2.0, True)))
    assert replace_reads(expr, lambda name: change.get(name, Read(name))) == expected
    assert rows_of(adapted, ((0, 2), (4, 5))) == Concat((Rows(adapted, 0, 2), Rows(adapted, 4, 5)))


def test_what_is_adapted_keeps_its_shape() -> None:
    shapes = {"w": (6, 3), "A": (2, 3), "B": (6, 2)}
    adapted = Adapted(Read("w"), "A", "B", 1.0)
    assert shape_of(adapted, shapes) == (6, 3)
    assert shape_of(Rows(adapted, 2, 5), shapes) == (3, 3)
    with pytest.raises(CheckpointError, match=r"w, A, B: no rows 5 to 7 in shape \[6, 3\]"):
        shape_of(Rows(adapted, 5, 7), shapes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 30))
def test_rows_of_a_tensor_stack_to_its_shape(heights: list[int], width: int) -> None:
    edges = [0, *(sum(heights[: place + 1]) for place in range(len(heights)))]
    blocks = tuple(Rows(Read("w"), start, stop) for start, stop in pairwise(edges))
    assert shape_of(Concat(blocks), {"w": (edges[-1], width)}) == (edges[-1], width)
    assert [shape_of(block, {"w": (edges[-1], width)}) for block in blocks] == [(height, width) for height in heights]


@pytest.mark.parametrize(
    ("expr", "said"),
    [
        (Read("missing"), "missing: there is no such tensor"),
        (Rows(Read("w"), 2, 5), r"w: no rows 2 to 5 in shape \[4, 3\]"),
        (Rows(Read("w"), 2, 2), "no rows 2 to 2"),
        (Rows(Read("w"), -1, 2), "no rows -1 to 2"),
        (Rows(Read("scalar"), 0, 1), "no rows 0 to 1"),
        (Concat((Read("w"), Read("v"))), r"w, v: shapes \[4, 3\], \[4\] do not stack"),
        (Concat((Read("scalar"), Read("scalar"))), "do not stack"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(expr: Expr, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        shape_of(expr, {"w": (4, 3), "v": (4,), "scalar": ()})
