"""Let every candidate answer every prompt, batch by batch, each written down as soon as it is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from polymerge.inference.answering import batches
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run
from polymerge.inference.workers import Crew
from polymerge.planning import Plan

__all__ = ["Asked", "generate"]

Answers = Mapping[int | str, str]


@dataclass(frozen=True)
class Asked:
    """Prompts in batches, always of the same prompts: a model's numbers depend in the last bits on what is beside."""

    prompts: tuple[Prompt, ...]
    size: int
    batches: tuple[tuple[Prompt, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(batches(self.prompts, self.size)))


@dataclass
class _Task:
    """A candidate in a worker's hands: what it is still to be asked."""

    name: str
    plan: Plan
    left: deque[tuple[Prompt, ...]]


def generate(
    run: Run,
    plans: Mapping[str, Plan],
    asked: Asked,
    crew: Callable[[], Crew],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
    """All candidates' answers: those that the run has, and the rest generated now.

    plans     the candidates by name
    crew      called for the workers when there is something to generate, and not before
    progress  told how many answers there are, and how many there will be
    """
    waiting: deque[_Task] = deque()
    done = 0
    for name, plan in plans.items():
        left = _unanswered(run, name, asked)
        done += len(asked.prompts) - sum(map(len, left))
        if left:
            waiting.append(_Task(name, plan, deque(left)))
    if waiting:
        tell = progress or (lambda _done, _total: None)
        _carry_out(run, waiting, crew(), done, len(plans) * len(asked.prompts), tell)
    return {name: run.log(name).read() for name in plans}


def _unanswered(run: Run, candidate: str, asked: Asked) -> list[tuple[Prompt, ...]]:
    """The batches that a candidate has not answered in full."""
    had = run.log(candidate).read()
    return [batch for batch in asked.batches if any(prompt.id not in had for prompt in batch)]


def _carry_out(
    run: Run,
    waiting: deque[_Task],
    crew: Crew,
    done: int,
    total: int,
    progress: Callable[[int, int], None],
) -> None:
    """Each worker takes a candidate, answers its batches one by one, and takes the next."""
    idle = list(range(crew.count))
    busy: dict[Future[Any], tuple[int, _Task, tuple[Prompt, ...] | None]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker, task = idle.pop(0), waiting.popleft()
                busy[crew.take(worker, task.plan)] = (worker, task, None)
            finished, _ = wait(busy, return_when=FIRST_COMPLETED)
            for future in finished:
                worker, task, batch = busy.pop(future)
                result = future.result()
                if batch is not None:
                    run.log(task.name).append(
                        [(prompt.id, answer) for prompt, answer in zip(batch, result, strict=True)]
                    )
                    done += len(batch)
                    progress(done, total)
                if task.left:
                    following = task.left.popleft()
                    busy[crew.answer(worker, following)] = (worker, task, following)
                else:
                    idle.append(worker)
    finally:
        for future in busy:
            future.cancel()
