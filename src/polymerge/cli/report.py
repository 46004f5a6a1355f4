"""report and demo: results of merging, as a page and as an example."""

from __future__ import annotations

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import PATH, argument, option
from polymerge.cli.streams import show
from polymerge.errors import MissingExtraError, human_size
from polymerge.paths import given_path

__all__ = ["demo", "report"]


@click.command(cls=FlagCommand)
@argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@option(
    "-o", "--out", metavar="FILE", type=PATH, default="report.html", show_default=True, help="Write the page to FILE."
)
@option("--title", help="Set the page's title; default: derived from the first merge.")
@option(
    "--json",
    "json_file",
    metavar="FILE",
    type=PATH,
    help="Write every number to FILE; default: beside the page, as .json.",
)
def report(runs: tuple[str, ...], out: str, title: str | None, json_file: str | None) -> None:
    """Show runs on one HTML page that works offline: recipe, plan, overlap, search, scores, knockouts, suggestions.

    RUN is a folder made by merge, search, evaluate, knockout or ablate, or a file written by `overlap --json`.
    """
    from polymerge.reporting.reports import report as run

    made = run(runs, out, title, json_file=json_file)
    shown = ", ".join(f"{source['kind']} {source['label']}" for source in made.data["sources"])
    show(f"{made.page}: {shown} ({human_size(made.page.stat().st_size)})")
    show(f"{made.json}: every number of it")


@click.command(cls=FlagCommand)
@option(
    "-o",
    "--out",
    type=PATH,
    default="demo-output",
    show_default=True,
    help="Write models, table, plot and page to this folder.",
)
@option("--train", is_flag=True, help="Train the three small models first (10 to 20 minutes on two cores).")
def demo(out: str, train: bool) -> None:
    """Merge a small reasoning model into a small VLM, and measure what it gains and loses."""
    from polymerge.demo.shipped import shipped_models

    if not train:
        shipped_models()  # before anything heavy is imported
    try:
        from polymerge.demo.story import run
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the demo needs {error.name}: pip install 'polymerge[demo]'") from None
    run(given_path(out), train=train)
