"""The page of a contest: tables of right answers with their errors, and what they say of size and method."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from cases import NORMS
from exam import FIRST, UNTAUGHT, Exam, Row
from polymerge.demo.digit_questions import Share

__all__ = ["REFERENCE", "findings", "results", "table", "wrapped"]

REFERENCE = "task_arithmetic"
"""The merge that others are compared with: the mean of what the models have changed, at its searched scale."""
NAMED = 4  # methods in a sentence

RESULTS = """
## Right answers, %

Answers are right if they are so to the word. The questions are about held-out scans; each task has the same {count}
digit pairs. ± is one standard error, with all questions on one pair as a cluster, and twice as much about a 95 %
interval: how a number might vary with other pairs and pictures, not with other trainings, of which there was one. All
rows have been asked the same questions. {untaught} was not taught to any of the models. `norm` is the Frobenius norm of
what a model or merge changes over the root mean square of the merged models'.
"""

SEARCHED = """
## Every method at its searched scale

The scale is the one that gives the most right answers to {searched} other questions on the {number} tasks, about other
pictures: other draws from the scans that nobody was taught, of the same digit pairs. It is one of those that make a
norm of {norms}, to two digits, or beyond these as long as that gives more; of equals it is the one with the smaller
norm. The answers in the table had no part in
it. The column beside the mean is the difference to `{reference}`, with its own error: the questions were the same.
"""

BY_NORM = """
## By size

What the search saw: the share of right answers to the {searched} questions, in %, at each norm; before that the norm
and the share of the merge at the scale that it has where a recipe says none.
"""

FINDINGS = """
## What decides

Over all {count} merges, the mean share of right answers in the search goes from {low:.1f} % at a norm of {low_at} to
{high:.1f} % at {high_at} and {last:.1f} % at {last_at}. At a norm of {high_at} the merges lie between
{at_high[0]:.1f} and {at_high[1]:.1f} % there. At their searched scales the merges' means lie between
{means[0]:.1f} and {means[1]:.1f} %, their norms between {norms[0]:.2f} and {norms[1]:.2f}.

