"""evaluate, compare and score: measure models, and compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import FOLDER, MODEL, PATH, argument, option
from polymerge.cli.progress import progress_bar
from polymerge.cli.shared_options import AS_JSON, FORCE_RUN, SCORER, generation_of, generation_options, run_folder
from polymerge.cli.streams import say, show
from polymerge.errors import RecipeError
from polymerge.paths import given_path

if TYPE_CHECKING:
    from polymerge.evaluation.results import Results
    from polymerge.evaluation.scoring import TaskScore

__all__ = ["compare", "evaluate", "score"]

_TOOLS = ("lmms-eval", "vlmevalkit", "lm-eval")
_FOR_TOOLS = ("kit", "print_command")
_NOT_FOR_TOOLS = (
    "data", "image_folder", "max_new_tokens", "workers", "torch_threads", "ray", "model_dtype", "engine",
    "engine_options",
)  # fmt: skip
_WRITTEN = {"model_dtype": "dtype", "engine_options": "engine-option"}


@click.command(cls=FlagCommand)
@argument("model", type=MODEL)
@argument("more", metavar="[-- OPTIONS OF THE TOOL]", nargs=-1, type=click.UNPROCESSED)
@option(
    "--tasks",
    metavar="TASK,...",
    required=True,
    help="Evaluate on these: mm-mergebench, tasks of it, FILE:SCORER; or the tool's own.",
)
@run_folder()
@option("--data", metavar="DIR", type=FOLDER, help="Find the benchmark's files here, in either published layout.")
@option("--image-folder", metavar="DIR", type=FOLDER, help="Resolve relative image paths against DIR.")
@option("--name", help="Name the model in tables; default: the name of its folder.")
@generation_options(max_new_tokens=None, tools=True)
@FORCE_RUN
@option("--with", "tool", type=click.Choice(_TOOLS), help="Evaluate with this tool (in batches of 1 by default).")
@option("--kit", metavar="PATH", type=PATH, help="Run VLMEvalKit from this clone.")
@option("--print-command", is_flag=True, help="Print the tool's command and run nothing.")
@AS_JSON
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    model: str,
    more: tuple[str, ...],
    tasks: str,
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate MODEL: a checkpoint, a hub id, or BASE+ADAPTER, which is folded in memory.

    Answers are kept as they come, so an interrupted run resumes. A question that cannot be asked or answered is
    listed in errors.jsonl, counted, and wrong.
    """
    words = [word.strip() for word in tasks.split(",") if word.strip()]
    said = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    tool = options["tool"]
    for_tools = _FOR_TOOLS if "engine" in said else (*_FOR_TOOLS, "environment")
    unused = [name for name in (for_tools if tool is None else _NOT_FOR_TOOLS) if name in said]
    option = f"--{_WRITTEN.get(unused[0], unused[0]).replace('_', '-')}" if unused else ""
    if tool is not None:
        if option:
            raise RecipeError(f"{option} says nothing to {tool}; its own options go after --")
    elif option or more:
        what = f"{option} is" if option else f"{' '.join(more)} are"
        raise RecipeError(f"{what} for another tool: say which with --with {' or '.join(_TOOLS)}")
    if out is None:
        raise click.UsageError("Missing option '-o': the folder of the run.")
    if tool is not None:
        if "batch_size" not in said:
            options["batch_size"] = None
        _by_tool(model, words, out, more, as_json, options)
        return
    from polymerge.evaluation.evaluating import evaluate as run

    how = {name: options.pop(name) for name in ("data", "image_folder", "name", "max_new_tokens", "force")}
    with progress_bar("answers", unit="") as progress:
        results = run(model, words, out, generation=generation_of(options), progress=progress, **how)
    _report(results, out, as_json)


def _by_tool(
    model: str, tasks: list[str], out: str, more: tuple[str, ...], as_json: bool, options: Mapping[str, Any]
) -> None:
    from polymerge.evaluation.harness.run import plan_tool, run_tool

    names = ("name", "environment", "kit", "device", "batch_size", "trust_remote_code", "force")
    job = plan_tool(
        options["tool"], model, tasks, given_path(out), more=more, **{name: options[name] for name in names}
    )  # fmt: skip
    if options["print_command"]:
        job.asked.fetch()  # what is printed can be run
        show(job.printed())
        return
    ended = run_tool(job, show=lambda text: say(text, end=""))
    _report(ended.results, out, as_json)
    for problem in ended.missing:
        say(f"missing: {problem}")
    if ended.missing:
        click.get_current_context().exit(1)


