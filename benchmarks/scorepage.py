"""The page of a contest: tables of right answers with their errors, and what they say of size and method."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from cases import NORMS
from exam import UNTAUGHT, Exam, Row
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
norm of {norms}, to two digits; of equals it is the one with the smaller norm. The answers in the table had no part in
it. The column beside the mean is the difference to `{reference}`, with its own error: the questions were the same.
"""

BY_NORM = """
## By size

What the search saw: the share of right answers to the {searched} questions, in %, at each norm; before that the norm
and the share of the merge as it is, without a scale.
"""

FINDINGS = """
## What decides

Over all {count} merges, the mean share of right answers in the search goes from {low:.1f} % at a norm of {low_at:g} to
{high:.1f} % at {high_at:g} and {last:.1f} % at {last_at:g}. At their searched scales the merges' means lie between
{means[0]:.1f} and {means[1]:.1f} %, their norms between {norms[0]:.2f} and {norms[1]:.2f}.

Beside `{reference}`, {of_mean}. {untaught}. With {count} merges, about one difference beyond two errors is to be
expected by chance. Compare methods at one norm, or search the scale of each (`polymerge search RECIPE --vary scale`),
before one is called better.
"""


def results(exam: Exam, models: Mapping[str, Row], searched: Mapping[str, Row]) -> str:
    """All tables: models that were not searched for, merges at their searched scale, and what the search saw."""
    mean = f"mean of the {_number(len(exam.taught))}"
    tasks = [*exam.taught, mean]
    untaught = [f"{task}, untaught" for task in exam.untaught]
    count = len({q.scene.digits for q in exam.questions[exam.taught[0]]})
    norms = f"{', '.join(f'{norm:g}' for norm in NORMS[:-1])} or {NORMS[-1]:g}"
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
        *table(["", "norm as it is", "as it is", *(f"{norm:g}" for norm in NORMS)], _named(_by_norm(exam, searched))),
    ]
    return "\n".join(parts)


def findings(exam: Exam, searched: Mapping[str, Row]) -> str:
    """What the tables say, in their numbers; nothing where too few merges were asked for."""
    found = {name: row for name, row in searched.items() if row.marks}
    if REFERENCE not in found or len(found) < 2:
        return ""
    by_norm = [
        100 * fmean(row.right[place] for row in found.values()) / len(exam.others) for place in range(len(NORMS))
    ]
    means = [100 * exam.mean(row).value for row in found.values()]
    norms = [row.norm for row in found.values() if row.norm is not None]
    shares = [100 * exam.share(row, UNTAUGHT).value for row in found.values()]
    untaught = (
        f"Their {UNTAUGHT}, which nobody meant to change, is {min(shares):.1f} to {max(shares):.1f} %, and "
        f"{_beside(exam, found, (UNTAUGHT,))}"
    )
    top = by_norm.index(max(by_norm))
    text = FINDINGS.format(
        count=len(found), low=by_norm[0], low_at=NORMS[0], high=by_norm[top], high_at=NORMS[top], last=by_norm[-1],
        last_at=NORMS[-1], means=(min(means), max(means)), norms=(min(norms), max(norms)), reference=REFERENCE,
        of_mean=_beside(exam, found, exam.taught), untaught=untaught,
    )  # fmt: skip
    return wrapped(text)


def _beside(exam: Exam, rows: Mapping[str, Row], tasks: Sequence[str]) -> str:
    """How many merges are better or worse than the reference by more than two errors, and which the most."""
    others = [(exam.difference(row, rows[REFERENCE], tasks), name) for name, row in rows.items() if name != REFERENCE]
    better = sorted(((d, n) for d, n in others if d.value > 2 * d.error), key=lambda one: -one[0].value)
    worse = sorted(((d, n) for d, n in others if d.value < -2 * d.error), key=lambda one: one[0].value)

    def listed(some: Sequence[tuple[Share, str]]) -> str:
        if not some:
            return "none"
        named = ", ".join(f"{name} ({_signed(difference)})" for difference, name in some[:NAMED])
        return f"{len(some)} ({'the most: ' if len(some) > NAMED else ''}{named})"

    return (
        f"of the other {len(others)} those better by more than two standard errors of the difference are "
        f"{listed(better)}, those worse {listed(worse)}"
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


def _by_norm(exam: Exam, searched: Mapping[str, Row]) -> dict[str, list[str]]:
    found = {name: row for name, row in searched.items() if row.marks}
    shares = {
        name: [100 * right / len(exam.others) for right in (row.as_is[1], *row.right)] for name, row in found.items()
    }
    told = {name: [f"{found[name].as_is[0]:.2f}", *(f"{one:.1f}" for one in some)] for name, some in shares.items()}
    return told | {"mean of all": ["", *(f"{fmean(some):.1f}" for some in zip(*shares.values(), strict=True))]}


def _percent(marks: Share) -> str:
    return f"{100 * marks.value:.1f} ± {100 * marks.error:.1f}"


def _signed(difference: Share) -> str:
    return f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f}"


def _number(count: int) -> str:
    return ("none", "one", "two", "three", "four")[count]
