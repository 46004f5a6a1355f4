"""Match regular expressions of other people in bounded time, with the results of Python's `re`.

`re` backtracks: a pattern of 20 characters can take it years. A pattern that is a plain name goes to `re`; any other is
parsed by Python's own parser and matched as sets of positions, each an integer with one bit per position. One pass over
the pattern moves all positions of a set at once, so that there is nothing to go back to; lookaheads and lookbehinds are
sets too. What a pattern captures is not asked. Back-references, conditions, atomic groups and flags are refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any, Final, TypeAlias

from polymerge.errors import CheckpointError, shown

if sys.version_info >= (3, 11):
    from re import _constants as constants  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as constants
    import sre_parse as parser

__all__ = ["Match", "compiled"]

_AGAIN: Final = "Download it, or save the adapter, again."
_PLAIN: Final = re.compile(r"\^?(?:[\w.-]|\\[.\-_])*", re.ASCII)
_MOST_STEPS: Final = 200_000  # of one match; a name of 100 characters takes a few hundred
_MOST_CHARACTERS: Final = 10_000  # of a pattern

_CATEGORIES: Final = {
    constants.CATEGORY_DIGIT: re.compile(r"\d"),
    constants.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    constants.CATEGORY_SPACE: re.compile(r"\s"),
    constants.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    constants.CATEGORY_WORD: re.compile(r"\w"),
    constants.CATEGORY_NOT_WORD: re.compile(r"\W"),
}
_WORDS: Final = [(constants.CATEGORY, constants.CATEGORY_WORD)]
_CHARACTERS: Final = (constants.LITERAL, constants.NOT_LITERAL, constants.ANY, constants.IN)

Node: TypeAlias = tuple[Any, Any]
"""An operation of Python's parser, and its arguments."""
Match: TypeAlias = Callable[[str], bool]
"""Whether a name matches."""


def compiled(pattern: str, where: str) -> Match:
    """Compile a pattern as PEFT matches it, against the end of a module's name, from a dot or the beginning on.

    where  the beginning of every message

    Raises CheckpointError if it is none or is refused; so does what is returned, if matching a name takes too long.
    """
    whole = rf"(.*\.)?({pattern})$"
    try:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"it is {len(pattern)} characters long, at most {_MOST_CHARACTERS} are read")
        if _PLAIN.fullmatch(pattern):
            plain = re.compile(whole)
            return lambda name: plain.match(name) is not None
        nodes = _nodes(whole)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{where}: expected a regular expression ({error}). {_AGAIN}") from None

    def match(name: str) -> bool:
        try:
            return _Matching(name).reached(nodes, 1) != 0
        except ValueError as error:
            raise CheckpointError(f"{where}: {error} '{shown(name)}'. Write simpler patterns.") from None

    return match


def _nodes(pattern: str) -> list[Node]:
    tree = parser.parse(pattern)
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError("it sets flags")
    nodes = list(tree)
    _check(nodes)
    return nodes


def _check(nodes: Iterable[Node]) -> None:
    """Refuse what needs more than sets of positions."""
    for operation, arguments in nodes:
        match operation, arguments:
            case constants.SUBPATTERN, (_, added, removed, inside):
                if added or removed:
                    raise ValueError("it sets flags")
                _check(inside)
            case constants.BRANCH, (_, ways):
                for way in ways:
                    _check(way)
            case ((constants.MAX_REPEAT | constants.MIN_REPEAT), (_, _, inside)):
                _check(inside)
            case ((constants.ASSERT | constants.ASSERT_NOT), (_, inside)):
                _check(inside)
            case ((constants.LITERAL | constants.NOT_LITERAL | constants.ANY | constants.IN | constants.AT), _):
                pass
            case _:
                raise ValueError(f"{str(operation).lower()} is not supported")


