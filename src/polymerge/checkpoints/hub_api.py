"""Metadata of a commit on the hub: its files with sizes and sha256, and headers of safetensors files.

Requests go through huggingface_hub, whose errors are translated to ours, and responses are cached in the user's
cache folder, so that a plan can be made again offline:

    polymerge/hub/owner/name/<commit>.json     the size of each file, and its sha256 if listed
    polymerge/hub/owner/name/<commit>.heads/   the size and header of each safetensors file
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec

from polymerge.checkpoints.bounds import CONFIG_BYTES, HEADER_BYTES, read_bounded
from polymerge.checkpoints.discovery import is_plain, matters
from polymerge.checkpoints.json_objects import checked
from polymerge.checkpoints.safetensors import LENGTH_BYTES, Head
from polymerge.durable import make_folder, write_file
from polymerge.errors import CheckpointError, OutputError, PolymergeError, RecipeError
from polymerge.paths import own_cache

__all__ = [
    "LastingError",
    "Listed",
    "Remote",
    "head_of",
    "hub_cache",
    "hub_disk",
    "hub_errors",
    "listing",
    "no_room",
    "unreachable",
]

_FIRST: Final = 1 << 16
"""Bytes of a safetensors file that are requested first; most headers end within them."""
_TRIES: Final = 3
_SHA256: Final = "^[0-9a-f]{64}$"
_PAUSE: Final = 1.0  # seconds before a header is asked for again
_LOCAL: Final = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "EFBIG", "ENAMETOOLONG", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}
"""Errors of the local machine, which no server causes."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of a commit of a hub repository."""

    repository: str
    commit: str
    name: str
    """Its path in the repository."""

    @property
    def pinned(self) -> str:
        """The repository, pinned to this commit, as a recipe names it."""
        return f"{self.repository}@{self.commit}"


class Listed(msgspec.Struct, frozen=True, array_like=True):
    """The hub's listing of a file."""

    size: int
    sha256: Annotated[str, msgspec.Meta(pattern=_SHA256)] | None = None
    """None for a file stored in git itself, as small ones are."""
    blob: str | None = None
    """The git hash of its content, or of its LFS pointer; None if not recorded."""


class _Sibling(msgspec.Struct):
    """A file as huggingface_hub hands it on."""

    name: str
    size: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    sha256: str | None = None
    blob: str | None = None


def _ascii(text: str | None) -> str | None:
    return text if text is not None and text.isascii() else None  # a hash of git is hexadecimal


@lru_cache(maxsize=256)
def listing(repository: str, commit: str) -> Mapping[str, Listed]:
    """The relevant files of a commit with their sizes and hashes; requested once and cached."""
    note = own_cache("hub") / repository / f"{commit}.json"
    with suppress(OSError, msgspec.DecodeError):  # not asked yet, or nothing that we have written
        kept = msgspec.json.decode(read_bounded(note, CONFIG_BYTES), type=dict[str, Listed])
        if all(map(is_plain, kept)):
            return MappingProxyType(kept)
    from huggingface_hub import HfApi

    with hub_errors(repository, commit):
        info = HfApi().model_info(repository, revision=commit, files_metadata=True)
        said = [
            {
                "name": file.rfilename,
                "size": file.size or 0,
                "sha256": file.lfs and file.lfs.sha256,
                "blob": file.blob_id,
            }
            for file in info.siblings or ()
        ]
    where = f"{repository}: the hub's list of its files"
    files = checked(said, list[_Sibling], where, then="Try again, or another endpoint.")
    found = {
        file.name: Listed(file.size, file.sha256 if re.match(_SHA256, file.sha256 or "") else None, _ascii(file.blob))
        for file in files
        if matters(file.name)
    }
    if outside := [name for name in found if not is_plain(name)]:
        raise CheckpointError(f"{repository}: lists '{outside[0]}', which is no plain path. Do not use it")
    _write(note, msgspec.json.format(msgspec.json.encode(found), indent=1))
    return MappingProxyType(found)


def head_of(file: Path, remote: Remote) -> Head:
    """The header of a remote safetensors file, and the file's size; cached after one or two requests.

    raises CheckpointError if the hub's response contradicts its listing.
    """
    kept = own_cache("hub") / remote.repository / f"{remote.commit}.heads" / remote.name
    if kept.is_file():
        raw = read_bounded(kept, LENGTH_BYTES + LENGTH_BYTES + HEADER_BYTES)
        return Head(raw[LENGTH_BYTES:], int.from_bytes(raw[:LENGTH_BYTES], "little"))
    listed = listing(remote.repository, remote.commit).get(remote.name)
    if listed is None:
        raise CheckpointError(f"{file}: {remote.repository} has no such file on the hub. Its index is of another model")
    size = listed.size
    text = _range(remote, 0, min(_FIRST, size), size)
    length = int.from_bytes(text[:LENGTH_BYTES], "little")
    end = min(LENGTH_BYTES + length, size)
    if len(text) < end and length <= HEADER_BYTES:
        text += _range(remote, len(text), end, size)
    head = Head(text[:end], size)
    _write(kept, size.to_bytes(LENGTH_BYTES, "little") + head.text)
    return head


