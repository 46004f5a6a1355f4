"""What lmms-eval and VLMEvalKit register, read from their source: nothing of theirs is imported."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SINKS = "**"


def lmms_eval_models(package: Path, names: set[str]) -> dict[str, list[str]]:
    """The arguments of each model's class: of the simple one, if there are two, which the other inherits."""
    tree = _parsed(package / "models" / "__init__.py")
    found: dict[str, list[str]] = {}
    for kind, named in (("simple", "AVAILABLE_SIMPLE_MODELS"), ("chat", "AVAILABLE_CHAT_TEMPLATE_MODELS")):
        assigned = (node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
        (classes,) = (ast.literal_eval(one.value) for one in assigned if named in ast.unparse(one).partition("=")[0])  # type: ignore[arg-type]
        for name in sorted(names & set(classes) - set(found)):
            file = package / "models" / kind / f"{name}.py"
            found[name] = _arguments(_classes([file]), classes[name].rpartition(".")[2])
    return dict(sorted(found.items()))


def kit_models(clone: Path, names: set[str]) -> dict[str, list[str]]:
    """The arguments of each class of models that the config file can name."""
    folder = clone / "vlmeval" / "vlm"
    offered = set(_imported(folder / "__init__.py"))
    classes = _classes(sorted(folder.rglob("*.py")))
    return {name: _arguments(classes, name) for name in sorted(names & offered)}


def kit_datasets(clone: Path, classes: Mapping[str, str]) -> dict[str, str]:
    """The data sets among those given that their class knows by name."""
    folder = clone / "vlmeval" / "dataset"
    offered = set(_imported(folder / "__init__.py"))
    known = {name for file in folder.rglob("*.py") for name in _texts(file)}
    return {name: kind for name, kind in sorted(classes.items()) if kind in offered and name in known}


def _parsed(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about their strings
        return ast.parse(file.read_text(encoding="utf-8"))


def _imported(file: Path) -> Iterator[str]:
    for node in _parsed(file).body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.ClassDef):
            yield node.name


def _texts(file: Path) -> Iterator[str]:
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _classes(files: list[Path]) -> dict[str, ast.ClassDef]:
    nodes = (node for file in files for node in ast.walk(_parsed(file)))
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _arguments(classes: Mapping[str, Any], name: str) -> list[str]:
    """The arguments of a class, and `**` if it takes any."""
    node = classes.get(name)
    if node is None:
        return []
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            named = [one.arg for one in (*item.args.args, *item.args.kwonlyargs)][1:]
            return [*named, *([SINKS] if item.args.kwarg else [])]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return next((found for base in bases if (found := _arguments(classes, base))), [])
