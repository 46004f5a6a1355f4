"""report: one page that shows what merging did."""

from __future__ import annotations

import click

__all__ = ["report"]


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--out", metavar="FILE", default="report.html", show_default=True, help="The page.")
@click.option("--title", help="Of the page; default: made of the first merge.")
@click.option("--json", "json_file", metavar="FILE", help="Every number of the page; default: beside it, FILE.json.")
def report(runs: tuple[str, ...], out: str, title: str | None, json_file: str | None) -> None:
    """Show runs as one HTML page that needs no network: recipe, plan, overlap, search, scores, knockouts, what next.

    RUN is a folder that merge, search, evaluate, knockout or ablate has made, or a file as `overlap --json` writes.
    """
    from polymerge.reporting.report import report as run

    made = run(runs, out, title, json_file=json_file)
    shown = ", ".join(f"{source['kind']} {source['label']}" for source in made.data["sources"])
    click.echo(f"{made.page}: {shown} ({made.page.stat().st_size / 1e6:.2f} MB)")
    click.echo(f"{made.json}: every number of it")
