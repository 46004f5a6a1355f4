"""What a run does, seed by seed: models, then experiments, as many at a time as there are cores, each of them once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from course import Course
from into_vlm import into_vlm
from layers import in_layers
from models import STAGES
from one_task_each import adapters, finetunes
from schedules import schedules
from sizes import Size, sized
from two_families import two_families

__all__ = ["EXPERIMENTS", "Job", "needed", "read_results", "result_file", "run_all"]

Rows = list[dict[str, Any]]

EXPERIMENTS: Mapping[str, tuple[Callable[[Course, Size, Path, Path], Rows], tuple[str, ...]]] = {
    "into_vlm": (into_vlm, ("llava",)),
    "layers": (in_layers, ("llava",)),
    "two_families": (two_families, ("llava", "deepseek")),
    "adapters": (adapters, ("adapters, common start", "adapters, own starts")),
    "finetunes": (finetunes, ("full fine-tunes",)),
    "schedules": (schedules, ("llava",)),
}
"""Each a function from the models of a seed to rows, by name, with what is to be trained before."""


@dataclass(frozen=True)
class Job:
    """A stage of training or an experiment, of a seed."""

    name: str
    seed: int

    @property
    def needs(self) -> tuple[Job, ...]:
        """What is to be done before."""
        table: Mapping[str, tuple[Any, tuple[str, ...]]] = {**STAGES, **EXPERIMENTS}
        return tuple(Job(name, self.seed) for name in table[self.name][1])


def result_file(results: Path, job: Job) -> Path:
    """Where the rows of an experiment are kept."""
    return results / f"{job.name}-{job.seed}.json"


def needed(experiments: Iterable[str], seeds: Iterable[int]) -> list[Job]:
    """Experiments and what they need, what is needed before what needs it, seed by seed."""
    found: dict[Job, None] = {}

    def add(job: Job) -> None:
        for one in job.needs:
            add(one)
        found[job] = None

    names = list(experiments)
    for seed in seeds:
        for name in names:
            add(Job(name, seed))
    return list(found)


def run_all(wanted: Sequence[Job], data: Path, results: Path, size: Size, workers: int) -> None:
    """Do what has not been done, in processes of one thread each.

    raises what a job has raised, once those that run have ended
    """
    done = {job for job in wanted if _is_done(job, data, results, size)}
    # models that only finished experiments need are not trained again
    open_experiments = [job for job in wanted if job.name in EXPERIMENTS and job not in done]
    asked = {need for job in open_experiments for need in needed([job.name], [job.seed])}
    left = [job for job in wanted if job in asked and job not in done]
    if workers == 1:  # in this process, which has imported everything
        for job in left:
            _say(job, _do(job, data, results, size.name))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[float], Job] = {}
        while left or running:
            for job in [one for one in left if all(need in done for need in one.needs)]:
                left.remove(job)
                running[pool.submit(_do, job, data, results, size.name)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                _say(job, future.result())
                done.add(job)


def _say(job: Job, seconds: float) -> None:
    print(f"{job.name}, seed {job.seed}: {seconds:.0f} s of processor time", file=sys.stderr, flush=True)


def _do(job: Job, data: Path, results: Path, size_name: str) -> float:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    size, course = sized[size_name], Course(job.seed)
    folder = data / size.digest / str(job.seed)
    started = time.process_time()
    if job.name in STAGES:
        folder.mkdir(parents=True, exist_ok=True)
        STAGES[job.name][0](course, size, folder)
        taken = time.process_time() - started
        _write(_mark(job, data, size), {"cpu seconds": round(taken, 1)})
        return taken
    work = folder / "runs" / job.name
    work.mkdir(parents=True, exist_ok=True)
    rows = EXPERIMENTS[job.name][0](course, size, folder, work)
    taken = time.process_time() - started
    trained = {stage.name: _read(_mark(stage, data, size))["cpu seconds"] for stage in needed([job.name], [job.seed])
               if stage.name in STAGES}  # fmt: skip
    about = {
        "experiment": job.name, "seed": job.seed, "size": size.name, "digest": size.digest,
        "cpu seconds": {**trained, job.name: round(taken, 1)}, "commit": _commit(),
        "versions": {name: version(name) for name in ("polymerge", "torch", "transformers", "peft")},
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    _write(result_file(results, job), {"about": about, "rows": rows})
    shutil.rmtree(work)
    return taken


def read_results(
    results: Path, seeds: Iterable[int], size: Size
) -> tuple[dict[str, dict[int, Rows]], dict[str, list[float]], set[str]]:
    """What is kept: rows by experiment and seed, seconds of processor time by stage, one for each seed, and commits."""
    rows: dict[str, dict[int, Rows]] = {}
    commits = set()
    spent: dict[str, dict[int, float]] = {}
    for job in (Job(name, seed) for name in EXPERIMENTS for seed in seeds):
        if _is_done(job, results, results, size):
            found = _read(result_file(results, job))
            rows.setdefault(job.name, {})[job.seed] = found["rows"]
            commits.add(found["about"]["commit"])
            for part, seconds in found["about"]["cpu seconds"].items():
                spent.setdefault(part, {})[job.seed] = seconds
    return rows, {part: list(by_seed.values()) for part, by_seed in spent.items()}, commits


def _commit() -> str:
    """The commit that runs, and whether anything differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', '--short=12', 'HEAD') or 'unknown'}{', with changes' if changed else ''}"


def _is_done(job: Job, data: Path, results: Path, size: Size) -> bool:
    if job.name in STAGES:
        return _mark(job, data, size).is_file()
    file = result_file(results, job)
    return file.is_file() and _read(file)["about"]["digest"] == size.digest


def _mark(job: Job, data: Path, size: Size) -> Path:
    """The file that says that a stage is trained."""
    return data / size.digest / str(job.seed) / f"{job.name}.json"


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file at once, so that a run that is cut short leaves none that is half written."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    rows = content.get("rows")
    if rows is None:
        text = json.dumps(content)
    else:
        text = f'{{"about": {json.dumps(content["about"])},\n"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
