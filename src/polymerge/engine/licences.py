"""The licences of a merge's inputs, as their cards state them, and what stands in the way of sharing the merge.

What is known of a licence is what its name says: a few well-known ones, and no more. None of this is legal advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import yaml

from polymerge.errors import shown

__all__ = ["TERMS", "Stated", "Terms", "card_metadata", "conflicts", "licence_lines", "stated_in"]


@dataclass(frozen=True)
class Terms:
    """What a licence asks of a merge.

    noncommercial  whether it forbids commercial use
    closed         whether it forbids sharing what is derived
    same           whether what is derived has to be under the same licence
    limits         whether it adds limits of its own that others must be told of, as use policies do
    only           the line of models that outputs may improve, where other language models are excluded
    asks           what has to go along with a merge that is shared
    """

    noncommercial: bool = False
    closed: bool = False
    same: bool = False
    limits: bool = False
    only: str = ""
    asks: str = ""


_NAMED: Final = "its authors are named, and that it was changed is said"
_NOTICE: Final = "its copyright notice goes along"
_BUILT: Final = 'its text and notice go along, "Built with Llama" is shown, and the name begins with "Llama"'
_BUILT_3: Final = 'its text and notice go along, "Built with Meta Llama 3" is shown, and the name begins with "Llama 3"'

TERMS: Final[Mapping[str, Terms]] = {
    "apache-2.0": Terms(asks="its text and notices go along, and that files were changed is said"),
    "mit": Terms(asks=_NOTICE),
    "bsd-2-clause": Terms(asks=_NOTICE),
    "bsd-3-clause": Terms(asks=_NOTICE),
    "isc": Terms(asks=_NOTICE),
    "cc0-1.0": Terms(),
    "unlicense": Terms(),
    "cc-by-4.0": Terms(asks=_NAMED),
    "cc-by-sa-4.0": Terms(same=True, asks=_NAMED),
    "cc-by-nc-4.0": Terms(noncommercial=True, asks=_NAMED),
    "cc-by-nc-sa-4.0": Terms(noncommercial=True, same=True, asks=_NAMED),
    "cc-by-nd-4.0": Terms(closed=True),
    "cc-by-nc-nd-4.0": Terms(noncommercial=True, closed=True),
    "gpl-3.0": Terms(same=True, asks="its text goes along"),
    "agpl-3.0": Terms(same=True, asks="its text goes along, also where the merge only answers over a network"),
    "llama2": Terms(limits=True, only="Llama 2", asks="its text, notice and use policy go along"),
    "llama3": Terms(limits=True, only="Llama 3", asks=_BUILT_3),
    "llama3.1": Terms(limits=True, asks=_BUILT),
    "llama3.2": Terms(limits=True, asks=_BUILT),
    "llama3.3": Terms(limits=True, asks=_BUILT),
    "llama4": Terms(limits=True, asks=_BUILT),
    "gemma": Terms(limits=True, asks="its terms and use policy go along"),
    "openrail": Terms(limits=True, asks="its restrictions of use go along"),
    "bigscience-openrail-m": Terms(limits=True, asks="its restrictions of use go along"),
    "creativeml-openrail-m": Terms(limits=True, asks="its restrictions of use go along"),
}  # fmt: skip
"""By the names that the hub has for licences."""

_TOGETHER: Final = ({"cc-by-sa-4.0", "gpl-3.0"}, {"gpl-3.0", "agpl-3.0"})
"""Licences for what is derived that can be met at once: what is under the first may be passed on under the second."""

_NO_FRONT: Final[Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Stated:
    """What the card of an input says of its licence; None if there is no card, or it says nothing.

    link  where the text is, as far as the card says
    """

    model: str
    licence: str | None
    link: str = ""
    seen: bool = True


def card_metadata(card: str) -> Mapping[str, Any]:
    """The metadata in front of a card; empty if there is none that can be read."""
    if not card.startswith("---"):
        return _NO_FRONT
    front, closed, _ = card[3:].partition("\n---")
    try:
        found = yaml.safe_load(front) if closed else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a card is anybody's text
        return _NO_FRONT
    return found if isinstance(found, dict) else _NO_FRONT


def stated_in(model: str, card: str | None) -> Stated:
    """What a card says of its model's licence; None for a card that is not at hand."""
    if card is None:
        return Stated(model, None, seen=False)
    front = card_metadata(card)
    said = front.get("license")
    if isinstance(said, list):
        said = ", ".join(map(str, said)) or None
    name = front.get("license_name")
    if said in (None, "other", "unknown") and isinstance(name, str) and name:
        said = name
    link = front.get("license_link")
    return Stated(model, None if said is None else shown(said).lower(), shown(link) if isinstance(link, str) else "")


def conflicts(stated: Sequence[Stated]) -> Iterator[str]:
    """Sentences on licences that do not go together, or that bind the whole merge; none for unknown ones."""
    known = [(one, TERMS[one.licence]) for one in stated if one.licence is not None and one.licence in TERMS]
    for one, terms in known:
        if terms.closed:
            yield f"{one.model} ({one.licence}) may not be shared in changed form, and a merge is one: do not share it."
        if terms.noncommercial and any(not other.noncommercial for _, other in known):
            yield f"{one.model} ({one.licence}) is for non-commercial use only, and then so is the merge."
    for (one, mine), (other, theirs) in combinations(known, 2):
        pair = {str(one.licence), str(other.licence)}
        if len(pair) > 1 and mine.same and theirs.same and pair not in _TOGETHER:
            yield (
                f"{one.model} ({one.licence}) and {other.model} ({other.licence}) each want their own licence for "
                "what is derived: none is both."
            )
        for first, its, second, others in ((one, mine, other, theirs), (other, theirs, one, mine)):
            if its.same and not others.same and (others.limits or (others.noncommercial and not its.noncommercial)):
                yield (
                    f"{first.model} ({first.licence}) allows no further limits on what is derived, and "
                    f"{second.model} ({second.licence}) has some: they do not go together."
                )
            if its.only and second.licence != first.licence:
                yield (
                    f"{first.model} ({first.licence}) may improve no language model but {its.only}, and {second.model} "
                    f"is under {second.licence}: they go together only if it is derived from {its.only}."
                )


def licence_lines(stated: Sequence[Stated]) -> list[str]:
    """A table for a card of what each input's card states, what that asks for, and what does not go together."""
    lines = ["| input | licence, as its card states it | what it asks for |", "|---|---|---|"]
    for one in stated:
        if one.licence is None:
            words = (
                ("its card states none", "ask its authors") if one.seen else ("its card was not at hand", "look it up")
            )
        elif one.licence in TERMS:
            words = one.licence, TERMS[one.licence].asks
        else:
            words = one.licence, "not one that polymerge knows: read it"
        link = f" ([text]({one.link}))" if one.link.startswith("https://") else ""
        lines.append(f"| {one.model} | {words[0].replace('|', '/')}{link} | {words[1]} |")
    told = list(dict.fromkeys(conflicts(stated)))
    if told:
        lines += ["", "**These do not simply go together:**", "", *(f"- {sentence}" for sentence in told)]
    return [*lines, "", "Known from the names of the licences alone, and no legal advice."]
