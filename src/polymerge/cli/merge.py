"""plan, merge, fold and verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from polymerge.cli.flags import FlagCommand, findings_with_flags
from polymerge.cli.option_types import FOLDER, MODEL, PATH, argument, option
from polymerge.cli.progress import progress_bar
from polymerge.cli.shared_options import (
    AS_JSON,
    IGNORE,
    JSON_OR_FILE,
    NAMES,
    TRUST,
    output_options,
    recipe_of,
    recipe_options,
)
from polymerge.cli.streams import paint_for, say, show
from polymerge.durable import write_file
from polymerge.errors import RecipeError, collecting, human_size, refuse
from polymerge.paths import given_path

if TYPE_CHECKING:
    from polymerge.engine.merge import Merged
    from polymerge.planning import Plan
    from polymerge.recipe.recipe import Names

__all__ = ["fold", "merge", "plan", "verify"]


@click.command(cls=FlagCommand)
@recipe_options()
@JSON_OR_FILE
@option("--full", is_flag=True, help="Print one line per tensor instead of one per kind.")
def plan(json_file: str | None, full: bool, **options: Any) -> None:
    """Print the fate of every tensor, from headers alone, or every problem of the recipe.

    RECIPE is a YAML file; the options can be used instead.
    """
    from polymerge.planning import make_plan
    from polymerge.planning.text import describe

    with collecting(needed=True):
        made = make_plan(recipe_of(options))
    if json_file is not None:
        text = json.dumps(_as_json(made), indent=1) + "\n"
        if json_file == "-":
            show(text, end="")
            return
        write_file(given_path(json_file), text)
    show(describe(made, full=full, paint=paint_for(sys.stdout)))


@click.command(cls=FlagCommand)
@recipe_options()
@output_options
@option(
    "--layout",
    type=click.Choice(["peft", "llava"]),
    help="Write a merged adapter in this layout; default: the template's.",
)
def merge(out: str | None, dry_run: bool, check: bool, as_json: bool, **options: Any) -> None:
    """Merge models into a new folder that loads as it is.

    RECIPE is a YAML file, or a plan written by `plan --json`; the options can be used instead.
    """
    _carry_out("merging", lambda: recipe_of(options), out, dry_run, check, as_json, options)


@click.command(cls=FlagCommand)
@argument("adapter", metavar="ADAPTER", type=MODEL)
@option(
    "--base",
    metavar="MODEL",
    type=MODEL,
    help="Fold into this model; default: the one that the adapter's config names.",
)
@IGNORE
@NAMES
@output_options
def fold(
    adapter: str,
    base: str | None,
    ignore: tuple[str, ...],
    names: Names | None,
    out: str | None,
    dry_run: bool,
    check: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fold an adapter into its base: an ordinary checkpoint that loads without PEFT.

    Non-LoRA weights of the adapter, such as a projector, replace those of the base, and so do a tokenizer, chat
    template, processor or generation config in its folder.
    """
    from polymerge.planning.folding import fold_recipe

    _carry_out(
        "folding",
        lambda: fold_recipe(adapter, base, ignore, names or "template"),
        out,
        dry_run,
        check,
        as_json,
        options,
    )