def _report(results: Results, out: str, as_json: bool) -> None:
    if as_json:
        show(json.dumps(results.to_json(), indent=1, ensure_ascii=False))
        return
    from polymerge.evaluation.comparison_text import describe_results

    show(describe_results(results))
    show(f"{out}: results.json and every answer")


@click.command(cls=FlagCommand)
@argument("results", nargs=-1, required=True, type=PATH)
@option("--parents", metavar="A,B,...", help="Show gains over the mean of these models, given by name.")
@option("--template", metavar="A", help="Show gains over this model, too, given by name.")
@option("--as-published", is_flag=True, help="Show the published scripts' numbers, which have no intervals.")
@option("--resamples", type=int, default=10_000, show_default=True, help="Draw this many bootstrap resamples.")
@option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the bootstrap.")
@option("-o", "--out", metavar="DIR", type=FOLDER, help="Write Markdown, CSV and a plot to this folder.")
@AS_JSON
def compare(
    results: tuple[str, ...],
    parents: str | None,
    template: str | None,
    as_published: bool,
    resamples: int,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Compare models: RESULTS are results.json files or the folders of runs.

    Models by tasks, with averages over the seen and the unseen tasks of MM-MergeBench. With --parents or --template,
    also what each model gains, with an interval from the paired bootstrap, which shows what is within noise.
    """
    from polymerge.evaluation.comparison import compare_files
    from polymerge.evaluation.comparison_text import plain_text, write_comparison

    named = [one.strip() for one in (parents or "").split(",") if one.strip()]
    compared = compare_files(
        results, parents=named, template=template, published=as_published, resamples=resamples, seed=seed
    )
    show(json.dumps(compared.to_json(), indent=1, ensure_ascii=False) if as_json else plain_text(compared))
    if out is not None:
        files = write_comparison(compared, given_path(out))
        (say if as_json else show)(f"\n{out}: {', '.join(file.name for file in files)}")


@click.command(cls=FlagCommand)
@option("--task", metavar="TASK", help="Score as for this task of MM-MergeBench, such as ScienceQA or REC.")
@SCORER
@option(
    "--predictions",
    metavar="FILE",
    type=PATH,
    required=True,
    help="Score these: one JSON object per line, with question_id and text.",
)
@option(
    "--annotations",
    metavar="DIR",
    type=PATH,
    required=True,
    help="Compare with the task's annotation folder; with --scorer, with a question file that holds the answers.",
)
@option("--as-published", is_flag=True, help="Report the published script's output; fail where it stops.")
@AS_JSON
def score(
    task: str | None, scorer: str | None, predictions: str, annotations: str, as_published: bool, as_json: bool
) -> None:
    """Score predictions against annotations: soundly, and as the benchmark's published script does.

    Where the two differ both are shown. The published scripts count empty answers as right, cut characters off boxes
    or pair by position; they stop on files that can still be scored, and then the reason is given.
    """
    from polymerge.evaluation.scoring import score_predictions, score_questions

    if (task is None) == (scorer is None):
        raise RecipeError("say what to score by: --task TASK or --scorer NAME, one of them")
    if task is not None:
        found = score_predictions(task, predictions, annotations)
    else:
        found = score_questions(str(scorer), predictions, annotations)
    if as_published and found.as_published is None:
        raise RecipeError(f"there is no number as published. {found.reason}")
    if as_json:
        show(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    _show_score(found, as_published)


def _show_score(found: TaskScore, published_first: bool) -> None:
    scores = {"score": found.score, "as published": found.as_published}
    further = {"score": found.metrics, "as published": found.published_metrics}
    if published_first:
        scores, further = dict(reversed(scores.items())), dict(reversed(further.items()))
    first, second = scores.items()
    whole = found.right is not None and float(found.right).is_integer()
    show(f"{found.task}: {found.total} questions" + (f", {found.right:.0f} right" if whole else ""))
    differ = _percent(first[1]) != _percent(second[1])
    for name, value in (first, second) if differ else (first,):
        show(f"  {name}: {_percent(value)}{_listed(further[name])}")
    if found.reason:
        show(f"  {found.reason}")
    for note in found.notes:
        show(f"  note: {note}")


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _listed(metrics: Mapping[str, float | None]) -> str:
    shown = ", ".join(
        f"{name} {value:.10g}" if name == "answered" and value is not None else f"{name} {_percent(value)}"
        for name, value in metrics.items()
    )
    return f" ({shown})" if shown else ""