class _Matching:
    """One name; bit i of a set stands for the place before character i, and the last one for the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self.everywhere = (2 << len(name)) - 1
        self.places_of: dict[int, int] = {}
        """By character, the places before it."""
        for place, character in enumerate(map(ord, name)):
            self.places_of[character] = self.places_of.get(character, 0) | 1 << place
        self.any = (self.everywhere >> 1) & ~self.places_of.get(ord("\n"), 0)
        self.found: dict[int, int] = {}
        """By set of characters, the places before them."""

    def reached(self, nodes: Sequence[Node], places: int, *, back: bool = False) -> int:
        """Return where a sequence of operations can end that begins at one of `places`.

        back  where it can begin instead, if it ends at one of them
        """
        for operation, arguments in reversed(nodes) if back else nodes:
            if not places:
                break
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise ValueError("it takes too long to match")
            places = self._after(operation, arguments, places, back)
        return places

    def _after(self, operation: Any, arguments: Any, places: int, back: bool) -> int:
        if operation is constants.SUBPATTERN:
            return self.reached(arguments[3], places, back=back)
        if operation is constants.BRANCH:
            found = 0
            for way in arguments[1]:
                found |= self.reached(way, places, back=back)
            return found
        if operation is constants.MAX_REPEAT or operation is constants.MIN_REPEAT:
            return self._repeated(arguments, places, back)
        if operation is constants.ASSERT or operation is constants.ASSERT_NOT:
            ahead, inside = arguments
            fits = self.reached(inside, self.everywhere, back=ahead > 0)
            return places & (fits if operation is constants.ASSERT else ~fits)
        if operation is constants.AT:
            return places & self._anchored(arguments)
        mask = self._places(operation, arguments)
        return (places >> 1) & mask if back else (places & mask) << 1

    def _repeated(self, arguments: Any, places: int, back: bool) -> int:
        least, most, inside = arguments
        for _ in range(least):
            before, places = places, self.reached(inside, places, back=back)
            if places in (0, before):
                break
        found = fresh = places
        if len(inside) == 1 and inside[0][0] in _CHARACTERS and most == constants.MAXREPEAT:
            mask = self._places(*inside[0])
            while fresh := ((fresh >> 1) & mask if back else (fresh & mask) << 1) & ~found:
                found |= fresh
            return found
        for _ in range(most - least):
            fresh = self.reached(inside, fresh, back=back) & ~found
            if not fresh:
                break
            found |= fresh
        return found

    def _anchored(self, kind: Any) -> int:
        """The places that an anchor stands for."""
        size = len(self.name)
        if kind is constants.AT_BEGINNING or kind is constants.AT_BEGINNING_STRING:
            return 1
        if kind is constants.AT_END or kind is constants.AT_END_STRING:
            before_last = kind is constants.AT_END and self.name.endswith("\n")
            return 1 << size | before_last << max(size - 1, 0)
        words = self._places(constants.IN, _WORDS)
        edges = (words ^ words << 1) & self.everywhere
        return edges if kind is constants.AT_BOUNDARY else edges ^ self.everywhere

    def _places(self, operation: Any, arguments: Any) -> int:
        """The places before the characters that an operation stands for."""
        if operation is constants.LITERAL:
            return self.places_of.get(arguments, 0)
        if operation is constants.ANY:
            return self.any
        key = id(arguments)
        if key not in self.found:
            fitting = (places for one, places in self.places_of.items() if _fits(operation, arguments, one))
            self.found[key] = reduce(or_, fitting, 0)
        return self.found[key]


def _fits(operation: Any, arguments: Any, character: int) -> bool:
    """Return whether a character is one that an operation, or a part of a set, stands for."""
    match operation:
        case constants.LITERAL:
            return bool(character == arguments)
        case constants.NOT_LITERAL:
            return bool(character != arguments)
        case constants.RANGE:
            return bool(arguments[0] <= character <= arguments[1])
        case constants.CATEGORY:
            return _CATEGORIES[arguments].match(chr(character)) is not None
    negated = arguments[0][0] is constants.NEGATE
    return negated != any(_fits(kind, values, character) for kind, values in arguments[negated:])
