"""The order of the house: imports go downward only, and what must stay light stays light."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import polymerge
from loading import loaded_by

SOURCE = Path(polymerge.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

FLOORS = {
    "errors": 0, "dtypes": 0,
    "checkpoints": 1, "methods": 1,
    "families": 2,
    "recipe": 3,
    "planning": 4,
    "engine": 5,
    "inference": 6,
    "evaluation": 7,
    "tuning": 8, "analysis": 8,
    "reporting": 9,
    "": 10,
    "demo": 11,
    "cli": 12,
    "__main__": 13,
}  # fmt: skip
"""The floor that each module or package is on; the package itself is its public names, which the demo uses."""


def home(module: str) -> str:
    """`polymerge.engine.merge` -> `run`."""
    return module.partition(".")[2].partition(".")[0]


def name_of(file: Path) -> str:
    parts = ("polymerge", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["polymerge", *file.relative_to(SOURCE).parts][: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from polymerge import kernels` names a module where there is one
            for alias in node.names:
                inside = SOURCE.parent.joinpath(*module.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{module}.{alias.name}" if is_module else module


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_downward(file: Path) -> None:
    own = home(name_of(file))
    assert own in FLOORS, f"{file}: is on no floor; give it one in FLOORS"
    for module in imported(file):
        if module.partition(".")[0] == "polymerge" and home(module) != own:
            assert FLOORS[home(module)] < FLOORS[own], f"{file} imports {module}"


def test_every_floor_exists() -> None:
    assert {home(name_of(file)) for file in MODULES} == set(FLOORS)


def test_methods_see_no_names() -> None:
    for file in (SOURCE / "methods").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        text = text.replace("`polymerge.engine.thresholds`", "")  # says where to find the other half
        assert not re.search(r"polymerge\.(checkpoints|planning|families|recipe|engine)\b", text), file


@pytest.mark.parametrize("package", ["planning", "checkpoints", "families", "recipe", "cli"])
def test_plans_need_no_arrays(package: str) -> None:
    for file in (SOURCE / package).rglob("*.py"):
        heavy = {module.partition(".")[0] for module in imported_at_the_top(file)} & {"numpy", "torch", "numba"}
        assert not heavy, f"{file} imports {heavy}"
        if package != "checkpoints":
            assert not {module.partition(".")[0] for module in imported(file)} & {"numpy", "torch", "numba"}, file


def imported_at_the_top(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


HELP = """
import sys
from polymerge.cli import main
sys.argv = ["polymerge", "--help"]
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import polymerge", {"torch", "transformers", "numpy", "numba", "yaml", "huggingface_hub"}),
        (HELP, {"torch", "transformers", "numpy", "numba", "huggingface_hub"}),
        (
            "import polymerge; polymerge.plan; import polymerge.planning.text",
            {"torch", "transformers", "numpy", "numba"},
        ),
        ("import polymerge; polymerge.merge; polymerge.verify", {"torch", "transformers", "safetensors"}),
    ],
    ids=["import", "help", "plan", "merge"],
)
def test_nothing_is_imported_before_it_is_needed(code: str, without: set[str]) -> None:
    loaded = loaded_by(code)
    assert "polymerge" in loaded
    assert not loaded & without


def test_the_public_names_are_there() -> None:
    for name in polymerge.__all__:
        assert getattr(polymerge, name).__module__.startswith("polymerge.")
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        polymerge.unknown  # noqa: B018
