"""What the page says of two architectures and of the choice without labels."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from course import SHOWN
from intervals import estimate, mean_share, share
from polymerge.charts import line_chart
from section import Results, Section, error_of_questions, series_of
from two_families import LABELS
from verdicts_over_seeds import advise

__all__ = ["of_two_families"]


def of_two_families(found: Results) -> Section:
    seeds = list(found)
    scores = {
        seed: {row["weight"]: row["exam"] for row in rows if row["what"] == "scores"} for seed, rows in found.items()
    }
    means = {seed: {weight: mean_share(exam, SHOWN) for weight, exam in own.items()} for seed, own in scores.items()}
    values = list(means[seeds[0]])
    best = {seed: max(own.values()) for seed, own in means.items()}
    rules: dict[tuple[str, int, int], dict[int, list[float]]] = {}
    for seed, rows in found.items():
        for row in rows:
            if row["what"] == "choice":
                rules.setdefault((row["rule"], row["step"], row["prompts"]), {})[seed] = row["chosen"]

    def line(key: tuple[str, int, int]) -> list[str]:
        chosen = rules[key]
        regret = [fmean(best[seed] - means[seed][value] for value in own) for seed, own in chosen.items()]
        gain = [fmean(means[seed][value] - means[seed][values[0]] for value in own) for seed, own in chosen.items()]
        every = [(seed, value) for seed, own in chosen.items() for value in own]
        at_best = fmean(means[seed][value] == best[seed] for seed, value in every)
        harm = fmean(means[seed][value] < means[seed][values[0]] for seed, value in every)
        told = [estimate(regret).text(), estimate(gain).text(sign="+"), f"{100 * at_best:.0f}", f"{100 * harm:.0f}"]
        return [key[0], f"{values[key[1]] - values[0]:g}", str(key[2]), *told]

    counts = sorted({prompts for _, _, prompts in rules})
    # labels, entropy and norms are of all prompts, and so is what is held against them
    at_all = {
        rule: [fmean(means[seed][value] for value in own) for seed, own in chosen.items()]
        for (rule, step, prompts), chosen in rules.items()
        if step == 1 and prompts == counts[-1] and rule != "the template alone"
    }
    alone = [means[seed][values[0]] for seed in seeds]
    advice = advise("Two architectures, the weight chosen without labels", "union", alone, at_all, [LABELS])
    by_weight = [
        [
            f"{value:g}",
            estimate([means[seed][value] for seed in seeds]).text(),
            *(estimate([share(scores[seed][value][group]) for seed in seeds]).text() for group in SHOWN),
        ]
        for value in values
    ]

    def charts() -> list[Any]:
        drawn = {}
        for rule in dict.fromkeys(rule for rule, step, prompts in rules if (rule, 1, counts[0]) in rules):
            told = [
                estimate([fmean(best[s] - means[s][v] for v in own) for s, own in rules[rule, 1, count].items()])
                for count in counts
            ]
            drawn[rule] = series_of(told)
        return [
            line_chart(
                "What a choice without labels gives up", ("prompts", counts), "points below the best weight", drawn
            )
        ]

    return Section(
        "Two architectures",
        "The text towers of LLaVA and of DeepSeek-VL, both grown from the base, are averaged in LLaVA's place, as "
        "AdaMMS does. Each rule chooses the second model's weight from prompts that no score is about. The oracle is "
        "the weight with the best score itself, so that some of the regret is luck; `labels of the same prompts` says "
        "how much a choice by labels gives up. `best` and `harm` are how often, in %, over seeds and draws, the choice "
        f"was the best weight, and worse than the template alone. Scores are means over {', '.join(SHOWN)}.",
        {
            "Right answers by the other model's weight, in %:": (["weight", "mean", *SHOWN], by_weight),
            "What each rule chooses:": (
                ["rule", "step", "prompts", "regret", "gain over the template", "best", "harm"],
                [line(key) for key in rules],
            ),
        },
        charts,
        [advice],
        [error_of_questions([scores[seed][values[0]] for seed in seeds], SHOWN)],
    )  # fmt: skip
