"""Evaluate a checkpoint with lmms-eval, lm-eval or VLMEvalKit: build the command, run it, convert its results."""

from __future__ import annotations

import codecs
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from polymerge.checkpoints.files import read_config
from polymerge.checkpoints.json_objects import read_json
from polymerge.durable import write_file
from polymerge.errors import MissingExtraError, OutputError, PolymergeError, RecipeError, Refused
from polymerge.evaluation.evaluated_model import EvaluatedModel, evaluated_model
from polymerge.evaluation.harness import lm_eval as lmeval
from polymerge.evaluation.harness import lmms_eval as lmmseval
from polymerge.evaluation.harness import vlmevalkit
from polymerge.evaluation.harness.registered_classes import wrapper_of
from polymerge.evaluation.results import FILE, Results, TaskResult
from polymerge.inference.run_folder import Run, alone_in, open_run
from polymerge.paths import exists, given_path, python_in

__all__ = ["Ended", "ToolJob", "plan_tool", "run_tool"]

_ALONE: Final[Mapping[str, str]] = {"PYTHONSAFEPATH": "1", "LMMS_EVAL_USE_CACHE": "False"}
"""With the first, Python does not look for modules in the current folder; before 3.11 an empty one has to do. Without
the second, lmms-eval before 0.7 takes answers of whatever model lay at the same path.
"""

_TASKS: Final = "tasks"
_MISSING: Final = "missing"

_MODULES = {"lmms-eval": "lmms_eval", "lm-eval": "lm_eval"}
"""The modules of the tools that are packages; VLMEvalKit is a clone."""
_PACKAGES = {"lmms-eval": "lmms-eval", "lm-eval": "'lm-eval[hf]'"}


@dataclass(frozen=True)
class ToolJob:
    """A tool's command, ready to run.

    run      the folder of the run
    reuse    what makes the command take answers that an unfinished run of it has left
    files    to be written first
    links    to be created first, each with its target: a folder name that the tool understands
    given    the absolute paths in the command, each as it was given
    read     reads the tool's results by task, and says what is missing, given the files that existed before it ran
    """

    tool: str
    command: tuple[str, ...]
    run: Path
    asked: EvaluatedModel
    tasks: tuple[str, ...]
    read: Callable[[set[Path]], tuple[dict[str, TaskResult], list[PolymergeError]]]
    force: bool = False
    reuse: tuple[str, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)
    links: Mapping[Path, Path] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)

    def as_given(self) -> list[str]:
        """The command without its Python, with paths as they were given: results are published."""
        words = list(self.command[1:])
        for path in sorted(self.given, key=len, reverse=True):
            words = [word.replace(path, self.given[path]) for word in words]
        return words

    def printed(self) -> str:
        """Format the command, and everything it needs, for pasting into a shell."""
        made = {path.parent for path in (*self.files, *self.links)}
        lines = [f"mkdir -p {shlex.join(map(str, sorted(made)))}"] if made else []
        lines += [f"ln -sfn {shlex.join([str(target), str(link)])}" for link, target in self.links.items()]
        lines += [f"cat > {shlex.quote(str(file))} <<'END'\n{text}END" for file, text in self.files.items()]
        command = shlex.join(self.command)
        if self.place is None:
            said = " ".join(f"{name}={value}" for name, value in _ALONE.items())
            command = f'(cd "$(mktemp -d)" && {said} {command})'
        return "\n".join([*lines, command])

    @property
    def place(self) -> Path | None:
        """The folder to run in: the clone of VLMEvalKit; None for an empty one, where lmms-eval finds no modules."""
        return Path(self.command[1]).parent if self.tool == "vlmevalkit" else None


