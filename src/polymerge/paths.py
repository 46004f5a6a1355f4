"""Paths as people write them, and what the system says about files: both with a reason and a next step."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

from polymerge.errors import RecipeError

__all__ = ["because", "exists", "given_path", "own_cache", "python_in"]

_PERMISSIONS: Final = "Check its permissions, and those of the folders above it"
_ROOM: Final = "Make room, or name a place on another disk"
_NETWORK: Final = "Check the network"
_NEXT: Final = {
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "Check the path",
    errno.EISDIR: "Name a file",
    errno.EEXIST: "Name another one",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "Name a place that can be written to",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.ENAMETOOLONG: "Take a shorter one",
    errno.ELOOP: "Its links lead in a circle: name what they should lead to",
    errno.EMFILE: "Raise the limit on open files, such as by `ulimit -n 4096`",
    errno.ENFILE: "End programs that have many files open",
    errno.ENOMEM: "Free memory, or take fewer threads or workers",
    errno.EIO: "Check the disk",
    errno.ESTALE: "Check the network drive",
    errno.ETIMEDOUT: _NETWORK,
    errno.ECONNREFUSED: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
}


def because(error: OSError) -> str:
    """The reason for which the system refuses something, with the next step: `Is a directory. Name a file`."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    then = _NEXT.get(error.errno or 0)
    return f"{reason}. {then}" if then else reason


def given_path(said: str | os.PathLike[str]) -> Path:
    """The path that a person has given, with the home folder in place of `~`; it need not exist.

    What no program could open ends here, and nowhere behind it as an error of Python's.

    raises RecipeError for an empty path, a NUL character, a name that is not UTF-8 or too long, links that lead in a
    circle, a folder that may not be entered, and the home folder of nobody.
    """
    text = os.fspath(said)
    if not text:
        raise RecipeError("a path is empty. Is a variable of the shell not set?")
    try:
        expanded = os.path.expanduser(text)  # noqa: PTH111 (pathlib's raises a RuntimeError)
        os.path.realpath(expanded).encode()
        Path(expanded).stat()
    except (FileNotFoundError, NotADirectoryError):
        if text.startswith("~") and expanded == text and not os.path.lexists(text):
            raise RecipeError(f"{text}: nobody here has this home folder. For such a name, write ./{text}") from None
    except UnicodeEncodeError:
        raise RecipeError(f"{text}: its full path is not UTF-8, and could not be recorded. Rename it") from None
    except ValueError:
        raise RecipeError(f"{text}: has a NUL character, which no path can have. Check the path") from None
    except OSError as error:
        raise RecipeError(f"{text}: {because(error)}") from None
    return Path(expanded)


def exists(said: str | os.PathLike[str]) -> bool:
    """Whether a text is the path of something that exists; whatever else it may be, it raises nothing."""
    return os.path.exists(os.path.expanduser(said))  # noqa: PTH110, PTH111 (pathlib's raise)


def own_cache(name: str) -> Path:
    """Our folder of that name in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches).resolve() / "polymerge" / name


def python_in(environment: str | None) -> str:
    """The Python of a virtual environment, given by its folder or by that Python itself; None is the current one.

    raises RecipeError if there is none.
    """
    if environment is None:
        return sys.executable
    path = given_path(environment).absolute()
    found = path / "bin" / "python" if path.is_dir() else path
    if not found.is_file() or not os.access(found, os.X_OK):
        raise RecipeError(f"environment {environment}: there is no {found}. Give the folder of a virtual environment")
    return str(found)
