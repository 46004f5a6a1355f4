"""Folders of answers as evaluation tools leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paths import GOLDEN

SEARCH = GOLDEN / "search"


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def logs_of_2024(*answers: str, **fields: Any) -> str:
    logs = [
        {
            "doc_id": place,
            "target": "x",
            "arguments": [["?"]],
            "resps": [[answer]],
            "filtered_resps": [answer],
            **fields,
        }
        for place, answer in enumerate(answers)
    ]
    return json.dumps({"args": {}, "model_configs": {}, "logs": logs})


def laid_out(case: str, root: Path) -> tuple[dict[str, Any], Path]:
    """A golden case, and its answers written as the tool that it imitates writes them."""
    golden = json.loads((SEARCH / f"{case}.json").read_text(encoding="utf-8"))
    for name, answers in golden["answers"].items():
        if case == "diff2_kit":
            records = [{"index": number, "question": "?", "prediction": text} for number, text in enumerate(answers)]
            put(root / name, json.dumps(records))
            continue
        log = json.loads(logs_of_2024(*answers))
        for document in log["logs"]:
            mine = document["doc_id"] in golden.get("mme_percetion_score", ())
            document["mme_percetion_score" if mine else "other_score"] = {"category": "color", "score": 1.0}
        put(root / name, json.dumps(log))
        put((root / name).with_name("results.json"), '{"results": {}}')
    return golden, root
