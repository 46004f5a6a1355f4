"""The environments, by name."""

from __future__ import annotations

import pytest

from environments import folder


@pytest.fixture
def vllm() -> str:
    return f"{folder()}/vllm"


@pytest.fixture
def transformers_4() -> str:
    return f"{folder()}/transformers4"


@pytest.fixture
def llama_cpp() -> str:
    return f"{folder()}/llama.cpp"
