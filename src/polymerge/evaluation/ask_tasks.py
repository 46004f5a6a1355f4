"""Ask every exam's questions, each batch by whichever worker is free, and write its answers down at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from polymerge.evaluation.prompted_tasks import Exam
from polymerge.inference.answering import Attempt, batches
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run
from polymerge.inference.worker import Worker
from polymerge.inference.worker_pool import Call, WorkerPool
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
    pool: WorkerPool,
    progress: Callable[[int, int], None] | None = None,
) -> Failures:
    """Have all questions answered: those that the run has, and the rest now; returns why some cannot be.

    A batch of which something is missing is asked again as a whole, since a model's numbers depend in the last bits on
    what is beside; a question that failed is thereby tried again whenever the run goes on.

    size      of a batch
    plan      what workers take before the first batch; None where the checkpoint is asked as it is
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
        streams = (_calls(waiting, plan) for _ in range(min(pool.count, len(waiting))))
        for asked, attempts in pool.run(streams):
            if asked is not None:
                write(*asked, attempts)
    return failures


def _calls(waiting: deque[_Batch], plan: Plan | None) -> Iterator[tuple[_Batch | None, Call]]:
    """What a worker does: take the model, and then one batch after the other, of those that no other has taken."""
    yield None, partial(Worker.take, plan=plan)
    while waiting:
        exam, batch = waiting.popleft()
        yield (exam, batch), partial(Worker.attempt, batch=batch, settings=exam.how)
