"""A worker: loads a model, applies one plan after another, and answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polymerge.inference.prompt_records import Prompt
from polymerge.methods.own import MethodsFile, added
from polymerge.planning import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from polymerge.inference.answering import Answerer, Attempt
    from polymerge.inference.live import LiveModel

__all__ = ["AnswerSettings", "Job", "Worker"]


@dataclass(frozen=True)
class AnswerSettings:
    """How prompts are processed.

    square  images are padded to squares first, with the processor's mean colour
    """

    max_new_tokens: int
    square: bool = False


@dataclass(frozen=True)
class Job:
    """What every worker needs at the start.

    plan            any of the plans to come, whose models are loaded; None to use the checkpoint in `folder` as it is
    torch_threads   of one worker; None for torch's own choice
    merge_threads   of one worker, for merging
    methods         files of the user's own methods, as they are known where the job is made
    """

    plan: Plan | None
    folder: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 16
    torch_threads: int | None = None
    merge_threads: int | None = None
    trust_remote_code: bool = False
    methods: tuple[MethodsFile, ...] = field(default_factory=added)


class Worker:
    """A model that applies one plan after another, and answers prompts.

    It is loaded on the first request, so that errors reach the caller.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._answerers: dict[AnswerSettings, Answerer] = {}

    @cached_property
    def _loaded(self) -> tuple[LiveModel | None, Any, Any]:
        """The live model, if there is a plan; the model and its processor."""
        import torch

        from polymerge.checkpoints.loading import load_model, load_processor

        job, live = self._job, None
        for file in job.methods:
            file.add()
        how: dict[str, Any] = {
            "device": job.device, "dtype": job.dtype, "trust_remote_code": job.trust_remote_code,
        }  # fmt: skip
        if job.torch_threads is not None:
            torch.set_num_threads(job.torch_threads)
        if job.plan is None:
            folder: str | Path = job.folder
            model = load_model(folder, **how)
        else:
            from polymerge.inference.live import LiveModel

            live = LiveModel(job.plan, threads=job.merge_threads, **how)
            folder, model = live.processor_folder, live.model
        return live, model, load_processor(folder, trust_remote_code=job.trust_remote_code)

    def take(self, plan: Plan | None) -> None:
        """Apply a plan; None keeps the weights as loaded."""
        live, _, _ = self._loaded
        self._answerer()  # so that a model that cannot be asked is found out now
        if plan is not None:
            assert live is not None
            live.set(plan)

    def answer(self, batch: Sequence[Prompt]) -> list[str]:
        """Answer a batch with the current weights."""
        return self._answerer().answer(batch)

    def attempt(self, batch: Sequence[Prompt], settings: AnswerSettings) -> list[Attempt]:
        """Answer a batch; failures are returned in place of answers."""
        from polymerge.inference.answering import attempt

        return attempt(self._answerer(settings), batch)

    def _answerer(self, settings: AnswerSettings | None = None) -> Answerer:
        from polymerge.inference.answering import Answerer
        from polymerge.inference.images import SquareImages

        settings = settings or AnswerSettings(self._job.max_new_tokens)
        if settings not in self._answerers:
            _, model, processor = self._loaded
            given = SquareImages(processor) if settings.square else processor
            self._answerers[settings] = Answerer(model, given, max_new_tokens=settings.max_new_tokens)
        return self._answerers[settings]
