"""The other end of a `ProgramProcess`: runs a program in its own environment, and answers messages on standard input.

It is run by that environment's Python, `program_host.py FILE`, and needs nothing but the standard library: FILE is the
program's, one of those beside this one. A message's `op` is the name of a function of FILE, which takes the message and
its blobs, and returns the reply. `start` returns an object instead, and what follows is asked of that: a method raises
`ValueError` for what it refuses without harm. After any other error the process ends, for the program may be in any
state.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

__all__ = ["read_message", "write_message"]

_LENGTH = struct.Struct("<Q")
_LOOK = 2.0  # seconds after which it is looked whether the other end is still there


def write_message(stream: IO[bytes], message: dict[str, Any], blobs: Sequence[Any] = ()) -> None:
    """Write a message: the length of its JSON, the JSON, in which `sizes` are those of the blobs, and the blobs."""
    views = [memoryview(blob).cast("B") for blob in blobs]
    text = json.dumps({**message, "sizes": [len(view) for view in views]}).encode()
    stream.write(_LENGTH.pack(len(text)))
    stream.write(text)
    for view in views:
        stream.write(view)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytearray]]:
    """Read a message and its blobs; raises EOFError where the stream ends."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    message: dict[str, Any] = json.loads(bytes(_exactly(stream, length)))
    return message, [_exactly(stream, size) for size in message.pop("sizes")]


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    read = bytearray(size)
    view, done = memoryview(read), 0
    while done < size:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]  # every binary stream has it
        if not count:
            raise EOFError
        done += count
    return read


def _streams() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, which nothing else can use from now on: what engines print goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _end_with_parent() -> None:
    """End where the other end is gone, even if the engine is at work."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _loaded(path: str) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    name = os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122 (no more than os is needed)
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != folder]  # noqa: PTH100
    requests, replies = _streams()
    _end_with_parent()
    started, target = False, None
    while True:
        try:
            message, blobs = read_message(requests)
        except EOFError:
            return
        op = message.pop("op")
        try:
            target = target or _loaded(sys.argv[1])
            reply = getattr(target, op)(message, blobs)
            if op == "start":
                started, target, reply = True, reply, reply.about()
        except BaseException as error:
            refused = started and isinstance(error, ValueError)
            write_message(replies, {"refused" if refused else "failed": f"{type(error).__name__}: {error}"})
            if not refused:
                raise
        else:
            write_message(replies, {"done": reply})


if __name__ == "__main__":
    _main()
