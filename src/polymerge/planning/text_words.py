"""Formatting of plans: sizes, settings, ranges of numbers, reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from polymerge.planning.plan import Plan, Vocabulary
from polymerge.recipe.parameters import Setting

__all__ = [
    "Paint",
    "beside_words",
    "by_reason",
    "note_lines",
    "plain",
    "ranges",
    "setting_words",
    "vocabulary_words",
    "warnings_of",
]

Paint = Callable[[str, str], str]
"""A function that styles text, given its kind (a fate or `note`) and the text."""


_FEW = 4


def plain(_: str, text: str) -> str:
    """Return the text unchanged: the `Paint` without styles."""
    return text


def warnings_of(plan: Plan) -> list[str]:
    """The warnings of a plan, after those of its stages, which are named."""
    told = [f"stage '{stage.name}': {warning}" for stage in plan.stages for warning in stage.warnings]
    return [*told, *plan.warnings]


def note_lines(warnings: Iterable[str], paint: Paint = plain) -> Iterator[str]:
    """The warnings of a plan, one per line."""
    yield from (f"{paint('note', 'note:')} {warning}" for warning in warnings)


def beside_words(beside: Mapping[str, str | None]) -> Iterator[str]:
    """A line on the sources of the files beside an output's weights; none if they are unknown."""
    if not beside:
        return
    owners: dict[str | None, list[str]] = defaultdict(list)
    for kind in ("config", "tokenizer", "chat_template"):
        owners[beside[kind]].append(kind.replace("_", " "))
    lacking = owners.pop(None, [])
    taken = "; ".join(f"{', '.join(kinds)} of {owner}" for owner, kinds in owners.items())
    yield f"  output: {taken or 'no files beside the weights'} ({beside['why']})" + (
        f"; no {', no '.join(lacking)}" if taken and lacking else ""
    )


def vocabulary_words(chosen: Vocabulary | None) -> Iterator[str]:
    """A line on the vocabulary of an output; none unless the recipe chooses it."""
    if chosen is None:
        return
    words = [f"tokenizer_source {chosen.source}: "]
    if chosen.agrees:
        words[0] += "all models have one vocabulary"
    else:
        words[0] += f"the tokenizer of {chosen.tokenizer}, {chosen.rows} rows"
    if chosen.added:
        brought = ", ".join(f"{count} of {label}" for label, count in chosen.lenders.items())
        words.append(f"{len(chosen.added)} token{'s' if chosen.added[1:] else ''} added ({brought})")
    for label, lent in chosen.filled.items():
        whose = ", ".join(f"{count} {words_for}" for words_for, count in lent.items())
        words.append(f"rows that {label} lacks: {whose}")
    for file, ids in chosen.ids.items():
        words.append(f"{', '.join(ids)} in {file} as there")
    yield f"  vocabulary: {'; '.join(words)}"


def setting_words(setting: Setting, labels: Sequence[str], others: Sequence[Setting] = ()) -> str:
    """Format a method with its parameters: `ties (weight 0.5 a, 0.5 b; density 0.2)`.

    others  settings of the same method and models; where they differ, ranges are given: `weight 0.5 a, 0 to 1 b`
    """
    words = []
    for name, value in setting.parameters.items():
        every = [value, *(other.parameters[name] for other in others)]
        if isinstance(value, tuple):
            shares = [_words([one[place] for one in every]) for place in range(len(value))]
            if len(set(shares)) == 1 and name != "weight":
                words.append(f"{name} {shares[0]}")
            else:
                words.append(
                    f"{name} " + ", ".join(f"{share} {label}" for share, label in zip(shares, labels, strict=True))
                )
        else:
            words.append(f"{name} {_words(every)}")
    return f"{setting.method}{' (' + '; '.join(words) + ')' if words else ''}"


def _words(values: Sequence[Any]) -> str:
    """One value, the range of several numbers, or several words."""
    if len(set(values)) > 1 and all(isinstance(value, float) for value in values):
        return f"{min(values):g} to {max(values):g}"
    return " or ".join(dict.fromkeys(f"{one:g}" if isinstance(one, float) else f"{one}".lower() for one in values))


def by_reason(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Format (reason, name) pairs, one line per reason: the number of names, and their common beginnings."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason, name in entries:
        kinds[reason].append(name)
    for reason, names in kinds.items():
        if len(names) <= _FEW:
            shown = ", ".join(names)
        else:
            stems = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            few = [stem if stem in names else f"{stem}.*" for stem in stems]
            shown = ", ".join(few) if len(few) <= _FEW else f"{names[0]}, ..."
        yield f"  {reason}: {len(names)} ({shown})"


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending integers as ranges: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
