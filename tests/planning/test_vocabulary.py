"""Embeddings and heads of vocabularies that differ: the template's, the rows that both have, or rows by their token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import polymerge
from layouts import Sizes, load, random_tower, same_bits, write
from polymerge.errors import Refused
from polymerge.planning import Plan, make_plan
from polymerge.planning.text import describe
from polymerge.planning.vocabulary import outside, runs
from running import linear, with_tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

OURS = ("<unk>", "a", "b", "c", "<image>", "d")
THEIRS = ("a", "<unk>", "e", "d", "c")
"""The same tokens elsewhere: no `b`, no `<image>`, an `e` of its own."""


def checkpoint(
    folder: Path, seed: int, tokens: Sequence[str] | None, rows: int, *, tie: bool = False, layout: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:  # fmt: skip
    """A decoder of so many rows, and a tokenizer.json; what has no token is padding."""
    sizes = Sizes(rows=rows, layers=1)
    write(layout, folder, random_tower(sizes, seed, dtype=dtype), sizes)
    if tie:
        tensors = {name: tensor for name, tensor in load(folder).items() if name != HEAD}
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    if tokens is not None:
        vocabulary = {"model": {"vocab": {token: place for place, token in enumerate(tokens)}}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


def recipe(*models: Path, **more: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "template": str(models[0]), "models": listed, **more}


def run(out: Path, *models: Path, **more: Any) -> dict[str, Tensor]:
    return load(polymerge.merge(recipe(*models, **more), out, check=False, block=7).folder)


def half(one: Tensor, other: Tensor) -> Tensor:
    return (0.5 * one.float() + 0.5 * other.float()).to(one.dtype)


def warned(plan: Plan, *words: str) -> bool:
    return any(all(word in warning for word in words) for warning in plan.warnings)


# --- template and overlap


@pytest.mark.parametrize("rows", [5, 9])
def test_the_template_s_is_kept_where_numbers_differ(rows: int, tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, None, 7), checkpoint(tmp_path / "theirs", 2, None, rows)
    out, before, other = run(tmp_path / "out", ours, theirs), load(ours), load(theirs)
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name], before[name])
    assert same_bits(out["model.norm.weight"], half(before["model.norm.weight"], other["model.norm.weight"]))
    plan = make_plan(recipe(ours, theirs))
    for name in ("text.embed_tokens.weight", "text.lm_head.weight"):
        assert warned(plan, name, f"'theirs' has {rows} rows, template 'ours' 7", "overlap or by-token merges")
    assert "vocabularies differ: 2 (lm_head.weight, model.embed_tokens.weight)" in describe(plan)


@pytest.mark.parametrize("vocab", ["template", "overlap"])
def test_vocabularies_of_one_size_are_merged_as_they_are(vocab: str, tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, None, 7), checkpoint(tmp_path / "theirs", 2, None, 7)
    out, before, other = run(tmp_path / "out", ours, theirs, vocab=vocab), load(ours), load(theirs)
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name], half(before[name], other[name]))
    assert not make_plan(recipe(ours, theirs, vocab=vocab)).warnings


@pytest.mark.parametrize(("rows", "common"), [((7, 5, 6), 5), ((7, 9, 8), 7), ((5, 9, 4), 4)])
def test_overlap_merges_the_rows_that_all_have(rows: tuple[int, ...], common: int, tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path / str(place), place, None, count) for place, count in enumerate(rows)]
    asked = recipe(*folders, vocab="overlap", parameters={"normalize": False})
    out = load(polymerge.merge(asked, tmp_path / "out", check=False, block=7).folder)
    for name in (EMBEDDING, HEAD):
        first, *others = (load(folder)[name] for folder in folders)
        expected = first.clone()
        total = 0.5 * first[:common].float()
        for other in others:
            total = total + 0.5 * other[:common].float()
        expected[:common] = total.to(first.dtype)
        assert same_bits(out[name], expected)
        (step,) = (step for step in make_plan(asked).steps if step.name == name)
        reasons = [f"rows {common} to {rows[0]} are the template's"] if common < rows[0] else []
        for place, count in enumerate(rows[1:], 1):
            reasons += [f"{count - common} of the {count} rows of '{place}' are not read"] if count > common else []
        assert step.reason == "; ".join(reasons)


# --- by token


def joined(ours: Sequence[str], theirs: Sequence[str], mine: Tensor, other: Tensor) -> Tensor:
    """Row by row: the mean of what stands for one token, the template's where the other has none."""
    result = mine.clone()
    for place, token in enumerate(ours):
        if token in theirs:
            result[place] = half(mine[place], other[theirs.index(token)])
    return result


