"""What huggingface_hub raises, in our own words, and where it keeps what it has fetched."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from polymerge.errors import CheckpointError, PolymergeError, RecipeError

__all__ = ["LastingError", "hub_cache", "hub_disk", "hub_errors", "unreachable"]

_LOCAL: Final = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "EFBIG", "ENAMETOOLONG", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}
"""What no server is to blame for."""


def hub_cache() -> Path:
    """The folder, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def hub_disk() -> Path:
    """The folder, or the first on the way to it that is there, and so is on the disk that it will be on."""
    cache = hub_cache()
    return next((folder for folder in (cache, *cache.parents) if folder.is_dir()), cache)


class LastingError(CheckpointError):
    """What the hub delivers is not to be used, and would be the same if it were asked once more."""


@contextmanager
def hub_errors(repository: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Raise RecipeError for what the hub does not have or give, CheckpointError where it fails to deliver.

    What this machine fails at, a full disk say, is a RecipeError too; an answer that makes no sense a LastingError.

    revision  as the user has it
    file      of the repository, where one is asked for
    """
    from huggingface_hub import constants, errors

    what = f"{repository}: '{file}'" if file else f"{repository}:"
    try:
        yield
    except PolymergeError:
        raise
    except errors.HFValidationError:
        raise RecipeError(
            f"{repository}: there is no such folder here, and no repository of the hub can have that name. Name the "
            "folder, or owner/name as the hub has it"
        ) from None
    except errors.GatedRepoError:
        raise RecipeError(
            f"{repository}: is gated on the hub. Accept its terms on its page there, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise RecipeError(
            f"{repository}: there is no such folder here and no such repository on the hub (or it is private: log in "
            "with `hf auth login`, or set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise RecipeError(
            f"{repository}: has no revision '{revision}' on the hub. Name one of its branches, tags or commits"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set. Unset it to fetch what is missing"
        else:
            why = f"the hub cannot be reached ({_reason(error.__cause__ or error)}). Try again"
        here = "" if file else " there is no such folder here, and"
        raise RecipeError(f"{what}{here} what is needed is not in the hub's cache, and {why}") from None
    except (*unreachable(), OSError) as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise _local(what, error) from None
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise RecipeError(
                f"{what} the hub does not let you read it ({_reason(error)}). Log in with `hf auth login`, or set "
                "HF_TOKEN, as somebody who may"
            ) from None
        raise CheckpointError(f"{what} the hub did not deliver it: {_reason(error)}. Try again") from None
    except ValueError as error:
        if "hf_xet" in str(error):
            raise LastingError(
                f"{what} is larger than what the hub serves by plain HTTP. Install hf_xet, and unset HF_HUB_DISABLE_XET"
            ) from None
        raise LastingError(
            f"{what} the hub did not deliver it: huggingface_hub makes nothing of its answer ({_reason(error)}). Try "
            "another endpoint, or fetch it with `hf download`"
        ) from None


def _local(what: str, error: OSError) -> RecipeError:
    room = f" ({shutil.disk_usage(hub_disk()).free} bytes are free)" if error.errno == errno.ENOSPC else ""
    return RecipeError(
        f"{what} cannot be written to the hub's cache {hub_cache()}: {error.strerror}{room}. Set HF_HUB_CACHE to a "
        "folder that can be written and has room"
    )


def unreachable() -> tuple[type[Exception], type[Exception]]:
    """What is raised where the hub cannot be asked, or must not be: a broken connection, no answer, the offline switch.

    The first of these come from the HTTP library of huggingface_hub, which is not the same in all its versions.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    return library.RequestError, OfflineModeIsEnabled


def _reason(error: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
