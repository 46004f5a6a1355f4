"""Ask every exam's questions, each batch by whichever worker is free, and write its answers down at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from polymerge.evaluation.prompted_tasks import Exam
from polymerge.inference.answering import batches
from polymerge.inference.attempts import Attempt
from polymerge.inference.prompt import Prompt
from polymerge.inference.run_folder import Run
from polymerge.inference.workers import Crew
from polymerge.planning import Plan

__all__ = ["Failures", "ask"]

Failures = dict[str, dict[int | str, str]]
"""By exam, why a question has no answer."""

_Batch = tuple[Exam, tuple[Prompt, ...]]


def ask(
    run: Run,
    exams: Sequence[Exam],
    size: int,
    plan: Plan | None,
    crew: Callable[[], Crew],
    progress: Callable[[int, int], None] | None = None,
) -> Failures:
    """Have all questions answered: those that the run has, and the rest now; returns why some cannot be.

    A batch of which something is missing is asked again as a whole, since a model's numbers depend in the last bits on
    what is beside; a question that failed is thereby tried again whenever the run goes on.

    size      of a batch
    plan      what workers take before the first batch; None where the checkpoint is asked as it is
    crew      called for the workers when there is something to ask, and not before
    progress  told how many questions are done, and how many there are
    """
    failures: Failures = {exam.name: {} for exam in exams}
    had = {exam.name: set(run.log(exam.name).read()) for exam in exams}
    every = [(exam, batch) for exam in exams for batch in batches(exam.prompts, size)]
    waiting = deque(one for one in every if any(prompt.id not in had[one[0].name] for prompt in one[1]))
    total = sum(len(exam.prompts) for exam in exams)
    done = total - sum(len(batch) for _, batch in waiting)

    def write(exam: Exam, batch: Sequence[Prompt], attempts: Sequence[Attempt]) -> None:
        nonlocal done
        given = [(prompt.id, answer, why) for prompt, (answer, why) in zip(batch, attempts, strict=True)]
        run.log(exam.name).append(
            [(name, answer) for name, answer, _ in given if answer is not None and name not in had[exam.name]]
        )
        failures[exam.name] |= {
            name: why for name, answer, why in given if answer is None and name not in had[exam.name]
        }
        done += len(batch)
        if progress is not None:
            progress(done, total)

    if waiting:
        _carry_out(waiting, plan, crew(), write)
    return failures


def _carry_out(
    waiting: deque[_Batch],
    plan: Plan | None,
    crew: Crew,
    write: Callable[[Exam, Sequence[Prompt], Sequence[Attempt]], None],
) -> None:
    """Each worker takes the model, and then one batch after the other."""
    busy: dict[Future[Any], tuple[int, _Batch | None]] = {
        crew.take(worker, plan): (worker, None) for worker in range(min(crew.count, len(waiting)))
    }
    try:
        while busy:
            finished, _ = wait(busy, return_when=FIRST_COMPLETED)
            for future in finished:
                worker, asked = busy.pop(future)
                result = future.result()
                if asked is not None:
                    write(*asked, result)
                if waiting:
                    exam, batch = waiting.popleft()
                    busy[crew.attempt(worker, batch, exam.how)] = (worker, (exam, batch))
    finally:
        for future in busy:
            future.cancel()
