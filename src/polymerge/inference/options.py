"""What a model is asked and how it answers: where prompts are, and how answers are generated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache

from polymerge.checkpoints.loading import DTYPES
from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.inference.prompts import Prompt, check_images, read_prompts
from polymerge.inference.sampling import draw
from polymerge.inference.workers import Crew, Job, hire
from polymerge.planning import Plan

__all__ = ["Generation", "PromptSource", "draw_prompts"]


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
    def crew(self, plan: Plan | None, folder: str = "") -> Iterator[Callable[[], Crew]]:
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
