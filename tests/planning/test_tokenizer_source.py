"""The vocabulary that a recipe chooses: whose tokenizer, which rows, and what a model gets for a token it lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, llama
from hub_standin import empty_cache
from layouts import load, same_bits
from polymerge.engine.device import Torch
from polymerge.errors import Refused
from polymerge.planning.text import describe
from running import cli, fold, recipe_file, weights
from vocabularies import EMBEDDING, HEAD, filled_in, listed, tokenizer_in, with_vocabulary

pytestmark = PEFT_WARNINGS

OURS = ("<unk>", "a", "b", "c", "<image>", "d")
THEIRS = ("a", "<unk>", "e", "d", "c")
THIRD = ("f", "a", "e", "b")
OLD = ("d", "c", "b", "a", "<unk>")


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Models with the same tokens elsewhere, tokens of their own, and rows that stand for none; last the base."""
    said = (("ours", OURS, 8), ("theirs", THEIRS, 5), ("third", THIRD, 6), ("old", OLD, 5))
    return [with_vocabulary(tmp_path / name, seed, tokens, rows) for seed, (name, tokens, rows) in enumerate(said)]


def run(recipe: dict[str, Any], out: Path, **more: Any) -> dict[str, Tensor]:
    return load(polymerge.merge(recipe, out, check=False, **more).folder)


def union(*several: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(token for tokens in several for token in tokens))


# --- rows that are filled in, against a loop


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["base", "union", 1, 2])
def test_a_linear_merge_fills_in_the_mean_of_those_that_have_a_token(
    source: str | int, dtype: str, four: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shares = four[:3], (0.5, 0.3, 0.2)
    chosen = str(models[source]) if isinstance(source, int) else source
    tokens = {"base": OURS, "union": union(OURS, THEIRS, THIRD), 1: THEIRS, 2: THIRD}[source]
    keeper = models[source if isinstance(source, int) else 0]
    out = run(listed(*models, weights=shares, tokenizer_source=chosen, dtype=dtype), tmp_path / "out", block=7)
    for name in (EMBEDDING, HEAD):
        tensors = [load(model)[name] for model in models]
        rows = filled_in(tokens, list(zip((OURS, THEIRS, THIRD), tensors, strict=True)))
        near = 1e-6 if dtype == "float32" else 2e-2
        total = 0.5 * rows[0].double() + 0.3 * rows[1].double() + 0.2 * rows[2].double()
        assert torch.allclose(out[name][: len(tokens)].double(), total, rtol=0, atol=near)
        rest = load(keeper)[name][len(tokens) :]  # rows that stand for no token stay as they are
        assert same_bits(out[name][len(tokens) :], rest.to(out[name].dtype))
        assert len(out[name]) == max(len(tokens), len(load(keeper)[name]))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == len(out[EMBEDDING])
    written = tokenizer_in(tmp_path / "out")
    assert written == {token: place for place, token in enumerate(tokens)}
    other = run(listed(*models, weights=shares, tokenizer_source=chosen, dtype=dtype), tmp_path / "b", threads=3)
    assert all(same_bits(out[name], other[name]) for name in out), "whatever blocks and threads"
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))
    other = run(listed(*models, weights=shares, tokenizer_source=chosen, dtype=dtype), tmp_path / "c", block=11)
    assert all(same_bits(out[name], other[name]) for name in out), "by torch as well"


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("source", ["base", "union", 0])
def test_deltas_are_filled_in_from_the_base_where_it_has_the_token(
    method: str, source: str | int, four: list[Path], tmp_path: Path
) -> None:
    chosen = str(four[source]) if isinstance(source, int) else source
    tokens = {"base": OLD, "union": union(OLD, OURS, THEIRS), 0: OURS}[source]
    density = {"density": 1.0, "normalize": False} if method == "ties" else {}
    recipe = listed(
        *four[:2], weights=(0.6, 0.7), merge_method=method, base_model=str(four[3]), tokenizer_source=chosen,
        parameters=density,
    )  # fmt: skip
    out = run(recipe, tmp_path / "out", block=5)
    for name in (EMBEDDING, HEAD):
        tensors = [load(model)[name] for model in (*four[:2], four[3])]
        one, two, old = filled_in(tokens, list(zip((OURS, THEIRS, OLD), tensors, strict=True)), base=2)
        deltas = torch.stack([0.6 * (one - old).double(), 0.7 * (two - old).double()])
        if method == "ties":
            deltas = torch.where(deltas.sign() == deltas.sum(0).sign(), deltas, 0.0)
        assert torch.allclose(out[name][: len(tokens)].double(), old + deltas.sum(0), rtol=0, atol=1e-6)


