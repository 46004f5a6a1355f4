"""Regular expressions of adapter configs: the results of `re`, in bounded time."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.checkpoints import patterns
from polymerge.checkpoints.patterns import compiled
from polymerge.errors import CheckpointError

NAMES = (
    *(f"model.layers.{layer}.{module}" for layer in (0, 1, 12) for module in ("self_attn.q_proj", "mlp.up_proj")),
    "model.vision_tower.layers.3.q_proj",
    "language_model.model.layers.3.self_attn.v_proj",
    "lm_head",
    "q_proj\n",
    "model.layers.3\n.q_proj",
    "été.q_proj",
    "layers.٣.q_proj",
)

REAL = (
    "q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"^model\.layers\.12\.mlp\.up\_proj",
    r"^model.layers.(\d+).self_attn.q_proj",
    r"layers\.(0|1|2)\..*",
    r"layers\.1?[0-9]\.mlp\.\w+",
    r"^(?!.*vision).*q_proj$",
    r".*\.(q|k|v)_proj",
    r"(?<=mlp\.)up_proj",
    r"[^.]*_proj",
    r".*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|q_proj)",
    r"(?:.*?(?:vision).*?(?:q_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj)))",
    r"\Bproj|\w+_head\b",
    "",
    "^",
    "a)|(lm_head",
)


def by_re(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_match_what_peft_matches(pattern: str) -> None:
    match = compiled(pattern, "f")
    assert [match(name) for name in NAMES] == [by_re(pattern, name) for name in NAMES]


_LEAVES = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        "[a-b1]",
        r"\d",
        r"[\d.]",
        "1",
        r"\b",
        r"\B",
        "^",
        "$",
        r"\w",
        r"\W",
        r"\A",
        r"\Z",
    ]
)
_PATTERNS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "??"])).map(
            "(?:{0[0]}){0[1]}".format
        ),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map("{0[0]}{0[1]})".format),
        st.tuples(st.sampled_from(["(?<=", "(?<!"]), _LEAVES).map("{0[0]}{0[1]})".format),
    ),
    max_leaves=8,
)


@given(_PATTERNS, st.lists(st.text("aab1.\n", min_size=1, max_size=8), min_size=1, max_size=8))
@settings(max_examples=400, deadline=None)
def test_any_pattern_has_the_results_of_re(pattern: str, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match = compiled(pattern, "f")
        assert [match(name) for name in names] == [by_re(pattern, name) for name in names]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)*b",
        "(a|a)*b",
        "(a+)+b",
        "(.*.*.*.*)*x",
        "((((a*)*)*)*)*b",
        "(a?){1000}a{1000}b",
        "(a{0,1000}){1000}b",
        "^(?=(a+)+b).*$",
        "(a|aa)+$b",
        "(?:" * 40 + "a*" + ")*" * 40 + "b",
    ],
)
def test_what_takes_re_years_is_matched_at_once(pattern: str) -> None:
    assert compiled(pattern, "f")("a" * 4096) is False


def test_a_pattern_that_takes_too_many_steps_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    match = compiled("(a*)*b", "f: rank_pattern['(a*)*b']")
    monkeypatch.setattr(patterns, "_MOST_STEPS", 3)
    with pytest.raises(CheckpointError, match=r"f: rank_pattern\[.*\]: it takes too long to match 'aa"):
        match("aaaa")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "missing \\), unterminated subpattern"),
        (r"(a)\3", "groupref is not supported"),
        ("(a)(?(3)a|b)", "groupref_exists is not supported"),
        ("(?i:a)", "it sets flags"),
        ("x" * 10_001, "it is 10001 characters long, at most 10000 are read"),
        ("(" * 5000 + ")" * 5000, "."),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=rf"f: expected a regular expression \({why}"):
        compiled(pattern, "f")


def test_the_longest_pattern_is_read() -> None:
    assert compiled("x" * 10_000, "f")("a." + "x" * 10_000)
