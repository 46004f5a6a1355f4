"""The chat template that a recipe chooses: the most common one of the models', a file's, or the recipe's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer

import polymerge
from adapters_made import PEFT_WARNINGS, adapter
from polymerge.errors import Refused
from polymerge.planning.text import describe
from running import with_config
from tiny import build, perturbed, related_llm
from vocabularies import listed

pytestmark = PEFT_WARNINGS

OWN = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def chats(folder: Path, text: str | list[dict[str, str]] | None, where: str = "chat_template.jinja") -> None:
    """Give a model this chat template alone, in one of the places where it may lie."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said.pop("chat_template", None)
    file.write_text(json.dumps(said))
    if isinstance(text, str) and where == "chat_template.jinja":
        (folder / where).write_text(text)
    elif text is not None:
        kept = json.loads((folder / where).read_text()) if (folder / where).is_file() else {}
        (folder / where).write_text(json.dumps(kept | {"chat_template": text}))


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    first = build("llama", tmp_path / "a", seed=1)
    return [first, *(perturbed(first, tmp_path / name, seed=place) for place, name in enumerate("bcd"))]


def chosen(*folders: Path, **more: Any) -> tuple[str | None, str | None]:
    plan = polymerge.plan(listed(*folders, chat_template="auto", **more))
    return plan.chat_template, plan.beside["chat_template"]


def test_auto_is_the_most_common_of_the_models(models: list[Path]) -> None:
    a, b, c, d = models
    chats(a, "{{ one }}")
    chats(b, "\n{{ two }} \n", "chat_template.json")
    chats(c, "{{ two }}", "tokenizer_config.json")
    several = [{"name": "default", "template": "{{ three }}"}, {"name": "tools", "template": "x"}]
    chats(d, several, "tokenizer_config.json")
    assert chosen(a, b, c, d) == ("{{ two }}", "b")
    assert chosen(a, b, d) == ("{{ one }}", "a"), "of three, the first model's"
    assert chosen(d, b) == ("{{ three }}", "d")
    assert chosen(b, d, merge_method="ties", base_model=str(c)) == ("{{ two }}", "b"), "the base counts as well"
    for one in models:
        chats(one, None)
    assert chosen(a, b) == (None, None)
    (warning,) = polymerge.plan(listed(a, b, chat_template="auto")).warnings
    assert warning == "chat_template: auto: no model has one, so the output has the template's, if any"


def test_only_multimodal_models_count_for_a_vlm(tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", seed=1)
    texts = [related_llm(vlm, tmp_path / str(seed), seed=seed) for seed in (2, 3)]
    chats(vlm, "{{ sees }}")
    for text in texts:
        chats(text, "{{ reads }}")
    assert chosen(vlm, *texts, parts=["text"], vocab="overlap") == ("{{ sees }}", "vlm")
    assert chosen(*texts) == ("{{ reads }}", "2")


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "nowhere"])
def test_it_is_written_where_the_template_has_one(where: str, models: list[Path], tmp_path: Path) -> None:
    a, b, *_ = models
    chats(a, "{{ old }}" if where != "nowhere" else None, where)
    recipe = listed(a, b, chat_template=OWN)
    merged = polymerge.merge(recipe, tmp_path / "out")
    out = AutoTokenizer.from_pretrained(merged.folder)
    assert out.chat_template == OWN
    assert out.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "[a b]"
    assert (merged.folder / "chat_template.jinja").read_text() == OWN
    if where.endswith(".json"):
        assert json.loads((merged.folder / where).read_text())["chat_template"] == OWN
    assert "{{ old }}" not in "".join(file.read_text() for file in merged.folder.glob("*[^s].j*"))
    assert "chat template of the recipe" in describe(merged.plan)
    assert merged.plan.hash == polymerge.plan(listed(a, b)).hash, "which is of the weights"
    assert polymerge.plan(merged.plan.to_json()) == merged.plan


def test_of_several_with_names_the_default_one_is_replaced(models: list[Path], tmp_path: Path) -> None:
    a, b, *_ = models
    tools = {"name": "tools", "template": "{{ tools }}"}
    chats(a, [tools, {"name": "default", "template": "{{ old }}"}], "tokenizer_config.json")
    out = polymerge.merge(listed(a, b, chat_template=OWN), tmp_path / "out", check=False).folder
    said = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert said == [{"name": "default", "template": OWN}, tools]


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json"])
def test_a_processor_has_it_too(where: str, tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", seed=1)
    other = perturbed(vlm, tmp_path / "other", seed=2)
    chats(vlm, "{{ old }}", where)
    recipe = listed(vlm, other, chat_template=OWN)
    out = polymerge.merge(recipe, tmp_path / "out").folder
    processor = AutoProcessor.from_pretrained(out)
    assert processor.chat_template == OWN
    with polymerge.live(recipe) as live:
        assert AutoProcessor.from_pretrained(live.processor_folder).chat_template == OWN
    assert AutoProcessor.from_pretrained(vlm).chat_template != OWN


def test_a_template_that_cannot_be_read_is_refused(models: list[Path]) -> None:
    a, b, *_ = models
    (b / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(Refused, match="not UTF-8"):
        polymerge.plan(listed(a, b, chat_template="auto"))


def test_adapters_have_neither(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    with pytest.raises(Refused, match="tokenizer_source and chat_template are for checkpoints"):
        polymerge.plan(listed(*folders, chat_template=OWN))
    with pytest.raises(Refused, match="tokenizer_source and chat_template are for checkpoints"):
        polymerge.plan(listed(*folders, tokenizer_source="base"))


def test_a_config_beside_keeps_what_else_it_says(models: list[Path], tmp_path: Path) -> None:
    a, b, *_ = models
    with_config(a, bos_token_id=1)
    chats(a, "{{ old }}", "tokenizer_config.json")
    out = polymerge.merge(listed(a, b, chat_template=OWN), tmp_path / "out", check=False).folder
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (a, out))
    assert {**before, "chat_template": OWN} == after