def _range(remote: Remote, start: int, stop: int, size: int) -> bytes:
    """Download bytes `start` to `stop` of a file of `size` bytes, retrying if the connection breaks."""
    if start >= stop:
        return b""
    with hub_errors(remote.repository, remote.commit, remote.name):
        for _ in range(_TRIES - 1):
            with suppress(unreachable()[0]):
                return _asked(remote, start, stop, size)
            time.sleep(_PAUSE)
        return _asked(remote, start, stop, size)


def _asked(remote: Remote, start: int, stop: int, size: int) -> bytes:
    """Request one range; if a server sends the entire file, reading stops after the range."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(remote.repository, remote.name, revision=remote.commit)
    wanted = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
    found = bytearray()
    # what it would retry by itself includes a body that breaks, and for that it has no second answer
    more: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}
    with http_stream_backoff("GET", url, headers=wanted, **more) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        said = response.headers.get("content-range" if partial else "content-length", "")
        total = said.rpartition("/")[2]
        if total.isdigit() and int(total) != size:
            raise CheckpointError(
                f"{remote.repository}: '{remote.name}' is {size} bytes long by the hub's list, {total} by what it "
                "serves. Try again"
            )
        skipped = 0 if partial else start
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skipped + stop - start:
                break
    text = bytes(found[skipped : skipped + stop - start])
    if len(text) < stop - start or (partial and not said.startswith(f"bytes {start}-")):
        raise CheckpointError(
            f"{remote.repository}: '{remote.name}': asked for bytes {start} to {stop}, got {len(text)} ({said}). Try "
            "again"
        )
    return text


def _write(file: Path, data: bytes) -> None:
    try:
        make_folder(file.parent)
        write_file(file, data)
    except OutputError as error:
        raise no_room(error) from error


def no_room(error: OutputError) -> CheckpointError:
    """The error for a user's cache folder that cannot be written."""
    return CheckpointError(f"{error}: XDG_CACHE_HOME names where caches are")


class LastingError(CheckpointError):
    """The hub's response cannot be used, and retrying would not help."""


@contextmanager
def hub_errors(repository: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Raise RecipeError for files that the hub does not have or grant, CheckpointError for failed downloads.

    Local failures, such as a full disk, are RecipeErrors too; invalid responses are LastingErrors.

    revision  as given by the user
    file      of the repository, if one is requested
    """
    from huggingface_hub import constants, errors

    what = f"{repository}: '{file}'" if file else f"{repository}:"
    try:
        yield
    except PolymergeError:
        raise
    except errors.HFValidationError:
        raise RecipeError(
            f"{repository}: there is no such folder, and no hub repository can have that name. Name the "
            "folder, or owner/name as on the hub"
        ) from None
    except errors.GatedRepoError:
        raise RecipeError(
            f"{repository}: is gated on the hub. Accept its terms on its page there, and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise RecipeError(
            f"{repository}: there is no such folder, and no such repository on the hub (or it is private: log in "
            "with `hf auth login`, or set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise RecipeError(
            f"{repository}: has no revision '{revision}' on the hub. Name one of its branches, tags or commits"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set. Unset it to download missing files"
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
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # it looks at no type
        if "hf_xet" in str(error):
            raise LastingError(
                f"{what} is larger than what the hub serves by plain HTTP. Install hf_xet, and unset HF_HUB_DISABLE_XET"
            ) from None
        raise LastingError(
            f"{what} the hub did not deliver it: huggingface_hub cannot parse its response ({_reason(error)}). Try "
            "another endpoint, or fetch it with `hf download`"
        ) from None


def _local(what: str, error: OSError) -> RecipeError:
    room = f" ({shutil.disk_usage(hub_disk()).free} bytes are free)" if error.errno == errno.ENOSPC else ""
    return RecipeError(
        f"{what} cannot be written to the hub's cache {hub_cache()}: {error.strerror}{room}. Set HF_HUB_CACHE to a "
        "folder that can be written and has room"
    )


def unreachable() -> tuple[type[Exception], type[Exception]]:
    """The exceptions for a hub that cannot or must not be reached: broken connection, timeout, offline switch.

    The first of these come from the HTTP library of huggingface_hub, which is not the same in all its versions.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    return library.RequestError, OfflineModeIsEnabled


def _reason(error: BaseException) -> str:
    said = re.sub(r"\[Errno -?\d+\] ", "", str(error))
    lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def hub_cache() -> Path:
    """The folder of the hub's cache, which need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def hub_disk() -> Path:
    """The hub's cache or its nearest existing parent, which is on the same disk."""
    cache = hub_cache()
    return next((folder for folder in (cache, *cache.parents) if folder.is_dir()), cache)
