"""What a search is told: where its prompts are, how answers are generated, how they are scored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.generation.draw import draw
from polymerge.generation.models import DTYPES
from polymerge.generation.prompts import Prompt, check_images, read_prompts
from polymerge.planning import AdapterPlan, Plan
from polymerge.search.candidates import Space
from polymerge.search.criterion import CRITERIA
from polymerge.search.judging import Judging, check_labels
from polymerge.search.trials import SAMPLERS
from polymerge.search.workers import Crew, Job, hire

__all__ = ["Generation", "PromptSource", "Scoring", "draw_prompts", "misfits"]


@dataclass(frozen=True)
class PromptSource:
    """Where prompts are, and how many are drawn.

    source        JSON lines, LLaVA's question format, a folder of images, or a dataset (see `read_prompts`)
    samples       how many are drawn; 0 for all
    seed          of the draw; AdaMMS's is 2
    question, split, fields, image_folder   as `read_prompts` takes them
    """

    source: str | os.PathLike[str]
    samples: int = 100
    seed: int = 2
    question: str | None = None
    split: str | None = None
    fields: Mapping[str, str] | None = field(default=None)
    image_folder: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Generation:
    """How answers are generated: greedily, in batches, by one worker or several.

    dtype          auto (as the template's weights are) or a torch dtype
    workers        processes, or actors where `ray` is given: `local`, or the address of a cluster
    torch_threads  of each worker; by default the processors are shared out
    """

    max_new_tokens: int = 16
    batch_size: int = 16
    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 1
    ray: str | None = None
    torch_threads: int | None = None
    trust_remote_code: bool = False

    def problems(self) -> list[PolymergeError]:
        """What of it cannot be."""
        found: list[PolymergeError] = [
            RecipeError(f"--{name.replace('_', '-')}: {getattr(self, name)} is too few")
            for name in ("max_new_tokens", "batch_size", "workers")
            if getattr(self, name) < 1
        ]
        if self.dtype not in DTYPES:
            found.append(RecipeError(f"--dtype: '{self.dtype}'.{did_you_mean(self.dtype, DTYPES)}"))
        return found

    @contextmanager
    def crew(self, plan: Plan | AdapterPlan | None, folder: str = "") -> Iterator[Callable[[], Crew]]:
        """What hires its workers when it is first called, and sees them off at the end.

        plan    whose models they load; None where they load the checkpoint in `folder`
        """
        threads = self.torch_threads
        if threads is None and (self.workers > 1 or self.ray is not None):
            threads = max(1, (os.cpu_count() or 1) // self.workers)
        job = Job(
            plan, self.device, self.dtype, self.max_new_tokens, threads, threads, self.trust_remote_code, folder
        )  # fmt: skip
        with ExitStack() as stack:
            yield cache(lambda: stack.enter_context(hire(job, self.workers, self.ray)))


@dataclass(frozen=True)
class Scoring:
    """How answers are scored where the right ones are known.

    scorer   a row of the table of scorers
    sampler  grid (every combination of the listed values), or one of Optuna's
    trials   of a sampler
    storage  URL of one of Optuna's storages; by default a journal in the run's folder
    choose   whether the best score chooses; else the criterion does, and the scores are only told
    """

    scorer: str
    sampler: str = "grid"
    trials: int = 20
    storage: str | None = None
    choose: bool = True


def draw_prompts(source: PromptSource, problems: list[PolymergeError]) -> list[Prompt]:
    """Read prompts, draw some, and look whether their images can be opened; what is wrong goes to `problems`."""
    try:
        if source.samples < 0:
            raise RecipeError(f"--samples: {source.samples} is no number of prompts; 0 takes all")
        every = read_prompts(
            source.source, question=source.question, split=source.split, fields=source.fields,
            image_folder=source.image_folder,
        )  # fmt: skip
        by_id = {prompt.id: prompt for prompt in every}
        drawn = [by_id[one] for one in draw(list(by_id), source.samples, source.seed)]
        check_images(drawn)
    except PolymergeError as error:
        problems += error.problems
        return []
    return drawn


def misfits(
    space: Space, generation: Generation, judging: Judging, scoring: Scoring | None, drawn: Sequence[Prompt]
) -> list[PolymergeError]:
    """What of a search's parts does not fit together."""
    problems = generation.problems() + judging.problems()
    if scoring is None:
        return problems + _without_labels(space, judging)
    if scoring.sampler == "grid":
        if any(span is not None for span in space.spans):
            problems.append(RecipeError("--vary: a grid needs a step in each range, such as 0:0.6:0.1"))
    elif scoring.sampler not in SAMPLERS:
        hint = did_you_mean(scoring.sampler, ("grid", *SAMPLERS))
        problems.append(RecipeError(f"--sampler: there is no '{scoring.sampler}'.{hint}"))
    elif generation.workers > 1:
        problems.append(
            RecipeError("--workers: a sampler learns from each trial before it draws the next; several are for a grid")
        )
    if scoring.trials < 1:
        problems.append(RecipeError(f"--trials: {scoring.trials} are none"))
    if not scoring.choose:
        problems += _without_labels(space, judging)
        if scoring.sampler != "grid":
            problems.append(RecipeError("--choose-by criterion: compares neighbours, so it needs --sampler grid"))
    if drawn:
        try:
            check_labels(scoring.scorer, drawn)
        except PolymergeError as error:
            problems.append(error)
    return problems


def _without_labels(space: Space, judging: Judging) -> list[PolymergeError]:
    """What cannot be chosen by comparing neighbours."""
    problems: list[PolymergeError] = []
    if len(space.knobs) > 1:
        problems.append(RecipeError("--vary: without labels one parameter is varied; several need --scorer"))
    if any(span is not None for span in space.spans):
        problems.append(RecipeError("--values: a range needs a step, such as 0:0.6:0.1"))
    if not all(knob.numeric for knob in space.knobs):
        problems.append(RecipeError("--vary: without labels a number is varied, for its neighbours are compared"))
    least = CRITERIA[judging.criterion].least if judging.criterion in CRITERIA else 0
    if not problems and space.knobs and len(space.points()) < least:
        problems.append(
            RecipeError(
                f"--values: criterion {judging.criterion} compares neighbours and needs {least} values, got "
                f"{len(space.points())}"
            )
        )
    return problems
