"""One file of the hub on its way into the hub's cache, taken up where an earlier process left it.

huggingface_hub takes up a broken connection, but throws away what it has of a file when it gives up, and never uses
what a killed process leaves; nor does Xet, whose cache of chunks is switched off unless HF_XET_CHUNK_CACHE_SIZE_BYTES
says otherwise. So a file whose sha256 the hub lists, as it does for all that is large, is received in order into one
of ours beside its place in the hub's cache, under the hub's own lock:

    models--owner--name/blobs/<sha256>.polymerge-<random>.incomplete

The next process asks for the rest, by plain HTTP or from Xet, and gives the whole to huggingface_hub as the blob that
it is, if it has the sha256 that is listed. `hf cache prune` removes what nobody comes back for.

Not taken up are small files that lie in git itself, what a hub serves under another ETag or size than it lists, and
whatever goes into a cache without symbolic links: all these come through `hf_hub_download`, from their beginning,
and are compared with what is listed when they are here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polymerge.checkpoint.hubbar import Received, bar_class
from polymerge.checkpoint.hubcache import hub_cache
from polymerge.checkpoint.huberrors import LastingError
from polymerge.checkpoint.hubfiles import Listed, Remote
from polymerge.checkpoint.hubparts import Part, TakenOverError, TooLongError, left, locked, sha256_of, take_over

__all__ = ["DamagedError", "already_here", "download", "tidy"]


class DamagedError(LastingError):
    """A file is not what the hub lists, although it was fetched anew; to try once more would hide it."""


def download(remote: Remote, listed: Listed | None, received: Received) -> Path:
    """Bring a file into the hub's cache and return its place in the snapshot there.

    listed    what the hub says of it, where it lists it
    received  told what is here from before, and what comes

    raises DamagedError where it is not what the hub lists even after it was fetched anew, and what huggingface_hub
    raises.
    """
    from huggingface_hub.errors import HfHubHTTPError

    most = -1
    while True:
        try:
            return _download(remote, listed, received)
        except HfHubHTTPError as error:
            # the signed address that the hub sends one to may have expired since; it sends one to a new one then
            expired = type(error) is HfHubHTTPError and error.response.status_code == 403
            if not expired or error.response.request.method != "GET" or received.most <= most:
                raise
            most = received.most


def _download(remote: Remote, listed: Listed | None, received: Received) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import are_symlinks_supported

    found = try_to_load_from_cache(remote.repository, remote.name, revision=remote.commit)
    if isinstance(found, str):
        return Path(found)
    seen = False
    if listed is not None and listed.sha256 is not None and are_symlinks_supported(constants.HF_HUB_CACHE):
        receive = _receiver(remote, listed, received)
        if receive is not None:
            seen = _bring(remote, listed.size, listed.sha256, receive, received)
    return _huggingface(remote, None if seen else listed, received)


def _huggingface(remote: Remote, listed: Listed | None, received: Received) -> Path:
    """What huggingface_hub makes of it: what it fetches is compared with what is listed, if that is given."""
    from huggingface_hub import hf_hub_download

    wrong = sha256 = ""
    for _ in range(2):
        received.fetched = False
        bar = bar_class(received)
        found = Path(hf_hub_download(remote.repository, remote.name, revision=remote.commit, tqdm_class=bar))
        if listed is None or listed.sha256 is None or not received.fetched or found.stat().st_size != listed.size:
            return found
        try:
            sha256 = sha256_of(found, partial(received.add, 0))
            if sha256 == listed.sha256:
                return found
        finally:  # what nobody has looked at to its end would be taken as it is the next time
            if sha256 != listed.sha256:
                for place in (found.resolve(), found):
                    place.unlink(missing_ok=True)
        wrong = _other_sum(listed.sha256, sha256)
    raise _damaged(remote, wrong)


def already_here(remote: Remote, listed: Listed) -> int:
    """Bytes of a file that an earlier process left, and that need no more room."""
    if listed.sha256 is None:
        return 0
    found = left(_storage(remote.repository) / "blobs" / listed.sha256)
    return max((size for size, _ in found if size <= listed.size), default=0)


def tidy(file: Path) -> None:
    """Remove what an earlier process left of a file that is here by now, because another program has fetched it."""
    for _, part in left(file.resolve()):
        with suppress(OSError):  # it is somebody else's to remove
            part.unlink()


def _receiver(remote: Remote, listed: Listed, received: Received) -> Callable[[Part, int], None] | None:
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


def _bring(remote: Remote, size: int, sha256: str, receive: Callable[[Part, int], None], received: Received) -> bool:
    """Whether the file is among the hub's blobs, where it was before or is as it is listed.

    It is not where somebody whom the lock does not hold has taken it over; huggingface_hub sees to it then.
    """
    storage = _storage(remote.repository)
    blob = storage / "blobs" / sha256
    look = partial(received.add, 0)
    with locked(storage.parent / ".locks" / storage.name / f"{sha256}.lock", look):
        place = take_over(blob, size)
        if blob.exists():
            place.unlink(missing_ok=True)
            return True
        for anew in (False, True):
            try:
                with Part(place, size, look) as part:
                    had = part.tell()
                    received.stands_at(had)
                    if had < size:
                        receive(part, had)
                if part.sha256 == sha256:
                    return _given(place, blob)
                wrong, hopeless = _other_sum(sha256, part.sha256), anew
            except TakenOverError:
                return False
            except TooLongError:
                wrong = f"is {size} bytes long by the hub's list, longer by what it delivered"
                hopeless = anew or not had
            place.unlink(missing_ok=True)
            if hopeless:
                break
            place.touch()
    raise _damaged(remote, wrong)


def _given(place: Path, blob: Path) -> bool:
    with suppress(FileNotFoundError):
        place.replace(blob)
        return True
    return False


def _other_sum(listed: str, found: str) -> str:
    return f"has the sha256 {listed} by the hub's list, {found} by what it delivered"


def _damaged(remote: Remote, wrong: str) -> DamagedError:
    return DamagedError(
        f"{remote.repository}: '{remote.name}' {wrong}. So it is not what it listed, although it was fetched anew, "
        "and is removed again. Try again later"
    )


def _by_http(url: str, size: int, received: Received, part: Part, had: int) -> None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "accept-encoding": "identity"}
    more: dict[str, Any] = {"headers": headers, "expected_size": size, "tqdm_class": bar_class(received)}
    try:
        http_get(url, part, resume_size=had, **more)
    except (HfHubHTTPError, ValueError) as error:
        # it has no such range, so what is here is not of it; or does not say of what the range is
        if not had or (isinstance(error, HfHubHTTPError) and error.response.status_code != 416):
            raise
        part.seek(0)
        part.truncate()
        http_get(url, part, **more)


def _by_xet(xet: Any, size: int, received: Received, part: Part, had: int) -> None:
    with closing(_xet_pieces(xet, had, size, received)) as pieces:
        for piece in pieces:
            received.add(len(piece))
            part.write(piece)
    if (delivered := part.tell()) < size:
        raise OSError(f"the connection to Xet ended after {delivered} of {size} bytes")


def _xet_pieces(xet: Any, start: int, size: int, received: Received) -> Generator[bytes]:
    from hf_xet import XetFileInfo  # type: ignore[import-untyped]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with _one_at_a_time:
        session = _xet_session(os.getpid())
    try:
        # neither in a `with` nor sure to have an `abort`, both of which came with hf_xet 1.7
        group = session.new_download_stream_group(
            token_refresh_url=xet.refresh_route, token_refresh_headers=build_hf_headers()
        )
        stream = group.download_stream(XetFileInfo(xet.file_hash, size), start=start)
        received.let_go = getattr(group, "abort", received.let_go)
        try:
            yield from stream
        finally:
            received.let_go = lambda: None
            stream.cancel()
    except RuntimeError as error:  # what hf_xet has no better name for
        raise OSError(str(error)) from None


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=1)
def _xet_session(_process: int) -> Any:
    """One for all files, which bounds the memory that it takes; another in a process that was forked off."""
    from hf_xet import XetSession

    return XetSession()


def _storage(repository: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / repo_folder_name(repo_id=repository, repo_type="model")