def plan_tool(
    tool: str,
    model: str,
    tasks: Sequence[str],
    out: Path,
    *,
    name: str | None = None,
    environment: str | None = None,
    kit: str | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
    force: bool = False,
) -> ToolJob:
    """Build the command with which a tool evaluates a checkpoint.

    environment  the tool's virtual environment, or its Python; by default the current one
    kit          the clone of VLMEvalKit that contains run.py
    more         additional options of the tool

    raises RecipeError if the tool has no model for the family, or the checkpoint is not a single folder.
    """
    asked = evaluated_model(model, name)
    if asked.plan is not None:
        raise RecipeError(
            f"{model}: {tool} reads a checkpoint from its folder. Make one with `polymerge fold`, and evaluate that"
        )
    if not tasks:
        raise RecipeError("tasks: names none")
    if kit is not None and tool != "vlmevalkit":
        raise RecipeError(f"kit says nothing to {tool}")
    config = read_config(asked.folder / "config.json")
    python = python_in(environment)
    run = given_path(out).absolute()
    folder = run / _TASKS / tool
    options = _absolute(more)
    given = {str(run): os.fspath(out), str(asked.folder): model} | dict(zip(options, more, strict=True))
    if tool in _MODULES and any(word.lstrip("-").partition("=")[0] == "use_cache" for word in more):
        raise RecipeError(f"use_cache: {tool} tells models apart by their paths. Leave its cache out")
    if tool == "lm-eval":
        place = lmeval.place(config, asked.folder, run / "models")
        command = lmeval.command(place, tasks, folder, device, batch_size or 1, trust_remote_code)
        return ToolJob(
            tool, (python, *command, *options), run, asked, tuple(tasks),
            lambda before: lmeval.read(folder, tasks, before), force,
            links={} if place == asked.folder else {place: asked.folder},
            given=given | {str(lmeval.SCRIPT): lmeval.SCRIPT.name},
        )  # fmt: skip
    row = wrapper_of(config, tool)
    if tool == "lmms-eval":
        place = lmmseval.place(row, asked.folder, run / "models")
        command = lmmseval.command(row, place, tasks, folder, device, batch_size or 1, trust_remote_code)
        return ToolJob(
            tool, (python, *command, *options), run, asked, tuple(tasks),
            lambda before: lmmseval.read(folder, tasks, before), force,
            links={} if place == asked.folder else {place: asked.folder}, given=given,
        )  # fmt: skip
    if batch_size is not None:
        raise RecipeError("batch_size: VLMEvalKit asks one question at a time. Leave it out")
    place, label = vlmevalkit.place(row, asked.folder, run / "models"), vlmevalkit.label(asked.name)
    settings = run / "vlmevalkit.json"
    script = str(given_path(kit).absolute() / "run.py") if kit is not None else "run.py"
    if kit is not None and not Path(script).is_file():
        raise RecipeError(f"kit {kit}: has no run.py. Give the clone of VLMEvalKit")
    names = vlmevalkit.datasets(tasks)
    return ToolJob(
        tool, (python, script, *vlmevalkit.command(settings, folder), *options), run, asked, tuple(names),
        lambda before: vlmevalkit.read(folder / label, label, list(names), before, run / f"{tool}.log"), force,
        (vlmevalkit.REUSE,), {settings: vlmevalkit.config(row, label, place, names)},
        {} if place == asked.folder else {place: asked.folder}, given | {script: "run.py"},
    )  # fmt: skip


class Ended(NamedTuple):
    """What a tool's run came to: its results, and why others are missing."""

    results: Results
    missing: list[PolymergeError]


def run_tool(job: ToolJob, show: Callable[[str], None]) -> Ended:
    """Run the command, show its output as it is printed, and write its results as RUN/results.json.

    Scores of some tasks are kept where those of others are missing. Then the next run of the same command goes on with
    the tool's own files; a run that has all is not made again, but its files are read again.

    raises OutputError if the tool fails or writes no results at all, MissingExtraError if it is not installed,
    RecipeError if the folder holds results of another model or command, unless `force`.
    """
    _check_installed(job)
    settings = {"kind": f"evaluation by {job.tool}", "model": job.asked.identity(), "command": list(job.command)}
    run = open_run(job.run, settings, force=job.force, what="an evaluation", parts=_TASKS, outcome=(FILE,))
    job.asked.fetch()
    with alone_in(run):
        return _run_alone(job, run, show)


