"""Options shared by several commands, and the recipe built from options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from polymerge.cli.option_types import (
    FOLDER,
    JSON_FILE,
    METHOD,
    MODEL,
    NUMBERS,
    PATH,
    SETTING,
    SIZE,
    argument,
    option,
)
from polymerge.errors import RecipeError, refuse
from polymerge.paths import exists

if TYPE_CHECKING:
    from polymerge.inference.generation import Generation

__all__ = [
    "AS_JSON",
    "FORCE_RUN",
    "IGNORE",
    "JSON_OR_FILE",
    "METHODS",
    "NAMES",
    "SAMPLES",
    "SAMPLE_SEED",
    "SCORER",
    "SHA256",
    "THREADS",
    "TRUST",
    "generation_of",
    "generation_options",
    "given",
    "named_file",
    "output_options",
    "recipe_of",
    "recipe_options",
    "run_folder",
]

F = TypeVar("F", bound=Callable[..., Any])

THREADS = click.IntRange(1, 1024)
"""Numbers of threads and worker processes."""

AS_JSON = option("--json", "as_json", is_flag=True, help="Print a JSON report instead of text.")
JSON_OR_FILE = option(
    "--json", "json_file", metavar="[FILE]", type=JSON_FILE, is_flag=False, flag_value="-",
    help="Write every number to FILE as JSON, beside the text; without FILE, print JSON instead of text.",
)  # fmt: skip
IGNORE = option(
    "--ignore",
    metavar="GLOB",
    multiple=True,
    help="Leave out tensors of every input by their stored name; repeatable.",
)
NAMES = option(
    "--names", type=click.Choice(["template", "published"]),
    help="Name the output's tensors as the template does (the default), or as its family is published.",
)  # fmt: skip
TRUST = option("--trust-remote-code", is_flag=True, help="Run Python files that come with the checkpoint.")
SHA256 = option(
    "--sha256", is_flag=True,
    help="Record the sha256 of every input file, for which all of each is read; default: of those that the hub lists.",
)  # fmt: skip
SCORER = option("--scorer", metavar="NAME", help="Score answers by NAME: exact, vqa, anls, cider, ...")
SAMPLES = option(
    "--samples", type=int, default=100, show_default=True, help="Draw this many prompts (of each task); 0 takes all."
)
SAMPLE_SEED = option("--sample-seed", type=int, default=2, show_default=True, help="Seed of the draw of prompts.")
FORCE_RUN = option("--force", is_flag=True, help="Discard a run with other settings in RUN.")

METHODS = option(
    "--methods", metavar="FILE", multiple=True, type=PATH,
    help="Run this Python file, and know the merge methods of your own in it; repeatable.",
)  # fmt: skip


def _on_ray(words: str) -> Callable[[F], F]:
    return option("--ray", metavar="ADDRESS", is_flag=False, flag_value="local", help=words)


_RECIPE = argument("recipe", required=False, type=PATH)

_IN_RECIPE = {
    "template": option(
        "--template", metavar="MODEL", type=MODEL,
        help="Take the output's layout from this model; it is the first to merge.",
    ),
    "others": option(
        "--with", "others", metavar="MODEL", type=MODEL, multiple=True, help="Merge this model too; repeatable."
    ),
    "base": option("--base", metavar="MODEL", type=MODEL, help="Take deltas from this common ancestor."),
    "method": option("--method", metavar="NAME", type=METHOD, help="Merge with this method; see `polymerge methods`."),
    "weight": option(
        "--weight", metavar="W,W,...", type=NUMBERS, help="Set each model's weight, the template's first."
    ),
    "parameters": option(
        "-p", "--parameter", "parameters", metavar="NAME=VALUE", type=SETTING, multiple=True,
        help="Set any other parameter of the method; repeatable.",
    ),
    "parts": option(
        "--parts", metavar="PART,...", help="Merge only these parts: text, vision, projector, audio."
    ),
    "exclude": option(
        "--exclude", metavar="GLOB", multiple=True, help="Keep the template's tensors by canonical name; repeatable."
    ),
    "ignore": IGNORE,
    "overflow": option(
        "--overflow", metavar="GLOB", multiple=True,
        help="Let numbers of tensors become infinite by canonical name; repeatable.",
    ),
    "vocab": option(
        "--vocab", metavar="HOW", help="Treat differing vocabularies by template, overlap (shared rows) or by-token."
    ),
    "tokenizer_source": option(
        "--tokenizer-source", metavar="SOURCE",
        help="Take the tokenizer of base, of a MODEL, or the union of all, and fill in rows that a model lacks.",
    ),
    "chat_template": option(
        "--chat-template", metavar="TEMPLATE", help="Write this chat template: auto, a file, or Jinja text."
    ),
    "names": NAMES,
    "dtype": option("--dtype", metavar="DTYPE", help="Write merged tensors in this dtype."),
    "seed": option("--seed", type=int, help="Seed of methods that draw random numbers."),
}  # fmt: skip

_OUTPUT = (
    option("-o", "--out", metavar="OUT", type=FOLDER, help="Write the checkpoint to this folder or URL (s3://...)."),
    option(
        "--device", default="cpu", show_default=True, help="Compute on cpu, or stream blocks through this torch device."
    ),
    _on_ray("Make the weight files on a Ray cluster; without an ADDRESS, on one of this machine."),
    option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Maximum size of a weight file."),
    option(
        "--threads", type=THREADS,
        help="Compute this many blocks at once; default: one per processor, up to 8.",
    ),
    option(
        "--format", "file_format", type=click.Choice(["safetensors", "torch"]), default="safetensors",
        show_default=True, help="Write weight files in this format.",
    ),
    option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    option("--force", is_flag=True, help="Replace OUT if it exists."),
    option(
        "--no-verify", "check", flag_value=False, default=True, help="Skip the final check that the output loads."
    ),
    option(
        "--trust-remote-code", is_flag=True, help="Let the final check run Python files that come with the checkpoint."
    ),
    SHA256,
    AS_JSON,
)  # fmt: skip


def given(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Add options to a command, in this order."""

    def add(command: F) -> F:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def recipe_options(*, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Add the recipe argument and the options that replace a recipe file.

    without  options with another meaning in the command
    """
    return given(_RECIPE, *(option for name, option in _IN_RECIPE.items() if name not in without), METHODS)


def output_options(command: F) -> F:
    """Add the options for the output of a merge."""
    return given(*_OUTPUT)(command)


def run_folder(*, required: bool = False) -> Callable[[F], F]:
    """Add the option for the folder of a run."""
    return option(
        "-o", "--out", metavar="RUN", required=required, type=FOLDER,
        help="Keep answers and results in this folder; an interrupted run resumes from it.",
    )  # fmt: skip


def generation_options(*, max_new_tokens: int | None = 16, ray: bool = True, tools: bool = False) -> Callable[[F], F]:
    """Add the options for generation; `generation_of` reads them.

    max_new_tokens  the default; None where each task has its own
    ray             whether models may run on a Ray cluster
    tools           whether a tool may take the place of the engine
    """
    of_task = "" if max_new_tokens else "; default: the benchmark's value for each task"
    options = [
        option("--device", default="cpu", show_default=True, help="Run the model on this torch device."),
        option(
            "--dtype", "model_dtype", default="auto", show_default=True,
            help="Run the model in auto (as stored), float32, bfloat16 or float16.",
        ),
        option(
            "--max-new-tokens", type=int, default=max_new_tokens, show_default=bool(max_new_tokens),
            help=f"Truncate answers after this many tokens{of_task}.",
        ),
        option(
            "--batch-size", type=int, default=16, show_default=True, help="Answer this many prompts at once."
        ),
        option(
            "--workers", type=int, default=1, show_default=True, help="Run this many copies of the model in parallel."
        ),
        option(
            "--engine", metavar="NAME", default="transformers", show_default=True,
            help="Run the model by transformers, or by vllm in a process of its own.",
        ),
        option(
            "--environment", metavar="PATH", type=PATH,
            help=f"Run the engine{' or tool' if tools else ''} in this virtual environment; default: the current one.",
        ),
        option(
            "--engine-option", "engine_options", metavar="NAME=VALUE", type=SETTING, multiple=True,
            help="Start the engine with a further argument of `vllm.LLM`: tensor_parallel_size=2; repeatable.",
        ),
        option(
            "--torch-threads", type=THREADS,
            help="Threads of each worker; default: the processors divided among them.",
        ),
    ]  # fmt: skip
    on_ray = _on_ray("Run workers on a Ray cluster; without an ADDRESS, on a local one.")
    return given(*options, *([on_ray] if ray else []), TRUST)


def generation_of(options: dict[str, Any]) -> Generation:
    """Build generation settings from the options; removes them from `options`."""
    from polymerge.inference.generation import Generation

    names = (
        "max_new_tokens", "batch_size", "device", "workers", "torch_threads", "ray", "trust_remote_code", "engine",
        "environment",
    )  # fmt: skip
    said = {name: options.pop(name, None) for name in names} | {"engine_options": dict(options.pop("engine_options"))}
    return Generation(
        dtype=options.pop("model_dtype"), **{name: value for name, value in said.items() if value is not None}
    )


def recipe_of(options: dict[str, Any]) -> str | dict[str, Any]:
    """The given recipe file, or a recipe built from the options; removes them from `options`.

    The files of the user's own methods are run before. raises RecipeError if neither or both are given.
    """
    if methods := options.pop("methods", ()):
        from polymerge.methods.own import add_methods

        add_methods(methods)
    recipe: str | None = options.pop("recipe")
    found = {name: options.pop(name, None) for name in _IN_RECIPE}
    said = [name for name, value in found.items() if value not in (None, ())]
    if recipe is not None:
        if said:
            raise RecipeError(f"a recipe file and --{said[0].replace('others', 'with')} together: say it in the recipe")
        return recipe
    needed = {"template": "--template MODEL", "others": "--with MODEL", "method": "--method NAME"}
    missing = [option for name, option in needed.items() if not found[name]]
    if len(missing) == len(needed):
        raise RecipeError(f"say what to merge: a recipe file, or {' '.join(missing)}")
    if missing:
        raise RecipeError(f"say what to merge: without a recipe file it needs {' and '.join(missing)}, too")
    models = [found["template"], *found["others"]]
    weights = found["weight"]
    if weights and len(weights) != len(models):
        wrong = f"{len(weights)} numbers for {len(models)} models. Give one for each, the template's first"
        refuse(RecipeError(f"--weight: {wrong}"))
        weights = [1.0] * len(models)  # so that nothing is said to be missing
    data: dict[str, Any] = {
        "merge_method": found["method"],
        "template": found["template"],
        "base_model": found["base"],
        "models": [
            {"model": model} | ({"parameters": {"weight": weights[place]}} if weights else {})
            for place, model in enumerate(models)
        ],
        "parameters": dict(found["parameters"]),
        "parts": found["parts"].split(",") if found["parts"] else None,
        "exclude": list(found["exclude"]),
        "ignore": list(found["ignore"] or ()),
        "overflow": list(found["overflow"] or ()),
        "vocab": found["vocab"],
        "tokenizer_source": found["tokenizer_source"],
        "chat_template": found["chat_template"],
        "names": found["names"],
        "dtype": found["dtype"],
        "seed": found["seed"],
    }
    return {name: value for name, value in data.items() if value not in (None, [], {})}


def named_file(text: str) -> tuple[str, str]:
    """Split [NAME=]FILE into the name of a task and its file; an existing path is a FILE, whatever characters it
    has.
    """
    name, equals, file = text.partition("=")
    if equals and not exists(text):
        return name, file
    return Path(text.partition("@")[0]).stem, text
