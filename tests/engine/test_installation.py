"""`polymerge doctor`: what is installed, what is missing and why it matters, and what is broken."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from paths import ROOT
from polymerge.engine import installation
from polymerge.engine.installation import Kernels, describe, doctor
from running import cli, loaded_by

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # which mypy and pytest bring
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = tuple(PROJECT["dependencies"])


@pytest.fixture(autouse=True)
def metadata_of_this_clone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements as pip would record them of this clone."""
    extras = PROJECT["optional-dependencies"].items()
    said = [*CORE, *(f'{one}; extra == "{extra}"' for extra, group in extras for one in group)]
    monkeypatch.setattr(installation, "requires", lambda _: said)
    return said


def test_every_extra_says_what_it_is_for() -> None:
    assert set(PROJECT["optional-dependencies"]) - set(installation.SERVES) == set()


def test_every_requirement_of_the_project_is_understood(metadata_of_this_clone: list[str]) -> None:
    for text in metadata_of_this_clone:
        found = installation._REQUIREMENT.fullmatch(text)
        assert found is not None, text
        low = re.search(r">=([\d.]+)", text)
        assert found["low"] == (low[1] if low else None), text
        assert found["extra"] == (text.split('"')[1] if "extra" in text else None), text


@pytest.mark.parametrize(
    "text",
    ["numpy>=1.26", "numpy (>=1.26)", "numpy>=1.26,<3", "numpy >=1.26 ; extra == 'x'", 'numpy>=1.26; extra == "x"',
     'numpy>=1.26; python_version < "3.14" and extra == "x"'],
)  # fmt: skip
def test_forms_of_requirements(text: str) -> None:
    found = installation._REQUIREMENT.fullmatch(text)
    assert found is not None
    assert (found["name"], found["low"]) == ("numpy", "1.26")
    assert found["extra"] == ("x" if "extra" in text else None)


def test_what_is_here_is_found_and_nothing_is_broken() -> None:
    found = doctor()
    assert found.problems == ()
    assert {one.name for one in found.packages} == {re.split(r"[>=\[]", text)[0] for text in CORE}
    assert all(one.version for one in found.packages)
    assert found.kernels.compile
    optional = {one.name: one for one in found.optional}
    assert optional["torch"].wanted == "2.4"
    assert "pytest" not in optional  # of work on polymerge itself
    extras = {one.name: one for one in found.extras}
    assert "torch" not in extras["adapters"].missing
    assert "test" not in extras
    assert [one["name"] for one in found.rows()] == [*(one.name for one in found.packages), *optional]


def test_extras_hold_what_those_hold_that_they_take_in() -> None:
    _, extras = installation._required()
    assert extras["adapters"].keys() > extras["transformers"].keys()
    assert "transformers" in extras["demo"]  # by search


def test_a_missing_package_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.version

    def version(name: str) -> str:
        if name in ("peft", "msgspec"):
            raise PackageNotFoundError(name)
        return "0.9.1" if name == "optuna" else real(name)

    monkeypatch.setattr(installation, "version", version)
    found = doctor()
    extras = {one.name: one.missing for one in found.extras}
    assert extras["adapters"] == ("peft",)
    assert extras["optuna"] == ("optuna",)
    assert [one.trouble for one in found.optional if one.name == "optuna"] == [
        "0.9.1 is older than 4.0: pip install -U 'optuna>=4.0'"
    ]
    assert found.problems == ("msgspec: is not installed: pip install 'msgspec>=0.19'",)  # optional ones are none


def test_a_package_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.import_module

    def import_module(name: str) -> Any:
        if name == "yaml":
            raise OSError("libyaml.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(installation, "import_module", import_module)
    ran = cli("doctor")
    assert ran.status == 1
    assert "pyyaml: does not import (OSError: libyaml.so: cannot open shared object file). Reinstall it" in ran.out
    assert json.loads(cli("doctor", "--json").out)["problems"][0].startswith("pyyaml: does not import")


def test_kernels_that_compute_something_else_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from polymerge.methods.kernels.cpu import formats

    monkeypatch.setattr(formats, "decode", lambda *_: True)
    found = doctor()
    assert not found.kernels.compile
    assert found.problems[0].startswith("kernels: bfloat16 1 and -2 were read as")


def test_kernels_that_are_not_kept_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_kernels", lambda: Kernels(True, None, 0))
    found = doctor()
    assert found.problems == ()
    assert "none is kept on the disk" in str(dict(describe(found))["kernels"])


def test_versions_are_compared_by_their_numbers() -> None:
    below = installation._below
    assert below("1.9", "1.10")
    assert below("2", "2.0.1")
    assert not below("2.4.0+cpu", "2.4")
    assert not below("2.10.0rc1", "2.9")


def test_it_is_printed_and_imports_nothing_heavy() -> None:
    ran = cli("doctor")
    assert (ran.status, ran.err) == (0, "")
    for word in ("always needed", "optional", "extras", "kernels", "places", "everything that polymerge needs is here"):
        assert word in ran.out
    report = json.loads(cli("doctor", "--json").out)
    assert report["problems"] == []
    assert {place["use"] for place in report["places"]} >= {"models of the hub", "what polymerge remembers"}
    code = "import contextlib, io\nfrom polymerge.engine.installation import doctor\ndoctor()"
    assert not loaded_by(code) & {"torch", "transformers", "ray", "vllm", "optuna", "peft"}