def _run_alone(job: ToolJob, run: Run, show: Callable[[str], None]) -> Ended:
    folder = run.part(job.tool)
    log = run.folder / f"{job.tool}.log"
    if job.force:
        shutil.rmtree(folder)
        (run.folder / FILE).unlink(missing_ok=True)
    elif _has_all(run.folder / FILE):
        show(f"{run.folder}: the run has ended, and is read again\n")
        return _read(job, run, log, set())
    before = {path for path in folder.rglob("*") if path.is_file()}
    for link, target in job.links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    for file, text in job.files.items():
        write_file(file, text)
    place = job.place or _empty(run.folder)
    # only what this very run has left may be taken: its settings say of which model and command that is
    status = _stream((*job.command, *(job.reuse if before else ())), log, show, place, job.place is not None)
    if job.place is None:
        with suppress(OSError):  # it has written something there
            place.rmdir()
    return _read(job, run, log, before, status)


def _has_all(file: Path) -> bool:
    """Whether a run has written results, and none was missing."""
    return file.is_file() and not read_json(file, dict[str, Any]).get("settings", {}).get(_MISSING)


def _read(job: ToolJob, run: Run, log: Path, before: set[Path], status: int = 0) -> Ended:
    """Read what the tool wrote, and write the run's results; raises OutputError or Refused if there are none."""
    tasks, missing = job.read(before)
    if status != 0:
        missing = [OutputError(f"{job.tool} ended with exit status {status}. What it said is above and in {log}")]
    if not tasks:
        if status == 0:
            missing.append(OutputError(f"{job.tool}: what it said is above and in {log}"))
        raise Refused(missing)
    settings = {"command": job.as_given()} | ({_MISSING: [str(one) for one in missing]} if missing else {})
    results = Results(job.tool, job.asked.described(), tasks, settings)
    run.write_json(FILE, results.to_json())
    return Ended(results, missing)


def _check_installed(job: ToolJob) -> None:
    here = job.command[0] == sys.executable
    if job.tool == "vlmevalkit" and job.command[1] == "run.py":
        raise RecipeError("VLMEvalKit runs from its clone: say where it is with `kit`")
    if job.tool in _MODULES and here and importlib.util.find_spec(_MODULES[job.tool]) is None:
        raise MissingExtraError(
            f"{job.tool} is not installed here: pip install {_PACKAGES[job.tool]}, or name its own environment with "
            "`environment`"
        )


def _absolute(words: Sequence[str]) -> list[str]:
    """Words of the tool's options, in which paths of what exists here are absolute: the tool runs elsewhere."""
    return [_absolute_word(word, option) for option, word in zip(("", *words), words, strict=False)]


def _absolute_word(word: str, option: str) -> str:
    """A word, given the one before it: a name alone is a path if the option says so."""
    name, equals, value = word.rpartition("=")
    is_path = os.sep in value or (name or option).endswith(("path", "dir", "file"))
    return f"{name}{equals}{os.path.abspath(value)}" if is_path and exists(value) else word  # noqa: PTH100


def _empty(run: Path) -> Path:
    """A new folder in that of a run, for what the tool writes where it is started."""
    places = (run / f"work-{number}" for number in itertools.count(1))
    place = next(place for place in places if not os.path.lexists(place))
    place.mkdir()
    return place


def _environment(kit: bool) -> dict[str, str]:
    """The variables of a tool, which looks for modules neither where it is started nor in relative folders.

    kit  it is VLMEvalKit, whose modules lie beside its script
    """
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # noqa: PTH100
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return found if kit else {**found, **_ALONE}


def _stream(command: Sequence[str], log: Path, show: Callable[[str], None], place: Path, kit: bool) -> int:
    """Run a command; its output is shown and logged as it arrives, progress bars included. Returns the exit status."""
    decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")
    with (
        log.open("wb") as kept,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(kit),
            cwd=place,
        ) as tool,
    ):
        assert tool.stdout is not None
        try:
            while data := os.read(tool.stdout.fileno(), 65536):
                kept.write(data)
                show(decoder.decode(data))
        except BaseException:
            tool.terminate()
            raise
    return tool.returncode
