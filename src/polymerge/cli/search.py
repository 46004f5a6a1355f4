"""search: choose a merge coefficient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import FOLDER, option
from polymerge.cli.progress import progress_bar
from polymerge.cli.shared_options import (
    AS_JSON,
    SAMPLE_SEED,
    SAMPLES,
    generation_of,
    generation_options,
    named_file,
    recipe_of,
    recipe_options,
    run_folder,
)
from polymerge.cli.streams import say, show
from polymerge.cli.varied import log_folders, parse_knob, parse_knobs
from polymerge.errors import PolymergeError, RecipeError, Refused, collecting, refuse

if TYPE_CHECKING:
    from polymerge.tuning.criterion import Judging

__all__ = ["search"]

_FOR_LOGS = {"task", "value_pattern", "having"}
_FOR_PROMPTS = {
    "question", "split", "fields", "image_folder", "values", "scorer", "choose_by", "sampler", "trials", "storage",
    "quick", "population",
    "device", "model_dtype", "max_new_tokens", "batch_size", "workers", "torch_threads", "ray", "trust_remote_code",
    "engine", "environment", "engine_options",
}  # fmt: skip
_WRITTEN = {
    "fields": "field",
    "model_dtype": "dtype",
    "engine_options": "engine-option",
}


@click.command(cls=FlagCommand)
@recipe_options(without=("dtype",))
@option(
    "--prompts", metavar="[NAME=]FILE", multiple=True,
    help="Ask these prompts: JSON lines, LLaVA questions, an image folder, or a dataset. Several are tasks.",
)  # fmt: skip
@option("--question", help="Ask this question about each image of a folder.")
@option("--split", help="Take this split of a dataset.")
@option("--field", "fields", metavar="NAME=COLUMN", multiple=True, help="Read a field from a column; repeatable.")
@option("--image-folder", metavar="DIR", type=FOLDER, help="Resolve relative image paths against DIR.")
@SAMPLES
@SAMPLE_SEED
@option(
    "--vary", metavar="NAME[=VALUES]", multiple=True,
    help="Vary weight (the second model's, the default), weight[2], scale, density@layers:0-5, ...; a schedule over "
    "the layers by weight@depth=VALUES:SHAPE (linear, knee, step) or weight@depth:last; repeatable.",
)  # fmt: skip
@option(
    "--values", metavar="VALUES", help="Try these values: FIRST:LAST:STEP or a list; default for a weight: 0:0.6:0.1."
)  # fmt: skip
@option(
    "--keep-template-weight", is_flag=True, help="Keep the template's weight, which is otherwise 1 minus the others'."
)  # fmt: skip
@run_folder()
@option(
    "--criterion", default="union", show_default=True, help="Choose where answers change least: union, sum or backward."
)  # fmt: skip
@option(
    "--compare", default="exact", show_default=True, help="Compare answers by exact text (ignoring case) or embedding."
)  # fmt: skip
@option("--embedding-model", metavar="MODEL", help="Embed answers with this sentence-transformers model.")
@option("--smooth", type=int, default=0, show_default=True, help="Average over this many candidates on either side.")
@option("--scorer", metavar="NAME", help="Score answers by NAME: exact, vqa, cider, ...; or by TASK=NAME,...")
@option(
    "--choose-by", type=click.Choice(["score", "criterion", "ideal", "worst", "mean"]),
    help="With --scorer, choose by this; default: score. Of several tasks' front: ideal (nearest to the best of each; "
    "the default), worst (best in its worst task) or mean.",
)  # fmt: skip
@option(
    "--sampler", default="grid", show_default=True,
    help="Try every value (grid), or those of Optuna's random, tpe, cmaes, gp or nsga2.",
)  # fmt: skip
@option(
    "--quick", type=int, metavar="N",
    help="With several tasks: ask each candidate N prompts of each, and all of them only those on the front.",
)  # fmt: skip
@option("--population", type=int, help="Trials of a generation of nsga2; default: 10 with several tasks.")
@option("--trials", type=int, default=20, show_default=True, help="Number of values that the sampler tries.")
@option("--storage", metavar="URL", help="Keep trials in this Optuna storage; default: a journal in RUN.")
@option(
    "--from-logs", metavar="DIR|VALUE=DIR", multiple=True,
    help="Use existing answers, from a directory with one folder per value, or from single folders.",
)  # fmt: skip
@option("--task", metavar="T", help="Read the answers to this task from the logs.")
@option(
    "--value-pattern", metavar="REGEX", help="Extract the value from a folder's name with a pattern with one group."
)
@option(
    "--having", metavar="FIELD", help="Read only documents of the logs that have this field; `all` reads every one."
)  # fmt: skip
@generation_options()
@option("--write", metavar="OUT", type=FOLDER, help="Merge with the chosen value into this folder.")
@option(
    "--force", is_flag=True, help="Discard a search with other settings in RUN; replace OUT if it exists."
)  # fmt: skip
@AS_JSON
@click.pass_context
def search(
    context: click.Context, /, prompts: tuple[str, ...], from_logs: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Choose a merge coefficient by the merged models' own answers, without labels and without writing checkpoints.

    RECIPE is a YAML file; the options can be used instead. With --from-logs it is only needed for --write.
    """
    said = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    problems = _out_of_place(said, options)
    if bool(prompts) == bool(from_logs):
        raise Refused([RecipeError("say where answers come from: --prompts FILE, or --from-logs DIR"), *problems])
    if from_logs:
        _from_logs(from_logs, as_json, options, problems)
    else:
        _generate(prompts, as_json, options, problems)


