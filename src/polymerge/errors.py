"""What can go wrong, as a tree.

PolymergeError
├── RecipeError       what the user asked for cannot be done: recipe, command line, models that do not fit
├── CheckpointError   a file is missing, broken, unsafe or holds what nobody can merge
├── OutputError       the output cannot be written, or did not pass its checks
├── MissingExtraError an optional package is needed and not installed
├── AnswerError       a model gave no answer to some prompts (in inference.answering, which raises it)
└── Refused           several of the above at once, found before any output existed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "MissingExtraError",
    "OutputError",
    "PolymergeError",
    "RecipeError",
    "Refused",
    "collecting",
    "collecting_into",
    "did_you_mean",
    "refuse",
    "refuse_if_any",
]


class PolymergeError(Exception):
    """Anything polymerge refuses or fails at; the message says what, where, both values and the next step."""

    exit_status = 1

    @property
    def problems(self) -> tuple[PolymergeError, ...]:
        """The single errors that it tells of: itself, but for `Refused`, which gathers several."""
        return (self,)


class RecipeError(PolymergeError):
    """The recipe or the command line asks for something that cannot be done."""

    exit_status = 2


class CheckpointError(PolymergeError):
    """A checkpoint on disk is missing a part, broken, unsafe, or of a kind that cannot be read."""


class OutputError(PolymergeError):
    """The output cannot be written, or it was written and failed its checks."""


class MissingExtraError(PolymergeError):
    """An optional dependency is needed for what was asked and is not installed."""


class Refused(PolymergeError):  # noqa: N818 (the plan refuses; nothing has failed)
    """Everything that was found wrong, at once; `problems` holds the single errors."""

    def __init__(self, problems: Iterable[PolymergeError]) -> None:
        self._problems = tuple({str(problem): problem for problem in problems}.values())
        self.exit_status = max(problem.exit_status for problem in self._problems)
        count = len(self._problems)
        lines = [f"{count} problem{'s' if count > 1 else ''}, nothing was written:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self._problems, 1)]
        super().__init__("\n".join(lines))

    @property
    def problems(self) -> tuple[PolymergeError, ...]:
        """Everything that was found wrong, each once."""
        return self._problems

    def __reduce__(self) -> tuple[type[Refused], tuple[tuple[PolymergeError, ...]]]:
        return Refused, (self._problems,)  # so that it comes whole out of another process


_GATHERED: ContextVar[list[PolymergeError] | None] = ContextVar("gathered", default=None)


@contextmanager
def collecting() -> Iterator[list[PolymergeError]]:
    """Gather the errors of a block, so that a person reads all of them at once; the list is what was found so far.

    Errors that are given to `refuse` inside are gathered, and so is a PolymergeError that ends the block. At the end
    the outermost block raises them as one `Refused`. A block inside another hands its errors on and raises nothing:
    what follows it runs, and can look at the list. Threads that a block starts gather for themselves.

    raises Refused if anything was gathered and no other block is open.
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
    if outer is not None:
        outer.extend(found)
    elif found:
        raise Refused(found)


@contextmanager
def collecting_into(problems: list[PolymergeError]) -> Iterator[None]:
    """Add what the block refuses to a list, for a caller that still has one of its own."""
    token = _GATHERED.set(problems)
    try:
        yield
    finally:
        _GATHERED.reset(token)


def refuse(*errors: PolymergeError) -> None:
    """Add errors to those that `collecting` gathers; where nothing is gathered, raise them.

    raises the error, or `Refused` for several, outside of any `collecting`.
    """
    gathered = _GATHERED.get()
    if gathered is not None:
        gathered.extend(problem for error in errors for problem in error.problems)
    elif errors:
        raise errors[0] if len(errors) == 1 else Refused(errors)


def refuse_if_any(problems: Iterable[PolymergeError]) -> None:
    """Raise `Refused` with every problem, or return when there is none."""
    found = tuple(problems)
    if found:
        raise Refused(found)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, as ` Did you mean 'x'?`, or list them all when none is close."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."
