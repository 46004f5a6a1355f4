"""Choose a value without labels: the one at which answers change least between neighbours.

Answers are compared by their text, or by the cosine distance of sentence embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

from polymerge.checkpoints.hub import split_revision
from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, did_you_mean

__all__ = ["CRITERIA", "Choice", "Criterion", "Distance", "Judging", "choose", "embedding_distance", "exact", "judge"]

Answers = Mapping[int | str, str]
COMPARISONS = ("exact", "embedding")
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # AdaMMS's

Distance = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""The distance of each answer from its counterpart, in [0, 1]; 0 for equal answers."""


@dataclass(frozen=True)
class Criterion:
    """How the changes towards both neighbours are combined into one difference.

    join      combines the distances of one prompt's answer to those at the previous and the next value
    two_sided whether both neighbours are needed, so that neither end can be chosen
    """

    name: str
    title: str
    source: str
    join: Callable[[float, float], float]
    two_sided: bool = True

    @property
    def least(self) -> int:
        """The minimum number of values."""
        return 3 if self.two_sided else 2


_ROWS: Final = (
    Criterion(
        "union",
        "prompts whose answer differs from that of either neighbour",
        "AdaMMS (Du et al. 2025), appendix B, and its search script",
        join=max,
    ),
    Criterion(
        "sum",
        "changes from the value before plus changes to the value after",
        "AdaMMS (Du et al. 2025), algorithm 1; its script's form for embeddings",
        join=lambda before, after: before + after,
    ),
    Criterion(
        "backward",
        "changes from the value before; only the first value cannot be chosen",
        "AdaMMS's second script (diff2), for Qwen2-VL",
        join=lambda before, _: before,
        two_sided=False,
    ),
)

CRITERIA: Final[Mapping[str, Criterion]] = MappingProxyType({row.name: row for row in _ROWS})
"""Every criterion by name."""


@dataclass(frozen=True)
class Choice:
    """The choice of a criterion.

    candidates   the eligible values, ascending
    differences  one for each candidate: a count of prompts (exact), or a mean distance per prompt (embedding)
    minima       every candidate with the smallest difference; the first is chosen
    """

    candidates: tuple[float, ...]
    differences: tuple[float, ...]
    minima: tuple[float, ...]

    @property
    def chosen(self) -> float:
        """The smallest of the minima: the closest to the template."""
        return self.minima[0]

    def to_json(self) -> dict[str, Any]:
        """The entry of search.json; counts are integers."""
        counts = [int(number) if number == int(number) else number for number in self.differences]
        return {
            "candidates": list(self.candidates),
            "differences": counts,
            "minima": list(self.minima),
            "chosen": self.chosen,
        }


def exact(answers: Sequence[str], others: Sequence[str]) -> Sequence[float]:
    """1 where two answers differ in more than case, as in the paper."""
    return [float(one.casefold() != other.casefold()) for one, other in zip(answers, others, strict=True)]


def choose(
    values: Sequence[float],
    answers: Sequence[Sequence[str]],
    criterion: str = "union",
    *,
    distance: Distance = exact,
    mean: bool = False,
    smooth: int = 0,
) -> Choice:
    """Choose the value whose answers differ least from its neighbours'.

    AdaMMS (Du et al. 2025), section 3.2. The paper does not specify how ties are broken: the smallest value
    is taken here, and all are reported.

    values   ascending
    answers  for each value, its answer to each prompt, in one order of prompts
    mean     take the mean over the prompts, not the sum
    smooth   replace each difference by the mean over this many candidates to either side; fewer at the ends

    raises RecipeError if there are too few values or no prompts.
    """
    row = CRITERIA[criterion]
    if len(values) < row.least:
        raise RecipeError(f"criterion {criterion}: compares neighbours and needs {row.least} values, got {len(values)}")
    if smooth < 0:
        raise RecipeError(f"smooth: {smooth} is no number of neighbours")
    if not answers[0]:
        raise RecipeError("there are no prompts to compare answers to")
    steps = [distance(one, other) for one, other in pairwise(answers)]
    places = range(1, len(values) - 1) if row.two_sided else range(1, len(values))
    count = len(answers[0]) if mean else 1
    raw = [
        math.fsum(map(row.join, steps[place - 1], steps[place] if row.two_sided else steps[place - 1])) / count
        for place in places
    ]
    differences = tuple(_around(raw, place, smooth) for place in range(len(raw)))
    candidates = tuple(values[place] for place in places)
    lowest = min(differences)
    minima = tuple(value for value, difference in zip(candidates, differences, strict=True) if difference == lowest)
    return Choice(candidates, differences, minima)


