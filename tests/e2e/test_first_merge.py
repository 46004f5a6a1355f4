"""examples/first_merge: the notebook is made of the script, and every cell of it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters_made import PEFT_WARNINGS
from paths import ROOT

pytest.importorskip("torch")
pytest.importorskip("altair")
pytest.importorskip("sklearn")

sys.path.insert(0, str(ROOT / "tools"))
import notebook

pytestmark = PEFT_WARNINGS

SCRIPT = ROOT / "examples" / "first_merge.py"
CELLS = notebook.cells_of(SCRIPT.read_text(encoding="utf-8"))


def test_the_notebook_is_made_of_the_script() -> None:
    written = json.loads(SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert written["nbformat"] == 4
    assert [(cell["cell_type"], cell["id"], cell["source"]) for cell in written["cells"]] == [
        (cell["cell_type"], cell["id"], cell["source"]) for cell in CELLS
    ]
    assert all(cell["outputs"] is not None for cell in written["cells"] if cell["cell_type"] == "code")


def test_every_cell_runs_and_shows_what_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [output for cell in notebook.run(CELLS) for output in cell.get("outputs", ())]
    kinds = [next(iter(output.get("data", {"stream": None}))) for output in shown]
    assert kinds.count("image/png") == 4  # the overlap, the picture, the curve, the scores
    assert kinds.count("text/html") == 4  # the models, the plan, the search, what was verified
    said = "".join(output.get("text", "") for output in shown)
    assert "the answer is 11" in said
    assert "weight 1: 11" in said
    assert "unseen: +" in said
    assert (tmp_path / "first-merge" / "merged" / "polymerge.json").is_file()
    assert (tmp_path / "first-merge" / "report.html").is_file()


def test_a_cell_shows_its_last_line() -> None:
    script = "# %%\nx = 2\nshow(x + 1)\n\n# %% [script]\nraise ValueError\n\n# %% [markdown]\n# # Two\n#\n# words\n"
    code, text = notebook.cells_of(script)
    assert (code["source"], text["source"]) == ("x = 2\nx + 1", "# Two\n\nwords")
    ran: list[dict[str, Any]] = list(notebook.run([code, text]))
    assert ran[0]["outputs"][0]["data"] == {"text/plain": "3"}