def _out_of_place(said: set[str], options: Mapping[str, Any]) -> list[PolymergeError]:
    """An error for each given option that would have no effect."""
    problems: list[PolymergeError] = []
    for names, reason in (
        (_FOR_LOGS if "prompts" in said else set(), "is for --from-logs"),
        (_FOR_PROMPTS if "from_logs" in said else set(), "is for --prompts"),
        (set() if options["compare"] == "embedding" else {"embedding_model"}, "is for --compare embedding"),
        (set() if options["sampler"] != "grid" else {"trials", "storage"}, "is for a --sampler other than grid"),
        (set() if options["scorer"] else {"choose_by", "sampler", "quick", "population"}, "needs --scorer"),
    ):
        written = [_WRITTEN.get(name, name).replace("_", "-") for name in sorted(names & said)]
        problems += [RecipeError(f"--{name} {reason}") for name in written]
    return problems


def _generate(prompts: tuple[str, ...], as_json: bool, options: dict[str, Any], problems: list[PolymergeError]) -> None:
    from polymerge.checkpoints.hub import one_commit
    from polymerge.inference.prompts import PromptSource
    from polymerge.tuning.outcome import describe_search
    from polymerge.tuning.search import SearchOptions, plan_search
    from polymerge.tuning.trials import Scoring

    out, write = options.pop("out"), options.pop("write")
    scorer, choose_by = options.pop("scorer"), options.pop("choose_by")
    own = {name: options.pop(name) for name in ("sampler", "trials", "storage", "quick", "population")}
    several, scoring = len(prompts) > 1, None
    if scorer is not None:
        own |= {"choose": choose_by != "criterion", "rule": choose_by if several and choose_by else "ideal"}
        scoring = Scoring(_scorers(scorer) if several else scorer, **own)
    elif several:
        problems.append(RecipeError("--prompts: several tasks are scored with labels: say --scorer"))
    if not several and choose_by in ("ideal", "worst", "mean"):
        problems.append(RecipeError(f"--choose-by {choose_by}: is for several tasks: say --prompts for each"))
    how = {name: options.pop(name) for name in ("keep_template_weight", "force")}
    generation, judging = generation_of(options), _judging(options)
    with one_commit():
        with collecting():
            refuse(*problems)
            if out is None:
                refuse(RecipeError("say -o RUN: the folder of the search"))
            how_read = {
                "samples": options.pop("samples"), "seed": options.pop("sample_seed"),
                "question": options.pop("question"), "split": options.pop("split"),
                "fields": _fields(options.pop("fields")), "image_folder": options.pop("image_folder"),
            }  # fmt: skip
            named = [named_file(text) for text in prompts] if several else [("", prompts[0])]
            sources = {name: PromptSource(file, **how_read) for name, file in named}
            if len(sources) < len(named):
                refuse(RecipeError("--prompts: two tasks have one name. Say NAME=FILE"))
            knobs = parse_knobs(options.pop("vary"), options.pop("values"))
            wanted = SearchOptions(
                vary=knobs, judging=judging, scoring=scoring, generation=generation, write=write, **how
            )  # fmt: skip
            planned = plan_search(_recipe(options), sources, out or "", wanted)
        with progress_bar("answers", unit="") as progress:
            found = planned.run(progress)
    if as_json:
        show(json.dumps(found.outcome, indent=1))
        return
    show(describe_search(found))
    plot = " and the plot" if any(found.folder.glob("search.[ps]*g")) else ""
    show(f"{found.folder}: every answer, search.json{plot}; recipe.yaml has the chosen value")
    if write is not None:
        show(f"{write}: merged with the chosen value")


