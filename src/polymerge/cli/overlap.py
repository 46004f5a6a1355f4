"""overlap: what predicts interference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from polymerge.cli.progress import progress_bar
from polymerge.cli.recipe_options import recipe_of, recipe_options
from polymerge.errors import OutputError

__all__ = ["overlap"]


@click.command()
@recipe_options
@click.option("--density", type=float, default=0.2, show_default=True, help="Share of each tensor's entries to keep.")
@click.option("--rank", type=int, default=8, show_default=True, help="Singular directions that are compared.")
@click.option("--no-svd", is_flag=True, help="Leave out singular values, which take most of the time.")
@click.option(
    "--sort", type=click.Choice(["layer", "conflict"]), default="layer", show_default=True,
    help="The order of the lines; conflict: most of it first.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as processors, up to 8.")
@click.option("--json", "json_file", metavar="FILE", help="Write every number as JSON; - for standard output.")
def overlap(
    density: float, rank: int, no_svd: bool, sort: str, threads: int | None, json_file: str | None, **options: Any
) -> None:
    """Show how the deltas of a merge lie to each other: norms, cosines, conflicts of sign, shared directions.

    RECIPE is a YAML file; the options say the same without a file. Nothing is merged, and no weight of the recipe
    plays a part. Where a method reads no base, what is compared are differences from the template.
    """
    from polymerge.planning import make_plan

    plan = make_plan(recipe_of(options))
    from polymerge.analysis.overlap import overlap as run
    from polymerge.analysis.overlap_text import describe_overlap

    with progress_bar("comparing", unit="") as progress:
        found = run(plan, density=density, rank=rank, svd=not no_svd, threads=threads, progress=progress)
    if json_file is not None:
        text = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
        if json_file == "-":
            click.echo(text, nl=False)
            return
        try:
            Path(json_file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--json {json_file}: cannot be written: {error.strerror}") from None
    click.echo(describe_overlap(found, by_conflict=sort == "conflict"))
