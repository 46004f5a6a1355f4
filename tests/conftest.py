"""What every test stands on: a cache folder of its own, and no test that fails because a machine is slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """Code of models is copied to a folder of this run: transformers takes one for a process, when it is imported."""
    folder = TemporaryDirectory(prefix="modules-")
    os.environ["HF_MODULES_CACHE"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is neither read nor filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
