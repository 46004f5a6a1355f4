"""Put an output into an object store, in which nothing can be renamed: its last file gives it its name.

All that a run uploads until the output is complete and checked lies beside it:

    .NAME.polymerge-partial/owner       the machine whose run this is, and where it puts the output together
    .NAME.polymerge-partial/publishing  there once files are being copied to NAME
    .NAME.polymerge-partial/<file>      files that are complete; an object appears whole or not at all

Then the store itself copies them to NAME, weight files first, then what lies beside them, the index and at the very end
config.json (of an adapter, adapter_config.json), without which no program takes the rest for a model. An earlier output
that is replaced loses these files first.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from polymerge.checkpoints.discovery import CONFIG, INDEX_SUFFIX
from polymerge.checkpoints.stores import filesystem, store_errors, tag_of
from polymerge.durable import make_folder
from polymerge.errors import OutputError, PolymergeError, RecipeError, StoppedError
from polymerge.paths import own_cache

__all__ = ["Upload"]

_OWNER, _PUBLISHING = "owner", "publishing"
_LAST: Final = ("config.json", CONFIG)
_BUCKETS: Final = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "memory")
"""Stores without folders; in others, a file's folder is made before it."""
_AT_ONCE: Final = 4


@dataclass(frozen=True)
class Upload:
    """An output in an object store.

    url    its own, which is not that of a whole bucket
    force  whether an earlier output there is replaced, and what another machine has left of one
    """

    url: str
    force: bool

    @classmethod
    def to(cls, url: str, force: bool) -> Upload:
        """An upload to a URL; raises RecipeError if it cannot be that of an output."""
        scheme, _, path = url.rstrip("/").partition("://")
        parts = path.split("/")
        if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
            raise RecipeError(f"{url}: is not the URL of a folder in a bucket. Write it like s3://bucket/models/merged")
        return cls(f"{scheme}://{path}", force)

    @property
    def folder(self) -> Path:
        """Where this machine puts the output together; its parent is there. Of weight files there is little in it."""
        scheme, _, path = self.url.partition("://")
        *above, name = (quote(part, safe=" ") for part in path.split("/"))
        return make_folder(own_cache("uploads").joinpath(scheme, *above)) / name

    def check(self) -> None:
        """Raise OutputError if there is an output already, or another machine's run; nothing is written."""
        with self._store() as (fs, path):
            fs.invalidate_cache()
            owner = self._owner(fs, path)
            if owner not in ("", self._me()) and not self.force:
                raise OutputError(
                    f"{self.url}: a run on machine {owner.partition(' ')[0]} writes it, or was killed and has left "
                    f"{self._partial(self.url)}. Wait for it, or say `force=True` to begin anew"
                )
            going_on = owner == self._me() and fs.exists(self._part(path, _PUBLISHING))
            if not self.force and not going_on and fs.exists(path):
                raise OutputError(f"{self.url}: exists already. Choose another, or say `force=True` to replace it")

    def begin(self, *, anew: bool) -> None:
        """Take the place for this run, first of all; what a run has left there is removed if this one begins anew."""
        if anew:
            self.discard()
        with self._store() as (fs, path):
            self._make_folder(fs, self._part(path, _OWNER))
            fs.pipe_file(self._part(path, _OWNER), self._me().encode())

    def put(self, file: Path, name: str) -> str:
        """Upload a complete file, which must not have its name yet; returns its tag in the store."""
        with self._store() as (fs, path):
            place, size = self._part(path, name), file.stat().st_size
            self._make_folder(fs, place)
            fs.put_file(str(file), place)
            return self._tag_if(fs, place, size)

    def tag(self, name: str) -> str:
        """The tag of a file that is uploaded; empty if none is, or the store gives none."""
        with self._store() as (fs, path):
            fs.invalidate_cache()
            with suppress(FileNotFoundError):
                return tag_of(fs.info(self._part(path, name)))
        return ""

    def publish(self, folder: Path, weights: Collection[str]) -> None:
        """Give the output its name: upload what lies in a folder, and have the store copy all of it.

        weights  the files that are uploaded already

        raises StoppedError where the store fails: a later run goes on.
        """
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        names = sorted(files, key=lambda name: (name in _LAST, name.endswith(INDEX_SUFFIX), name not in weights, name))
        try:
            for name in names:
                if name not in weights:
                    self.put(files[name], name)
            with self._store() as (fs, path), ThreadPoolExecutor(_AT_ONCE) as pool:
                fs.pipe_file(self._part(path, _PUBLISHING), b"")
                fs.invalidate_cache()
                before = {one: one.removeprefix(f"{path}/") for one in (fs.find(path) if fs.exists(path) else ())}
                decisive = [one for one, name in before.items() if name in _LAST or name.endswith(INDEX_SUFFIX)]
                for one in decisive:
                    fs.rm_file(one)
                first = [name for name in names if name in weights]
                list(pool.map(lambda name: self._copy(fs, path, name, files[name].stat().st_size), first))
                for name in names[len(first) :]:
                    self._copy(fs, path, name, files[name].stat().st_size)
                for one, name in before.items():
                    if name not in files and one not in decisive:
                        fs.rm_file(one)
        except PolymergeError as error:
            raise StoppedError(str(error)) from error
        self.discard()

    def discard(self) -> None:
        """Remove what this run has uploaded and not published."""
        with self._store() as (fs, path):
            fs.invalidate_cache()
            partial, owner = self._partial(path), self._part(path, _OWNER)
            if fs.exists(partial):
                # the owner last, which tells whose the others are
                for one in sorted(fs.find(partial), key=lambda place: place == owner):
                    fs.rm_file(one)
                with suppress(OSError, NotImplementedError):  # where there are folders
                    fs.rm(partial, recursive=True)

    @contextmanager
    def discarded_if_failed(self) -> Iterator[None]:
        """Remove what was uploaded if the block fails, unless a later run can go on from it."""
        try:
            yield
        except (KeyboardInterrupt, StoppedError):
            raise
        except BaseException:
            with suppress(PolymergeError):  # what is told is why it failed
                self.discard()
            raise

    @contextmanager
    def _store(self) -> Iterator[tuple[Any, str]]:
        fs, path = filesystem(self.url)
        with store_errors(self.url, to_write=True):
            yield fs, path

    def _me(self) -> str:
        return f"{socket.gethostname()} {self.folder}"

    def _owner(self, fs: Any, path: str) -> str:
        with suppress(FileNotFoundError):
            return bytes(fs.cat_file(self._part(path, _OWNER))).decode("utf-8", "replace")
        return ""

    def _copy(self, fs: Any, path: str, name: str, size: int) -> None:
        self._make_folder(fs, f"{path}/{name}")
        fs.cp_file(self._part(path, name), f"{path}/{name}")
        self._tag_if(fs, f"{path}/{name}", size)

    def _tag_if(self, fs: Any, place: str, size: int) -> str:
        """The tag of an object; raises OutputError unless it has this size."""
        fs.invalidate_cache()
        info = fs.info(place)
        if info["size"] != size:
            raise OutputError(f"{self.url}: {place} has {info['size']} bytes in the store, uploaded were {size}")
        return tag_of(info)

    def _make_folder(self, fs: Any, place: str) -> None:
        if self.url.partition("://")[0] not in _BUCKETS:
            fs.makedirs(place.rpartition("/")[0], exist_ok=True)

    @staticmethod
    def _partial(path: str) -> str:
        above, _, name = path.rpartition("/")
        return f"{above}/.{name}.polymerge-partial"

    def _part(self, path: str, name: str) -> str:
        return f"{self._partial(path)}/{name}"
