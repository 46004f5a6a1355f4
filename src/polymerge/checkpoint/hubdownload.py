"""One file of the hub on its way into the hub's cache, taken up where an earlier process left it.

huggingface_hub takes up a broken connection, but throws away what it has of a file when it gives up, and never uses
what a killed process leaves; nor does Xet, whose cache of chunks is switched off unless HF_XET_CHUNK_CACHE_SIZE_BYTES
says otherwise. So a file whose sha256 the hub lists, as it does for all that is large, is received in order into one
of ours beside its place in the hub's cache, under the hub's own lock:

    models--owner--name/blobs/<sha256>.polymerge-<random>.incomplete

The next process asks for the rest, by plain HTTP or from Xet, checks the sha256 of the whole, since it did not see all
of it come, and gives it to huggingface_hub as the blob that it is. `hf cache prune` removes what nobody comes back for.

Not taken up are small files that lie in git itself, what a hub serves under another ETag or size than it lists, and
whatever goes into a cache without symbolic links: all these come through `hf_hub_download`, from their beginning.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from polymerge.checkpoint.hubbar import Received, bar_class
from polymerge.checkpoint.hubfiles import Listed, Remote
from polymerge.errors import CheckpointError

__all__ = ["DamagedError", "already_here", "download", "tidy"]

_LOOK: Final = 1.0  # seconds after which whoever waits for another process looks whether the file is still wanted


class DamagedError(CheckpointError):
    """A file is not what the hub lists, although it was fetched anew; to try once more would hide it."""


def download(remote: Remote, listed: Listed | None, received: Received) -> Path:
    """Bring a file into the hub's cache and return its place in the snapshot there.

    listed    what the hub says of it, where it lists it
    received  told what is here from before, and what comes

    raises DamagedError where it is not what the hub lists even after it was fetched anew, and what huggingface_hub
    raises.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.file_download import are_symlinks_supported

    found = try_to_load_from_cache(remote.repository, remote.name, revision=remote.commit)
    if isinstance(found, str):
        return Path(found)
    if listed is not None and listed.sha256 is not None and are_symlinks_supported(constants.HF_HUB_CACHE):
        receive = _receiver(remote, listed, received)
        if receive is not None:
            _bring(remote, listed.size, listed.sha256, receive, received)
    return Path(hf_hub_download(remote.repository, remote.name, revision=remote.commit, tqdm_class=bar_class(received)))


def already_here(remote: Remote, listed: Listed) -> int:
    """Bytes of a file that an earlier process left, and that need no more room."""
    if listed.sha256 is None:
        return 0
    left = _left(_storage(remote.repository) / "blobs" / listed.sha256)
    return max((size for size, _ in left if size <= listed.size), default=0)


def tidy(file: Path) -> None:
    """Remove what an earlier process left of a file that is here by now, because another program has fetched it."""
    for _, part in _left(file.resolve()):
        with suppress(OSError):  # it is somebody else's to remove
            part.unlink()