@pytest.mark.parametrize(("here", "there"), [(6, 5), (8, 7), (6, 6)], ids=["whole", "padded", "one size"])
@pytest.mark.parametrize("layout", ["llama", "llava_original"])
def test_rows_are_joined_by_their_token(here: int, there: int, layout: str, tmp_path: Path) -> None:
    """In another order, with tokens that only one of them has, and with rows at the end that stand for none."""
    ours = checkpoint(tmp_path / "ours", 1, OURS, here, layout=layout)
    theirs = checkpoint(tmp_path / "theirs", 2, THEIRS, there)
    out, before, other = run(tmp_path / "out", ours, theirs, vocab="by-token"), load(ours), load(theirs)
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name], joined(OURS, THEIRS, before[name], other[name]))
        assert same_bits(out[name][2], before[name][2]), "b is no token of theirs"
        assert not same_bits(out[name][5], before[name][5]), "d is one"
        assert same_bits(out[name][6:], before[name][6:]), "padding"
    plan = make_plan(recipe(ours, theirs, vocab="by-token"))
    (step,) = (step for step in plan.steps if step.name == EMBEDDING)
    kept = [piece.rows for piece in step.pieces if piece.setting is None]
    assert sum(stop - start for rows in kept for start, stop in rows) == here - 4
    assert f"({step.reason})" in describe(plan)
    assert "are the template's" in step.reason


def test_tokens_beyond_the_stored_rows_are_nobody_s(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than there are rows, on either side."""
    ours, theirs = checkpoint(tmp_path / "ours", 1, OURS, 4), checkpoint(tmp_path / "theirs", 2, THEIRS, 2)
    out, before, other = run(tmp_path / "out", ours, theirs, vocab="by-token"), load(ours), load(theirs)
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name], joined(OURS[:4], THEIRS[:2], before[name], other[name]))


def test_the_base_is_read_by_its_own_tokenizer(tmp_path: Path) -> None:
    """A row is merged where all three have its token: its delta is measured from the base's row for the same token."""
    ancestors = ("d", "c", "b", "a")
    folders = [
        checkpoint(tmp_path / name, place, tokens, rows, dtype=torch.float32)
        for place, (name, tokens, rows) in enumerate((("ours", OURS, 7), ("theirs", THEIRS, 5), ("base", ancestors, 4)))
    ]
    asked = recipe(*folders[:2], vocab="by-token", merge_method="task_arithmetic", base_model=str(folders[2]))
    out = load(polymerge.merge(asked, tmp_path / "out", check=False, block=5).folder)
    for name in (EMBEDDING, HEAD):
        mine, other, base = (load(folder)[name] for folder in folders)
        for place, token in enumerate(OURS):
            if token in ("a", "c", "d"):
                old = base[ancestors.index(token)]
                expected = old + (0.5 * (mine[place] - old) + 0.5 * (other[THEIRS.index(token)] - old))
                assert same_bits(out[name][place], expected), token
            else:
                assert same_bits(out[name][place], mine[place]), token
        assert same_bits(out[name][6:], mine[6:])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_are_kept_are_converted_with_the_rest(dtype: str, tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, OURS, 8), checkpoint(tmp_path / "theirs", 2, THEIRS, 5)
    out = run(tmp_path / "out", ours, theirs, vocab="by-token", dtype=dtype)
    before, other = load(ours), load(theirs)
    kind = getattr(torch, dtype)
    for name in (EMBEDDING, HEAD):
        wide = joined(OURS, THEIRS, before[name].float(), other[name].float())
        assert same_bits(out[name], wide.to(kind))


def test_of_two_rows_for_one_token_the_first_is_merged(tmp_path: Path) -> None:
    twice = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 2, "content": "a"}, {"id": 3, "content": "c"}],
    }
    ours, theirs = checkpoint(tmp_path / "ours", 1, None, 4), checkpoint(tmp_path / "theirs", 2, ("c", "a"), 2)
    (ours / "tokenizer.json").write_text(json.dumps(twice), encoding="utf-8")
    out, before, other = run(tmp_path / "out", ours, theirs, vocab="by-token"), load(ours), load(theirs)
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name][0], half(before[name][0], other[name][1]))
        assert same_bits(out[name][1:3], before[name][1:3])
        assert same_bits(out[name][3], half(before[name][3], other[name][0]))


