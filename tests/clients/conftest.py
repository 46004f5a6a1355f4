"""The environments, by name; programs that take long to start are started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from environments import folder
from polymerge.inference.programs import comparing
from warm_programs import WarmPrograms


@pytest.fixture(scope="session")
def programs() -> Iterator[WarmPrograms]:
    made = WarmPrograms()
    yield made
    made.close()


@pytest.fixture
def warm(programs: WarmPrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs stay alive between tests."""
    monkeypatch.setattr(comparing, "ask", programs.ask)


@pytest.fixture
def vllm() -> str:
    return f"{folder()}/vllm"


@pytest.fixture
def transformers_4() -> str:
    return f"{folder()}/transformers4"


@pytest.fixture
def llama_cpp() -> str:
    return f"{folder()}/llama.cpp"
