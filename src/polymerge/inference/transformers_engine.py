"""The engine that runs a model by transformers, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polymerge.checkpoints.loading import load_model, load_processor
from polymerge.inference.answering import Answerer
from polymerge.inference.images import SquareImages
from polymerge.inference.job import AnswerSettings, Job
from polymerge.inference.live import LiveModel
from polymerge.planning import Plan

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """A model loaded by transformers; plans are applied to it in place."""

    def __init__(self, job: Job) -> None:
        how: dict[str, Any] = {
            "device": job.device, "dtype": job.dtype, "trust_remote_code": job.trust_remote_code,
        }  # fmt: skip
        if job.torch_threads is not None:
            torch.set_num_threads(job.torch_threads)
        self._live = None if job.plan is None else LiveModel(job.plan, threads=job.merge_threads, **how)
        folder: str | Path = job.folder if self._live is None else self._live.processor_folder
        self._model = load_model(folder, **how) if self._live is None else self._live.model
        self._processor = load_processor(folder, trust_remote_code=job.trust_remote_code)

    def set(self, plan: Plan) -> None:
        """Set the weights to a plan's."""
        assert self._live is not None
        self._live.set(plan)

    def answerer(self, settings: AnswerSettings) -> Answerer:
        """Answers prompts with the weights that are set."""
        processor = SquareImages(self._processor) if settings.square else self._processor
        return Answerer(self._model, processor, max_new_tokens=settings.max_new_tokens)

    def close(self) -> None:
        """Release threads and files of merges."""
        if self._live is not None:
            self._live.close()