def test_vocabularies_without_a_common_token_are_kept_apart(tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, ("a", "b"), 2), checkpoint(tmp_path / "theirs", 2, ("c", "d"), 2)
    plan = make_plan(recipe(ours, theirs, vocab="by-token"))
    kept = [step for step in plan.steps if step.reason == "no token is in every vocabulary"]
    assert {step.name for step in kept} == {EMBEDDING, HEAD}
    assert all(step.fate == "copied" for step in kept)


# --- rows that are merged by number

ROWS = "the rows of text.lm_head.weight and text.embed_tokens.weight are merged by number"


def only(found: tuple[str, ...]) -> str:
    (one,) = found
    return one


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (list("abcdefg"), list("abcdefg"), None),
        (list("abcdefg"), list("abdcefg"), "2 of 7| (2: 'c'/'d', 3: 'd'/'c')"),
        (list("abcdefg"), list("gfedcba"), "6 of 7| (0: 'a'/'g', 1: 'b'/'f', ...)"),
        # rows that only one of them uses, as for tokens of a chat
        (list("abcde"), list("abcdef"), "1 of 7| (5: none/'f')"),
        (list("abcde"), list("abcdxf"), "2 of 7|, 1 of them for one in one of the two alone (4: 'e'/'x', 5: none/'f')"),
        # rows beyond the embedding are none
        (list("abcdefg"), list("abcdefgh"), None),
        (None, list("abcdefg"), None),
        (list("abcdefg"), None, None),
    ],
)  # fmt: skip
def test_rows_of_other_tokens_are_said(
    ours: list[str] | None, theirs: list[str] | None, said: str | None, tmp_path: Path
) -> None:
    models = with_tokens(tmp_path / "one", 1, ours), with_tokens(tmp_path / "two", 2, theirs)
    warnings = polymerge.plan(linear(*models)).warnings
    middle = " rows do not stand for one token in template 'one' and in 'two'"
    way_out = "Say vocab: by-token to join rows by their token, or name these tensors in exclude"
    assert warnings == ((f"{ROWS}, but {said.replace('|', middle)}. {way_out}",) if said else ())
    # and neither of the ways out is warned of
    if ours and theirs:
        assert polymerge.plan(linear(*models, vocab="by-token")).warnings == ()
    assert polymerge.plan(linear(*models, exclude=["text.lm_head.weight", "text.embed_tokens.weight"])).warnings == ()


def test_only_the_rows_that_are_merged_by_number_count(tmp_path: Path) -> None:
    models = with_tokens(tmp_path / "one", 1, list("abcdefg")), with_tokens(tmp_path / "two", 2, list("abcdxyz"), 5)
    assert "1 of 5 rows" in only(polymerge.plan(linear(*models, vocab="overlap")).warnings)
    assert "vocabularies differ" in only(polymerge.plan(linear(*models)).warnings)