def test_one_of_two_that_has_a_token_lends_its_own_row(four: list[Path], tmp_path: Path) -> None:
    """So that a merge whose weights add up to 1 has that row."""
    out = run(listed(*four[:2], tokenizer_source="union"), tmp_path / "out")
    assert torch.allclose(out[EMBEDDING][OURS.index("<image>")], load(four[0])[EMBEDDING][4], rtol=0, atol=1e-6)
    assert torch.allclose(out[EMBEDDING][len(OURS)], load(four[1])[EMBEDDING][THEIRS.index("e")], rtol=0, atol=1e-6)
    plan = polymerge.plan(listed(*four[:2], tokenizer_source="union"))
    assert "; 1 token added (1 of theirs); rows that ours lacks: 1 of 'theirs'" in describe(plan)
    assert "rows that theirs lacks: 2 of 'ours'" in describe(plan)
    assert not [left for left in plan.left_out if "embed" in left.name]


def test_a_mean_of_three_is_shown(four: list[Path]) -> None:
    plan = polymerge.plan(listed(*four[:3], tokenizer_source="union"))
    said = describe(plan)
    assert "rows that ours lacks: 1 the mean of 'theirs' and 'third', 1 of 'third'" in said
    assert "mean(theirs:lm_head.weight[2:3], third:lm_head.weight[2:3])" in said


def test_a_tied_head_is_the_embedding_of_a_lender(tmp_path: Path) -> None:
    ours = with_vocabulary(tmp_path / "ours", 1, OURS)
    theirs = with_vocabulary(tmp_path / "theirs", 2, THEIRS, tie_word_embeddings=True)
    tensors = load(theirs)
    del tensors[HEAD]
    save_file(tensors, theirs / "model.safetensors")
    out = run(listed(ours, theirs, tokenizer_source="union"), tmp_path / "out")
    assert torch.allclose(out[HEAD][len(OURS)], tensors[EMBEDDING][THEIRS.index("e")], rtol=0, atol=1e-6)
    tied = run(listed(theirs, ours, tokenizer_source="union"), tmp_path / "tied")
    assert HEAD not in tied
    assert len(tied[EMBEDDING]) == len(union(THEIRS, OURS))


# --- vocabularies that agree


