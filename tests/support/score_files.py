"""The golden files of predictions and what they score."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest

from paths import GOLDEN
from polymerge.evaluation.mm_mergebench.tasks import TASKS

FOLDER = GOLDEN / "scores"


CASES = {task: json.loads((FOLDER / f"{task}.json").read_text(encoding="utf-8")) for task in TASKS}


NEEDS_CAPTIONS = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="caption metrics are an extra")
NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the PTB tokenizer need java")


def written(task, variant, folder):
    """The files of a case or of a variant of it: predictions, annotation folder, and what is expected."""
    case = CASES[task]
    expected = case["variants"][variant] if variant else case
    lines = [case["lines"][line] if isinstance(line, int) else line for line in expected["lines"]]
    predictions = folder / "merge.jsonl"
    predictions.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    for name, content in (case["annotations"] | expected.get("annotations", {})).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return predictions, folder, expected
