"""A package that a processor needs: which it is, whole, and what to install."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tiny
from polymerge.checkpoints import needed_packages
from polymerge.checkpoints.needed_packages import needed_package, torchvision_fault
from running import cli

IN_LINES = """
Qwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check out the
instructions on the installation page: https://pytorch.org/get-started/locally/ and follow the ones that match.
"""


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed_packages, "find_spec", lambda _: None)


@pytest.fixture
def unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision that was built for another torch."""
    (tmp_path / "torchvision").mkdir()
    text = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)


@pytest.mark.usefixtures("missing")
def test_torchvision_is_named_and_how_to_install_it() -> None:
    said = needed_package(ImportError(IN_LINES))
    assert said.startswith("torchvision is missing: pip install 'polymerge[vision]'")
    assert said == torchvision_fault()


@pytest.mark.usefixtures("unfit")
def test_one_that_is_installed_and_does_not_import_is_said_to_be_so() -> None:
    cause = RuntimeError("operator torchvision::nms does not exist")
    error = ModuleNotFoundError("Could not import module 'AutoProcessor'. Are this object's requirements defined?")
    error.__cause__ = cause
    said = needed_package(error)
    assert "does not import beside torch" in said
    assert "(operator torchvision::nms does not exist): uninstall it, or install one that fits" in said


def test_another_package_is_told_in_a_whole_sentence() -> None:
    error = ImportError("\nThis model needs\nthe timm library. Install it\nwith pip.")
    assert needed_package(error) == "a package that it needs is not installed: This model needs the timm library"
    assert needed_package(ValueError("this needs `tiktoken` to be installed.")).endswith("`tiktoken` to be installed")
    assert needed_package(KeyError("shape")) == ""


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_command_says_it_before_it_loads_a_model(tmp_path: Path) -> None:
    folder = tiny.build("qwen2_vl", tmp_path / "vlm")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))  # so that the model would not load
    questions = tmp_path / "q.json"
    questions.write_text('[{"id": 1, "text": "what?", "answer": "red"}]')
    ran = cli("evaluate", folder, "--tasks", f"{questions}:exact", "-o", tmp_path / "run")
    assert ran.status == 1
    assert "its processor cannot be loaded: torchvision is missing: pip install 'polymerge[vision]'" in ran.err
