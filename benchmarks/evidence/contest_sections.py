"""What the page says of merges of models that were taught one task each."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

from cases import NORMS
from intervals import estimate, mean_share, share
from polymerge.charts import bar_chart, line_chart
from polymerge.demo.world import ARITHMETIC
from section import Results, Section, error_of_questions, series_of
from verdicts_over_seeds import advise

__all__ = ["of_adapters", "of_finetunes"]


def _contest(title: str, about: str, found: Results, reference: str, kind: str) -> Section:
    """Merges of models that were taught one task each, ordered by what they answer."""
    seeds = list(found)
    rows = {seed: {row["merge"]: row for row in own} for seed, own in found.items()}
    failed = sorted({name for own in rows.values() for name, row in own.items() if "failure" in row})
    names = [
        name for name in rows[seeds[0]]
        if name not in (*failed, "none", "each on its own task") and all(name in own for own in rows.values())
    ]  # fmt: skip
    tasks = list(rows[seeds[0]]["each on its own task"]["exam"])
    others = [task for task in rows[seeds[0]]["none"]["exam"] if task not in tasks]
    scores = {name: [mean_share(rows[seed][name]["exam"], tasks) for seed in seeds] for name in names}
    without = [mean_share(rows[seed]["none"]["exam"], tasks) for seed in seeds]
    advice = advise(kind, reference, without, scores)
    best = [max(own[place] for own in scores.values()) for place in range(len(seeds))]
    ordered = sorted(names, key=lambda name: -fmean(scores[name]))

    def cells(name: str) -> list[str]:
        exams = [rows[seed][name]["exam"] for seed in seeds]
        return [estimate([share(exam[task]) for exam in exams]).text() if task in exams[0] else "" for task in others]

    lines = [
        [
            name,
            "",
            estimate([mean_share(rows[seed][name]["exam"], tasks) for seed in seeds]).text(),
            "",
            "",
            *cells(name),
        ]
        for name in ("none", "each on its own task")
    ]
    lines += [
        [
            name,
            estimate([rows[seed][name]["norm"] for seed in seeds]).text(2),
            estimate(scores[name]).text(),
            advice.differences[name].text(sign="+") if name in advice.differences else "",
            estimate([top - own for top, own in zip(best, scores[name], strict=True)]).text(),
            *cells(name),
        ]
        for name in ordered
    ]
    norms = [
        f"{norm:g}" for norm in NORMS if all(f"{norm:g}" in rows[s][n]["dev by norm"] for s in seeds for n in names)
    ]
    by_norm = {
        name: [estimate([share(rows[seed][name]["dev by norm"][norm]) for seed in seeds]) for norm in norms]
        for name in ordered
    }
    as_is = {
        name: [
            estimate([rows[seed][name]["as it is"]["norm"] for seed in seeds]).text(2),
            estimate([share(rows[seed][name]["as it is"]["dev"]) for seed in seeds]).text(),
        ]
        for name in ordered
    }

    def charts() -> list[Any]:
        shown = [reference, *(name for name in ordered if name != reference)][:6]
        drawn = {name: series_of(by_norm[name]) for name in shown}
        title_of_bars = f"{title}: each at its searched scale"
        bars = {"right": series_of([estimate(scores[name]) for name in ordered])}
        sizes = f"{title}: by the size of the merge"
        return [
            line_chart(sizes, ("norm", [float(norm) for norm in norms]), "right, %", drawn),
            bar_chart(title_of_bars, ("merge", ordered), "right answers on the taught tasks, %", bars),
        ]  # fmt: skip

    head = ["", "norm", f"mean of {', '.join(tasks)}", f"minus `{reference}`", "regret", *others]
    notes = [error_of_questions([rows[seed]["none"]["exam"] for seed in seeds], tasks)]
    if failed:
        notes.append(f"Failed with some seed, and left out: {', '.join(failed)}.")
    return Section(
        title, about,
        {
            "At the searched scale, right answers in %, regret in points to the best merge of a seed:": (head, lines),
            "In the search at equal norms, right answers in %; before that the merge without a search:": (
                ["", "norm", "as it is", *norms],
                [[name, *as_is[name], *(one.text() for one in by_norm[name])] for name in ordered],
            ),
        },
        charts, [advice], notes,
    )  # fmt: skip


def of_adapters(found: Results, start: str) -> Section:
    told = {
        "common": "Four LoRA adapters that began with the same factors, each taught one kind of arithmetic.",
        "own": "The control: the same adapters, each begun with factors of its own.",
    }
    section = _contest(
        f"Adapters, {start} start{'s' * (start == 'own')}",
        f"{told[start]} Each merge is taken at the scale that answers most further questions. `norm` is that of the "
        "merge over the root mean square of the adapters'.",
        {seed: [row for row in rows if row["start"] == start] for seed, rows in found.items()},
        "task_arithmetic",
        f"Adapters, {start} start{'s' * (start == 'own')}",
    )
    return section if start == "common" else replace(section, notes=[_of_starts(found), *section.notes])


def _of_starts(found: Results) -> str:
    """What a common start gains, merge by merge."""
    scores = {
        seed: {(row["start"], row["merge"]): mean_share(row["exam"], ARITHMETIC) for row in rows if "norm" in row}
        for seed, rows in found.items()
    }
    both = [name for start, name in next(iter(scores.values())) if start == "own"]
    told = [
        f"{name} {estimate([own['common', name] - own['own', name] for own in scores.values()]).text(sign='+')}"
        for name in both
        if all({("common", name), ("own", name)} <= own.keys() for own in scores.values())
    ]
    return f"A common start minus own starts, within a seed: {', '.join(told)}."


def of_finetunes(found: Results) -> Section:
    return _contest(
        "Full fine-tunes",
        "Three copies of the VLM, all weights trained on one kind of arithmetic each: means beside the methods that "
        "decompose matrices, at equal norms and each at its searched scale. The control is the plain mean of the same "
        "norm.",
        found,
        "task_arithmetic",
        "Full fine-tunes of one model",
    )
