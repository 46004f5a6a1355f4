"""The tree of errors.

PolymergeError
├── RecipeError       what the user asked for cannot be done: recipe, command line, models that do not fit
├── CheckpointError   a file is missing, broken, unsafe or holds what nobody can merge
├── OutputError       the output cannot be written, or did not pass its checks
│   └── StoppedError  other machines ended before it was complete; what they had finished is kept
├── MissingExtraError an optional package is needed and not installed
├── AnswerError       a model gave no answer to some prompts (in inference.answering, which raises it)
└── Refused           several of the above at once, found before any output existed
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Final

__all__ = [
    "CheckpointError",
    "MissingExtraError",
    "OutputError",
    "PolymergeError",
    "RecipeError",
    "Refused",
    "StoppedError",
    "collecting",
    "did_you_mean",
    "human_size",
    "refuse",
    "refuse_if_any",
    "refuse_if_gathered",
    "shown",
]

_MOST_SHOWN: Final = 120  # characters of a value of somebody else's
_MOST_IN_A_LINE: Final = 3000  # characters of a message; the last of them tell what to do
_MOST_LISTED: Final = 1000  # problems
_UNSHOWABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, that turn the direction of text, or that have no encoding."""


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """A value from a file for a message: on one line, with what cannot be printed escaped, cut at `most` characters."""
    text = value if isinstance(value, str) else str(value)
    return _printable(text[:most]) + ("..." if len(text) > most else "")


def _printable(text: str) -> str:
    """Escape what could steer a terminal, begin a line, turn the direction of writing or not be encoded."""
    return _UNSHOWABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class PolymergeError(Exception):
    """Any refusal or failure of polymerge; the message tells what, where, both values and the next step.

    It is one line that can be printed and read, whatever the files hold that it quotes.
    """

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        end = _MOST_IN_A_LINE // 5
        short = len(message) <= _MOST_IN_A_LINE
        super().__init__(_printable(message if short else f"{message[: 4 * end]} [...] {message[-end:]}"))

    @property
    def problems(self) -> tuple[PolymergeError, ...]:
        """The individual errors: itself, except for `Refused`, which collects several."""
        return (self,)


class RecipeError(PolymergeError):
    """The recipe or the command line requests something that cannot be done."""

    exit_status = 2


class CheckpointError(PolymergeError):
    """A checkpoint on disk is incomplete, broken, unsafe, or of an unsupported kind."""


class OutputError(PolymergeError):
    """The output cannot be written, or it was written and failed its checks."""


class StoppedError(OutputError):
    """The machines that an output is written by are gone; a later run goes on with what they have finished."""


class MissingExtraError(PolymergeError):
    """An optional dependency is required and not installed."""


class Refused(PolymergeError):  # noqa: N818 (the plan refuses; nothing has failed)
    """All problems found, at once; `problems` holds the individual errors."""

    def __init__(self, problems: Iterable[PolymergeError]) -> None:
        self._problems = tuple({str(problem): problem for problem in problems}.values())
        self.exit_status = max(problem.exit_status for problem in self._problems)
        count = len(self._problems)
        lines = [f"{count} problem{'s' if count > 1 else ''}, nothing was written:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self._problems[:_MOST_LISTED], 1)]
        if count > _MOST_LISTED:
            lines.append(f"  and {count - _MOST_LISTED} more")
        Exception.__init__(self, "\n".join(lines))  # a line for each

    @property
    def problems(self) -> tuple[PolymergeError, ...]:
        """All problems found, without duplicates."""
        return self._problems

    def __reduce__(self) -> tuple[type[Refused], tuple[tuple[PolymergeError, ...]]]:
        return Refused, (self._problems,)  # so that it comes whole out of another process


_GATHERED: ContextVar[list[PolymergeError] | None] = ContextVar("gathered", default=None)


@contextmanager
def collecting(*, needed: bool = False) -> Iterator[list[PolymergeError]]:
    """Collect the errors of a block, so that all of them are reported at once; yields the list of errors so far.

    Errors passed to `refuse` inside are collected, and so is a PolymergeError that ends the block. At the end
    the outermost block raises them as one `Refused`. A nested block passes its errors on and raises nothing:
    the code after it runs, and can inspect the list. Threads started in a block collect separately.

    needed  whether the code after the block needs its result: then a nested block raises, too

    raises Refused if anything was collected and no other block is open, or the result is needed.
    """
    outer = _GATHERED.get()
    found: list[PolymergeError] = []
    token = _GATHERED.set(found)
    try:
        yield found
    except PolymergeError as error:
        found.extend(error.problems)
    finally:
        _GATHERED.reset(token)
    if outer is not None and not needed:
        outer.extend(found)
    elif found:
        raise Refused(found)


def refuse(*errors: PolymergeError) -> None:
    """Add errors to those that `collecting` collects; outside of it, raise them.

    raises the error, or `Refused` for several, outside of any `collecting`.
    """
    gathered = _GATHERED.get()
    if gathered is not None:
        gathered.extend(problem for error in errors for problem in error.problems)
    elif errors:
        raise errors[0] if len(errors) == 1 else Refused(errors)


def refuse_if_gathered() -> None:
    """End the open block of `collecting`, if one is open and something was gathered in it: nothing is to be done then.

    raises Refused with what was gathered.
    """
    refuse_if_any(_GATHERED.get() or ())


def refuse_if_any(problems: Iterable[PolymergeError]) -> None:
    """Raise `Refused` with every problem; return if there is none."""
    found = tuple(problems)
    if found:
        raise Refused(found)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that was probably meant, as ` Did you mean 'x'?`, or list them all if none is close."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."


def human_size(size: float) -> str:
    """Format bytes for people: 16.1 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
