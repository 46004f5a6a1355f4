"""Run a script of cells and write it as a notebook with what each cell shows: `python tools/notebook.py FILE.py`.

A cell begins with a line `# %%`; one of `# %% [markdown]` is text, in comments, and one of `# %% [script]` is left out.
A cell that ends with `show(x)` ends with `x` in the notebook, which shows that by itself. No Jupyter is needed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Cell = dict[str, Any]

_PYTHON = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells_of(script: str) -> list[Cell]:
    """The cells of a script, not run."""
    cells = []
    for number, block in enumerate(re.split(r"^# %%", script, flags=re.MULTILINE)[1:], 1):
        head, _, text = block.partition("\n")
        text = text.strip("\n")
        cell: Cell = {"cell_type": "code", "id": f"cell-{number}", "metadata": {}}
        match head.strip():
            case "[script]":
                continue
            case "[markdown]":
                cell |= {"cell_type": "markdown", "source": re.sub(r"^# ?", "", text, flags=re.MULTILINE)}
            case _:
                shown = re.sub(r"^show\((.*)\)\Z", r"\1", text, flags=re.MULTILINE)
                cell |= {"source": shown, "execution_count": None, "outputs": []}
        cells.append(cell)
    return cells


def run(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Each cell with its outputs, in order and in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in cells), 1):
        if cell["cell_type"] == "markdown":
            yield cell
            continue
        said = io.StringIO()
        with redirect_stdout(said):
            value = _value(cell["source"], names)
        outputs = []
        if said.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": said.getvalue()})
        if value is not None:
            shown = {"data": _shown(value), "metadata": {}, "execution_count": number}
            outputs.append({"output_type": "execute_result", **shown})
        yield cell | {"outputs": outputs, "execution_count": number}


def _value(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line, if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def _shown(value: Any) -> dict[str, str]:
    """What a notebook shows of a value: a picture, a table, or text."""
    if hasattr(value, "to_dict") and hasattr(value, "save"):  # a chart of altair's
        picture = io.BytesIO()
        value.save(picture, format="png")
        return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": type(value).__name__}
    if hasattr(value, "_repr_html_"):
        return {"text/html": value._repr_html_(), "text/plain": type(value).__name__}
    if hasattr(value, "_repr_png_"):
        return {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": type(value).__name__}
    return {"text/plain": repr(value)}


def notebook(cells: Sequence[Cell]) -> str:
    """The text of a notebook file."""
    data = {"cells": list(cells), "metadata": {"kernelspec": _PYTHON}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    script = parser.parse_args().script
    made = notebook(list(run(cells_of(script.read_text(encoding="utf-8")))))
    script.with_suffix(".ipynb").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
