"""Generate the answers of every plan's model to every prompt, batch by batch, saving each answer at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.loading import DTYPES, PROCESSOR_FILES, load_processor
from polymerge.checkpoints.needed_packages import torchvision_fault
from polymerge.engine.device import open_device
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, did_you_mean
from polymerge.inference.answering import batches
from polymerge.inference.engines import ENGINES, SEED, engine_problems, engine_versions
from polymerge.inference.job import Job
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run
from polymerge.inference.worker import Worker
from polymerge.inference.worker_pool import Call, WorkerPool
from polymerge.planning import Plan

__all__ = ["WEIGHTS", "Batches", "Generation", "generate"]

WEIGHTS: Final = "weights.json"
"""What an engine of its own process said of the weights that were put into it, in the folder of a candidate."""

_MOST: Final = {"max_new_tokens": 1_000_000, "batch_size": 1_000_000, "workers": 1024, "torch_threads": 1024}

Batch = tuple[Prompt, ...]
Answers = Mapping[int | str, str]


@dataclass(frozen=True)
class Generation:
    """How to generate answers: greedily, in batches, with one or more workers.

    dtype          auto (as the template's weights are) or a torch dtype
    workers        processes, or actors if `ray` is set: `local`, or the address of a cluster
    torch_threads  of each worker; by default the processors are divided among them
    engine         a row of the table of engines: transformers, or vllm, which runs in a process of its own
    environment    the virtual environment in which such an engine is installed; by default the current one
    engine_options further arguments of such an engine, by name: those of `vllm.LLM`, such as tensor_parallel_size
    """

    max_new_tokens: int = 16
    batch_size: int = 16
    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 1
    ray: str | None = None
    torch_threads: int | None = None
    trust_remote_code: bool = False
    engine: str = "transformers"
    environment: str | os.PathLike[str] | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    def problems(self) -> list[PolymergeError]:
        """Errors in these settings."""
        found: list[PolymergeError] = [
            RecipeError(f"{name}: {value} is {'too few' if value < 1 else f'more than {most}'}")
            for name, most in _MOST.items()
            if (value := getattr(self, name)) is not None and not 1 <= value <= most
        ]
        local = self.engine in ENGINES and not ENGINES[self.engine].package
        if local and self.ray is None:  # the machines of a cluster have their own
            try:
                open_device(self.device)
            except PolymergeError as error:
                found.append(error)
        if self.dtype not in DTYPES:
            found.append(RecipeError(f"dtype: '{self.dtype}'.{did_you_mean(self.dtype, DTYPES)}"))
        return found + engine_problems(self._job(None, ""), self.workers, self.ray)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that answers depend on, which excludes the number and place of workers."""
        own = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        if not ENGINES[self.engine].package:
            return own | {"device": self.device.partition(":")[0], "dtype": self.dtype}
        versions = engine_versions(self.engine, os.fspath(self.environment or ""))
        engine = {"name": self.engine, "versions": dict(versions), "seed": SEED, "options": dict(self.engine_options)}
        return own | {"engine": engine, "dtype": self.dtype}

    def worker_pool(self, plan: Plan | None, folder: str = "") -> WorkerPool:
        """The pool of workers.

        plan    whose models they load; None to load the checkpoint in `folder`

        raises MissingExtraError where a package is missing that the processor needs: before any model is loaded.
        """
        where = Path(folder if plan is None else plan.inputs[plan.template].path)
        if self.ray is None and any((where / name).is_file() for name in PROCESSOR_FILES) and torchvision_fault():
            with suppress(CheckpointError):  # an adapter may bring another processor
                load_processor(where, trust_remote_code=self.trust_remote_code)
        return WorkerPool(self._job(plan, folder), self.workers, self.ray)

    def _job(self, plan: Plan | None, folder: str) -> Job:
        threads = self.torch_threads
        if threads is None and (self.workers > 1 or self.ray is not None):
            threads = max(1, (os.cpu_count() or 1) // self.workers)
        return Job(
            plan, folder, self.device, self.dtype, self.max_new_tokens, threads, threads, self.trust_remote_code,
            engine=self.engine, environment=os.fspath(self.environment or ""), engine_options=dict(self.engine_options),
        )  # fmt: skip


@dataclass(frozen=True)
class Batches:
    """Prompts in fixed batches: the last bits of a model's numbers depend on the rest of the batch.

    first  number of prompts that are in batches of their own, as if they had been asked alone
    """

    prompts: tuple[Prompt, ...]
    size: int
    batches: tuple[Batch, ...] = field(init=False)
    first: int = 0

    def __post_init__(self) -> None:
        parts = (self.prompts[: self.first], self.prompts[self.first :])
        object.__setattr__(self, "batches", tuple(batch for part in parts for batch in batches(part, self.size)))


def generate(
    run: Run,
    plans: Mapping[str, Plan],
    asked: Batches,
    pool: WorkerPool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
    """The answers of all plans' models: those already in the run, with the missing ones generated now.

    Each worker takes a plan, answers its batches one by one, and takes the next plan.

    plans     by the name under which the run stores the answers
    progress  called with the number of answers done, and the total
    """
    missing = {name: _unanswered(run, name, asked) for name in plans}
    total = len(plans) * len(asked.prompts)
    done = total - sum(len(batch) for own in missing.values() for batch in own)
    streams = (_calls(name, plans[name], own) for name, own in missing.items() if own)
    for (name, batch), answers in pool.run(streams):
        if not batch and answers is not None:
            run.write_part(name, WEIGHTS, answers)
        if batch:
            run.log(name).append(zip((prompt.id for prompt in batch), answers, strict=True))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return {name: run.log(name).read() for name in plans}


def _unanswered(run: Run, name: str, asked: Batches) -> list[Batch]:
    """The batches for which a plan's model lacks answers."""
    had = run.log(name).read()
    return [batch for batch in asked.batches if any(prompt.id not in had for prompt in batch)]


def _calls(name: str, plan: Plan, own: list[Batch]) -> Iterator[tuple[tuple[str, Batch], Call]]:
    yield (name, ()), partial(Worker.take, plan=plan)
    for batch in own:
        yield (name, batch), partial(Worker.answer, batch=batch)
