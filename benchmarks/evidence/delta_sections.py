"""What the page says of a language model's delta in a vision-language model: by method, by layer, by schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from course import DEV, GROUPS
from intervals import Estimate, estimate, mean_share, share
from into_vlm import CONTROLS, PLAIN
from polymerge.analysis.baseline import THIRDS
from polymerge.charts import Series, bar_chart, line_chart
from schedules import CONSTANT, OTHER_END
from section import Results, Section, error_of_questions, series_of
from verdicts_over_seeds import advise

__all__ = ["of_layers", "of_schedules", "of_vlm"]


def of_vlm(found: Results) -> Section:
    seeds = list(found)
    merges = {
        seed: {(row["merge"], row["weight"]): row for row in rows if row["weight"] is not None}
        for seed, rows in found.items()
    }
    first = merges[seeds[0]]
    names = list(dict.fromkeys(name for name, _ in first if name != "none"))
    alone = {seed: own["none", 0.0] for seed, own in merges.items()}
    best = {
        name: {
            seed: max(
                (row for (merge, _), row in own.items() if merge == name), key=lambda row: mean_share(row["dev"], DEV)
            )
            for seed, own in merges.items()
        }
        for name in names
    }
    scores = {name: [mean_share(rows[seed]["exam"], DEV) for seed in seeds] for name, rows in best.items()}
    without = [mean_share(alone[seed]["exam"], DEV) for seed in seeds]
    advice = advise("A language model into a vision-language model", PLAIN, without, scores, list(CONTROLS))

    def gain(name: str, group: str) -> str:
        rows = best[name]
        return estimate([share(rows[seed]["exam"][group]) - share(alone[seed]["exam"][group]) for seed in seeds]).text(
            sign="+"
        )

    chosen = [
        [
            name,
            ", ".join(f"{best[name][seed]['weight']:g}" for seed in seeds),
            estimate([best[name][seed]["norm"] for seed in seeds]).text(2),
            advice.gains[name].text(sign="+"),
            advice.differences[name].text(sign="+") if name in advice.differences else "",
            *(gain(name, group) for group in GROUPS),
        ]
        for name in names
    ]
    before = [["none", *(estimate([share(alone[seed]["exam"][group]) for seed in seeds]).text() for group in GROUPS)]]
    for name in ("base, in words", "reason, in words"):
        rows = {seed: next(row for row in own if row["merge"] == name)["exam"] for seed, own in found.items()}
        asked = {"order": "order", "words": "words", "lists": "lists"}
        before.append([name, *(
            estimate([share(rows[seed][group]) for seed in seeds]).text() if group in asked else "" for group in GROUPS
        )])  # fmt: skip
    weights = sorted({weight for name, weight in first if name == PLAIN})
    by_weight = [
        [
            name,
            f"{weight:g}",
            estimate([mean_share(own[name, weight]["exam"], DEV) for own in merges.values()]).text(),
            *(
                estimate([share(own[name, weight]["exam"][group]) for own in merges.values()]).text()
                for group in GROUPS
            ),
        ]
        for name, weight in first
    ]

    def curve(name: str, group: str) -> Series:
        values = [
            estimate([share((own[name, w] if w else alone[seed])["exam"][group]) for seed, own in merges.items()])
            for w in (0.0, *weights)
        ]
        return series_of(values)

    def charts() -> list[Any]:
        drawn = {
            f"{group}: {told}": curve(name, group)
            for group in DEV
            for name, told in ((PLAIN, "reasoning delta"), ("random delta", "random delta"))
        }
        return [
            line_chart("What the merged model answers", ("weight of the delta", [0.0, *weights]), "right, %", drawn)
        ]

    return Section(
        "A language model into a vision-language model",
        "The reasoning model's delta is merged into the text tower of the VLM; embedding and head stay. Each merge is "
        f"taken at the weight with the best mean over {', '.join(DEV)} on further questions, and asked others. "
        f"Controls: {', '.join(CONTROLS)}. `words` and `lists` are asked without a picture. `norm` is that of the "
        "change over that of the reasoning delta.",
        {
            "What the models answer before any merge, in %:": (["", *GROUPS], before),
            "Gains over the VLM as it is at the chosen weight, in points:": (
                ["", "weights", "norm", f"mean of {', '.join(DEV)}", f"minus `{PLAIN}`", *GROUPS], chosen,
            ),
            "Right answers by weight, in %:": (["", "weight", f"mean of {', '.join(DEV)}", *GROUPS], by_weight),
        },
        charts,
        [advice],
        [error_of_questions([alone[seed]["exam"] for seed in seeds], DEV)],
    )  # fmt: skip


def of_layers(found: Results) -> Section:
    seeds = list(found)

    def over(pick: Callable[[Mapping[str, Any]], float], **where: Any) -> Estimate:
        return estimate([
            pick(next(row for row in found[seed] if all(row.get(key) == value for key, value in where.items())))
            for seed in seeds
        ])  # fmt: skip

    knocked, merged = [], []
    for replace in ("uniform", "from base"):
        for task in DEV:
            for module in ("attention", "mlp"):
                where = {"what": "knockout", "replace": replace, "task": task, "module": module}
                for when in ("before", "after"):
                    cells = [over(_third(when, third), **where).text() for third in THIRDS]
                    knocked.append([replace, task, module, when, *cells])
    ranges = [row["range"] for row in found[seeds[0]] if row["what"] == "layerwise" and row["delta"] == "reasoning"]
    for delta in ("reasoning", "random"):
        for name in ranges:
            where = {"what": "layerwise", "delta": delta, "range": name}
            merged.append([delta, name, *(over(_gain(task), **where).text(sign="+") for task in DEV)])

    def curve(task: str, when: str) -> Series:
        where = {"what": "knockout", "replace": "uniform", "task": task, "module": "attention"}
        count = len(next(row for row in found[seeds[0]] if row["what"] == "knockout")[f"by layer {when}"])
        return series_of([over(_cell(when, layer), **where) for layer in range(count)])

    def charts() -> list[Any]:
        drawn = {f"{task}, {when} merging": curve(task, when) for task in DEV for when in ("before", "after")}
        count = len(next(iter(drawn.values())).values)
        title = "What the attention of each layer is worth"
        return [line_chart(title, ("layer", list(range(count))), "points lost without it", drawn, zero=True)]

    return Section(
        "Where perception and reasoning sit",
        "Each module of each layer is replaced in turn, in the VLM and in the merge: by uniform weights, or by those "
        "of the base, which is the control (what has been learnt in that place since). Then only a third of the layers "
        "is merged, with a random delta as the control. Drops are sums over the layers of a third.",
        {
            "Points lost, sums over the layers of a third:": (
                ["replaced by", "task", "module", "merging", *THIRDS], knocked,
            ),
            "Points gained where only these layers are merged:": (["delta", "layers", *DEV], merged),
        },
        charts,
        (),
        [_places(found, seeds)],
    )  # fmt: skip


def _third(when: str, third: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: float(row[when][third])


def _gain(task: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: float(row["gain"][task])


def _cell(when: str, layer: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: float(row[f"by layer {when}"][layer])


def _places(found: Results, seeds: Sequence[int]) -> str:
    """In how many seeds each third loses the most, task by task."""
    told = []
    for task in DEV:
        counts = dict.fromkeys(THIRDS, 0)
        for seed in seeds:
            rows = [
                row for row in found[seed]
                if row["what"] == "knockout" and row["replace"] == "uniform" and row["task"] == task
            ]  # fmt: skip
            lost = {third: sum(row["after"][third] for row in rows) for third in THIRDS}
            if max(lost.values()) > 0:
                counts[max(lost, key=lambda third: lost[third])] += 1
        told.append(f"{task} {', '.join(f'{third} {count}' for third, count in counts.items())}")
    return (
        f"The third whose uniform knockouts cost the merge most, in how many of {len(seeds)} seeds: {'; '.join(told)}."
    )


def of_schedules(found: Results) -> Section:
    seeds = list(found)
    rows = {seed: {row["schedule"]: row for row in own} for seed, own in found.items()}
    names = [name for name in rows[seeds[0]] if name != "none"]
    scores = {name: [mean_share(rows[seed][name]["exam"], DEV) for seed in seeds] for name in names}
    without = [mean_share(rows[seed]["none"]["exam"], DEV) for seed in seeds]
    advice = advise("Weights that change with depth", CONSTANT, without, scores, [OTHER_END])
    lines = [
        [
            name,
            str(rows[seeds[0]][name]["trials"] or ""),
            advice.gains[name].text(sign="+"),
            advice.differences[name].text(sign="+") if name in advice.differences else "",
            *(estimate([share(rows[seed][name]["exam"][group]) for seed in seeds]).text() for group in DEV),
        ]
        for name in names
    ]

    def charts() -> list[Any]:
        bars = {"gain": series_of([advice.gains[name] for name in names])}
        return [bar_chart("Weights that change with depth", ("schedule", names), "points over the VLM as it is", bars)]

    return Section(
        "Schedules by depth",
        "The reasoning delta with a weight that changes from layer to layer, searched by labels on further questions. "
        "The controls: one weight, searched in as many values as the line, and the found line from its other end.",
        {"Gains over the VLM in points, right answers in %:": (
            ["", "trials", f"mean of {', '.join(DEV)}", "minus one weight", *DEV], lines,
        )},
        charts, [advice], [error_of_questions([rows[seed]["none"]["exam"] for seed in seeds], DEV)],
    )  # fmt: skip
