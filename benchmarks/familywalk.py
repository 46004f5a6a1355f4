"""All model types that no table is needed for: built tiny, merged, and held against literal merges in memory.

    python benchmarks/families.py --derived --markdown docs/families-derived.md

The checkpoints and the literal merges are those of the tests (`tests/support/tiny_derived.py`, `derived_walk.py`).
"""

from __future__ import annotations

import importlib
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from polymerge.errors import PolymergeError
from polymerge.families.registry import GENERIC, claimed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
tiny_derived: Any = importlib.import_module("tiny_derived")
derived_walk: Any = importlib.import_module("derived_walk")

TYPES: Mapping[str, str] = tiny_derived.multimodal_types()
"""The model types that transformers has a multimodal class of, each with the class."""

RIGHT = "right"

TITLE = """# Model types without a table

Every model type for which transformers has a class of images, sound and text: a tiny checkpoint of it, its default
config with all sizes shrunk, is merged by polymerge from rules that are derived from the class. The output has to load
strictly by that class, with every tensor as a literal merge in memory has it. The page is what this command printed:
"""

READING = """
- **VLM + VLM**: two checkpoints of the type, 0.7 and 0.3 of every tensor of every part.
- **names in memory**: the second has the names that transformers has in memory instead of those that it writes.
- **VLM + LLM**: with a language model that has the text tower's class, or that of the model it grew from, 0.7 and 0.3
  of the decoder and the head, all else the template's.
- **refused**: polymerge said what is the matter and wrote nothing.
"""


@dataclass(frozen=True)
class Walked:
    """What became of one pair of a model type, or of its checkpoint where that could not be built (no pair)."""

    kind: str
    pair: str
    text: str


def walk(kinds: Iterable[str]) -> Iterator[Walked]:
    """Build, merge and compare every pair of each model type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                pairs = [*derived_walk.pairs(kind, TYPES[kind], Path(folder))]
            except Exception as error:  # whatever a class raises where its default config is not enough
                yield Walked(kind, "", f"not built: {_said(error)}")
                continue
            for pair, run in pairs:
                try:
                    run()
                except PolymergeError as error:
                    yield Walked(kind, pair, f"refused: {_said(error)}")
                except Exception as error:  # a wrong output fails in more than one way
                    yield Walked(kind, pair, f"WRONG: {_said(error)}")
                else:
                    yield Walked(kind, pair, RIGHT)


def walk_page(command: Sequence[str], about: Mapping[str, str], walked: Sequence[Walked]) -> str:
    """The page of a walk: numbers, a table of all model types, and the reasons of those that are not right."""
    cells: dict[str, dict[str, str]] = {}
    notes = []
    for one in walked:
        row = cells.setdefault(one.kind, {})
        column = _column(one.pair)
        text = f"{one.pair.removeprefix('VLM + ')}: " if column == "VLM + LLM" else ""
        row[column] = text + one.text.partition(":")[0]
        if one.text != RIGHT:
            notes.append(f"- `{one.kind}`{f', {one.pair}' if one.pair else ''}: {one.text}")
    right = {column: sum(row.get(column, "").endswith(RIGHT) for row in cells.values()) for column in _COLUMNS}
    lines = [TITLE, f"    {shlex.join(['python', *command])}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        READING,
        f"{len(cells)} model types, {len([*filter(_has_table, cells)])} of them with a table. Right are ",
    ]
    lines[-1] += ", ".join(f"{count} in {column}" for column, count in right.items()) + "."
    lines += ["", f"| model type | read by | {' | '.join(_COLUMNS)} |", "|---|---|" + "---|" * len(_COLUMNS)]
    for kind, row in cells.items():
        built = [row[""], "", ""] if "" in row else [row.get(column, "") for column in _COLUMNS]
        lines.append(f"| `{kind}` | {'a table' if _has_table(kind) else 'its class'} | {' | '.join(built)} |")
    return "\n".join([*lines, "", "## What is not right, and why", "", *notes, ""])


_COLUMNS = ("VLM + VLM", "names in memory", "VLM + LLM")


def _has_table(kind: str) -> bool:
    return claimed({"architectures": [TYPES[kind]]}) is not GENERIC


def _column(pair: str) -> str:
    names = {"": "", "VLM + VLM": _COLUMNS[0], "VLM + VLM in memory's names": _COLUMNS[1]}
    return names.get(pair, _COLUMNS[2])


def _said(error: Exception, most: int = 220) -> str:
    problems = getattr(error, "problems", None)
    line = " ".join(str(problems[0] if problems else error).split()).replace("|", "\\|")
    name = "" if isinstance(error, PolymergeError) else f"{type(error).__name__}: "
    return name + (line if len(line) <= most else f"{line[: most - 3]}...")