def test_where_all_vocabularies_agree_nothing_is_to_do(tmp_path: Path) -> None:
    models = [with_vocabulary(tmp_path / str(seed), seed, OURS, 8) for seed in range(3)]
    plain = polymerge.plan(listed(*models))
    for source in ("base", "union", str(models[1])):
        plan = polymerge.plan(listed(*models, tokenizer_source=source))
        assert plan.hash == plain.hash
        assert f"vocabulary: tokenizer_source {source}: all models have one vocabulary" in describe(plan)
        assert not plan.warnings
    out = polymerge.merge(listed(*models, tokenizer_source="union"), tmp_path / "out", check=False).folder
    assert (out / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()


def test_embeddings_may_be_excluded_only_where_they_stay(four: list[Path]) -> None:
    kept = {"exclude": ["text.embed_tokens.weight", "text.lm_head.weight"]}
    assert polymerge.plan(listed(*four[:2], tokenizer_source="base", **kept))
    with pytest.raises(Refused, match=r"tokenizer_source: union: .*would be kept \(excluded by the recipe\)"):
        polymerge.plan(listed(*four[:2], tokenizer_source="union", **kept))


# --- the tokenizer


def test_tokens_follow_the_template_s_those_of_vocabularies_first(tmp_path: Path) -> None:
    """As mergekit adds them; one that the template has only as a word is set as the model sets it that adds it."""
    ours = with_vocabulary(tmp_path / "ours", 1, ("a", "b", "<end>"), 7, added=("<s>",))
    theirs = with_vocabulary(tmp_path / "theirs", 2, ("x", "a"), added=("<new>", "<end>", "<s>"))
    third = with_vocabulary(tmp_path / "third", 3, ("y", "a", "<new>"), added=("<last>",))
    out = polymerge.merge(listed(ours, theirs, third, tokenizer_source="union"), tmp_path / "out", check=False)
    numbers = {"a": 0, "b": 1, "<end>": 2, "<s>": 3, "x": 4, "y": 5, "<new>": 6, "<last>": 7}
    assert tokenizer_in(out.folder) == numbers
    written = json.loads((out.folder / "tokenizer.json").read_text())["added_tokens"]
    assert [(one["content"], one["special"], one["normalized"]) for one in written] == [
        ("<end>", True, False), ("<s>", True, False), ("x", False, True), ("y", False, True),
        ("<new>", True, False), ("<last>", True, False),
    ]  # fmt: skip
    assert len(load(out.folder)[EMBEDDING]) == 8
    record = json.loads((out.folder / "polymerge.json").read_text())["vocabulary"]
    assert [one["content"] for one in record["added"]] == ["x", "y", "<new>", "<end>", "<last>"]
    assert record["lenders"] == {"theirs": 3, "third": 2}
    (warning,) = out.plan.warnings
    assert "2 of the 5 added are tokens of another tokenizer's own vocabulary ('x', 'y')" in warning
    card = (out.folder / "README.md").read_text()
    assert "the tokenizer of ours, 8 rows; 5 tokens added (3 of theirs, 2 of third)" in card


def test_the_files_are_those_of_the_model_that_is_named(tmp_path: Path) -> None:
    """With its chat template, and the numbers of its special tokens."""
    special = {"bos_token_id": 1, "eos_token_id": [3, 5], "pad_token_id": None}
    ours = with_vocabulary(tmp_path / "ours", 1, OURS, **special)
    theirs = with_vocabulary(tmp_path / "theirs", 2, THEIRS, bos_token_id=0, eos_token_id=4, pad_token_id=2)
    (ours / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 3}))
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    (ours / "merges.txt").write_text("a b")
    (ours / "chat_template.jinja").write_text("{{ ours }}")
    (theirs / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ theirs }}"}))
    merged = polymerge.merge(listed(ours, theirs, tokenizer_source=str(theirs)), tmp_path / "out", check=False)
    out = merged.folder
    assert (out / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    assert not (out / "merges.txt").exists()
    assert not (out / "chat_template.jinja").exists()
    assert (out / "tokenizer_config.json").is_file()
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 4, None)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0, 3], "top_k": 3}
    assert merged.plan.beside["tokenizer"] == merged.plan.beside["chat_template"] == "theirs"
    assert merged.plan.beside["config"] == "ours"
    assert "bos_token_id, eos_token_id in config.json as there" in describe(merged.plan)


