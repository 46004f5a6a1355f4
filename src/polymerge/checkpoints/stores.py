"""Checkpoints in object stores, by any URL that fsspec opens, such as `s3://bucket/models/base`.

What lies under a URL is represented by a folder in the user's cache folder, as a commit on the hub is:

    polymerge/stores/<scheme>/<path>/@<digest>/   small files themselves, and for each weight file a link to its URL

The digest is of the names, sizes and tags of the objects; a tag is what the store calls an ETag, or whatever else it
says of an object that changes with its content. Weight files are read by ranges (`ranges`), and only torch files, whose
headers lie between the data, are copied as a whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from urllib.parse import quote, unquote

import msgspec

from polymerge.checkpoints.bounds import INDEX_BYTES, read_bounded
from polymerge.checkpoints.discovery import COMPANIONS, LAYOUTS, is_plain, matters
from polymerge.durable import rename_new, sync, sync_tree, writing
from polymerge.errors import (
    CheckpointError,
    MissingExtraError,
    OutputError,
    PolymergeError,
    RecipeError,
    StoppedError,
    human_size,
)
from polymerge.paths import own_cache

__all__ = [
    "Stored",
    "bring_stored",
    "current",
    "filesystem",
    "is_url",
    "locate_stored",
    "read_range",
    "restore_stored",
    "store_errors",
    "stored_at",
    "tag_of",
    "view_of",
]

_URL: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<path>.+)", re.DOTALL)
_VIEW: Final = re.compile(r"@[0-9a-f]{32}")
_OBJECTS: Final = ".objects.json"
_DEEP: Final = 3  # folders in which there may be code and text of a checkpoint
_MOST: Final = 20_000
_AT_ONCE: Final = 8
_TRIES: Final = 4
_PAUSE: Final = 0.5  # seconds after the first failed try, twice as many after each further one
_TAGS: Final = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")


@dataclass(frozen=True)
class Stored:
    """A weight file in an object store: where it is, and its size and tag when it was listed."""

    url: str
    size: int
    tag: str


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return whether a text is the URL of a place in an object store."""
    return _URL.fullmatch(os.fspath(text)) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path there.

    raises MissingExtraError if fsspec, or what it needs for this scheme, is not installed; RecipeError if it knows no
    such scheme.
    """
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(
            f"{url}: cannot be opened here: {error}. For s3 and gs: pip install 'polymerge[stores]'"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{url}: fsspec cannot open it: {error}") from None
    return fs, str(path)


@contextmanager
def store_errors(url: str, *, to_write: bool = False) -> Iterator[None]:
    """Raise RecipeError for what a store does not have or grant, CheckpointError for what fails; when writing,
    OutputError and StoppedError.
    """
    refused: type[PolymergeError] = OutputError if to_write else RecipeError
    failed: type[PolymergeError] = StoppedError if to_write else CheckpointError
    try:
        yield
    except PolymergeError:
        raise
    except FileNotFoundError as error:
        raise refused(f"{url}: is not there ({_reason(error)}). Check the name of the bucket and the path") from None
    except PermissionError as error:
        what = "written to" if to_write else "read"
        raise refused(
            f"{url}: may not be {what} ({_reason(error)}). Check the credentials, and whose they are"
        ) from None
    except NotImplementedError:
        raise refused(f"{url}: a store of this kind can only be read. Choose another place") from None
    except Exception as error:  # every store's library has errors of its own: botocore's, aiohttp's, Google's
        raise failed(
            f"{url}: the store failed ({type(error).__name__}: {_reason(error)}). Check credentials, endpoint and "
            "network, and try again"
        ) from error


def _reason(error: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def locate_stored(url: str) -> Path:
    """The folder that stands for what lies under a URL, or the file in it if the URL is that of a weight file.

    raises RecipeError if there is nothing, CheckpointError if the store fails.
    """
    url = url.rstrip("/")
    found = _URL.fullmatch(url)
    if found is None or any(part in ("", ".", "..") for part in found["path"].split("/")):
        raise RecipeError(f"{url}: is not the URL of a folder in a store. Write it like s3://bucket/models/base")
    fs, path = filesystem(url)
    folder, _, name = url.rpartition("/")
    with store_errors(url):
        fs.invalidate_cache()
        single = Path(name).suffix in LAYOUTS and "/" in found["path"] and fs.isfile(path)
    return _view(folder) / name if single else _view(url)


def restore_stored(path: Path) -> Path | None:
    """A path that `locate_stored` returned and a plan recorded, made again if it is not here; None for any other.

    raises CheckpointError if the objects are no longer what they were.
    """
    if (of := view_of(path)) is None:
        return None
    view, url = of
    if _view(url) != view:
        raise CheckpointError(f"{url}: what lies there has changed since it was planned. Plan again")
    return path


def view_of(path: Path) -> tuple[Path, str] | None:
    """The folder that a path in it, or it itself, belongs to, and the URL that it stands for; None for other paths."""
    views = own_cache("stores")
    if views not in path.parents:
        return None
    scheme, *parts = path.relative_to(views).parts
    end = next((place for place, part in enumerate(parts) if _VIEW.fullmatch(part)), None)
    if end is None:
        return None
    return views.joinpath(scheme, *parts[: end + 1]), f"{scheme}://{'/'.join(map(unquote, parts[:end]))}"


def stored_at(file: Path) -> Stored | None:
    """The object that a path stands for; None for any other path, and for what has been fetched."""
    of = view_of(file)
    if of is None or not file.is_symlink():
        return None
    known = _objects(of[0]).get(file.relative_to(of[0]).as_posix())
    return None if known is None else Stored(os.readlink(file), *known)  # noqa: PTH115 (a Path would lose a slash)


def current(files: Iterable[Path]) -> dict[Path, tuple[int, str] | None]:
    """For the paths among `files` that stand for objects: the size and tag that these have now, None if one is gone.

    Every folder is listed once.
    """
    found: dict[Path, tuple[int, str] | None] = {}
    listed: dict[str, Mapping[str, tuple[int, str]]] = {}
    for file in files:
        if stored_at(file) is not None and (of := view_of(file)) is not None:
            view, url = of
            if url not in listed:
                listed[url] = _listing(url)
            found[file] = listed[url].get(file.relative_to(view).as_posix())
    return found


def read_range(stored: Stored, start: int, stop: int) -> bytes:
    """Read bytes `start` to `stop` of an object, again if the store fails; raises CheckpointError or RecipeError."""
    fs, path = filesystem(stored.url)
    for attempt in range(_TRIES):
        try:
            with store_errors(stored.url):
                data = bytes(fs.cat_file(path, start=start, end=stop))
            break
        except CheckpointError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE * 2**attempt)
    if len(data) != stop - start:
        raise CheckpointError(
            f"{stored.url}: asked for bytes {start} to {stop}, got {len(data)}; it was replaced since it was planned"
        )
    return data


def bring_stored(files: Iterable[Path]) -> None:
    """Put objects themselves in the place of the links that stand for them; with any other paths nothing happens.

    raises CheckpointError if the disk has no room for them, or the store fails.
    """
    wanted = {file: stored for file in files if (stored := stored_at(file)) is not None}
    needed = sum(stored.size for stored in wanted.values())
    if wanted and needed > (free := shutil.disk_usage(own_cache("stores")).free):
        raise CheckpointError(
            f"{own_cache('stores')}: {human_size(needed)} have to be fetched from a store, the disk has "
            f"{human_size(free)} free. XDG_CACHE_HOME names where caches are"
        )
    for file, stored in wanted.items():
        fresh = file.with_name(f".{file.name}.{token_hex(8)}")
        try:
            _get(stored.url, stored.size, fresh)
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)


def tag_of(info: Mapping[str, Any]) -> str:
    """What changes with an object's content, of all that a store says of it; empty if it says nothing of the kind."""
    return next((str(info[key]).strip('"') for key in _TAGS if info.get(key)), "")


