"""Candidates scored on one or several tasks, and the choice among those that no other is better than on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import dist
from types import MappingProxyType
from typing import Any, Final

from polymerge.errors import RecipeError
from polymerge.inference.generation import Batches, generate
from polymerge.inference.prompts import Prompt, sample
from polymerge.inference.run_folder import Run
from polymerge.inference.worker_pool import WorkerPool
from polymerge.planning import Plan
from polymerge.tuning.trials import score

__all__ = ["RULES", "Objective", "Scorekeeper", "choose_from", "front_outcome", "pareto_front", "quick_first"]

Scores = tuple[float, ...]
"""The score of a candidate on each task, in percent."""

RULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ideal": "nearest to the best score of every task at once, each task scaled to its range over the front",
        "worst": "whose worst task, scaled to its range over the front, is best",
        "mean": "with the highest mean of the scores",
    }
)
"""How one candidate is chosen from a front."""


@dataclass(frozen=True)
class Objective:
    """A task whose score is to be high.

    name   empty if it is the only one
    quick  the prompts that every candidate is asked, the first of `whole`
    """

    name: str
    scorer: str
    whole: Batches
    quick: Batches

    def log(self, candidate: str) -> str:
        """The name under which the run stores a candidate's answers."""
        return f"{candidate},{self.name}" if self.name else candidate


class Scorekeeper:
    """Lets candidates answer the prompts of every task, and scores the answers.

    budget    number of candidates that are to be asked the quick prompts
    progress  called with the number of answers done, and the total as far as it is known
    """

    def __init__(
        self,
        run: Run,
        pool: WorkerPool,
        objectives: Sequence[Objective],
        budget: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.objectives = objectives
        self._run, self._pool, self._progress = run, pool, progress
        self._done, self._total = 0, budget * sum(len(one.quick.prompts) for one in objectives)

    def scores(self, plans: Mapping[str, Plan], *, whole: bool = False) -> list[Scores]:
        """The scores of candidates on each task.

        plans  by the candidates' names
        whole  ask all prompts, not only the quick ones
        """
        if whole:
            self._total += len(plans) * sum(len(one.whole.prompts) - len(one.quick.prompts) for one in self.objectives)
        columns = []
        for one in self.objectives:
            asked = one.whole if whole else one.quick
            had = len(one.quick.prompts) * len(plans) if whole else 0
            names = {one.log(name): plan for name, plan in plans.items()}
            answers = generate(self._run, names, asked, self._pool, self._telling(had))
            self._done += len(plans) * len(asked.prompts) - had
            columns.append([score(one.scorer, asked.prompts, answers[name]) for name in names])
        return list(zip(*columns, strict=True))

    def _telling(self, had: int) -> Callable[[int, int], None]:
        def tell(done: int, _: int) -> None:
            if self._progress is not None:
                self._progress(self._done + max(done - had, 0), max(self._total, self._done + done - had))

        return tell


def quick_first(prompts: Sequence[Prompt], quick: int | None, seed: int) -> list[Prompt]:
    """The prompts with those in front that every candidate is asked: `quick` of them, drawn by `seed`."""
    if quick is None or quick >= len(prompts):
        return list(prompts)
    by_id = {prompt.id: prompt for prompt in prompts}
    first = dict.fromkeys(sample(list(by_id), quick, seed))
    return [by_id[one] for one in (*first, *(one for one in by_id if one not in first))]


def pareto_front(scores: Sequence[Scores]) -> list[int]:
    """The places of all scores that no other dominates: none is as high on every task and higher on one.

    Equal scores are on the front together.
    """
    return [
        place
        for place, own in enumerate(scores)
        if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in scores)
    ]


def choose_from(front: Sequence[Scores], rule: str) -> int:
    """The place of the chosen one in a front, the first of equals.

    rule  of `RULES`; where a task has one score all over the front, it does not matter
    """
    if rule not in RULES:
        raise RecipeError(f"rule: '{rule}' is none of {', '.join(RULES)}")
    if rule == "mean":
        worth = [sum(own) / len(own) for own in front]
    else:
        low, high = ([end(column) for column in zip(*front, strict=True)] for end in (min, max))
        scaled = [
            [
                (one - least) / (most - least) if most > least else 1.0
                for one, least, most in zip(own, low, high, strict=True)
            ]
            for own in front
        ]
        ideal = [1.0] * len(low)
        worth = [-dist(own, ideal) if rule == "ideal" else min(own) for own in scaled]
    return max(range(len(front)), key=worth.__getitem__)


def front_outcome(
    tried: Mapping[Any, Scores],
    names: Sequence[str],
    rule: str,
    again: Callable[[Sequence[Any]], Sequence[Scores]] | None,
) -> tuple[list[dict[str, Any]], Any]:
    """The front of tried points, with scores by task, and the chosen point.

    again  gives the scores on the whole sets of prompts, among which dominance is then decided anew
    """
    points = list(tried)
    on = [points[place] for place in pareto_front(list(tried.values()))]
    scores = [tried[point] for point in on] if again is None else list(again(on))
    kept = sorted(pareto_front(scores), key=lambda place: (*(-one for one in scores[place]), place))
    chosen = on[kept[choose_from([scores[place] for place in kept], rule)]]
    front = [{"value": on[place], "scores": dict(zip(names, scores[place], strict=True))} for place in kept]
    return front, chosen