def test_a_written_plan_makes_the_same(four: list[Path], tmp_path: Path) -> None:
    recipe = recipe_file(listed(*four[:3], tokenizer_source="union"), tmp_path / "recipe.yaml")
    assert cli("plan", recipe, "--json", tmp_path / "plan.json").status == 0
    for name, source in (("one", recipe), ("other", tmp_path / "plan.json")):
        ran = cli("merge", source, "-o", tmp_path / name, "--no-verify")
        assert ran.status == 0, ran.err
    assert weights(tmp_path / "one") == weights(tmp_path / "other")
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    ran = cli("merge", "--template", four[0], "--with", four[1], "--with", four[2], "--method", "linear", "--weight",
              "0.5,0.5,0.5", "--tokenizer-source", "union", "-o", tmp_path / "again", "--no-verify")  # fmt: skip
    assert ran.status == 0, ran.err
    assert weights(tmp_path / "again") == weights(tmp_path / "one")


# --- models with adapters, models on the hub


def test_rows_that_an_adapter_changes_are_lent_as_it_changes_them(tmp_path: Path) -> None:
    """Alone and in a mean: as if the adapter had been folded in before."""
    tokens = [f"w{place}" for place in range(20)]
    llama(0).save_pretrained(tmp_path / "base")
    models = [folded_into(tmp_path, tokens)]
    for seed, own in enumerate((tokens[:17], [*tokens[3:], "x"]), 1):
        other = llama(seed)
        other.resize_token_embeddings(len(own), mean_resizing=False)
        other.save_pretrained(tmp_path / str(seed))
        say_tokens(tmp_path / str(seed), own)
        models.append(tmp_path / str(seed))
    out, before = (
        run(listed(*folders, weights=(0.5, 0.3, 0.2), tokenizer_source="union"), tmp_path / name, block=11)
        for name, folders in (("out", [f"{tmp_path / 'base'}+{tmp_path / 'lora'}", *models[1:]]), ("before", models))
    )
    assert out.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.allclose(out[name], tensor, rtol=0, atol=1e-5), name
    assert len(out[EMBEDDING]) == 21
    assert not torch.allclose(out[EMBEDDING][18], load(tmp_path / "base")[EMBEDDING][18], atol=1e-2)


def folded_into(folder: Path, tokens: Sequence[str]) -> Path:
    adapter(folder / "lora", 5, target_modules=["embed_tokens", "q_proj"])
    say_tokens(folder / "base", tokens)
    return fold(folder / "base", folder / "lora", folder / "folded", "--no-verify")


