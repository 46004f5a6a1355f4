"""What a report suggests: each rule speaks by its number, and is silent without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import polymerge
from adapters_made import PEFT_WARNINGS, adapter
from polymerge.reporting.advice import Suggestion
from polymerge.reporting.report import collect
from report_made import ablation, knockout, results, search, small_merge, write

pytestmark = PEFT_WARNINGS


def advice(folder: Path, name: str, data: Mapping[str, Any], *more: Path) -> dict[str, dict[str, Any]]:
    """What is suggested for one record, by its title."""
    found = collect([write(folder / name, data), *more])["advice"]
    for one in found:
        assert one["numbers"], one
        assert all(isinstance(number, int | float) for number in one["numbers"].values())
    return {one["title"]: one for one in found}


def test_nothing_is_suggested_without_a_number() -> None:
    with pytest.raises(ValueError, match="without a number: Try"):
        Suggestion("run", "Try", "because", {})


def test_a_clear_search_asks_for_nothing(tmp_path: Path) -> None:
    assert advice(tmp_path, "search.json", search()) == {}


@pytest.mark.parametrize(
    ("differences", "chosen", "title"),
    [
        ([5, 40, 80], 0.2, "Search weight with a finer grid of small values"),
        ([80, 40, 5], 0.6, "Search weight with larger values"),
    ],
)
def test_a_choice_at_the_edge_asks_for_another_grid(
    differences: list[int], chosen: float, title: str, tmp_path: Path
) -> None:
    data = search(differences=differences, minima=[chosen], chosen=chosen, best=chosen)
    told = advice(tmp_path, "search.json", data)
    assert list(told) == [title]
    assert told[title]["numbers"] == {"chosen": chosen, "smallest": 0.2, "largest": 0.6}


def test_tied_minima_ask_for_more_prompts(tmp_path: Path) -> None:
    data = search(differences=[12, 12, 40], minima=[0.2, 0.4], chosen=0.2, best=0.2)
    assert advice(tmp_path, "search.json", data)["Draw more prompts"]["numbers"] == {
        "minima": 2, "difference": 12, "prompts": 100,
    }  # fmt: skip


@pytest.mark.parametrize(("second", "fires"), [(17, True), (18, False)])
def test_a_difference_within_chance_asks_for_more_prompts(second: int, fires: bool, tmp_path: Path) -> None:
    """Of 12 against 17 and 18: chance is the root of the sum, 5.4 and 5.5."""
    told = advice(tmp_path, "search.json", search(differences=[40, 12, second]))
    assert ("Draw more prompts" in told) == fires
    if fires:
        assert told["Draw more prompts"]["numbers"]["chance"] == pytest.approx(29**0.5)


def test_a_smoothed_or_embedded_difference_is_no_count_and_is_not_judged_by_chance(tmp_path: Path) -> None:
    for change in ({"smooth": 1}, {"compare": "embedding"}):
        assert advice(tmp_path, "search.json", search(differences=[40, 12, 13], **change)) == {}


def test_the_best_by_labels_is_held_against_another_choice(tmp_path: Path) -> None:
    title = "Hold the choice against the best by labels"
    far = advice(tmp_path, "search.json", search(scores=[40.0, 90.0, 60.0, 55.0, 20.0], best=0.2))
    assert far[title]["numbers"] == {"best": 90.0, "chosen": 60.0, "apart": 30.0}
    near = advice(tmp_path, "search.json", search(scores=[40.0, 62.0, 60.0, 55.0, 20.0], best=0.2))
    assert near[title]["numbers"]["standard error"] == pytest.approx(100 * (0.62 * 0.38 / 100) ** 0.5)
    assert "within the standard error of 4.9 points of 100 prompts" in near[title]["text"]


def test_flat_scores_choose_nothing(tmp_path: Path) -> None:
    told = advice(tmp_path, "search.json", search(scores=[58.0, 59.0, 60.5, 60.0, 57.0]))
    assert told["Do not choose by these scores alone"]["numbers"]["span"] == 3.5


def test_a_best_score_at_the_end_of_a_scored_grid_asks_for_a_wider_one(tmp_path: Path) -> None:
    data = search(chosen_by="exact", chosen=0.8, best=0.8, scores=[10.0, 20.0, 30.0, 40.0, 60.0])
    assert "Search weight with larger values" in advice(tmp_path, "search.json", data)


# --- overlaps


def overlap_with(tmp_path: Path, **total: Any) -> dict[str, Any]:
    """A real overlap of two deltas, whose totals are then set."""
    merged = small_merge(tmp_path / "models")
    data: dict[str, Any] = json.loads((merged / "overlap.json").read_text(encoding="utf-8"))
    (all_of_it,) = data["totals"]
    for delta, norm, kept in zip(
        all_of_it["deltas"], total.pop("norms", (1.0, 1.0)), total.pop("kept", (0.5, 0.5)), strict=True
    ):
        delta |= {"norm": norm, "kept": kept}
    all_of_it["pairs"][0]["cosine"] = total.pop("cosine", 0.0)
    all_of_it["conflict_mass"] = total.pop("conflict_mass", 0.1)
    for row in data["places"]:
        row["conflict_mass"] = total.get("places", 0.1)
    return data


@pytest.mark.parametrize(
    ("total", "title", "numbers"),
    [
        ({}, None, {}),
        ({"conflict_mass": 0.24, "places": 0.24}, None, {}),
        (
            {"conflict_mass": 0.26, "places": 0.26},
            "Try ties with a density of 0.2, or a lower one",
            {"conflict by mass": 0.26, "unrelated": 0.29},
        ),
        ({"places": 0.15}, None, {}),
        ({"places": 0.2}, "Give layer 0, mlp, an override of its own", {"conflict there": 0.2, "in all": 0.1}),
        ({"cosine": 0.6}, "A plain average may be enough", {"cosine": 0.6}),
        ({"norms": (1.0, 1.9)}, None, {}),
        ({"norms": (1.0, 2.0)}, "Weigh math with care", {"ratio": 2.0, "norm of math": 2.0, "norm of vlm": 1.0}),
        ({"kept": (0.95, 0.85)}, None, {}),
        ({"kept": (0.95, 0.92)}, "Trimming costs little here", {"density": 0.2, "kept": 0.92}),
    ],
)
def test_a_rule_on_deltas_speaks_from_its_number_on(
    total: dict[str, Any], title: str | None, numbers: dict[str, float], tmp_path: Path
) -> None:
    told = advice(tmp_path, "overlap.json", overlap_with(tmp_path, **total))
    assert list(told) == ([title] if title else [])
    if title:
        assert told[title]["numbers"] == numbers


def test_what_was_merged_by_ties_is_not_told_to_try_ties(tmp_path: Path) -> None:
    data = overlap_with(tmp_path, conflict_mass=0.3, places=0.3)
    told = advice(tmp_path, "overlap.json", data, tmp_path / "models" / "merged" / "polymerge.json")
    assert "Lower the density of ties" in told


# --- scores, layers, adapters


def test_a_gain_within_the_noise_asks_for_more_questions_and_a_sure_loss_for_a_look(tmp_path: Path) -> None:
    before = {"sums": [1.0, 0.0] * 10, "read": [1.0] * 20}
    after = {"sums": [1.0, 0.0, 0.0, 1.0] * 5, "read": [0.0] * 15 + [1.0] * 5}
    other = write(tmp_path / "before" / "results.json", results("vlm", "vlm", before))
    found = collect([other, write(tmp_path / "after" / "results.json", results("merged", "merged", after))])
    told = {one["title"]: one for one in found["advice"]}
    unsure = told["Ask more questions before believing a gain"]
    assert unsure["numbers"] | {"low": 0, "high": 0} == {"gain": 0, "low": 0, "high": 0, "in doubt": 1, "gains": 3}
    lost = told["Look at what merged loses on read"]
    assert lost["numbers"]["gain"] == -75
    assert lost["numbers"]["high"] < 0


def test_a_third_of_the_layers_that_surely_carries_a_task_is_named(tmp_path: Path) -> None:
    told = advice(tmp_path, "knockout.json", knockout([0.6, 0.9]))
    assert list(told) == [f"Weigh the late layers of mlp with care for {task}" for task in ("read", "sums")]
    numbers = told["Weigh the late layers of mlp with care for sums"]["numbers"]
    assert numbers == {"share": 0.75, "low": 0.6, "high": 0.9, "drop": 14.25}


def test_a_wide_interval_asks_for_more_questions_and_none_for_nothing(tmp_path: Path) -> None:
    told = advice(tmp_path, "knockout.json", knockout([0.3, 0.95]))
    assert "Ask more questions to see which layers of mlp sums needs" in told
    assert advice(tmp_path, "knockout.json", knockout([0.3, 0.6])) == {}
    assert advice(tmp_path, "knockout.json", knockout(None)) == {}


def test_a_range_that_gains_more_than_the_whole_is_named_with_its_doubt(tmp_path: Path) -> None:
    data = ablation()
    told = advice(tmp_path, "ablation.json", data)
    assert told["Merge only the early layers"]["numbers"] == {"gain": 7.5, "whole": 4.5, "low": 5.75, "high": 9.25}
    assert "ask more questions first" not in told["Merge only the early layers"]["text"]
    data["ranges"][0]["tasks"]["sums"]["interval"] = [1.0, 14.0]
    assert "ask more questions first" in advice(tmp_path, "ablation.json", data)["Merge only the early layers"]["text"]
    data["ranges"][2]["tasks"]["sums"]["gain"] = 7.5
    assert advice(tmp_path, "ablation.json", data) == {}


def test_a_merged_adapter_is_shown_with_its_pairs_and_with_what_its_rank_has_no_room_for(tmp_path: Path) -> None:
    saved = {"modules_to_save": ["lm_head"]}
    both = [str(adapter(tmp_path / name, seed, **saved)) for seed, name in enumerate(("one", "other"))]
    recipe = {"merge_method": "linear", "models": both, "parameters": {"weight": 0.5, "rank": 2}}
    out = polymerge.merge(recipe, tmp_path / "out", check=False).folder
    data = collect([out])
    (merge,) = data["merges"]
    rows = {row[0]: row for row in merge["plan"]["rows"]}
    module = "model.layers.1.self_attn.q_proj"
    assert rows[module][2] == "merged"
    assert merge["plan"]["reasons"][rows[module][6]].startswith("rank 2 x ")
    assert "base_model.model.lm_head.weight" in rows
    assert [one["models"] for one in merge["plan"]["settings"]] == [["one", "other"]] * len(merge["plan"]["settings"])
    assert merge["ranks"] == [2]
    worst = merge["relative_error"]["most"]
    assert worst > 0.2
    assert [(one["title"], one["numbers"]) for one in data["advice"]] == [
        ("Give the merged adapter a higher rank", {"relative error": worst})
    ]
    (view,) = merge["charts"][0]["views"]
    assert view["spec"]["datasets"][view["spec"]["data"]["name"]][0]["value"] == worst
