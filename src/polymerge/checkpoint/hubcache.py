"""Where huggingface_hub keeps what it has fetched, and on which disk that is."""

from __future__ import annotations

from pathlib import Path

__all__ = ["hub_cache", "hub_disk"]


def hub_cache() -> Path:
    """The folder, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def hub_disk() -> Path:
    """The folder, or the first on the way to it that is there, and so is on the disk that it will be on."""
    cache = hub_cache()
    return next((folder for folder in (cache, *cache.parents) if folder.is_dir()), cache)
