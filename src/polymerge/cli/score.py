"""score: what a file of predictions is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from polymerge.errors import RecipeError

if TYPE_CHECKING:
    from polymerge.evaluation.scoring import TaskScore

__all__ = ["score"]


@click.command()
@click.option("--task", metavar="TASK", help="A task of MM-MergeBench, such as ScienceQA or REC.")
@click.option("--scorer", metavar="NAME", help="Instead of a task: a scorer, such as exact, vqa, anls or cider.")
@click.option("--predictions", metavar="FILE", required=True, help="A JSON object a line: question_id and text.")
@click.option(
    "--annotations",
    metavar="FOLDER",
    required=True,
    help="The task's annotation folder; with --scorer, a question file that holds the answers.",
)
@click.option("--as-published", is_flag=True, help="Report what the published script prints; fail where it stops.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON, with each sample's share of right.")
def score(
    task: str | None, scorer: str | None, predictions: str, annotations: str, as_published: bool, as_json: bool
) -> None:
    """Score predictions against annotations: soundly, and as the benchmark's published script does.

    Where the two differ both are shown. The published scripts count empty answers as right, cut characters off boxes
    or pair by position; they stop on files that can still be scored, and then the reason is given.
    """
    from polymerge.evaluation.scoring import score_predictions, score_questions

    if (task is None) == (scorer is None):
        raise RecipeError("say what to score by: --task TASK or --scorer NAME, one of them")
    if task is not None:
        found = score_predictions(task, predictions, annotations)
    else:
        found = score_questions(str(scorer), predictions, annotations)
    if as_published and found.as_published is None:
        raise RecipeError(f"there is no number as published. {found.reason}")
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    _show(found, as_published)


def _show(found: TaskScore, published_first: bool) -> None:
    scores = {"score": found.score, "as published": found.as_published}
    further = {"score": found.metrics, "as published": found.published_metrics}
    if published_first:
        scores, further = dict(reversed(scores.items())), dict(reversed(further.items()))
    first, second = scores.items()
    whole = found.right is not None and float(found.right).is_integer()
    click.echo(f"{found.task}: {found.total} questions" + (f", {found.right:.0f} right" if whole else ""))
    differ = _percent(first[1]) != _percent(second[1])
    for name, value in (first, second) if differ else (first,):
        click.echo(f"  {name}: {_percent(value)}{_listed(further[name])}")
    if found.reason:
        click.echo(f"  {found.reason}")
    for note in found.notes:
        click.echo(f"  note: {note}")


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _listed(metrics: Mapping[str, float | None]) -> str:
    shown = ", ".join(
        f"{name} {value:.10g}" if name == "answered" and value is not None else f"{name} {_percent(value)}"
        for name, value in metrics.items()
    )
    return f" ({shown})" if shown else ""
