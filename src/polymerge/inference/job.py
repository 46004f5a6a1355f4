"""What a worker is told: the model, the engine that runs it, and how prompts are processed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polymerge.methods.own import MethodsFile, added
from polymerge.planning import Plan

__all__ = ["AnswerSettings", "Job"]


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
    engine          a row of the table of engines
    environment     the environment in which an engine of its own process is installed; empty for the current one
    engine_options  further arguments of the engine
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
    engine: str = "transformers"
    environment: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