{of_mean}. Their {untaught}, which nobody meant to change, is {shares[0]:.1f} to {shares[1]:.1f} %: {of_untaught}. By
chance alone about one difference in twenty is beyond two errors. Compare methods at one norm, or search the scale of
each (`polymerge search RECIPE --vary scale`), before one is called better.
"""


def results(exam: Exam, models: Mapping[str, Row], searched: Mapping[str, Row]) -> str:
    """All tables: models that were not searched for, merges at their searched scale, and what the search saw."""
    mean = f"mean of the {_number(len(exam.taught))}"
    tasks = [*exam.taught, mean]
    untaught = [f"{task}, untaught" for task in exam.untaught]
    count = len({q.scene.digits for q in exam.questions[exam.taught[0]]})
    first = [f"{NORMS[place]:g}" for place in FIRST]
    norms = f"{', '.join(first[:-1])} or {first[-1]}"
    sizes = {"searched": len(exam.others), "number": _number(len(exam.taught)), "norms": norms}
    named = " and ".join(exam.untaught)
    head = RESULTS.format(count=count, untaught=named[0].upper() + named[1:])
    if len(exam.untaught) > 1:
        head = head.replace(" was not taught", " were not taught")
    reference = searched.get(REFERENCE)
    rows = {
        name: [f"{row.scale:g}" if row.scale is not None else "", *_cells(exam, row, reference)]
        for name, row in searched.items()
    }
    minus = f"minus that of `{REFERENCE}`"
    parts = [
        wrapped(head),
        *table(["", "norm", *tasks, *untaught], _named({name: _cells(exam, row) for name, row in models.items()})),
        wrapped(SEARCHED.format(**sizes, reference=REFERENCE)),
        *table(["", "scale", "norm", *tasks, *([minus] if reference else []), *untaught], _named(rows)),
        wrapped(BY_NORM.format(**sizes)),
        *table(["", "norm as it is", "as it is", *_tried(searched)], _named(_by_norm(exam, searched))),
    ]
    return "\n".join(parts)


def findings(exam: Exam, searched: Mapping[str, Row]) -> str:
    """What the tables say, in their numbers; nothing where too few merges were asked for."""
    found = {name: row for name, row in searched.items() if row.marks}
    if REFERENCE not in found or len(found) < 2:
        return ""
    by_norm = {
        f"{NORMS[place]:g}": [100 * row.right[f"{NORMS[place]:g}"] / len(exam.others) for row in found.values()]
        for place in FIRST
    }
    on_average = {norm: fmean(shares) for norm, shares in by_norm.items()}
    low, *_, last = by_norm
    top = max(on_average, key=lambda norm: on_average[norm])
    of_mean = _beside(exam, found, exam.taught)
    text = FINDINGS.format(
        count=len(found), low=on_average[low], low_at=low, high=on_average[top], high_at=top,
        last=on_average[last], last_at=last, at_high=_span(by_norm[top]),
        means=_span(100 * exam.mean(row).value for row in found.values()),
        norms=_span(row.norm for row in found.values() if row.norm is not None),
        of_mean=of_mean[0].upper() + of_mean[1:], untaught=UNTAUGHT,
        shares=_span(100 * exam.share(row, UNTAUGHT).value for row in found.values()),
        of_untaught=_beside(exam, found, (UNTAUGHT,)),
    )  # fmt: skip
    return wrapped(text)


def _span(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return min(listed), max(listed)


def _beside(exam: Exam, rows: Mapping[str, Row], tasks: Sequence[str]) -> str:
    """How many merges are better or worse than the reference by more than two errors, and which the most."""
    others = [(exam.difference(row, rows[REFERENCE], tasks), name) for name, row in rows.items() if name != REFERENCE]
    better = sorted(((d, n) for d, n in others if d.value > 2 * d.error), key=lambda one: -one[0].value)
    worse = sorted(((d, n) for d, n in others if d.value < -2 * d.error), key=lambda one: one[0].value)

    def named(some: Sequence[tuple[Share, str]]) -> str:
        told = ", ".join(f"`{name}` {_signed(difference)}" for difference, name in some[:NAMED])
        return f" ({'most of all ' if len(some) > NAMED else ''}{told})" if some else ""

    return (
        f"of the {len(others)} others {_are(len(better))} better than `{REFERENCE}` by more than two standard errors "
        f"of the difference{named(better)}, and {_are(len(worse))} worse{named(worse)}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """The lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def wrapped(text: str) -> str:
    """Paragraphs in lines of one length, once their numbers are in them."""
    paragraphs = text.strip().split("\n\n")
    return "\n".join(["", *(textwrap.fill(one, 120, break_on_hyphens=False) + "\n" for one in paragraphs)])


def _named(rows: Mapping[str, Sequence[str]]) -> list[list[str]]:
    return [[name, *cells] for name, cells in rows.items()]


def _cells(exam: Exam, row: Row, reference: Row | None = None) -> list[str]:
    norm = "" if row.norm is None else f"{row.norm:.2f}"
    if not row.marks:
        return [norm, "failed"]
    tasks = [_percent(exam.share(row, task)) if task in row.marks else "" for task in exam.taught]
    mean = [_percent(exam.mean(row))]
    if reference is not None:
        mean.append("" if row is reference else _signed(exam.difference(row, reference, exam.taught)))
    return [norm, *tasks, *mean, *(_percent(exam.share(row, t)) if t in row.marks else "" for t in exam.untaught)]


def _tried(searched: Mapping[str, Row]) -> list[str]:
    return sorted({norm for row in searched.values() for norm in row.right}, key=float)


def _by_norm(exam: Exam, searched: Mapping[str, Row]) -> dict[str, list[str]]:
    lines = {}
    for name, row in searched.items():
        counts = [row.as_is[1], *(row.right.get(norm) for norm in _tried(searched))] if row.marks else []
        cells = ["" if count is None else f"{100 * count / len(exam.others):.1f}" for count in counts]
        lines[name] = [f"{row.as_is[0]:.2f}", *cells] if row.marks else ["failed"]
    return lines


def _percent(marks: Share) -> str:
    return f"{100 * marks.value:.1f} ± {100 * marks.error:.1f}"


def _signed(difference: Share) -> str:
    return f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f}"


def _are(count: int) -> str:
    return {0: "none is", 1: "one is"}.get(count, f"{count} are")


def _number(count: int) -> str:
    return ("none", "one", "two", "three", "four")[count]
