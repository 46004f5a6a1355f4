"""Download files from the hub during a merge: a few at once, in the order in which they are needed.

`hf_hub_download` stores each file in the hub's cache, where every other program finds it. A partial file left by a
terminated process is downloaded again.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from polymerge.checkpoints.bounds import open_regular
from polymerge.checkpoints.hub import missing_remote
from polymerge.checkpoints.hub_api import LastingError, Remote, head_of, hub_cache, hub_disk, hub_errors, listing
from polymerge.checkpoints.identity import Stamp, sha256_of, stamp_of
from polymerge.errors import CheckpointError, RecipeError, human_size

__all__ = ["Prefetch", "fetch_all", "fetched", "fetches_to"]

_AT_ONCE: Final = 3
_TRIES: Final = 5
_PAUSE: Final = 1.0  # seconds after the first failed try, twice as many after each further one

_running: dict[Path, tuple[Future[None], Prefetch]] = {}
"""Files that are being downloaded or queued."""


class _StoppedError(Exception):
    """Ends a download that nobody waits for any more."""


class Prefetch:
    """Files that a merge needs, downloaded while it runs; `fetched` waits for one of them.

    files    in the order in which they are needed; local and cached ones are skipped
    advance  called with the number of new bytes, never from two threads at once; a negative number means that bytes
             are downloaded again; its exceptions are raised in the threads that wait for a file

    The first error ends the wait for all of them.

    raises RecipeError at once if downloading is impossible: the offline switch is set, or the disk has no room.
    """

    def __init__(self, files: Iterable[Path], advance: Callable[[int], None] = lambda _: None) -> None:
        self._missing = {file: remote for file in dict.fromkeys(files) if (remote := missing_remote(file))}
        self._advance, self._one_at_a_time = advance, threading.Lock()
        self._stop = threading.Event()
        self._failed: Future[None] = Future()  # completed by the first error
        self._pool: ThreadPoolExecutor | None = None
        self.size = 0
        """Bytes to download."""
        self.delivered: dict[Path, tuple[Stamp | None, str | None]] = {}
        """For each file that has come: its stamp before it was checked, and its sha256 if the hub lists one."""
        if self._missing:
            _refuse_offline(self._missing.values())
            found = (listing(one.repository, one.commit).get(one.name) for one in self._missing.values())
            self.size = sum(listed.size for listed in found if listed)
            _check_room(self.size)

    def __enter__(self) -> Prefetch:
        if self._missing:
            self._pool = ThreadPoolExecutor(_AT_ONCE, "polymerge-fetch")
            for file, remote in self._missing.items():
                _running[file] = self._pool.submit(self._fetch, file, remote), self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._fail(CancelledError())
        try:
            if self._pool is not None:  # what has failed does not wait for a server that has fallen silent
                self._pool.shutdown(wait=not self._stop.is_set(), cancel_futures=True)
        finally:
            for file in self._missing:
                _running.pop(file, None)

    def finish(self) -> None:
        """Wait for all files; raises the error of a failed download."""
        for file in self._missing:
            fetched(file)

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """If the block fails, stop waiting for files before anything outside joins the waiting threads."""
        try:
            yield
        except BaseException:
            self._fail(CancelledError())
            raise

    def wait_for(self, future: Future[None]) -> None:
        """Wait for one file; raises the error of its or another file's failed download."""
        wait([future, self._failed], return_when=FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()
        future.result()

    def _fail(self, error: BaseException) -> None:
        with self._one_at_a_time:
            if not self._stop.is_set():
                self._stop.set()
                self._failed.set_exception(error)
        for file in self._missing:
            if file in _running:
                _running[file][0].cancel()

    def _fetch(self, file: Path, remote: Remote) -> None:
        try:
            self.delivered[file] = _download(file, remote, self._tell, self._stop)
        except BaseException as error:
            self._fail(error)
            raise

    def _tell(self, more: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._one_at_a_time:
            try:
                self._advance(more)
                return
            except BaseException as error:  # or it would pass for something that the hub has done
                failure = error
        self._fail(failure)
        raise _StoppedError from failure


def fetch_all(files: Iterable[Path], advance: Callable[[int, int], None] | None = None) -> None:
    """Download files and return when all are available.

    advance  called with bytes done and total bytes; by default a progress bar if standard error is a terminal

    raises as `Prefetch` and `fetched` do.
    """
    from tqdm import tqdm

    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        bar.update(more)
        if advance is not None:
            advance(done, prefetch.size)

    prefetch = Prefetch(files, told)
    hidden = True if advance is not None or not prefetch.size else None  # None: where there is no terminal
    with (
        tqdm(desc="fetching", total=prefetch.size, unit="B", unit_scale=True, leave=False, disable=hidden) as bar,
        prefetch,
    ):
        prefetch.finish()


def fetched(file: Path) -> None:
    """Return once a file is available: at once for a local one, else after waiting for or downloading it.

    raises CheckpointError or RecipeError if the download fails.
    """
    remote = missing_remote(file)
    if remote is None:
        return
    running = _running.get(file)
    if running is None:
        _refuse_offline([remote])
        _download(file, remote, lambda _: None, threading.Event())
        return
    future, prefetch = running
    try:
        prefetch.wait_for(future)
    except CancelledError:
        raise CheckpointError(f"{file}: was not downloaded, because the merge ended before. Start it again") from None


def _download(
    file: Path, remote: Remote, advance: Callable[[int], None], stop: threading.Event
) -> tuple[Stamp | None, str | None]:
    """Download a file into the hub's cache and check that it matches the listing and the plan.

    returns its stamp before the check, and its sha256 if it is listed
    """
    from huggingface_hub import hf_hub_download

    for attempt in range(1, _TRIES + 1):
        received = _Received(advance)
        try:
            with hub_errors(remote.repository, remote.commit, remote.name):
                bar = _bar_class(received)
                found = Path(hf_hub_download(remote.repository, remote.name, revision=remote.commit, tqdm_class=bar))
                break
        except LastingError:
            raise
        except CheckpointError:  # what the hub refuses is a RecipeError, and would be refused again
            received.stands_at(0)
            if attempt == _TRIES or stop.wait(_PAUSE * 2 ** (attempt - 1)):
                raise
    listed, stamp = listing(remote.repository, remote.commit).get(remote.name), stamp_of(found)
    delivered = found.stat().st_size
    wrong = "" if listed is None or delivered == listed.size else f"{delivered} bytes, listed are {listed.size}"
    if not wrong and listed is not None and listed.sha256 is not None and (sha256 := sha256_of(found)) != listed.sha256:
        wrong = f"it has the sha256 {sha256}, listed is {listed.sha256}"
    if not wrong and file.suffix == ".safetensors":
        text = head_of(file, remote).text
        with open_regular(found) as stream:
            wrong = "" if stream.read(len(text)) == text else "it has another header than was planned with"
    if wrong:
        for place in (found.resolve(), found):
            place.unlink(missing_ok=True)  # or it would be taken for the file from now on
        raise LastingError(
            f"{remote.repository}: '{remote.name}' as delivered is not what the hub lists: {wrong}. It is removed "
            "again; try again later"
        )
    received.stands_at(listed.size if listed else delivered)
    return stamp, listed.sha256 if listed else None


class _Received:
    """The number of bytes received of one file; reports increments to `advance`."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._here = advance, 0

    def stands_at(self, here: int) -> None:
        if here != self._here:
            self._advance(here - self._here)
            self._here = here

    def add(self, more: int) -> None:
        self.stands_at(self._here + more)


def _bar_class(received: _Received) -> Any:
    """A progress bar class for huggingface_hub that reports the bytes received and draws nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            # less than was asked for where a server sends a file from its beginning instead
            received.stands_at(int(options.get("initial") or 0))

        def update(self, n: float | None = 1) -> None:
            received.add(int(n or 0))

        # that they are there says that one bar stands for what is received and what is written: a byte counts once
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

    return Bar


def fetches_to(folder: Path) -> bool:
    """Return whether downloads go to the same disk as a folder."""
    return hub_disk().stat().st_dev == folder.stat().st_dev


def _refuse_offline(missing: Iterable[Remote]) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        one, *more = missing
        others = f" and {len(more)} more files are" if more else " is"
        raise RecipeError(
            f"{one.repository}: '{one.name}'{others} not in the hub's cache, and HF_HUB_OFFLINE is set. Unset it to "
            "fetch what is missing"
        )


def _check_room(size: int) -> None:
    free = shutil.disk_usage(hub_disk()).free
    if size > free:
        raise RecipeError(
            f"{hub_cache()}: {human_size(size)} have to be fetched from the hub, the disk has {human_size(free)} "
            "free. Set HF_HUB_CACHE to a folder with more room"
        )
