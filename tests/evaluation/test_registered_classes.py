"""The table of classes against what lmms-eval and VLMEvalKit register; see also tests/clients/test_registries.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymerge.evaluation.harness.registered_classes import DATASETS, WRAPPERS

REGISTRIES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "harness_registries.json").read_text(encoding="utf-8")
)
"""Of lmms-eval 0.7.3 and VLMEvalKit at e8e78f05: for each class in the table, the arguments that it takes."""


def test_lmms_eval_has_every_model_with_the_arguments_that_it_is_given() -> None:
    models = REGISTRIES["lmms-eval"]["models"]
    assert {row.lmms for row in WRAPPERS if row.lmms} == set(models)
    for row in WRAPPERS:
        if row.lmms:
            assert row.lmms_path in models[row.lmms], row
            taken = {"device_map"} & set(models[row.lmms])
            # qwen3_5 hands on what it is given to the class for Qwen3-VL
            assert row.placed == bool(taken) or row.lmms == "qwen3_5", row


def test_vlmevalkit_has_every_class_with_the_arguments_that_it_is_given() -> None:
    kit = REGISTRIES["VLMEvalKit"]
    assert {row.kit for row in WRAPPERS if row.kit} == set(kit["models"])
    for row in WRAPPERS:
        if row.kit:
            taken = kit["models"][row.kit]
            assert "model_path" in taken, row
            assert set(row.kit_more) <= set(taken) or "**" in taken, row


def test_vlmevalkit_knows_every_data_set() -> None:
    assert REGISTRIES["VLMEvalKit"]["datasets"] == dict(sorted(DATASETS.items()))
