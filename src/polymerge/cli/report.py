"""report, push and demo: results of merging, as a page, on the hub, and as an example."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from polymerge.cli.flags import FlagCommand, notes_with_flags
from polymerge.cli.option_types import FOLDER, PATH, argument, option
from polymerge.cli.shared_options import AS_JSON, TRUST
from polymerge.cli.streams import paint_for, say, show
from polymerge.errors import MissingExtraError, collecting, human_size
from polymerge.paths import given_path

__all__ = ["demo", "push", "report"]


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
@argument("folder", type=FOLDER)
@argument("repository", metavar="OWNER/NAME")
@option("--public", is_flag=True, help="Let everybody see it; by default it is private.")
@option("--license", "licence", metavar="NAME", help="State this licence of the merge in its card, such as apache-2.0.")
@option(
    "--results", metavar="RUN", multiple=True, type=PATH,
    help="Put what this run of `polymerge evaluate` measured into the card, of whatever model; repeatable. Runs beside "
    "FOLDER that measured it are found.",
)  # fmt: skip
@option("--no-verify", "check", flag_value=False, default=True, help="Skip the check that it loads.")
@option("--force", is_flag=True, help="Upload what polymerge did not write, or what was changed since.")
@TRUST
@AS_JSON
def push(
    folder: str,
    repository: str,
    public: bool,
    licence: str | None,
    results: tuple[str, ...],
    check: bool,
    force: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Upload FOLDER, an output of polymerge, to the hub as OWNER/NAME: private unless told, after `verify`.

    Its card gets the licences of all inputs, as their cards state them, with a word where they do not go together, and
    what was measured. You have to be logged in (`hf auth login`).
    """
    from polymerge.engine.pushing import push as run
    from polymerge.evaluation.results import read_results, results_beside

    with collecting(needed=True):
        read = [read_results(given_path(one)) for one in results]
    found = [one for one in read if one is not None] or results_beside(given_path(folder))
    if not sys.stderr.isatty():
        _no_bars()
    made = run(
        folder, repository, private=not public, licence=licence, measured=[row for one in found for row in one.rows()],
        force=force, check=check, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        show(json.dumps(asdict(made), indent=1))
        return
    for note in made.notes:
        say(f"{paint_for(sys.stderr)('note', 'note:')} {notes_with_flags(note)}")
    show(f"{made.url}: {made.files} files, {'private' if made.private else 'public'}, commit {made.commit[:12]}")


def _no_bars() -> None:
    """Where nobody looks at a terminal, huggingface_hub draws no bars on it."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


@click.command(cls=FlagCommand)
@option(
    "-o",
    "--out",
    metavar="DIR",
    type=FOLDER,
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