def _scorers(said: str) -> str | dict[str, str]:
    """One scorer for all tasks, or one for each, from TASK=NAME,TASK=NAME."""
    if "=" not in said:
        return said
    pairs = [text.partition("=") for text in said.split(",")]
    return {task.strip(): name.strip() for task, _, name in pairs}


def _from_logs(said: tuple[str, ...], as_json: bool, options: dict[str, Any], problems: list[PolymergeError]) -> None:
    from polymerge.tuning.from_logs import choose_from_logs, plan_merge
    from polymerge.tuning.outcome import describe_search

    judging, write, vary = _judging(options), options.pop("write"), options.pop("vary")
    asked = {name: options.pop(name) for name in ("task", "value_pattern", "having", "samples", "out")}
    how = {name: options.pop(name) for name in ("keep_template_weight", "force")}
    seed, merge = options.pop("sample_seed"), None
    with collecting():
        refuse(*problems)
        source = log_folders(said)
        if write is not None:
            knobs = [parse_knob(name) for name in vary or _varied_by(source)]
            merge = plan_merge(_recipe(options), source, write, vary=knobs, **how)
    found = choose_from_logs(source, seed=seed, judging=judging, **asked)
    for note in found.outcome["notes"]:
        say(f"note: {note}")
    show(json.dumps(found.outcome, indent=1) if as_json else describe_search(found))
    if merge is not None:
        merge.merge(found.outcome["chosen"])
        (say if as_json else show)(f"{write}: merged with the chosen value")


def _varied_by(source: Path | dict[float, Path]) -> list[str]:
    """The parameters varied by the search run that serves as logs."""
    from polymerge.inference.run_folder import read_settings

    settings = read_settings(source) if isinstance(source, Path) else None
    return settings["vary"] if settings else []


def _recipe(options: dict[str, Any]) -> Any:
    try:
        return recipe_of(options)
    except RecipeError as error:
        refuse(error)
        return {}


def _judging(options: dict[str, Any]) -> Judging:
    from polymerge.tuning.criterion import Judging

    said = {name: options.pop(name) for name in ("criterion", "compare", "embedding_model", "smooth")}
    return Judging(**{name: value for name, value in said.items() if value is not None})


def _fields(said: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in said]
    for text, (_, equals, _) in zip(said, pairs, strict=True):
        if not equals:
            refuse(RecipeError(f"--field: '{text}' is not NAME=COLUMN"))
    return {name: column for name, equals, column in pairs if equals} or None
