"""Judge the answers of candidates: without labels by a criterion, and with labels by a scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.prompts import Prompt
from polymerge.tuning.criterion import CRITERIA, Choice, Distance, choose, exact
from polymerge.tuning.embedding import DEFAULT_MODEL, embedding_distance

__all__ = ["COMPARISONS", "Judging", "check_labels", "judge", "score"]

Answers = Mapping[int | str, str]
COMPARISONS = ("exact", "embedding")


@dataclass(frozen=True)
class Judging:
    """How answers are judged without labels.

    criterion        a row of `CRITERIA`
    compare          exact (differing in more than case), or embedding (cosine distance)
    embedding_model  a sentence-transformers model by path or id
    smooth           mean over so many candidates to either side
    """

    criterion: str = "union"
    compare: str = "exact"
    embedding_model: str = DEFAULT_MODEL
    smooth: int = 0

    def problems(self) -> list[PolymergeError]:
        """What of it is not there."""
        found: list[PolymergeError] = []
        if self.criterion not in CRITERIA:
            hint = did_you_mean(self.criterion, CRITERIA)
            found.append(RecipeError(f"--criterion: there is no '{self.criterion}'.{hint}"))
        if self.compare not in COMPARISONS:
            hint = did_you_mean(self.compare, COMPARISONS)
            found.append(RecipeError(f"--compare: there is no '{self.compare}'.{hint}"))
        if self.smooth < 0:
            found.append(RecipeError(f"--smooth: {self.smooth} is no number of neighbours"))
        if not found and self.compare == "embedding":
            try:
                self.distance()
            except PolymergeError as error:
                found.append(error)
        return found

    def distance(self) -> Distance:
        """How answers are compared."""
        return embedding_distance(self.embedding_model) if self.compare == "embedding" else exact

    @property
    def settings(self) -> dict[str, Any]:
        """What of this search.json says."""
        more = {"embedding_model": self.embedding_model} if self.compare == "embedding" else {}
        return {"criterion": self.criterion, "compare": self.compare, "smooth": self.smooth, **more}


def judge(values: Sequence[float], answers: Sequence[Answers], ids: Sequence[int | str], judging: Judging) -> Choice:
    """Choose among values by their answers to the prompts of these ids.

    raises RecipeError where an answer is missing: it never counts as anything.
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


def check_labels(scorer: str, prompts: Sequence[Prompt]) -> None:
    """Refuse a scorer that is not there, or prompts that it cannot score; raises RecipeError."""
    if scorer not in SCORERS:
        raise RecipeError(f"--scorer: there is no scorer '{scorer}'.{did_you_mean(scorer, SCORERS)}")
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if without:
        raise RecipeError(
            f"--scorer {scorer}: {len(without)} of {len(prompts)} prompts have no answer, the first of them "
            f"{without[0]!r}. A scored search needs the right answer of each prompt; leave --scorer out to do without"
        )


def score(scorer: str, prompts: Sequence[Prompt], answers: Answers) -> float:
    """The score of a candidate's answers, in percent."""
    scored = SCORERS[scorer].score([answers[prompt.id] for prompt in prompts], [prompt.answer for prompt in prompts])
    return float(scored.score)
