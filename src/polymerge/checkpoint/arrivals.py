"""Files of hub repositories on their way here: a few at a time, in the order in which they are wanted."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

from polymerge.checkpoint.headers import Head
from polymerge.checkpoint.hubbar import Received
from polymerge.checkpoint.hubcache import hub_cache, hub_disk
from polymerge.checkpoint.hubdownload import already_here, download, tidy
from polymerge.checkpoint.huberrors import LastingError, hub_errors
from polymerge.checkpoint.hubfiles import Listed, Remote, head_of, link, listing, missing_remote, remote_of
from polymerge.checkpoint.hubworkers import Workers
from polymerge.errors import CheckpointError, RecipeError

__all__ = ["Arrivals", "arrive", "arriving_on", "bring_all"]

_AT_ONCE: Final = 3
_TRIES: Final = 6  # that brought nothing new, one after the other
_PAUSE: Final = 1.0  # seconds after the first of them, twice as many after each further one
_LONGEST: Final = 30.0
_LOOK: Final = 0.2  # seconds after which whoever waits for a file looks whether it is still wanted

_coming: dict[Path, tuple[Future[None], Arrivals]] = {}
"""Files that somebody fetches already, or is about to."""


class _StoppedError(Exception):
    """What ends a download in its midst."""


class Arrivals:
    """Files that a merge needs, fetched beside it; `arrive` waits for one of them.

    files    in the order in which they are wanted; those that are here, and local ones, need nothing
    advance  told how many more bytes are here, from any thread, but never from two at once; what an earlier process
             left of a file is told when its turn comes, and a number below zero says that it is fetched again;
             what it raises is raised to whoever waits for a file

    What keeps one of them from coming ends the wait for all.

    raises RecipeError at once where they cannot come: the offline switch is set, or the disk has no room.
    """

    def __init__(self, files: Iterable[Path], advance: Callable[[int], None] = lambda _: None) -> None:
        of_hub = {file: remote for file in dict.fromkeys(files) if (remote := remote_of(file))}
        missing = {file: remote for file, remote in of_hub.items() if missing_remote(file)}
        for file in of_hub.keys() - missing:
            tidy(file)
        self._sizes = {file: listed.size if (listed := _listed(one)) else 0 for file, one in missing.items()}
        self._missing, self._advance = missing, advance
        self._stop, self._one_at_a_time = threading.Event(), threading.Lock()
        self._error: BaseException | None = None
        self._receiving: set[Received] = set()
        self._workers = Workers(_AT_ONCE)
        self.to_come = 0
        """Bytes that were not here yet at the start."""
        if missing:
            _refuse_offline(missing.values())
            here = (already_here(one, listed) for one in missing.values() if (listed := _listed(one)))
            self.to_come = self.size - sum(here)
            _check_room(self.to_come)

    @property
    def size(self) -> int:
        """Bytes that were to come."""
        return sum(self._sizes.values())

    def __enter__(self) -> Arrivals:
        for file, remote in self._missing.items():
            _coming[file] = self._workers.submit(partial(self._fetch, file, remote)), self
        return self

    def finish(self) -> None:
        """Wait for all of them; raises what kept one from coming."""
        for file in self._missing:
            arrive(file)

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """What waits for files is let go where the block fails, before anything outside waits for that in turn."""
        try:
            yield
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._stop.set()
        for file in self._missing:
            if file in _coming:
                _coming[file][0].cancel()
        for received in list(self._receiving):
            received.let_go()

    def _fail(self, error: BaseException) -> None:
        """The first error is what all others come of."""
        if not self._stop.is_set():
            self._error = error
            self._give_up()

    def wait_for(self, file: Path, future: Future[None]) -> None:
        """Wait for one of them; raises what kept it, or another one, from coming."""
        while not wait([future], _LOOK).done:
            if self._stop.is_set():
                raise self._error or _gave_up(file)
        if future.cancelled():
            raise self._error or _gave_up(file)
        if error := future.exception():
            raise self._error or error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._give_up()
        try:
            # a server that has fallen silent would hold up what has failed
            self._workers.close(wait=not self._stop.is_set())
        except BaseException:
            self._give_up()
            raise
        finally:
            for file in self._missing:
                _coming.pop(file, None)

    def _fetch(self, file: Path, remote: Remote) -> None:
        received = Received(self._tell, self._sizes[file])
        self._receiving.add(received)
        try:
            if self._stop.is_set():
                raise _gave_up(file)
            _download(file, remote, received, self._stop)
            with suppress(_StoppedError):
                received.stands_at(self._sizes[file])
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._receiving.discard(received)

    def _tell(self, more: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        if more:
            with self._one_at_a_time:
                try:
                    self._advance(more)
                except BaseException as error:  # else it would pass for something that the hub has done
                    self._fail(error)
                    raise _StoppedError from None


def bring_all(files: Iterable[Path], advance: Callable[[int, int], None] | None = None) -> None:
    """Have files here before anything goes on.

    advance  told bytes done and bytes in all; without it a bar is drawn, if standard error is a terminal

    raises what `Arrivals` and `arrive` raise.
    """
    from tqdm import tqdm

    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        bar.update(more)
        if advance is not None:
            advance(done, arrivals.size)

    arrivals = Arrivals(files, told)
    hidden = True if advance is not None or not arrivals.size else None  # None: where there is no terminal
    with (
        tqdm(desc="fetching", total=arrivals.size, unit="B", unit_scale=True, leave=False, disable=hidden) as bar,
        arrivals,
    ):
        arrivals.finish()


def arrive(file: Path) -> None:
    """Return once a file is here: at once for a local one, else after waiting for it, or fetching it.

    raises CheckpointError or RecipeError where it does not come.
    """
    remote = missing_remote(file)
    if remote is None:
        return
    coming = _coming.get(file)
    if coming is None:
        _refuse_offline([remote])
        _download(file, remote, Received(lambda _: None))
        return
    future, arrivals = coming
    arrivals.wait_for(file, future)


def _download(file: Path, remote: Remote, received: Received, stop: threading.Event | None = None) -> None:
    """Bring a file into the hub's cache, and see that it is the one that was planned with."""
    listed, stop, tries = _listed(remote), stop or threading.Event(), 0
    while True:
        most = received.most
        try:
            with hub_errors(remote.repository, remote.commit, remote.name):
                found = download(remote, listed, received)
            break
        except _StoppedError:
            raise _gave_up(file) from None
        except LastingError:
            raise
        except CheckpointError:  # what the hub refuses is a RecipeError, and would be refused again
            tries = 1 if received.most > most else tries + 1
            if tries == _TRIES or stop.wait(min(_PAUSE * 2 ** (tries - 1), _LONGEST)):
                raise
    size = listed.size if listed else None
    head = head_of(file, remote) if file.suffix == ".safetensors" else None
    delivered = found.stat().st_size
    if delivered != size or (head and not _begins_with(found, head)):
        for place in (found.resolve(), found):
            place.unlink(missing_ok=True)  # or it would be taken for the file from now on
        raise CheckpointError(
            f"{file}: what the hub delivered ({delivered} bytes) is not what it listed ({size} bytes) and what was "
            "planned with, so it is removed again. Try again"
        )
    link(file, found)


def _listed(remote: Remote) -> Listed | None:
    return (listing(remote.repository, remote.commit) or {}).get(remote.name)


def _begins_with(file: Path, head: Head) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(head.text)) == head.text


def _refuse_offline(missing: Iterable[Remote]) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        one, *more = missing
        others = f" and {len(more)} more files are" if more else " is"
        raise RecipeError(
            f"{one.repository}: '{one.name}'{others} not in the hub's cache, and HF_HUB_OFFLINE is set. Unset it to "
            "fetch what is missing"
        )


def arriving_on(folder: Path) -> bool:
    """Whether what is fetched goes to the disk that a folder is on."""
    return hub_disk().stat().st_dev == folder.stat().st_dev


def _check_room(size: int) -> None:
    free = shutil.disk_usage(hub_disk()).free
    if size > free:
        raise RecipeError(
            f"{hub_cache()}: {size / 1e9:.1f} GB have to be fetched from the hub, the disk has {free / 1e9:.1f} GB "
            "free. Set HF_HUB_CACHE to a folder with more room"
        )


def _gave_up(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: was not fetched, because the merge ended before. Start it again")
