"""evaluate and compare: what models are worth, and which is worth more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.progress import progress_bar
from polymerge.errors import RecipeError

if TYPE_CHECKING:
    from polymerge.evaluation.results import Results

__all__ = ["compare", "evaluate"]

_TOOLS = ("lmms-eval", "vlmevalkit")
_OURS = ("data", "image_folder", "max_new_tokens", "workers", "torch_threads", "ray", "dtype")
"""Options that say nothing to another tool."""


@click.command(cls=FlagCommand)
@click.argument("model")
@click.argument("more", metavar="[-- OPTIONS OF THE TOOL]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--tasks", metavar="TASK,...", required=True, help="mm-mergebench, its tasks, FILE:SCORER; or the tool's."
)
@click.option("-o", "--out", metavar="RUN", type=click.Path(), help="The folder of the run; it goes on there.")
@click.option("--data", metavar="DIR", type=click.Path(), help="The benchmark's files, in either published layout.")
@click.option("--image-folder", metavar="DIR", type=click.Path(), help="What image paths are relative to.")
@click.option("--name", help="What tables call the model; default: its folder's name.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--dtype", help="auto (default), float32, bfloat16 or float16.")
@click.option("--max-new-tokens", type=int, help="The longest answer; default: as the benchmark has it for each task.")
@click.option("--batch-size", type=int, help="Default: 16; with another tool 1.")
@click.option("--workers", type=int, help="Models that generate side by side; default: 1.")
@click.option("--torch-threads", type=click.IntRange(min=1), help="Of each worker; default: the processors shared out.")
@click.option("--ray", metavar="ADDRESS", is_flag=False, flag_value="local", help="A Ray cluster; alone: a local one.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python files that lie in the checkpoint.")
@click.option("--force", is_flag=True, help="Drop what a run with other settings left in RUN.")
@click.option("--with", "tool", type=click.Choice(_TOOLS), help="Let this tool evaluate, and read its results.")
@click.option("--environment", metavar="PATH", type=click.Path(), help="The tool's virtual environment.")
@click.option("--kit", metavar="PATH", type=click.Path(), help="The clone of VLMEvalKit.")
@click.option("--print-command", is_flag=True, help="Only print what would be run.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON: what results.json holds.")
def evaluate(model: str, more: tuple[str, ...], tasks: str, out: str | None, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL: a checkpoint, a hub id, or BASE+ADAPTER, which is put together in memory.

    Answers are kept as they come, so a run that was stopped goes on. A question that cannot be asked or answered is
    listed in errors.jsonl, counted, and wrong.
    """
    words = [word.strip() for word in tasks.split(",") if word.strip()]
    if options["tool"] is not None:
        _by_tool(model, words, out, more, as_json, options)
        return
    unused = [name for name in ("environment", "kit") if options[name] is not None]
    unused += ["print_command"] if options["print_command"] else []
    if unused or more:
        what = f"--{unused[0].replace('_', '-')} is" if unused else f"{' '.join(more)} are"
        raise RecipeError(f"{what} for another tool: say which with --with {' or '.join(_TOOLS)}")
    if out is None:
        raise click.UsageError("Missing option '-o': the folder of the run.")
    from polymerge.evaluation.evaluate import evaluate as run
    from polymerge.inference.generation import Generation

    said = {name: options[name] for name in ("batch_size", "workers", "dtype") if options[name] is not None}
    generation = Generation(
        device=options["device"], ray=options["ray"], torch_threads=options["torch_threads"],
        trust_remote_code=options["trust_remote_code"], **said,
    )  # fmt: skip
    how = {name: options[name] for name in ("data", "image_folder", "name", "max_new_tokens", "force")}
    with progress_bar("answers", unit="") as progress:
        results = run(model, words, out, generation=generation, progress=progress, **how)
    _report(results, out, as_json)


def _by_tool(
    model: str, tasks: list[str], out: str | None, more: tuple[str, ...], as_json: bool, options: dict[str, Any]
) -> None:
    from polymerge.evaluation.harness.run import plan_tool, run_tool

    unused = [name for name in _OURS if options[name] not in (None, False)]
    if unused:
        raise RecipeError(
            f"--{unused[0].replace('_', '-')} says nothing to {options['tool']}; its own options go after --"
        )
    if out is None:
        raise click.UsageError("Missing option '-o': the folder of the run.")
    job = plan_tool(
        options["tool"], model, tasks, Path(out), name=options["name"], environment=options["environment"],
        kit=options["kit"], device=options["device"], batch_size=options["batch_size"],
        trust_remote_code=options["trust_remote_code"], more=more, force=options["force"],
    )  # fmt: skip
    if options["print_command"]:
        job.asked.fetch()  # what is printed can be run
        click.echo(job.printed())
        return
    _report(run_tool(job, show=lambda text: click.echo(text, err=True, nl=False)), out, as_json)


def _report(results: Results, out: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=1, ensure_ascii=False))
        return
    from polymerge.evaluation.comparison_text import describe_results

    click.echo(describe_results(results))
    click.echo(f"{out}: results.json and every answer")


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path())
@click.option("--parents", metavar="A,B,...", help="Models that others were merged of, by name: gains over their mean.")
@click.option("--template", metavar="A", help="A model over which gains are told, too, by name.")
@click.option("--as-published", is_flag=True, help="The numbers of the published scripts; they have no intervals.")
@click.option("--resamples", type=int, default=10_000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the bootstrap.")
@click.option("-o", "--out", metavar="DIR", type=click.Path(), help="Write Markdown, CSV and a plot there.")
def compare(
    results: tuple[str, ...],
    parents: str | None,
    template: str | None,
    as_published: bool,
    resamples: int,
    seed: int,
    out: str | None,
) -> None:
    """Set models side by side: RESULTS are results.json files or the folders of runs.

    Models by tasks, with averages over the seen and the unseen tasks of MM-MergeBench. With --parents or --template,
    also what each model gains, with an interval from the paired bootstrap, which says what is within noise.
    """
    from polymerge.evaluation.comparison import compare_files
    from polymerge.evaluation.comparison_text import plain_text, write_comparison

    named = [one.strip() for one in (parents or "").split(",") if one.strip()]
    compared = compare_files(
        results, parents=named, template=template, published=as_published, resamples=resamples, seed=seed
    )
    click.echo(plain_text(compared))
    if out is not None:
        files = write_comparison(compared, Path(out))
        click.echo(f"\n{out}: {', '.join(file.name for file in files)}")
