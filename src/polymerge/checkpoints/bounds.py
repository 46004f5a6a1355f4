"""How much of a file is read, and how much is made of it: bounds above every real file and below what hurts a machine.

A reader opens its file with `open_regular` or `read_bounded`. Both raise OSError, so that a pipe or a file that is too
long is reported like one without permission. What text unfolds to is bounded as well: 32 MB of brackets are gigabytes
of lists.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

__all__ = [
    "CONFIG_BYTES",
    "DIGITS",
    "DIRECTORY_BYTES",
    "EXPERTS",
    "HEADER_BYTES",
    "HEADER_VALUES",
    "HEADS",
    "IMAGE_BYTES",
    "INDEX_BYTES",
    "JSON_VALUES",
    "LINE_BYTES",
    "NAME_LENGTH",
    "NESTING",
    "PICKLE_BYTES",
    "PICKLE_STEPS",
    "PROBLEMS",
    "RECIPE_BYTES",
    "RECIPE_VALUES",
    "RECORDS_BYTES",
    "SHEET_BYTES",
    "SHEET_TAGS",
    "TABLE_CELLS",
    "TENSORS",
    "TOKENIZER_BYTES",
    "file_kind",
    "lines_of",
    "open_descriptor",
    "open_regular",
    "read_bounded",
]

CONFIG_BYTES: Final = 64 * 2**20
"""Of config.json and adapter_config.json, some of which list thousands of modules; in reality up to a few MB."""
TOKENIZER_BYTES: Final = 256 * 2**20
"""Of tokenizer.json and its relatives; the largest published ones have 35 MB."""
INDEX_BYTES: Final = 256 * 2**20
"""Of an index: a million tensors with long names take 130 MB."""
HEADER_BYTES: Final = 100_000_000
"""Of a safetensors header; the same limit as in the safetensors library."""
PICKLE_BYTES: Final = 32 * 2**20
"""Of the pickle in a torch file; a model with a thousand tensors takes about 150 kB."""
DIRECTORY_BYTES: Final = 32 * 2**20
"""Of the directory of a torch file's zip archive, which takes about 130 bytes a tensor."""
RECIPE_BYTES: Final = 2**20
"""Of a recipe in YAML."""
RECORDS_BYTES: Final = 4 * 2**30
"""Of questions, answers, predictions and results that are read as a whole; some carry their images."""
LINE_BYTES: Final = 256 * 2**20
"""Of one line of prompts or answers: one record, perhaps with its images."""
IMAGE_BYTES: Final = 512 * 2**20
"""Of an image file."""
SHEET_BYTES: Final = 2**30
"""Of the XML in an .xlsx file, unpacked."""

TENSORS: Final = 1_250_000
"""Of one file."""
NAME_LENGTH: Final = 4096
"""Characters of a tensor's name."""
JSON_VALUES: Final = 10_000_000
"""Values and keys in one JSON text, as far as commas, colons and opening brackets tell: an upper estimate."""
RECIPE_VALUES: Final = 50_000
"""Values and keys in a recipe, with those that its aliases repeat."""
HEADER_VALUES: Final = 4_000_000
"""Values and keys in a safetensors header that is not as plain as all writers make it, or in its metadata."""
NESTING: Final = 100
"""Levels of lists and mappings in JSON and YAML."""
DIGITS: Final = 300
"""Of a whole number in JSON and YAML: what a float64 can hold."""
PICKLE_STEPS: Final = 3_000_000
"""Instructions of a pickle; a tensor takes about 25."""
SHEET_TAGS: Final = 8_000_000
"""Tags in an .xlsx file; a cell takes about four."""
TABLE_CELLS: Final = 10_000_000
"""Cells of a table."""
HEADS: Final = 65_536
"""Attention heads of a layer."""
EXPERTS: Final = 65_536
"""Experts of a layer."""
PROBLEMS: Final = 100
"""Problems of one kind that are listed before the rest is counted."""

_WAIT_FOR_NOBODY: Final = getattr(os, "O_NONBLOCK", 0)  # opening a named pipe would wait for its writer
_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(file: Path, most: int | None = None) -> BufferedReader:
    """Open a regular file for reading bytes.

    most  maximum length of the file in bytes, if it will be read as a whole

    Raises OSError if it cannot be opened, is no regular file, or is longer.
    """
    stream = os.fdopen(open_descriptor(file), "rb")
    size = os.fstat(stream.fileno()).st_size
    if most is not None and size > most:
        stream.close()
        raise _too_long("it", size, most)
    return stream


def open_descriptor(file: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor; raises OSError if it cannot be opened, or is of another kind."""
    try:
        descriptor = os.open(file, flags | _WAIT_FOR_NOBODY)
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, f"no file can have this name ({error})") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, f"it is {file_kind(mode)}, no regular file")
    return descriptor


def file_kind(mode: int) -> str:
    """What has this mode, and is neither a regular file nor a folder: `a named pipe`."""
    return next((name for is_one, name in _KINDS if is_one(mode)), "something else")


def read_bounded(file: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes; raises OSError as `open_regular` does."""
    with open_regular(file, most) as stream:
        content = stream.read(os.fstat(stream.fileno()).st_size)
        while len(content) <= most and (more := stream.read(min(1 << 16, most + 1 - len(content)))):
            content += more  # it has grown, or the system does not say its length
    if len(content) > most:
        raise _too_long("it", len(content), most)
    return content


def lines_of(stream: BinaryIO, most: int = LINE_BYTES) -> Iterator[bytes]:
    """The lines of a file with their line feeds; raises OSError at one longer than `most` bytes."""
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            raise _too_long(f"line {number}", len(line), most)
        yield line


def _too_long(what: str, size: int, most: int) -> OSError:
    return OSError(errno.EFBIG, f"{what} is {size} bytes long or longer, at most {most} are read")
