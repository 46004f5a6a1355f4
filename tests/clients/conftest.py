"""The environments, by name; programs that take long to start are started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from environments import folder
from polymerge.inference.programs import comparing
from warm_workers import WarmWorkers


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmWorkers]:
    made = WarmWorkers(tmp_path_factory.mktemp("workers"))
    yield made
    made.close()


@pytest.fixture
def warm(workers: WarmWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers stay alive between tests."""
    monkeypatch.setattr(comparing, "run_worker", workers.run)


@pytest.fixture
def vllm() -> str:
    return f"{folder()}/vllm"


@pytest.fixture
def transformers_4() -> str:
    return f"{folder()}/transformers4"


@pytest.fixture
def llama_cpp() -> str:
    return f"{folder()}/llama.cpp"
