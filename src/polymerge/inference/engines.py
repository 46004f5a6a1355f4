"""The table of engines: the programs that run a model. Another one is a row here, and a file in `programs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, did_you_mean
from polymerge.inference.job import AnswerSettings, Job
from polymerge.inference.programs.program_process import program_file, versions_in
from polymerge.planning import Plan

if TYPE_CHECKING:
    from polymerge.inference.answering import Answerer

__all__ = [
    "ENGINES",
    "SEED",
    "Engine",
    "EngineRow",
    "engine_file",
    "engine_problems",
    "engine_versions",
    "open_engine",
]

SEED: Final = 0
"""The seed that engines are started with; decoding is greedy, and draws nothing."""


class Engine(Protocol):
    """A loaded model whose weights can be those of one plan after another."""

    def set(self, plan: Plan) -> dict[str, Any] | None:
        """Set the weights to a plan's; what the engine has to say of them, if anything."""

    def answerer(self, settings: AnswerSettings) -> Answerer:
        """Answers prompts with the weights that are set."""

    def close(self) -> None:
        """End what the engine has started."""


@dataclass(frozen=True)
class EngineRow:
    """An engine.

    place     module and function that opens it for a `Job`
    package   the package that runs in a process of its own, with a file in `programs`; empty for this process
    versions  the packages whose versions are recorded with its answers
    """

    place: str
    package: str = ""
    versions: tuple[str, ...] = ()


_PROCESS: Final = "polymerge.inference.process_engine:ProcessEngine"

ENGINES: Final[Mapping[str, EngineRow]] = {
    "transformers": EngineRow("polymerge.inference.transformers_engine:TransformersEngine"),
    "vllm": EngineRow(_PROCESS, "vllm", ("vllm", "torch", "transformers")),
}


def open_engine(job: Job) -> Engine:
    """Load the model of a job in its engine."""
    module, _, name = ENGINES[job.engine].place.partition(":")
    engine: Engine = getattr(import_module(module), name)(job)
    return engine


def engine_problems(job: Job, workers: int, ray: str | None) -> list[PolymergeError]:
    """What is wrong with the choice of an engine: its name, its environment, or what it cannot be asked for."""
    if job.engine not in ENGINES:
        return [RecipeError(f"engine: there is none called '{job.engine}'.{did_you_mean(job.engine, ENGINES)}")]
    if not ENGINES[job.engine].package:
        return [
            RecipeError(f"{name}: is for an engine in a process of its own, and '{job.engine}' runs in this one")
            for name, said in (("environment", job.environment), ("engine_options", job.engine_options))
            if said
        ]
    found: list[PolymergeError] = []
    if workers > 1 or ray is not None:
        found.append(
            RecipeError(
                f"{'workers' if ray is None else 'ray'}: {job.engine} is one engine, which answers many prompts at "
                "once: raise batch_size. Several GPUs are its own affair, such as tensor_parallel_size=2 in "
                "engine_options"
            )
        )
    if job.device != "cpu":
        found.append(
            RecipeError(
                f"device: '{job.device}': {job.engine} runs on what it was built for. Leave it out; GPUs are chosen by "
                "CUDA_VISIBLE_DEVICES"
            )
        )
    try:
        engine_versions(job.engine, job.environment)
    except PolymergeError as error:
        found.append(error)
    return found


def engine_versions(engine: str, environment: str) -> Mapping[str, str]:
    """The versions of an engine's packages in an environment, without importing them.

    raises MissingExtraError where the engine is not installed there, RecipeError where its Python does not run.
    """
    row = ENGINES[engine]
    found = versions_in(environment, row.versions)
    if row.package not in found:
        where = f"in {environment}" if environment else "here"
        raise MissingExtraError(
            f"engine {engine}: {row.package} is not installed {where}. pip install 'polymerge[{engine}]', or install "
            "it in an environment of its own and name that with environment"
        )
    return found


def engine_file(engine: str) -> Path:
    """The file that runs in the engine's environment."""
    return program_file(f"{engine}_host.py")
