"""search: choose a merge coefficient."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from polymerge.cli.flags import FlagCommand
from polymerge.cli.progress import progress_bar
from polymerge.cli.recipe_options import recipe_of, recipe_options_without
from polymerge.errors import PolymergeError, RecipeError, Refused, refuse_if_any

if TYPE_CHECKING:
    from polymerge.tuning.judging import Judging

__all__ = ["search"]

_FOR_LOGS = {"task", "value_pattern", "keep"}
_FOR_PROMPTS = {
    "question", "split", "fields", "image_folder", "values", "scorer", "choose_by", "sampler", "trials", "storage",
    "device", "model_dtype", "max_new_tokens", "batch_size", "workers", "torch_threads", "ray", "trust_remote_code",
}  # fmt: skip
_WRITTEN = {"fields": "field", "model_dtype": "dtype"}


@click.command(cls=FlagCommand)
@recipe_options_without("dtype")
@click.option("--prompts", metavar="FILE", help="JSON lines, LLaVA questions, a folder of images, or a dataset.")
@click.option("--question", help="What is asked of each picture of a folder of images.")
@click.option("--split", help="Of a dataset.")
@click.option("--field", "fields", metavar="NAME=COLUMN", multiple=True, help="Another name of a field.")
@click.option("--image-folder", type=click.Path(), help="What relative image paths are relative to.")
@click.option("--samples", type=int, default=100, show_default=True, help="Prompts to draw; 0 for all.")
@click.option("--sample-seed", type=int, default=2, show_default=True, help="Of the draw.")
@click.option(
    "--vary", metavar="NAME[=VALUES]", multiple=True,
    help="What is varied: weight (default: the second model's), weight[2], scale, density@layers:0-5, ...",
)  # fmt: skip
@click.option("--values", metavar="VALUES", help="FIRST:LAST:STEP or a list; of a weight by default 0:0.6:0.1.")
@click.option("--keep-template-weight", is_flag=True, help="Leave the template's as it is; else 1 minus the others'.")
@click.option("-o", "--out", metavar="RUN", type=click.Path(), help="The folder of the search; it goes on there.")
@click.option("--criterion", default="union", show_default=True, help="union, sum or backward.")
@click.option("--compare", default="exact", show_default=True, help="exact (but for case) or embedding.")
@click.option("--embedding-model", metavar="MODEL", help="A sentence-transformers model by path or id.")
@click.option("--smooth", type=int, default=0, show_default=True, help="Mean over so many candidates to either side.")
@click.option("--scorer", metavar="NAME", help="Choose by score; the prompts have answers.")
@click.option("--choose-by", type=click.Choice(["score", "criterion"]), help="With --scorer; default: score.")
@click.option("--sampler", default="grid", show_default=True, help="grid, or Optuna's random, tpe, cmaes, gp, nsgaii.")
@click.option("--trials", type=int, default=20, show_default=True, help="Of a sampler.")
@click.option("--storage", metavar="URL", help="One of Optuna's storages; default: a journal in RUN.")
@click.option("--from-logs", metavar="DIR", type=click.Path(), help="Answers that exist, a folder for each value.")
@click.option("--task", metavar="T", help="The task in the logs.")
@click.option("--value-pattern", metavar="REGEX", help="Finds the value in a folder's name; one group.")
@click.option("--keep", metavar="FIELD", help="Of the logs, only documents that have this field; `all` for every one.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option(
    "--dtype",
    "model_dtype",
    default="auto",
    show_default=True,
    help="auto, float32, bfloat16 or float16.",
)
@click.option("--max-new-tokens", type=int, default=16, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--workers", type=int, default=1, show_default=True, help="Models that generate side by side.")
@click.option("--torch-threads", type=click.IntRange(min=1), help="Of each worker; default: the processors shared out.")
@click.option("--ray", metavar="ADDRESS", is_flag=False, flag_value="local", help="A Ray cluster; alone: a local one.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python files that lie in the template.")
@click.option("--write", metavar="OUT", type=click.Path(), help="Merge with the chosen value.")
@click.option("--force", is_flag=True, help="Drop what another search left in RUN; replace an existing OUT.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON: what search.json holds.")
@click.pass_context
def search(
    context: click.Context, /, prompts: str | None, from_logs: str | None, as_json: bool, **options: Any
) -> None:
    """Choose a merge coefficient by the merged models' own answers, without labels and without writing checkpoints.

    RECIPE is a YAML file; the options say the same without a file. With --from-logs it is needed for --write only.
    """
    said = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    problems = _out_of_place(said, options)
    if (prompts is None) == (from_logs is None):
        raise Refused([RecipeError("say where answers come from: --prompts FILE, or --from-logs DIR"), *problems])
    try:
        if from_logs is not None:
            _from_logs(Path(from_logs), as_json, options, problems)
        else:
            _generate(str(prompts), as_json, options, problems)
    except KeyboardInterrupt:
        click.echo("polymerge: interrupted. The answers so far are kept: the same command goes on", err=True)
        sys.exit(1)


def _out_of_place(said: set[str], options: Mapping[str, Any]) -> list[PolymergeError]:
    """Options that were given and would not do anything."""
    problems: list[PolymergeError] = []
    for names, reason in (
        (_FOR_LOGS if "prompts" in said else set(), "is for --from-logs"),
        (_FOR_PROMPTS if "from_logs" in said else set(), "is for --prompts"),
        (set() if options["compare"] == "embedding" else {"embedding_model"}, "is for --compare embedding"),
        (set() if options["sampler"] != "grid" else {"trials", "storage"}, "is for a --sampler other than grid"),
        (set() if options["scorer"] else {"choose_by", "sampler"}, "needs --scorer"),
    ):
        written = [_WRITTEN.get(name, name).replace("_", "-") for name in sorted(names & said)]
        problems += [RecipeError(f"--{name} {reason}") for name in written]
    return problems


def _generate(prompts: str, as_json: bool, options: dict[str, Any], problems: list[PolymergeError]) -> None:
    from polymerge.inference.generation import Generation
    from polymerge.inference.prompts import PromptSource
    from polymerge.tuning.checks import Scoring
    from polymerge.tuning.search import search as run
    from polymerge.tuning.text_of_search import describe_search

    out = options.pop("out")
    if out is None:
        problems.append(RecipeError("say -o RUN: the folder of the search"))
    for name in _FOR_LOGS:
        del options[name]
    scorer, choose_by = options.pop("scorer"), options.pop("choose_by")
    own = {name: options.pop(name) for name in ("sampler", "trials", "storage")}
    scoring = Scoring(scorer, choose=choose_by != "criterion", **own) if scorer is not None else None
    source = PromptSource(
        prompts, samples=options.pop("samples"), seed=options.pop("sample_seed"), question=options.pop("question"),
        split=options.pop("split"), fields=_fields(options.pop("fields"), problems),
        image_folder=options.pop("image_folder"),
    )  # fmt: skip
    generation = Generation(
        dtype=options.pop("model_dtype"),
        **{
            name: options.pop(name)
            for name in (
                "max_new_tokens", "batch_size", "device", "workers", "ray", "torch_threads", "trust_remote_code",
            )
        },
    )  # fmt: skip
    judging = _judging(options)
    how = {name: options.pop(name) for name in ("vary", "values", "keep_template_weight", "write", "force")}
    with progress_bar("answers", unit="") as progress:
        searched = run(
            _recipe(options, problems), source, out or "", judging=judging, scoring=scoring, generation=generation,
            progress=progress, problems=problems, **how,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(searched.outcome, indent=1))
        return
    click.echo(describe_search(searched.outcome))
    click.echo(f"{searched.folder}: every answer, search.json and the plot")
    if how["write"] is not None:
        click.echo(f"{how['write']}: merged with the chosen value")


def _from_logs(directory: Path, as_json: bool, options: dict[str, Any], problems: list[PolymergeError]) -> None:
    from polymerge.tuning.chosen import Chosen
    from polymerge.tuning.from_logs import choose_from_logs
    from polymerge.tuning.text_of_search import describe_search

    judging, write, recipe = _judging(options), options["write"], None
    asked = {name: options.pop(name) for name in ("task", "value_pattern", "keep", "samples", "out")}
    vary, keep_template, force = options.pop("vary"), options.pop("keep_template_weight"), options.pop("force")
    seed = options.pop("sample_seed")
    if write is not None:
        recipe = Chosen.of(_recipe(options, problems), directory, vary, keep_template, Path(write), force, problems)
    refuse_if_any(problems)
    found = choose_from_logs(directory, seed=seed, judging=judging, **asked)
    for note in found["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(json.dumps(found, indent=1) if as_json else describe_search(found))
    if recipe is not None:
        recipe.merge(found["chosen"], Path(write), force)
        click.echo(f"{write}: merged with the chosen value", err=as_json)


def _recipe(options: dict[str, Any], problems: list[PolymergeError]) -> Any:
    try:
        return recipe_of(options)
    except RecipeError as error:
        problems.append(error)
        return {}


def _judging(options: dict[str, Any]) -> Judging:
    from polymerge.tuning.judging import Judging

    said = {name: options.pop(name) for name in ("criterion", "compare", "embedding_model", "smooth")}
    return Judging(**{name: value for name, value in said.items() if value is not None})


def _fields(said: tuple[str, ...], problems: list[PolymergeError]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in said]
    problems += [
        RecipeError(f"--field: '{text}' is not NAME=COLUMN")
        for text, (_, equals, _) in zip(said, pairs, strict=True)
        if not equals
    ]
    return {name: column for name, equals, column in pairs if equals} or None