def _around(numbers: Sequence[float], place: int, radius: int) -> float:
    window = numbers[max(place - radius, 0) : place + radius + 1]
    return math.fsum(window) / len(window)


@cache
def embedding_distance(model: str = DEFAULT_MODEL, device: str = "cpu") -> Distance:
    """A distance between answers: 1 minus the cosine of their embeddings, in [0, 2]; 0 for equal answers.

    AdaMMS (Du et al. 2025), appendix G. Each answer is embedded only once.

    model  a sentence-transformers model by path or hub id, which may be followed by @revision

    raises MissingExtraError without sentence-transformers, RecipeError if the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError(
            "comparing by embedding needs sentence-transformers: pip install 'polymerge[embeddings]'"
        ) from None
    name, revision = split_revision(model)
    try:
        encoder: Any = SentenceTransformer(name, device=device, revision=revision)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # the last of an endpoint that answers otherwise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"embedding_model {model}: is no sentence-transformers model: {reason}") from None
    known: dict[str, Any] = {}

    def distance(answers: Sequence[str], others: Sequence[str]) -> Sequence[float]:
        new = [text for text in dict.fromkeys((*answers, *others)) if text not in known]
        if new:
            vectors = encoder.encode(new, normalize_embeddings=True, show_progress_bar=False).astype("float64")
            known.update(zip(new, vectors, strict=True))
        return [
            0.0 if one == other else max(0.0, 1.0 - float(known[one] @ known[other]))
            for one, other in zip(answers, others, strict=True)
        ]

    return distance


@dataclass(frozen=True)
class Judging:
    """How answers are compared without labels.

    criterion        a row of `CRITERIA`
    compare          exact (differing in more than case), or embedding (cosine distance)
    embedding_model  a sentence-transformers model by path or id
    smooth           average over this many candidates to either side
    """

    criterion: str = "union"
    compare: str = "exact"
    embedding_model: str = DEFAULT_MODEL
    smooth: int = 0

    def problems(self) -> list[PolymergeError]:
        """Errors in these settings."""
        found: list[PolymergeError] = []
        if self.criterion not in CRITERIA:
            hint = did_you_mean(self.criterion, CRITERIA)
            found.append(RecipeError(f"criterion: there is no '{self.criterion}'.{hint}"))
        if self.compare not in COMPARISONS:
            hint = did_you_mean(self.compare, COMPARISONS)
            found.append(RecipeError(f"compare: there is no '{self.compare}'.{hint}"))
        if self.smooth < 0:
            found.append(RecipeError(f"smooth: {self.smooth} is no number of neighbours"))
        if not found and self.compare == "embedding":
            try:
                self.distance()
            except PolymergeError as error:
                found.append(error)
        return found

    def distance(self) -> Distance:
        """The distance between answers."""
        return embedding_distance(self.embedding_model) if self.compare == "embedding" else exact

    @property
    def settings(self) -> dict[str, Any]:
        """The settings recorded in search.json."""
        more = {"embedding_model": self.embedding_model} if self.compare == "embedding" else {}
        return {"criterion": self.criterion, "compare": self.compare, "smooth": self.smooth, **more}


def judge(values: Sequence[float], answers: Sequence[Answers], ids: Sequence[int | str], judging: Judging) -> Choice:
    """Choose among values by their answers to the prompts with these ids.

    raises RecipeError if an answer is missing.
    """
    lacking = [
        f"{value:g} lacks {sum(one not in given for one in ids)} of {len(ids)}, the first of them {missing!r}"
        for value, given in zip(values, answers, strict=True)
        for missing in [next((one for one in ids if one not in given), None)]
        if missing is not None
    ]
    if lacking:
        raise RecipeError(f"answers are missing: {'; '.join(lacking)}")
    texts = [[given[one] for one in ids] for given in answers]
    mean = judging.compare == "embedding"
    return choose(values, texts, judging.criterion, distance=judging.distance(), mean=mean, smooth=judging.smooth)
