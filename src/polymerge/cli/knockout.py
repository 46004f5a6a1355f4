"""knockout and ablate: what each layer does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.progress import progress_bar
from polymerge.cli.recipe_options import recipe_of, recipe_options_without
from polymerge.errors import RecipeError, refuse_if_any

if TYPE_CHECKING:
    from polymerge.inference.generation import Generation

__all__ = ["ablate", "knockout"]

F = TypeVar("F", bound=Callable[..., Any])

_GENERATION = ("max_new_tokens", "batch_size", "device", "workers", "torch_threads", "trust_remote_code")

_PROMPTS = (
    click.option(
        "--prompts", metavar="[NAME=]FILE", multiple=True,
        help="Prompts with answers, of one task; repeatable. Its name is the file's unless it is said.",
    ),
    click.option("--scorer", metavar="NAME", help="Scores the answers, such as exact."),
    click.option(
        "--tasks", metavar="FILE:SCORER,...", help="The same, as `polymerge evaluate` takes it; one scorer for all."
    ),
    click.option("-o", "--out", metavar="RUN", required=True, type=click.Path(), help="The folder of the run."),
)  # fmt: skip

_ASKING = (
    click.option(
        "--samples", type=int, default=100, show_default=True, help="Prompts to draw of each task; 0 for all."
    ),
    click.option("--sample-seed", type=int, default=2, show_default=True, help="Of the draw."),
    click.option("--device", default="cpu", show_default=True, help="Where the model runs."),
    click.option(
        "--dtype", "model_dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."
    ),
    click.option("--max-new-tokens", type=int, default=16, show_default=True),
    click.option("--batch-size", type=int, default=16, show_default=True),
    click.option("--workers", type=int, default=1, show_default=True, help="Models that generate side by side."),
    click.option(
        "--torch-threads", type=click.IntRange(min=1), help="Of each worker; default: the processors shared out."
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run Python files that lie in the model's folder."),
    click.option("--force", is_flag=True, help="Drop what another run left in RUN."),
    click.option("--json", "as_json", is_flag=True, help="Report as JSON: what the file in RUN holds."),
)


def _given(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Give a command some options, in this order."""

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give


@click.command(cls=FlagCommand)
@click.argument("model", type=click.Path())
@_given(*_PROMPTS)
@click.option("--against", metavar="TEMPLATE", type=click.Path(), help="The model before it was merged, to compare.")
@click.option(
    "--replace", default="uniform", show_default=True, metavar="HOW", help="uniform, zero, noise or from:CHECKPOINT."
)
@click.option("--noise-size", type=float, help="Of noise, as a multiple of a tensor's standard deviation; default 1.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of noise, and of resampling.")
@click.option("--modules", default="attention,mlp", show_default=True, help="Out of attention, mlp and both.")
@click.option("--layers", metavar="LAYERS", help="Such as 0-31; default: all.")
@click.option("--stride", type=int, help="How far apart groups begin; default: one after the other.")
@click.option("--group", type=int, default=1, show_default=True, help="Layers that are knocked out at a time.")
@_given(*_ASKING)
def knockout(model: str, prompts: tuple[str, ...], out: str, as_json: bool, force: bool, **options: Any) -> None:
    """Measure what each layer of MODEL does: replace its attention or MLP in memory, score, and put it back.

    MODEL is a checkpoint, or BASE+ADAPTER. Nothing of it is changed on disk.
    """
    from polymerge.analysis.knockout import knockout as run
    from polymerge.analysis.knockout_text import describe_knockout

    generation, prompts = _generation(options), _tasks(prompts, options)
    with progress_bar("answers", unit="") as progress:
        done = run(model, prompts, out, generation=generation, force=force, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(done.outcome, indent=1))
        return
    click.echo(describe_knockout(done.outcome))
    click.echo(f"{done.folder}: every answer, knockout.json, the map and the curves")


@click.command(cls=FlagCommand)
@recipe_options_without("dtype", "seed")
@_given(*_PROMPTS)
@click.option("--ranges", metavar="LIST", help="Out of early, middle, late (thirds) and full; default: all four.")
@click.option("--window", type=int, help="Merge so many layers at a time, sliding over all.")
@click.option("--stride", type=int, help="How far the window slides; default 1.")
@click.option("--layers", metavar="LIST", help="Further ranges, such as 0-3,4-7.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of resampling; that of a merge is the recipe's.")
@_given(*_ASKING)
def ablate(prompts: tuple[str, ...], out: str, as_json: bool, force: bool, **options: Any) -> None:
    """Merge only a range of layers in memory, and score each range against the template.

    RECIPE is a YAML file; the options say the same without a file. Embedding, final norm, head and everything outside
    the text tower are merged in `full` only.
    """
    from polymerge.analysis.ablation import ablate as run
    from polymerge.analysis.knockout_text import describe_ablation

    generation, prompts = _generation(options), _tasks(prompts, options)
    own = {
        name: options.pop(name)
        for name in ("scorer", "ranges", "window", "stride", "layers", "seed", "samples", "sample_seed")
    }
    with progress_bar("answers", unit="") as progress:
        done = run(
            recipe_of(options), prompts, out, generation=generation, force=force, progress=progress, **own
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(done.outcome, indent=1))
        return
    click.echo(describe_ablation(done.outcome))
    click.echo(f"{done.folder}: every answer, ablation.json and the plot")


def _tasks(prompts: tuple[str, ...], options: dict[str, Any]) -> tuple[str, ...]:
    """The prompts of every task; leaves the one scorer of all in `options`."""
    said = [text.rpartition(":") for text in (options.pop("tasks") or "").split(",") if text]
    problems = [
        RecipeError(
            f"--tasks: '{file or scorer}' is not FILE:SCORER; tasks of a benchmark are for `polymerge evaluate`"
        )
        for file, colon, scorer in said
        if not (file and colon)
    ]
    scorers = {scorer for _, _, scorer in said} | ({options["scorer"]} if options["scorer"] else set())
    if not said and not prompts:
        problems.append(RecipeError("say what to ask: --prompts FILE --scorer NAME, or --tasks FILE:SCORER"))
    elif len(scorers) != 1 and not problems:
        told = f"they are {', '.join(sorted(scorers))}" if scorers else "say --scorer NAME"
        problems.append(RecipeError(f"--scorer: one for all tasks: {told}"))
    refuse_if_any(problems)
    (options["scorer"],) = scorers
    return (*prompts, *(file for file, _, _ in said))


def _generation(options: dict[str, Any]) -> Generation:
    from polymerge.inference.generation import Generation

    return Generation(dtype=options.pop("model_dtype"), **{name: options.pop(name) for name in _GENERATION})
