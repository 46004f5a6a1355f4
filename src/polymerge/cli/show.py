"""inspect, methods and families: what there is, before a merge."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

__all__ = ["families", "inspect", "methods"]

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Report as JSON.")


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@AS_JSON
def inspect(models: tuple[str, ...], as_json: bool) -> None:
    """Show what models are, from headers alone, and which can be merged with which."""
    from polymerge.planning.compare import inspect_models
    from polymerge.planning.words import human_size

    portraits, joints = inspect_models(models)
    if as_json:
        report = {"models": [asdict(portrait) for portrait in portraits], "pairs": [asdict(joint) for joint in joints]}
        click.echo(json.dumps(report, indent=1))
        return
    for portrait in portraits:
        click.echo(
            f"{portrait.label}: family {portrait.family}, {portrait.tensors} tensors, {human_size(portrait.size)}"
        )
        click.echo(
            f"  text tower: {portrait.text_tower or 'unknown'}, {portrait.layers} layers, width {portrait.width}, "
            f"vocabulary {portrait.vocabulary}, head {'tied' if portrait.tied_head else 'its own'}"
        )
        for part, (count, part_size) in portrait.parts.items():
            click.echo(f"  {part}: {count} tensors, {human_size(part_size)}")
        click.echo(f"  dtypes: {', '.join(f'{count} {dtype}' for dtype, count in portrait.dtypes.items())}")
    for joint in joints:
        can = "can be merged into" if not joint.obstacles else "cannot be merged into"
        parts = f" in {', '.join(joint.parts)} ({joint.joined} tensors)" if not joint.obstacles and joint.parts else ""
        click.echo(f"{joint.other} {can} {joint.template}{parts}")
        for line in (*joint.obstacles, *joint.kept):
            click.echo(f"  {line}")


@click.command()
@AS_JSON
def methods(as_json: bool) -> None:
    """List the merge methods, their parameters with defaults, and where each is from."""
    from polymerge.methods.table import METHODS

    if as_json:
        click.echo(json.dumps({name: asdict(row) for name, row in METHODS.items()}, indent=1, default=str))
        return
    for row in METHODS.values():
        click.echo(f"{row.name}: {row.title}\n  from: {row.source}\n  works on: {row.on}")
        for parameter in row.parameters:
            default = "required" if parameter.default is None else f"default {parameter.default}".lower()
            span = " | ".join(parameter.choices) or (
                f"{parameter.low:g} to {parameter.high:g}" if parameter.high < float("inf") else parameter.kind
            )
            click.echo(f"  {parameter.name}: {span}, {default}{', per model' if parameter.each else ''}")


@click.command()
@AS_JSON
def families(as_json: bool) -> None:
    """List the model families, how their names are read, and an example of each."""
    from polymerge.families import FAMILIES

    if as_json:
        click.echo(json.dumps({name: asdict(family) for name, family in FAMILIES.items()}, indent=1))
        return
    for family in FAMILIES.values():
        click.echo(f"{family.name}: {family.title}{f', such as {family.source}' if family.source else ''}")
        for rule in family.rules:
            click.echo(f"  {rule.pattern} -> {rule.canonical}")
