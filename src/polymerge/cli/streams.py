"""The standard streams, which may be closed, full or without a reader; their colours; signals that end a command."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

import click

if TYPE_CHECKING:
    from polymerge.planning.text_words import Paint

__all__ = ["heed_signals", "open_streams", "paint_for", "say", "show", "unprinted"]

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "note": {"fg": "yellow"}, "error": {"fg": "red", "bold": True}, "passed": {"fg": "green"},
    "FAILED": {"fg": "red", "bold": True}, "head": {"bold": True}, "merged": {"fg": "green"},
    "folded": {"fg": "magenta"}, "dequantized": {"fg": "magenta"}, "copied": {"fg": "blue"}, "tied": {"fg": "cyan"},
    "left out": {"fg": "red"},
}  # fmt: skip


def open_streams() -> None:
    """Put the null device in place of each standard stream that is closed.

    The next file that is opened would take its number, and what is printed would be written to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def heed_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end a command in order, but for those that whoever started it has it ignore.

    The first of them raises KeyboardInterrupt. Later ones are ignored, for they would disturb the tidying up.
    """
    heeded = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        for one in heeded:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for one in heeded:
        signal.signal(one, interrupt)


def show(text: str, end: str = "\n") -> None:
    """Print on standard output; raises OSError, whose file is standard output, if it cannot be printed."""
    try:
        click.echo(text + end, nl=False)
    except OSError as error:
        raise unprinted(error) from None


def say(text: str, end: str = "\n") -> None:
    """Print on standard error, as far as it can be printed: no command fails because nobody reads what it remarks."""
    with suppress(OSError):
        click.echo(text + end, err=True, nl=False)


def paint_for(stream: TextIO) -> Paint:
    """The styles of words, given their kind: colours on a terminal that has them, unless NO_COLOR is set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return lambda _, text: text
    return lambda kind, text: click.style(text, **_STYLES[kind])


def unprinted(error: OSError) -> OSError:
    """The error with standard output as its file, where nothing more is printed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it when it ends
    return OSError(error.errno, error.strerror, "standard output")