def say_tokens(folder: Path, tokens: Sequence[str]) -> None:
    vocabulary = {"model": {"vocab": {token: place for place, token in enumerate(tokens)}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")


@pytest.mark.parametrize("source", ["union", "a/theirs"])
def test_tokenizers_on_the_hub_are_fetched(
    source: str, four: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (four[1] / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    (four[1] / "chat_template.jinja").write_text("{{ theirs }}")
    here = {"a/theirs": str(four[1])}.get(source, source)
    expected = polymerge.merge(listed(*four[:3], tokenizer_source=here), tmp_path / "here", check=False).folder
    with empty_cache(monkeypatch, tmp_path) as server:
        for folder in four[:3]:
            server.publish(f"a/{folder.name}", folder)
        recipe = {
            "merge_method": "linear", "tokenizer_source": source, "parameters": {"weight": 0.5},
            "models": [f"a/{folder.name}" for folder in four[:3]],
        }  # fmt: skip
        out = polymerge.merge(recipe, tmp_path / "out", check=False).folder
    for file in expected.iterdir():
        if file.name not in ("polymerge.json", "README.md"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in out.iterdir()} == {file.name for file in expected.iterdir()}


def test_verify_finds_an_added_token_with_another_number(tmp_path: Path) -> None:
    """Which transformers would give it if a file that it reads first did not have the token."""
    ours = with_vocabulary(tmp_path / "ours", 1, OURS, tokenizer_class="x")
    theirs = with_vocabulary(tmp_path / "theirs", 2, THEIRS)
    out = polymerge.merge(listed(ours, theirs, tokenizer_source="union"), tmp_path / "out", check=False).folder
    said = json.loads((out / "tokenizer.json").read_text())
    said["model"]["unk_token"] = "<unk>"
    (out / "tokenizer.json").write_text(json.dumps({"version": "1.0", **said}))
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    found = {one.check: one for one in polymerge.verify(out).findings}
    assert found["processor"].passed, found["processor"].detail
    (last,) = (one for one in said["added_tokens"] if one["content"] == "e")
    last["content"] = "other"
    (out / "tokenizer.json").write_text(json.dumps({"version": "1.0", **said}))
    found = {one.check: one for one in polymerge.verify(out).findings}
    assert not found["processor"].passed
    assert "added token 'e' has the number" in found["processor"].detail


# --- stages


@pytest.mark.parametrize("source", ["union", "base", "half"])
def test_the_last_of_several_stages_can_choose(source: str, four: list[Path], tmp_path: Path) -> None:
    half = listed(four[1], four[2], vocab="by-token") | {"name": "half"}
    last = {**listed(four[0], "half"), "tokenizer_source": source}
    out = run({"stages": [half, last]}, tmp_path / "out")
    polymerge.merge(half, tmp_path / "half", check=False)
    chosen = str(tmp_path / "half") if source == "half" else source
    expected = run(listed(four[0], tmp_path / "half", tokenizer_source=chosen), tmp_path / "expected")
    assert out.keys() == expected.keys()
    assert all(same_bits(out[name], expected[name]) for name in out)
    assert tokenizer_in(tmp_path / "out") == tokenizer_in(tmp_path / "expected")


# --- what cannot be right


def refusal(recipe: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    (problem,) = refused.value.problems
    return str(problem)


def test_tokenizers_of_two_kinds_are_refused(tmp_path: Path) -> None:
    byte = with_vocabulary(tmp_path / "byte", 1, ("Ġa", "Ġb", "b"))
    piece = with_vocabulary(tmp_path / "piece", 2, ("▁a", "▁b", "b"))
    said = refusal(listed(byte, piece, tokenizer_source="union"))
    assert said.startswith("tokenizer_source: union: the tokenizers of 'byte' and 'piece' are of different kinds: one ")
    assert "marks words by 'Ġ', the other marks words by '▁'" in said


def test_a_model_that_is_not_read_has_no_rows_to_give(four: list[Path]) -> None:
    said = refusal(listed(*four[:2], tokenizer_source=str(four[2])))
    assert said.startswith(f"tokenizer_source: '{four[2]}' is none of the models that are read: say base, union, or")
    said = refusal(listed(*four[:2], base_model=str(four[3]), tokenizer_source="base"))
    assert said.startswith("tokenizer_source: linear does not read base_model. List it among models")


def test_a_model_without_a_tokenizer_is_refused_once(four: list[Path]) -> None:
    (four[1] / "tokenizer.json").unlink()
    assert "no tokenizer.json, vocab.json or tokenizer.model" in refusal(listed(*four[:2], tokenizer_source="union"))


def test_a_head_with_fewer_rows_than_the_embedding_cannot_grow(tmp_path: Path) -> None:
    ours = with_vocabulary(tmp_path / "ours", 1, OURS, 7)
    theirs = with_vocabulary(tmp_path / "theirs", 2, (*OURS, *THIRD))
    tensors = load(ours)
    save_file(tensors | {HEAD: tensors[HEAD][:6].clone()}, ours / "model.safetensors")
    said = refusal(listed(ours, theirs, tokenizer_source="union"))
    assert "beyond the 7 rows of 'ours', and its text.lm_head.weight has 6 rows" in said


def test_names_without_a_meaning_have_no_embedding(tmp_path: Path) -> None:
    own = {"model_type": "strange", "architectures": ["Strange"]}
    models = [with_vocabulary(tmp_path / str(n), n, one, 6, **own) for n, one in enumerate((OURS, THEIRS))]
    for model in models:
        named = {f"strange.{name}": tensor for name, tensor in load(model).items()}
        save_file(named, model / "model.safetensors")
    assert "the template's family is unknown" in refusal(listed(*models, tokenizer_source="union"))