def _listing(url: str) -> dict[str, tuple[int, str]]:
    """The size and tag of every file of a checkpoint under a URL, by its path there, asked anew."""
    fs, root = filesystem(url)
    with store_errors(url):
        fs.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = fs.find(root, maxdepth=_DEEP, detail=True)
        if not found:
            fs.ls(root)  # which says what is missing
            raise RecipeError(f"{url}: holds no files. Check the path")
        if len(found) > _MOST:
            raise RecipeError(f"{url}: holds more than {_MOST} files. Name the folder of one model")
        files: dict[str, tuple[int, str]] = {}
        for path, info in sorted(found.items()):
            name = path.removeprefix(f"{root.rstrip('/')}/")
            if matters(name) and is_plain(name) and not any(part.startswith(".") for part in name.split("/")):
                said = info if info.get("size") is not None and tag_of(info) else fs.info(path)
                files[name] = int(said["size"] or 0), tag_of(said)
    return files


def _view(url: str) -> Path:
    files = _listing(url)
    digest = hashlib.sha256(msgspec.json.encode(sorted(files.items()))).hexdigest()[:32]
    scheme, _, path = url.partition("://")
    folder = own_cache("stores").joinpath(scheme, *(quote(part, safe=" ") for part in path.split("/")), f"@{digest}")
    if folder.is_dir():
        return folder
    fresh = folder.with_name(f".{token_hex(8)}")
    try:
        with writing(folder):
            fresh.mkdir(parents=True)
            small = [name for name in files if Path(name).suffix not in LAYOUTS or name in COMPANIONS]
            for name in files:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                if name not in small:
                    (fresh / name).symlink_to(f"{url}/{name}")
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for done in [pool.submit(_get, f"{url}/{name}", files[name][0], fresh / name) for name in small]:
                    done.result()
            (fresh / _OBJECTS).write_bytes(msgspec.json.encode(files))
            sync_tree(fresh)
            rename_new(fresh, folder)
            sync(folder.parent)
    except OutputError as error:
        if not folder.is_dir():  # or somebody else has made it since
            raise CheckpointError(f"{error}: XDG_CACHE_HOME names where caches are") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _get(url: str, size: int, file: Path) -> None:
    fs, path = filesystem(url)
    with store_errors(url):
        try:
            fs.get_file(path, str(file))
        except OSError as error:
            with writing(file):  # the system's own words, such as a full disk
                if error.errno is not None and str(error.filename) == str(file):
                    raise
            raise
        if (got := file.stat().st_size) != size:
            raise CheckpointError(f"{url}: listed with {size} bytes, got {got}; it was replaced meanwhile. Try again")


@lru_cache(maxsize=256)
def _objects(view: Path) -> dict[str, tuple[int, str]]:
    return msgspec.json.decode(read_bounded(view / _OBJECTS, INDEX_BYTES), type=dict[str, tuple[int, str]])