def _receiver(remote: Remote, listed: Listed, received: Received) -> Callable[[Path, int], None] | None:
    """What appends to a file the bytes from a number on; None where the file is to come in huggingface_hub's way."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(remote.repository, remote.name, revision=remote.commit)
    said = get_hf_file_metadata(url, retry_on_errors=True)
    if (said.etag, said.size) != (listed.sha256, listed.size):
        return None
    if said.xet_file_data is None or constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return partial(_by_http, url, listed.size, received)
    known = hf_hub_download(remote.repository, remote.name, revision=remote.commit, dry_run=True)
    return None if known.is_cached else partial(_by_xet, said.xet_file_data, listed.size, received)


def _bring(remote: Remote, size: int, sha256: str, receive: Callable[[Path, int], None], received: Received) -> None:
    storage = _storage(remote.repository)
    blob = storage / "blobs" / sha256
    with _locked(storage.parent / ".locks" / storage.name / f"{sha256}.lock", received):
        part = _take_over(blob, size)
        if blob.exists():
            part.unlink(missing_ok=True)
            return
        for anew in (False, True):
            had = part.stat().st_size
            received.stands_at(had)
            try:
                if had < size:
                    receive(part, had)
                # what this process saw come from the first byte on is taken as huggingface_hub takes it
                wrong = _difference(part, size, sha256 if had or anew else None)
                if wrong is None:
                    part.replace(blob)
                    return
                part.unlink()
            except FileNotFoundError:  # taken over by somebody whom the lock does not hold: huggingface_hub sees to it
                return
            part.touch()
        part.unlink()
    raise DamagedError(
        f"{remote.repository}: '{remote.name}' {wrong}, although it was fetched anew, so it is removed again. Try "
        "again later"
    )


class _Part(io.FileIO):
    """A file that is written to as long as it has its name."""

    def write(self, data: Any, /) -> int:
        if not os.path.lexists(self.name):
            raise FileNotFoundError(errno.ENOENT, "another process has taken it over", self.name)
        return super().write(data)


def _take_over(blob: Path, size: int) -> Path:
    """What was left of a file, under a new name; the rest is removed, for there is nobody else while the lock is held.

    The new name is for file systems where locks do not hold: who writes under the old one finds it gone, and stops.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    mine = blob.with_name(f"{blob.name}.polymerge-{uuid4().hex[:8]}.incomplete")
    for length, part in sorted(_left(blob), reverse=True):
        with suppress(FileNotFoundError):
            if length > size or mine.exists():
                part.unlink()
            else:
                part.rename(mine)
    mine.touch()
    return mine


def _left(blob: Path) -> list[tuple[int, Path]]:
    found = []
    for part in blob.parent.glob(f"{blob.name}.polymerge-*.incomplete"):
        with suppress(FileNotFoundError):
            found.append((part.stat().st_size, part))
    return found


def _difference(part: Path, size: int, sha256: str | None) -> str | None:
    """What is wrong with a received file; its sha256 is computed where one is given."""
    if part.stat().st_size != size:
        return f"is {size} bytes long by the hub's list, {part.stat().st_size} by what it delivered"
    if sha256 is None:
        return None
    from huggingface_hub.utils.sha import sha_fileobj

    with part.open("rb") as stream:
        found = sha_fileobj(stream).hex()
    return None if found == sha256 else f"has the sha256 {sha256} by the hub's list, {found} by what it delivered"


def _by_http(url: str, size: int, received: Received, part: Path, had: int) -> None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "accept-encoding": "identity"}
    more: dict[str, Any] = {"headers": headers, "expected_size": size, "tqdm_class": bar_class(received)}
    with io.BufferedWriter(_Part(part, "ab")) as file:
        try:
            http_get(url, file, resume_size=had, **more)
        except HfHubHTTPError as error:
            if not had or error.response.status_code != 416:  # it has no such range, so what is here is not of it
                raise
            file.truncate(0)
            file.seek(0)
            http_get(url, file, **more)


def _by_xet(xet: Any, size: int, received: Received, part: Path, had: int) -> None:
    with closing(_xet_pieces(xet, had, size)) as pieces, io.BufferedWriter(_Part(part, "ab")) as file:
        for piece in pieces:
            received.add(len(piece))
            file.write(piece)
    if (delivered := part.stat().st_size) < size:
        raise OSError(f"the connection to Xet ended after {delivered} of {size} bytes")


def _xet_pieces(xet: Any, start: int, size: int) -> Generator[bytes]:
    from hf_xet import XetFileInfo  # type: ignore[import-untyped]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    session = _xet_session(os.getpid())
    try:
        with session.new_download_stream_group(
            token_refresh_url=xet.refresh_route, token_refresh_headers=build_hf_headers()
        ) as group:
            yield from group.download_stream(XetFileInfo(xet.file_hash, size), start=start)
    except RuntimeError as error:  # what hf_xet has no better name for
        raise OSError(str(error)) from None


@lru_cache(maxsize=1)
def _xet_session(_process: int) -> Any:
    """One for all files, which bounds the memory that it takes; another in a process that was forked off."""
    from hf_xet import XetSession

    return XetSession()


@contextmanager
def _locked(file: Path, received: Received) -> Iterator[None]:
    """Hold the lock that huggingface_hub takes for a blob; whoever waits for it in vain is let go."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(file, timeout=_LOOK))
                break
            except TimeoutError:
                received.add(0)
        yield


def _storage(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repository, repo_type="model")
