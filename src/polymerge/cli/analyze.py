"""overlap, knockout and ablate: where models interfere, and what each layer contributes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import FINITE, PATH, argument, option
from polymerge.cli.progress import progress_bar
from polymerge.cli.shared_options import (
    AS_JSON,
    FORCE_RUN,
    JSON_OR_FILE,
    SAMPLE_SEED,
    SAMPLES,
    SCORER,
    THREADS,
    generation_of,
    generation_options,
    given,
    named_file,
    recipe_of,
    recipe_options,
    run_folder,
)
from polymerge.cli.streams import say, show
from polymerge.durable import write_file
from polymerge.errors import RecipeError, Refused, collecting, refuse
from polymerge.paths import given_path

if TYPE_CHECKING:
    from polymerge.analysis.knockout import Knockout
    from polymerge.analysis.layerwise import Layerwise

__all__ = ["ablate", "knockout", "overlap"]


def _layers(_context: click.Context, _option: click.Parameter, text: str | None) -> list[tuple[int, ...]] | None:
    """Parse ranges of layers such as `0-3,7`."""
    ranges = []
    for word in () if text is None else text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", word)
        if found is None:
            raise click.BadParameter(f"'{word}' is no layer and no range of layers such as 0-5")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise click.BadParameter(f"'{word}' ends before it starts")
        ranges.append(tuple(range(first, last + 1)))
    return None if text is None else ranges


_TASKS = given(
    option(
        "--prompts", metavar="[NAME=]FILE", multiple=True,
        help="Ask the prompts of this task, which have answers; repeatable. NAME is the file's name by default.",
    ),
    SCORER,
    option(
        "--tasks", metavar="FILE:SCORER,...", help="Ask these tasks, as in `polymerge evaluate`; one scorer for all."
    ),
    run_folder(required=True),
)  # fmt: skip

_SUGGESTED = option(
    "--write-recipe", "suggested", metavar="OUT.yaml", type=PATH,
    help="Write the schedule over depth that the outcome suggests, as a recipe.",
)  # fmt: skip

_ASKING = given(SAMPLES, SAMPLE_SEED, generation_options(ray=False), FORCE_RUN, AS_JSON)


@click.command(cls=FlagCommand)
@recipe_options()
@option(
    "--density",
    type=FINITE,
    default=0.2,
    show_default=True,
    help="Compare the largest entries of each delta, up to this share.",
)
@option("--rank", type=int, default=8, show_default=True, help="Compare this many singular directions.")
@option("--no-svd", is_flag=True, help="Skip singular values, which take most of the time.")
@option(
    "--sort", type=click.Choice(["layer", "conflict"]), default="layer", show_default=True,
    help="Sort lines by layer, or by conflict, largest first.",
)  # fmt: skip
@option(
    "--threads",
    type=THREADS,
    help="Use this many threads; default: one per processor, up to 8.",
)
@JSON_OR_FILE
def overlap(
    density: float, rank: int, no_svd: bool, sort: str, threads: int | None, json_file: str | None, **options: Any
) -> None:
    """Show how the deltas of a merge relate to each other: norms, cosines, sign conflicts, shared directions.

    RECIPE is a YAML file; the options can be used instead. Nothing is merged, and no weight of the recipe
    plays a part. Where a method reads no base, what is compared are differences from the template.
    """
    from polymerge.analysis.figures import describe_overlap
    from polymerge.analysis.overlap import overlap as run

    with progress_bar("comparing", unit="") as progress:
        found = run(recipe_of(options), density=density, rank=rank, svd=not no_svd, threads=threads, progress=progress)
    if json_file is not None:
        text = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
        if json_file == "-":
            show(text, end="")
            return
        write_file(given_path(json_file), text)
    show(describe_overlap(found, by_conflict=sort == "conflict"))


@click.command(cls=FlagCommand)
@argument("model", type=PATH)
@_TASKS
@option(
    "--against", metavar="TEMPLATE", type=PATH, help="Compare with this model, the one before the merge."
)  # fmt: skip
@option(
    "--replace", default="uniform", show_default=True, metavar="HOW",
    help="Replace weights by uniform, zero, noise or from:CHECKPOINT.",
)  # fmt: skip
@option(
    "--noise-size", type=FINITE, help="Scale noise to this multiple of each tensor's standard deviation; default 1."
)  # fmt: skip
@option("--seed", type=int, default=42, show_default=True, help="Seed of noise and of the bootstrap.")
@option("--modules", default="attention,mlp", show_default=True, help="Knock out attention, mlp or both, in turn.")
@option("--layers", metavar="LAYERS", callback=_layers, help="Knock out these layers, such as 0-3,7, not all.")
@option("--stride", type=int, help="Start groups this many layers apart; default: the group size.")
@option("--group", type=int, default=1, show_default=True, help="Knock out this many layers at a time.")
@_SUGGESTED
@option(
    "--recipe-of", "scheduled", metavar="RECIPE", type=PATH,
    help="Schedule this recipe; default: the one in the polymerge.json of MODEL.",
)  # fmt: skip
@option("--keep", metavar="TASK", help="Keep the template where this task depends on a layer; default: the first task.")
@_ASKING
def knockout(
    model: str,
    prompts: tuple[str, ...],
    out: str,
    as_json: bool,
    replace: str,
    noise_size: float | None,
    modules: str,
    layers: list[tuple[int, ...]] | None,
    seed: int,
    suggested: str | None,
    scheduled: str | None,
    keep: str | None,
    **options: Any,
) -> None:
    """Measure what each layer of MODEL contributes: replace its attention or MLP in memory, score, and restore it.

    MODEL is a checkpoint, or BASE+ADAPTER. Nothing of it is changed on disk.
    """
    from polymerge.analysis.knockout import knockout as run
    from polymerge.analysis.knockout_text import describe_knockout
    from polymerge.analysis.replacements import Replacement
    from polymerge.analysis.suggested import refuse_unfit_for_schedules

    kind, _, source = replace.partition(":")
    generation = generation_of(options)
    with progress_bar("answers", unit="") as progress, _tasks(prompts, options) as tasks:
        if suggested is not None:
            refuse_unfit_for_schedules(scheduled, model, list(tasks), keep)
        elif scheduled or keep:
            refuse(
                RecipeError(f"--{'recipe-of' if scheduled else 'keep'} is for --write-recipe, which writes a schedule")
            )
        done = run(
            model, tasks, out, replace=Replacement(kind, source, noise_size, seed), modules=_words(modules),
            layers=None if layers is None else [layer for run in layers for layer in run], seed=seed,
            generation=generation, progress=progress, **options,
        )  # fmt: skip
    _write_suggested(done, suggested, scheduled, keep)
    if as_json:
        show(json.dumps(done.to_json(), indent=1))
        return
    show(describe_knockout(done))
    show(f"{done.folder}: every answer, knockout.json, the map and the curves")


@click.command(cls=FlagCommand)
@recipe_options(without=("dtype", "seed"))
@_TASKS
@option("--ranges", metavar="LIST", help="Merge early, middle, late (thirds) or full; default: all four.")
@option("--window", type=int, help="Merge this many layers at a time, in a window that slides over all.")
@option("--stride", type=int, help="Slide the window by this many layers; default 1.")
@option("--layers", metavar="LAYERS", callback=_layers, help="Merge these ranges, too, such as 0-3,4-7.")
@option(
    "--seed", type=int, default=42, show_default=True, help="Seed of the bootstrap; that of a merge is the recipe's."
)
@_SUGGESTED
@_ASKING
def ablate(
    prompts: tuple[str, ...],
    out: str,
    as_json: bool,
    ranges: str | None,
    window: int | None,
    stride: int | None,
    layers: list[tuple[int, ...]] | None,
    suggested: str | None,
    **options: Any,
) -> None:
    """Merge only a range of layers in memory, and score each range against the template.

    RECIPE is a YAML file; the options can be used instead. Embedding, final norm, head and everything outside
    the text tower are merged in `full` only.
    """
    from polymerge.analysis.knockout_text import describe_layerwise
    from polymerge.analysis.layerwise import layerwise
    from polymerge.analysis.suggested import refuse_unfit_for_schedules

    generation = generation_of(options)
    with progress_bar("answers", unit="") as progress, _tasks(prompts, options) as tasks:
        own = {name: options.pop(name) for name in ("scorer", "seed", "samples", "sample_seed", "force")}
        recipe = recipe_of(options)
        if suggested is not None:
            refuse_unfit_for_schedules(recipe)
        done = layerwise(
            recipe, tasks, out, ranges=None if ranges is None else _words(ranges), window=window,
            stride=stride, layers=layers or (), generation=generation, progress=progress, **own,
        )  # fmt: skip
    _write_suggested(done, suggested)
    if as_json:
        show(json.dumps(done.to_json(), indent=1))
        return
    show(describe_layerwise(done))
    show(f"{done.folder}: every answer, ablation.json and the plot")


def _write_suggested(
    done: Knockout | Layerwise, file: str | None, recipe: str | None = None, keep: str | None = None
) -> None:
    """Write the recipe that an outcome suggests, if a file is named for it."""
    from polymerge.analysis.suggested import suggest, suggestion_text

    if file is not None:
        write_file(given_path(file), suggestion_text(suggest(done, recipe, keep=keep), done, keep))
        say(f"{file}: the schedule that this suggests, as a recipe")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


@contextmanager
def _tasks(prompts: tuple[str, ...], options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The file of each task, from `--prompts` or `--tasks`; leaves the common scorer in `options`.

    What is wrong with them is refused after the block, together with what the block finds wrong.
    """
    said = [text.rpartition(":") for text in (options.pop("tasks") or "").split(",") if text]
    scorers = {scorer for file, colon, scorer in said if file and colon} | (
        {options["scorer"]} if options["scorer"] else set()
    )
    tasks: dict[str, str] = {}
    problems = [
        RecipeError(
            f"--tasks: '{file or scorer}' is not FILE:SCORER; tasks of a benchmark are for `polymerge evaluate`"
        )
        for file, colon, scorer in said
        if not (file and colon)
    ]
    if not said and not prompts:
        raise Refused([RecipeError("say what to ask: --prompts FILE --scorer NAME, or --tasks FILE:SCORER")])
    if len(scorers) != 1 and not problems:
        told = f"they are {', '.join(sorted(scorers))}" if scorers else "say --scorer NAME"
        problems.append(RecipeError(f"--scorer: one for all tasks: {told}"))
    for text in (*prompts, *(file for file, _, _ in said if file)):
        name, file = named_file(text)
        if name in tasks:
            problems.append(RecipeError(f"--prompts {text}: there is a task '{name}' already. Say NAME={file}"))
        tasks[name] = file
    options["scorer"] = min(scorers, default="exact")
    with collecting() if problems else nullcontext():
        refuse(*problems)
        yield tasks
