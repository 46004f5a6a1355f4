"""The registries that the tests of the table go by are those of the installed versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from environments import environment, folder
from polymerge.evaluation.harness.registered_classes import DATASETS, WRAPPERS
from registries import kit_datasets, kit_models, lmms_eval_models


@pytest.fixture
def recorded() -> Any:
    file = Path(__file__).parents[1] / "golden" / "harness_registries.json"
    return json.loads(file.read_text(encoding="utf-8"))


@environment("lmms-eval")
def test_lmms_eval(recorded: Any) -> None:
    (package,) = Path(f"{folder()}/lmms-eval").glob("lib/python*/site-packages/lmms_eval")
    found = lmms_eval_models(package, {row.lmms for row in WRAPPERS if row.lmms})
    assert found == recorded["lmms-eval"]["models"]


@environment("VLMEvalKit-src")
def test_vlmevalkit(recorded: Any) -> None:
    clone = Path(f"{folder()}/VLMEvalKit-src")
    assert kit_models(clone, {row.kit for row in WRAPPERS if row.kit}) == recorded["VLMEvalKit"]["models"]
    assert kit_datasets(clone, DATASETS) == recorded["VLMEvalKit"]["datasets"]
