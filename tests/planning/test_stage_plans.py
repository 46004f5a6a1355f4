"""Stages whose tokens, chat template or config are not their template's: planned as they will be, and merged so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import polymerge
from hub_standin import empty_cache
from misplaced import adapter, factors
from polymerge.errors import Refused
from polymerge.planning import Plan
from running import leftovers
from vocabularies import EMBEDDING, listed, tokenizer_in, with_vocabulary

OURS = ("<unk>", "a", "b", "c", "<image>", "d")
THEIRS = ("a", "<unk>", "e", "d", "c")
THIRD = ("f", "a", "e", "b")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Three models, of which every two have tokens that the third lacks."""
    said = (("ours", OURS, 8), ("theirs", THEIRS, 5), ("third", THIRD, 6))
    made = {
        name: with_vocabulary(tmp_path / name, seed, tokens, rows) for seed, (name, tokens, rows) in enumerate(said)
    }
    (made["theirs"] / "chat_template.jinja").write_text("{{ theirs }}")
    (made["theirs"] / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 3}))
    (made["ours"] / "config.json").write_text(
        json.dumps(json.loads((made["ours"] / "config.json").read_text()) | {"eos_token_id": 0, "image_token_id": 4})
    )
    return made


def files(folder: Path) -> dict[str, bytes]:
    """What lies in an output, without what tells of the run."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("polymerge.json", "README.md")
    }


def check(first: dict[str, Any], last: Callable[[str], dict[str, Any]], folder: Path) -> Plan:
    """Merge two stages at once and one by one: the same files. Returns the plan, which is the same as JSON."""
    one = polymerge.merge(first, folder / "first", check=False).folder
    expected = polymerge.merge(last(str(one)), folder / "last", check=False).folder
    recipe = {"stages": [{**first, "name": "first"}, last("first")]}
    plan = polymerge.plan(recipe)
    assert polymerge.plan(json.loads(json.dumps({**plan.to_json(), "hash": plan.hash}))) == plan
    out = polymerge.merge(plan.to_json(), folder / "out", check=False).folder
    assert files(out) == files(expected)
    assert leftovers(folder) == []
    assert "polymerge-stages-" not in json.dumps(plan.to_json())
    return plan


@pytest.mark.parametrize("joined", [{"vocab": "by-token"}, {"tokenizer_source": "union"}, {"vocab": "overlap"}])
@pytest.mark.parametrize("source", ["union", "theirs"])
def test_a_stage_with_other_tokens_is_read_with_those(
    source: str, joined: dict[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    ours, theirs, third = models.values()
    chosen = source if source == "union" else str(theirs)
    if source != "union":  # whose tokenizer has no token for an image
        ours = with_vocabulary(tmp_path / "plain", 5, OURS, 8)
    first = listed(ours, theirs, tokenizer_source=chosen)
    plan = check(first, lambda stage: listed(stage, third, **joined), tmp_path)
    rows = {"union": 8, "theirs": 5}[source]
    assert next(step.shape[0] for step in plan.stages[0].steps if step.name == EMBEDDING) == rows


def test_the_last_stage_takes_the_tokenizer_of_one_that_chose_it(models: dict[str, Path], tmp_path: Path) -> None:
    ours, theirs, third = models.values()
    first = listed(ours, theirs, tokenizer_source="union", chat_template="{{ mine }}")
    plan = check(first, lambda stage: listed(third, stage, template=str(third), tokenizer_source=stage), tmp_path)
    assert {taken.folder for taken in plan.companions} == {"first"}
    assert set(tokenizer_in(tmp_path / "out")) == {*OURS, "e"}
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ mine }}"


def test_a_stage_whose_template_has_an_adapter_with_its_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """Its adapter's folder has a whole tokenizer, which the output takes, and so does what comes after."""
    name = "model.layers.0.self_attn.q_proj"
    shape = load_file(models["ours"] / "model.safetensors")[f"{name}.weight"].shape
    lora = adapter(tmp_path / "lora", factors({name: (shape[0], shape[1])})[0])
    tokens = {token: place for place, token in enumerate(OURS[::-1])}
    (lora / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": tokens}, "added_tokens": []})
    )
    first = {"merge_method": "copy", "models": [f"{models['ours']}+{lora}"]}
    plan = check(first, lambda stage: listed(stage, models["third"], vocab="by-token"), tmp_path)
    assert plan.stages[0].companions[0].folder == str(lora)
    assert tokenizer_in(tmp_path / "out") == tokens


@pytest.mark.parametrize("source", [None, "union"])
def test_stages_of_models_on_the_hub(
    source: str | None, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"tokenizer_source": source} if source else {"vocab": "by-token"}

    def recipe(*names: str) -> dict[str, Any]:
        ours, theirs, third = names
        first = {**listed(ours, theirs, **more), "name": "first"}
        return {"stages": [first, listed("first", third, vocab="by-token")]}

    expected = polymerge.merge(recipe(*map(str, models.values())), tmp_path / "here", check=False).folder
    with empty_cache(monkeypatch, tmp_path) as server:
        for name, folder in models.items():
            server.publish(f"a/{name}", folder)
        out = polymerge.merge(recipe("a/ours", "a/theirs", "a/third"), tmp_path / "out", check=False).folder
    assert files(out) == files(expected)


def test_what_cannot_be_joined_is_said_before_anything_is_merged(models: dict[str, Path], tmp_path: Path) -> None:
    first = listed(models["third"], models["theirs"], tokenizer_source="union") | {"name": "first"}
    last = listed(models["ours"], "first", tokenizer_source="first")
    with pytest.raises(Refused, match="'<image>', which is") as refused:
        polymerge.merge({"stages": [first, last]}, tmp_path / "out", check=False)
    assert len(refused.value.problems) == 1
    assert not (tmp_path / "out").exists()
