"""The order of the house: imports go downward only, and what must stay light stays light."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

import polymerge
from paths import ROOT
from running import loaded_by, two_llamas

SOURCE = Path(polymerge.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FLOORS = {
    "errors": 0, "dtypes": 0, "themes": 0,
    "durable": 1, "paths": 1,
    "charts": 2, "tables": 2,
    "checkpoints": 2, "methods": 2,
    "families": 3,
    "recipe": 4,
    "planning": 5,
    "engine": 6,
    "inference": 7,
    "evaluation": 8,
    "tuning": 9, "analysis": 9,
    "reporting": 10,
    "": 11,
    "demo": 12,
    "cli": 13,
    "__main__": 14,
}  # fmt: skip
"""The floor that each module or package is on; the package itself is its public names, which the demo uses."""

NAMED_TWICE = {"merge.py", "report.py", "search.py"}
"""Names that two files have: a group of commands, and the function that it calls. At most seven."""

FLAGS_OF_OTHERS = {
    "evaluation/harness/lm_eval.py", "evaluation/harness/lmms_eval.py", "evaluation/harness/vlmevalkit.py",
    "inference/programs/ask_llama_cpp.py",
}  # fmt: skip
"""Files that write the command line of another tool."""

FLAGS_LEFT = {"reporting": 1}
"""How many strings of a room outside of cli/ still name an option. The numbers only shrink."""


def home(module: str) -> str:
    """`polymerge.engine.merge` -> `engine`."""
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


def circles(graph: Mapping[str, Set[str]]) -> list[set[str]]:
    """Modules that reach each other by imports, as sets of two or more (Tarjan's strongly connected components)."""
    found: list[set[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        open_modules.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in open_modules:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            start = open_modules.index(module)
            found.append(set(open_modules[start:]))
            del open_modules[start:]

    for module in graph:
        if module not in number:
            visit(module)
    return [component for component in found if len(component) > 1]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}}) == [{"a", "b", "c"}, {"d", "e"}]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_no_two_files_import_each_other() -> None:
    names = {name_of(file) for file in MODULES}
    graph = {name_of(file): {*imported(file)} & names - {name_of(file)} for file in MODULES}
    left = circles(graph)
    assert not left, "; ".join(" <-> ".join(sorted(circle)) for circle in left)


def test_file_names_are_unique() -> None:
    counts = Counter(file.name for file in MODULES if not file.name.startswith("__"))
    assert {name for name, count in counts.items() if count > 1} <= NAMED_TWICE
    assert max(counts.values()) == 2
    assert len(NAMED_TWICE) <= 7


def test_options_are_named_in_the_command_line_only() -> None:
    told: dict[str, list[str]] = {}
    for file in MODULES:
        own = file.relative_to(SOURCE)
        if own.parts[0] != "cli" and own.as_posix() not in FLAGS_OF_OTHERS:
            words = [text for text in literals(file) if re.search(r"(?<![\w-])--[a-z]", text)]
            told.setdefault(own.parts[0], []).extend(f"{own}: {text!r}" for text in words)
    for room, words in told.items():
        assert len(words) <= FLAGS_LEFT.get(room, 0), "\n".join(words)


def literals(file: Path) -> Iterator[str]:
    """Every string of a file, docstrings and parts of f-strings among them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("file", TESTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_test_imports_from_another(file: Path) -> None:
    assert not [name for name in imported_anywhere(file) if name.rpartition(".")[2].startswith("test_")]


def imported_anywhere(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names if not node.module)


def test_methods_see_no_names() -> None:
    for file in (SOURCE / "methods").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        text = text.replace("`polymerge.engine.cutoffs`", "")  # says where to find the other half
        assert not re.search(r"polymerge\.(checkpoints|planning|families|recipe|engine)\b", text), file


@pytest.mark.parametrize("package", ["planning", "checkpoints", "families", "recipe", "cli"])
def test_plans_need_no_arrays(package: str) -> None:
    for file in (SOURCE / package).rglob("*.py"):
        heavy = {module.partition(".")[0] for module in imported_at_the_top(file)} & {"numpy", "torch", "numba"}
        assert not heavy, f"{file} imports {heavy}"
        # where no table covers a model, its class is asked, which is built with torch
        if package != "checkpoints" and file.name != "blueprint.py":
            assert not {module.partition(".")[0] for module in imported(file)} & {"numpy", "torch", "numba"}, file


def imported_at_the_top(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def command(*words: object) -> str:
    """Code that runs the command line."""
    return f"""
import contextlib, io, sys
from polymerge.cli import main
sys.argv = {["polymerge", *map(str, words)]}
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
"""


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import polymerge", {"torch", "transformers", "numpy", "numba", "yaml", "huggingface_hub"}),
        (command("--help"), {"torch", "transformers", "numpy", "numba", "huggingface_hub"}),
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


def test_a_plan_by_the_command_line_needs_no_arrays(tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    words = ("plan", "--template", one, "--with", other, "--method", "linear", "--weight", "0.5,0.5")
    loaded = loaded_by(command(*words, "--json", tmp_path / "plan.json"))
    assert (tmp_path / "plan.json").is_file()
    assert not loaded & {"torch", "transformers", "numpy", "numba"}