@click.command(cls=FlagCommand)
@argument("folder", type=FOLDER)
@option(
    "--base",
    metavar="MODEL",
    type=MODEL,
    help="Check an adapter against this base, whose config is read but not its weights.",
)
@option(
    "--inputs",
    is_flag=True,
    help="Check instead that the models at hand are those that FOLDER was made of, as its polymerge.json has them.",
)
@option("--sha256", is_flag=True, help="With --inputs: compare whole files, where their sha256 is recorded.")
@option(
    "--with",
    "program",
    type=click.Choice(["transformers", "vllm", "llama.cpp"]),
    help="Load it in this program too, and compare its greedy answers with those of transformers.",
)
@option(
    "--environment",
    metavar="PATH",
    type=PATH,
    help="Run the program in this virtual environment; for llama.cpp, its clone.",
)
@option("--prompts", metavar="FILE", type=PATH, help="Ask these, 8 at most; default: three questions and an image.")
@option("--max-new-tokens", type=int, default=16, show_default=True, help="Compare this many tokens of each answer.")
@option("--device", default="cpu", show_default=True, help="Run transformers, and llama.cpp, on this device.")
@option("--dtype", default="float32", show_default=True, help="Run both in float32, bfloat16, float16 or auto.")
@TRUST
@AS_JSON
@click.pass_context
def verify(
    context: click.Context,
    /,
    folder: str,
    base: str | None,
    inputs: bool,
    sha256: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Check that a checkpoint or adapter from a folder or the hub loads as it is, without allocating its weights.

    With --with, another program loads it, weights and all, and must say what transformers says, token for token.
    """
    program = options.pop("program")
    if inputs and program is not None:
        raise RecipeError("--inputs looks at what FOLDER was made of, --with at FOLDER itself: say one of them")
    if sha256 and not inputs:
        raise RecipeError("sha256: is for `inputs`")
    if program is None:
        from polymerge.engine.verify import verify as run
        from polymerge.engine.verify_inputs import verify_inputs

        for name in options:
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
                raise RecipeError(f"--{name.replace('_', '-')} is for another program: say which with --with")
        if inputs:
            result = verify_inputs(folder, sha256=sha256)
        else:
            result = run(folder, base=base, trust_remote_code=trust_remote_code)
    else:
        from polymerge.inference.programs.comparing import verify_with
        from polymerge.inference.prompts import PromptSource

        file = options.pop("prompts")
        prompts = None if file is None else PromptSource(file, samples=8)
        result = verify_with(
            folder, program, base=base, prompts=prompts, trust_remote_code=trust_remote_code, show=say, **options
        )
    if as_json:
        report = {"folder": folder, "passed": result.passed, "findings": [vars(found) for found in result.findings]}
        show(json.dumps(report, indent=1))
    else:
        said = "passed" if result.passed else "FAILED"
        show(f"{folder}: {paint_for(sys.stdout)(said, said)}\n{findings_with_flags(str(result))}")
    if not result.passed:
        raise click.exceptions.Exit(1)


def _carry_out(
    what: str,
    recipe: Callable[[], str | dict[str, Any]],
    out: str | None,
    dry_run: bool,
    check: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Print the plan of a recipe, or carry it out and print what was made."""
    from polymerge.checkpoints.stores import is_url
    from polymerge.checkpoints.target import check_target
    from polymerge.checkpoints.upload import Upload
    from polymerge.engine.device import open_device
    from polymerge.planning import make_plan
    from polymerge.planning.matrix_costs import cost_words
    from polymerge.planning.text import describe
    from polymerge.planning.text_words import note_lines, warnings_of

    with collecting(needed=True):
        if dry_run:
            pass
        elif out is None:
            refuse(RecipeError("Missing option '-o': the folder to make"))
        else:
            with collecting():
                if is_url(out):
                    Upload.to(out, options["force"]).check()
                else:
                    check_target(given_path(out), (), options["force"])
            with collecting():
                open_device(options["device"])
        made = make_plan(recipe())
    if dry_run or out is None:
        show(json.dumps(_as_json(made)) if as_json else describe(made, paint=paint_for(sys.stdout)))
        return
    from polymerge.engine.merge import merge as run

    for line in note_lines(warnings_of(made), paint_for(sys.stderr)):
        say(line)
    for one in (*made.stages, made):
        if cost := cost_words(one):
            say(f"cost{f' of stage {one.name!r}' if one is not made else ''}: {cost}")
    with progress_bar(what) as progress:
        merged = run(made, out, check=check, progress=progress, **options)
    for line in note_lines(merged.warnings, paint_for(sys.stderr)):
        say(line)
    _report(merged, as_json)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {**plan.to_json(), "hash": plan.hash}


def _report(merged: Merged, as_json: bool) -> None:
    """Print the result, as text or as JSON."""
    from polymerge.checkpoints.stores import is_url

    plan, counts = merged.plan, merged.plan.counts()
    if as_json:
        findings = merged.verification.findings if merged.verification else ()
        report = {"out": str(merged.folder), "plan_hash": plan.hash, "tensors": counts}
        more: dict[str, Any] = {"relative_error": dict(merged.errors)} if merged.errors else {}
        more |= {"update_norm": merged.norms.to_json()} if merged.norms else {}
        more |= {"warnings": list(merged.warnings)} if merged.warnings else {}
        show(json.dumps({**report, **more, "verification": [vars(finding) for finding in findings]}, indent=1))
        return
    merged_count = counts.pop("merged")
    others = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count or fate == "copied")
    what = "modules and full weights" if plan.of_adapters else "tensors"
    show(f"{merged.folder}: {merged_count} {what} merged, {others}, {human_size(plan.size)}")
    if merged.worked:
        machines = len({task.machine for task in merged.worked})
        read, written = (sum(counts) for counts in zip(*(task[-2:] for task in merged.worked), strict=True))
        words = f"{len(merged.worked)} tasks on {machines} machine{'s' if machines > 1 else ''}"
        show(f"  {words}: {human_size(read)} read, {human_size(written)} written")
    parts = ("weight file", "weight files") if merged.worked or is_url(merged.folder) else ("matrix", "matrices")
    resumed = ((merged.resumed_stages, "stage", "stages"), (merged.resumed, *parts))
    if words := " and ".join(f"{count} {one if count == 1 else more}" for count, one, more in resumed if count):
        were = "was" if merged.resumed_stages + merged.resumed == 1 else "were"
        show(f"  went on where it was stopped: {words} {were} finished")
    if merged.errors:
        worst = max(merged.errors, key=lambda module: merged.errors[module])
        mean = sum(merged.errors.values()) / len(merged.errors)
        show(
            f"  cut to rank: {mean:.2%} of the merged update's norm left out on average, "
            f"{merged.errors[worst]:.2%} at most ({worst})"
        )
    if merged.norms and merged.norms.ratio is not None:
        worst = max(merged.norms.modules, key=merged.norms.modules.__getitem__)
        show(
            f"  norm of the merged update: {merged.norms.ratio:.2f} of the adapters' (root mean square), "
            f"{merged.norms.modules[worst]:.2f} at most ({worst})"
        )
    verified = merged.verification
    show(findings_with_flags(str(verified)) if verified else "  not verified (--no-verify)")
