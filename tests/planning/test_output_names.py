"""What a plan says of its output's names, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import polymerge
import tiny
import tiny_derived
from polymerge.errors import PolymergeError
from polymerge.families import derived
from running import checkpoint, cli, linear, raw, small_llama

WARNED = "transformers 5 has it so in memory and loads it"


def copied(folder: Path) -> dict[str, Any]:
    return {"merge_method": "copy", "models": [str(folder)], "names": "published"}


def told(recipe: dict[str, Any], words: str) -> list[str]:
    return [warning for warning in polymerge.plan(recipe).warnings if words in warning]


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tiny.as_live(tiny.build("llava", tmp_path / "live"))


def test_a_template_with_the_names_of_memory_is_warned_of_once(live: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    polymerge.merge(copied(live), published)
    (said,) = told(linear(live, published), WARNED)
    assert "'live' has 'lm_head.weight' where its family is published with 'language_model.lm_head.weight'" in said
    assert "names: published" in said
    assert not told(linear(published, live), WARNED)  # only the template's names are those of the output
    assert not told(linear(live, published) | {"names": "published"}, WARNED)


def test_a_tower_without_its_level_is_warned_of(tmp_path: Path) -> None:
    """So transformers writes a model that was not read from a file."""
    (said,) = told(linear(*(tiny.build("llava", tmp_path / name) for name in "ab")), WARNED)
    assert "'vision_tower.vision_model.embeddings.class_embedding'" in said


def test_verify_says_what_names_a_folder_has(live: Path, tmp_path: Path) -> None:
    found = {finding.check: finding for finding in polymerge.verify(live).findings}
    assert found["names"].passed
    assert WARNED in found["names"].detail
    polymerge.merge(copied(live), tmp_path / "out")
    ran = cli("verify", tmp_path / "out")
    assert "names       ok: those that its family is published with" in ran.out


def test_the_plan_says_what_is_renamed(live: Path) -> None:
    plan = polymerge.plan(copied(live))
    (said,) = [one for one in plan.warnings if one.startswith("names: published")]
    assert "64 tensors of 'live' are written as its family is published" in said
    (read,) = plan.inputs
    assert read.renamed["lm_head.weight"] == "language_model.lm_head.weight"
    ran = cli("plan", "--template", live, "--with", live, "--method", "copy", "--names", "published")
    assert ran.status == 0
    assert "such as" in ran.out


def test_published_names_stay_and_copying_alone_is_still_no_merge(tmp_path: Path) -> None:
    folder = tiny.build("qwen2_vl", tmp_path / "vlm")
    assert told(
        linear(folder, tiny.build("qwen2_vl", tmp_path / "other", seed=1)) | {"names": "published"}, "changes nothing"
    )
    with pytest.raises(PolymergeError, match="nothing would be merged"):
        polymerge.plan(copied(folder))


def test_a_family_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    kind = {"model_type": "strange"}
    folders = [checkpoint(tmp_path / name, small_llama(seed), kind) for seed, name in enumerate("ab")]
    with pytest.raises(PolymergeError, match=r"names: published: what 'a' is published with is not known"):
        polymerge.plan(linear(*folders) | {"names": "published"})


@pytest.mark.parametrize(
    ("kind", "why"),
    [("inkling_mm_model", "Interleave"), ("ernie4_5_vl_moe", "Experts"), ("molmo2", "would be made of")],
)
def test_what_no_expression_says_is_refused_by_name(
    kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # as if nobody knew that a tensor in memory is several in files
    monkeypatch.setattr(derived, "_joined", lambda *_: {})
    config = tiny_derived.tiny_config(kind)
    model = getattr(transformers, tiny_derived.multimodal_types()[kind])(config)
    tiny_derived.filled(model, 0)
    model.save_pretrained(tmp_path / "live", save_original_format=False)
    with pytest.raises(PolymergeError, match=r"names: published: .*the plan has no expression for that") as refused:
        polymerge.plan(copied(tmp_path / "live"))
    assert why in str(refused.value)
    next_step = ("new = type(old)(old.config)", "new.load_state_dict(old.state_dict(), assign=True)")
    assert all(line in str(refused.value) for line in next_step)
    old = type(model).from_pretrained(tmp_path / "live")
    new = type(old)(old.config)
    new.load_state_dict(old.state_dict(), assign=True)
    new.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "made anew")
    assert raw(tmp_path / "published") == raw(tmp_path / "made anew")


def test_adapters_and_other_words_are_refused(live: Path) -> None:
    with pytest.raises(PolymergeError, match="names has to be template or published, got 'mine'"):
        polymerge.plan(copied(live) | {"names": "mine"})
