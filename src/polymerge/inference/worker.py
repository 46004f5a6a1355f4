"""A worker: loads a model, applies one plan after another, and answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polymerge.inference.engines import Engine, open_engine
from polymerge.inference.job import AnswerSettings, Job
from polymerge.inference.prompt_records import Prompt
from polymerge.planning import Plan

if TYPE_CHECKING:
    from polymerge.inference.answering import Answerer, Attempt

__all__ = ["Worker"]


class Worker:
    """A model that applies one plan after another, and answers prompts; which engine runs it, it does not know.

    It is loaded on the first request, so that errors reach the caller.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._answerers: dict[AnswerSettings, Answerer] = {}

    @cached_property
    def _engine(self) -> Engine:
        for file in self._job.methods:
            file.add()
        return open_engine(self._job)

    def take(self, plan: Plan | None) -> dict[str, Any] | None:
        """Apply a plan; None keeps the weights as loaded. Returns what the engine has to say of them, if anything."""
        self._answerer()  # so that a model that cannot be asked is found out now
        return None if plan is None else self._engine.set(plan)

    def answer(self, batch: Sequence[Prompt]) -> list[str]:
        """Answer a batch with the current weights."""
        return self._answerer().answer(batch)

    def attempt(self, batch: Sequence[Prompt], settings: AnswerSettings) -> list[Attempt]:
        """Answer a batch; failures are returned in place of answers."""
        from polymerge.inference.answering import attempt

        return attempt(self._answerer(settings), batch)

    def close(self) -> None:
        """End an engine that has a process of its own."""
        if (engine := vars(self).pop("_engine", None)) is not None:
            engine.close()

    def _answerer(self, settings: AnswerSettings | None = None) -> Answerer:
        settings = settings or AnswerSettings(self._job.max_new_tokens)
        if settings not in self._answerers:
            self._answerers[settings] = self._engine.answerer(settings)
        return self._answerers[settings]
