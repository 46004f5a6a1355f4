"""What every test stands on: a cache folder of its own, so that the user's is neither read nor filled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (a text for the environment)
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or f"{home}/matplotlib")  # its fonts take seconds
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
