"""Locate the models that a recipe names: a local path, the URL of an object store, or one commit of a hub repository.

A commit of a repository is represented by a folder of links into the hub's cache, in the user's cache folder:

    polymerge/views/<cache>/owner/name/<commit>/   a link for every relevant file; broken until it is downloaded

So a remote repository looks like a folder, and is one as soon as its files are downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.discovery import COMPANIONS, LAYOUTS
from polymerge.checkpoints.hub_api import Remote, hub_errors, listing, no_room, unreachable
from polymerge.checkpoints.stores import is_url, locate_stored, restore_stored
from polymerge.durable import rename_new, sync, sync_tree, writing
from polymerge.errors import CheckpointError, OutputError, PolymergeError, RecipeError, did_you_mean
from polymerge.paths import exists, given_path, own_cache

__all__ = [
    "companions",
    "listed_alike",
    "listed_sha256",
    "locate",
    "missing_remote",
    "one_commit",
    "pinned",
    "remote_of",
    "restore",
    "split_revision",
]

_HUB_ID: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FOR_A_PLAN: Final = ["config.json", "adapter_config.json", "*.index.json"]
_FRESH: Final = 60.0
"""Seconds for which a branch is assumed to stay at its commit, so that all requests of a plan see the same one."""

_seen: dict[str, tuple[float, Path]] = {}
_held: dict[object, float] = {}
"""The start of each active `one_commit`; branches located since then are not looked up again."""


@contextmanager
def one_commit() -> Iterator[None]:
    """Pin every branch to the commit at which it is first located, for the duration of the block."""
    mine = object()
    _held[mine] = time.monotonic()
    try:
        yield
    finally:
        del _held[mine]


def locate(source: str) -> Path:
    """The local path of a model: `source` itself if it exists, else a folder for the hub repository that it names, or
    for what lies under a URL (`stores`).

    A path that exists is never looked up anywhere else. A hub id may carry a revision, `owner/name@revision`; it is
    resolved to a commit with huggingface_hub, so its cache, token and offline switch (HF_HUB_OFFLINE) hold. Of the
    files only the config and the index are fetched here: the folder has a link for every file of that commit, and
    what is needed arrives later (see `hub_api` and `prefetch`).

    raises RecipeError if there is neither such a path nor such an id, CheckpointError if the hub or store fails.
    """
    path = given_path(source)
    if path.exists():
        return path.resolve() if path.is_dir() else path.absolute()
    found, stored = _HUB_ID.fullmatch(source), is_url(source)
    if not stored and (found is None or path.is_symlink() or path.parent.is_dir()):
        named = "" if found or "/" in source else " A model of the hub is owner/name"
        raise RecipeError(f"{source}: there is no such file or folder.{_neighbours(path)}{named}")
    since, folder = _seen.get(source, (0.0, path))
    if since < min([time.monotonic(), *_held.values()]) - _FRESH or not os.path.lexists(folder):
        folder = locate_stored(source) if found is None else _look_up(found["id"], found["revision"])
        _seen[source] = (time.monotonic(), folder)
    return folder


def split_revision(source: str) -> tuple[str, str | None]:
    """Split a hub id into repository and revision; an existing path and a URL have no revision."""
    if exists(source) or is_url(source):
        return source, None
    name, _, revision = source.partition("@")
    return name, revision or None


def restore(path: Path) -> Path:
    """Restore a path that `locate` returned and a plan recorded: the same commit, recreated if it is no longer
    cached.
    """
    remote = remote_of(path)
    if remote is None:
        return restore_stored(path) or path
    if path.is_dir():
        needed = (file for file in path.iterdir() if any(fnmatch(file.name, one) for one in _FOR_A_PLAN))
        if all(file.exists() for file in needed):
            return path
    return _look_up(remote.repository, remote.commit)


def _look_up(repository: str, revision: str | None) -> Path:
    # imported here: a merge of local folders must not pay for it, nor touch the network
    from huggingface_hub import snapshot_download
    from tqdm import tqdm

    class Hidden(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    quiet: Any = Hidden
    with hub_errors(repository, revision):
        snapshot = snapshot_download(repository, revision=revision, allow_patterns=_FOR_A_PLAN, tqdm_class=quiet)
        return _view(repository, Path(snapshot))


def _view(repository: str, snapshot: Path) -> Path:
    """The folder of links for the commit of a snapshot in the hub's cache.

    If the hub cannot be reached and its listing is not cached, it is the snapshot itself, with the files it has.
    """
    commit = snapshot.name
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise CheckpointError(f"{repository}: the hub calls its commit '{commit}', which is none. Try another endpoint")
    # of each cache its own: who uses another one must not turn the links of a merge that is running
    cache = hashlib.sha256(str(snapshot.parents[2]).encode()).hexdigest()[:8]
    folder = own_cache("views") / cache / repository / commit
    if folder.is_dir():
        return folder
    try:
        names = listing(repository, commit)
    except PolymergeError as error:
        if isinstance(error.__context__, unreachable()):
            return snapshot.resolve()
        raise
    fresh = folder.with_name(f".{commit}.{os.getpid()}.{threading.get_ident()}")
    try:
        with writing(folder):
            for name in names:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).symlink_to(snapshot / name)
            sync_tree(fresh)
            rename_new(fresh, folder)
            sync(folder.parent)
    except OutputError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not folder.is_dir():  # or somebody else has made it since
            raise no_room(error) from error
    return folder


def remote_of(file: Path) -> Remote | None:
    """The hub file for a path in a folder of links; None for any other path."""
    views = own_cache("views")
    if views not in file.parents:
        return None
    _, owner, name, commit, *rest = (*file.relative_to(views).parts, "", "", "")
    return Remote(f"{owner}/{name}", commit, "/".join(filter(None, rest)))


def missing_remote(file: Path) -> Remote | None:
    """The hub file for a path, or None if it is available locally."""
    return None if file.exists() else remote_of(file)


def companions(folder: Path, names: Collection[str] | None = None) -> list[Path]:
    """The files beside a checkpoint's weights, or those among `names`, as paths in its folder of links.

    Empty for a local folder, which is already complete.
    """
    if remote_of(folder) is None:
        return []
    beside = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    return [
        file
        for name, file in beside.items()
        if (file.suffix not in LAYOUTS or name in COMPANIONS) and (names is None or name in names)
    ]


def listed_alike(one: Path, other: Path) -> bool:
    """Return whether the hub lists two files with the same content, so that comparing them needs no download."""
    blobs = []
    for remote in map(remote_of, (one, other)):
        listed = listing(remote.repository, remote.commit).get(remote.name) if remote else None
        blobs.append(listed.blob if listed else None)
    return None not in blobs and blobs[0] == blobs[1]


def listed_sha256(file: Path) -> str | None:
    """The sha256 that the hub lists of a file, which was compared when it came; None of any other."""
    remote = remote_of(file)
    listed = listing(remote.repository, remote.commit).get(remote.name) if remote else None
    return listed.sha256 if listed else None


def _neighbours(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")][:200]
    hint = did_you_mean(path.name, names) if names else ""
    return hint if hint.startswith(" Did") else f" '{parent}' exists, but has no '{path.name}'."


def pinned(*places: tuple[str, Path]) -> str:
    """The source that names exactly these files, `owner/name@commit`; empty if nothing comes from the hub.

    places  a model as it was named, and where it was found; after it the adapter that belongs to it, if there is one
    """
    commits = [_commit(found) for _, found in places]
    return "+".join(commit or named for commit, (named, _) in zip(commits, places, strict=True)) if any(commits) else ""


def _commit(folder: Path) -> str:
    remote = remote_of(folder)
    if remote is not None:
        return remote.pinned
    snapshot = re.fullmatch(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40,64})", "/".join(folder.parts[-3:]))
    return f"{snapshot[1]}/{snapshot[2]}@{snapshot[3]}" if snapshot else ""