def test_models_that_differ_alike_share_a_warning(tmp_path: Path) -> None:
    one, two, three = (
        with_tokens(tmp_path / name, seed, tokens)
        for seed, (name, tokens) in enumerate(
            (("one", list("abcdefg")), ("two", list("abcdef")), ("three", list("abcdef")))
        )
    )
    said = only(polymerge.plan(linear(one, two, three)).warnings)
    assert "1 of 7 rows do not stand for one token in template 'one' and in 'two' and 'three' (6: 'g'/none)" in said


def test_a_tokenizer_that_cannot_be_read_is_no_error_where_none_is_needed(tmp_path: Path) -> None:
    models = with_tokens(tmp_path / "one", 1, list("abcdefg")), with_tokens(tmp_path / "two", 2, "[" * 100_000)
    warning = only(polymerge.plan(linear(*models)).warnings)
    assert warning.startswith(f"{ROWS}, and whether they stand for the same tokens in 'two' was not compared: ")
    assert "its tokenizer cannot be read" in warning
    with pytest.raises(Refused, match="its tokenizer cannot be read"):
        polymerge.plan(linear(*models, vocab="by-token"))


# --- tied heads


def test_the_head_of_a_model_that_ties_it_is_its_embedding(tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, OURS, 7), checkpoint(tmp_path / "theirs", 2, THEIRS, 6, tie=True)
    out, before, other = run(tmp_path / "out", ours, theirs, vocab="by-token"), load(ours), load(theirs)
    assert HEAD not in other
    for name in (EMBEDDING, HEAD):
        assert same_bits(out[name], joined(OURS, THEIRS, before[name], other[EMBEDDING]))


def test_a_tied_template_has_no_place_for_a_head(tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, OURS, 7, tie=True), checkpoint(tmp_path / "theirs", 2, THEIRS, 6)
    out, before, other = run(tmp_path / "out", ours, theirs, vocab="by-token"), load(ours), load(theirs)
    assert HEAD not in out
    assert same_bits(out[EMBEDDING], joined(OURS, THEIRS, before[EMBEDDING], other[EMBEDDING]))
    plan = make_plan(recipe(ours, theirs, vocab="by-token"))
    assert warned(plan, "'theirs' has a head of its own")
    assert {entry.name: entry.reason for entry in plan.left_out}[HEAD] == "the template ties its head to its embedding"


# --- tokenizers that cannot be read


@pytest.mark.parametrize("broken", [None, "{"])
def test_a_tokenizer_that_is_missing_or_broken_stops_the_plan_once(broken: str | None, tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "ours", 1, OURS, 7), checkpoint(tmp_path / "theirs", 2, None, 6)
    if broken is not None:
        (theirs / "tokenizer.json").write_text(broken, encoding="utf-8")
    said = f"{theirs}: " + ("no tokenizer.json, vocab.json or tokenizer.model" if broken is None else "its tokenizer")
    with pytest.raises(Refused) as refused:
        make_plan(recipe(ours, theirs, vocab="by-token"))
    (problem,) = refused.value.problems
    assert str(problem).startswith(said)
    assert make_plan(recipe(ours, theirs, vocab="template")), "nobody asks for tokens there"
    assert make_plan(
        recipe(ours, theirs, vocab="by-token", exclude=["text.embed_tokens.weight", "text.lm_head.weight"])
    )


# --- rows as ranges


@given(st.lists(st.integers(0, 30)))
def test_runs_are_the_numbers(numbers: list[int]) -> None:
    found = runs(numbers)
    assert [number for start, stop in found for number in range(start, stop)] == numbers
    assert all(one[1] != other[0] for one, other in pairwise(found)), "as few as there can be"


@given(st.sets(st.integers(0, 30)), st.integers(31, 40))
def test_outside_is_the_rest(numbers: set[int], total: int) -> None:
    rest = [number for start, stop in outside(runs(sorted(numbers)), total) for number in range(start, stop)]
    assert sorted(rest) == rest
    assert set(rest) == set(range(total)) - numbers
