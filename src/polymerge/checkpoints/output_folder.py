"""An output folder that appears under its name only when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from polymerge.checkpoints.discovery import COMPANIONS, of_training
from polymerge.errors import CheckpointError, OutputError, refuse_if_any

__all__ = ["check_target", "copy_companions", "output_folder"]

_WEIGHTS: Final = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OURS: Final = ("README.md", "polymerge.json")
_CODE_AND_TEXT: Final = (".py", ".json", ".jinja", ".txt", ".model")


def check_target(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise OutputError unless a folder may be made at `out` without harm to what is there, or to any input."""
    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents:
            raise OutputError(f"{out}: is or holds the input {path}, which would be replaced. Choose another folder")
        if source.is_dir() and source in target.parents:
            raise OutputError(f"{out}: lies inside of the input {path}. Choose another folder")
    if target in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise OutputError(f"{out}: is the folder that you are in, or holds it. Choose another folder")
    if (out.exists() or out.is_symlink()) and not force:
        raise OutputError(f"{out}: exists already. Choose another folder, or say --force to replace it")
    if not target.parent.is_dir():
        raise OutputError(f"{out}: its parent folder {target.parent} does not exist. Make it first")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write to; it takes that name when the block ends well and is removed otherwise.

    What an earlier run left behind when it was killed is removed first. A run that is still writing the same output
    holds a lock, and then OutputError is raised; so it is where the system refuses something, such as a full disk.
    """
    out = out.resolve()
    partial, old = (out.with_name(f".{out.name}.polymerge-{kind}") for kind in ("partial", "old"))
    try:
        with _locked(out):
            if old.exists() and not out.exists():
                old.rename(out)  # killed between the two renames below: put back what was there
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                if out.exists() or out.is_symlink():
                    out.rename(old)
                partial.rename(out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                if old.exists() and not out.exists():
                    old.rename(out)
                raise
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: could not be completed, nothing was left behind: {error}") from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output, a file beside it; it goes with the process that holds it."""
    path = out.with_name(f".{out.name}.polymerge-lock")
    descriptor = _lock(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, out: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{out}: another run of polymerge is writing it") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # a run that has just ended took the file away: what is locked is no longer the name


def copy_companions(template: Path, folder: Path, *, deep: bool = True) -> list[str]:
    """Copy what belongs to a checkpoint beside its weights: config, tokenizer, processor, chat template, remote code.

    Real files, also where the template has links to a cache. Weights, model cards and what starts with a dot stay
    behind, and what training left. The names of the files that were copied, relative to the folder.

    deep  whether to look into folders

    raises CheckpointError where one of them is a link to nothing: an output without it would be another model.
    """
    copied: list[str] = []
    gone: list[CheckpointError] = []
    for path in sorted(template.rglob("*") if deep else template.glob("*")):
        name = path.relative_to(template)
        if any(part.startswith(".") for part in name.parts) or path.is_dir() or of_training(name.as_posix()):
            continue
        if (path.name.endswith(_WEIGHTS) and path.name not in COMPANIONS) or str(name) in _OURS:
            continue
        if len(name.parts) > 1 and path.suffix not in _CODE_AND_TEXT:
            continue
        if not path.exists():
            gone.append(CheckpointError(f"{path}: is a link to nothing. Have the file there, or remove the link"))
        elif path.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            copied.append(str(name))
    refuse_if_any(gone)
    return copied
