"""inspect, methods and families: what there is, before a merge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from polymerge.cli.shared_options import AS_JSON, IGNORE
from polymerge.errors import PolymergeError

if TYPE_CHECKING:
    from polymerge.methods.table import Parameter

__all__ = ["families", "inspect", "methods"]


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--against",
    metavar="ADAPTER...",
    multiple=True,
    help="Show what the first adapter, a merged one, kept of these that went into it.",
)
@IGNORE
@click.option("--largest", type=click.IntRange(min=1), help="With --against: count this many as the largest.")
@AS_JSON
def inspect(
    models: tuple[str, ...], against: tuple[str, ...], ignore: tuple[str, ...], largest: int | None, as_json: bool
) -> None:
    """Show what models or adapters are, from headers alone, and which can be merged with which.

    MERGED --against A B ... compares a merged adapter by singular vectors with those that went into it.
    """
    if against or largest:
        # a shell's `MERGED --against A B C` reaches this as against A, models MERGED B C
        _show_robustness(models[0], (*against, *models[1:]), largest, as_json)
        return
    adapters = [model for model in models if _is_adapter(model)]
    if adapters:
        _show_adapters(adapters, as_json)
        if len(adapters) == len(models):
            return
        models = tuple(model for model in models if model not in adapters)
    from polymerge.planning.compare import inspect_models
    from polymerge.planning.text_words import human_size

    portraits, joints = inspect_models(models, ignore)
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
        for remark in portrait.remarks:
            click.echo(f"  note: {remark}")
    for joint in joints:
        can = "can be merged into" if not joint.obstacles else "cannot be merged into"
        parts = f" in {', '.join(joint.parts)} ({joint.joined} tensors)" if not joint.obstacles and joint.parts else ""
        click.echo(f"{joint.other} {can} {joint.template}{parts}")
        for line in (*joint.obstacles, *joint.kept):
            click.echo(f"  {line}")


def _is_adapter(source: str) -> bool:
    from polymerge.checkpoints.adapter import is_adapter
    from polymerge.checkpoints.folder import split_source
    from polymerge.checkpoints.hub import locate

    try:
        return split_source(source)[1] is None and is_adapter(locate(source))
    except PolymergeError:
        return False  # said, with all else that is wrong, when it is opened


def _show_adapters(sources: Sequence[str], as_json: bool) -> None:
    from polymerge.checkpoints.adapter import open_adapter
    from polymerge.checkpoints.hub import locate

    portraits: list[dict[str, Any]] = []
    for source in sources:
        adapter = open_adapter(source, locate(source))
        portraits.append(
            {
                "adapter": source,
                "base": adapter.config.get("base_model_name_or_path"),
                "layout": adapter.layout,
                "modules": len(adapter.pairs),
                "ranks": sorted({pair.rank for pair in adapter.pairs.values()}),
                "scalings": sorted({pair.scaling for pair in adapter.pairs.values()}),
                "full_weights": sorted(adapter.extras),
                "files": dict(adapter.became),
                "size": sum(entry.nbytes for entry in adapter.entries),
            }
        )
    if as_json:
        click.echo(json.dumps({"adapters": portraits}, indent=1))
        return
    for one in portraits:
        ranks, scalings = (", ".join(f"{value:g}" for value in one[name]) for name in ("ranks", "scalings"))
        click.echo(f"{one['adapter']}: LoRA adapter ({one['layout']} layout) of {one['base'] or 'a base not named'}")
        click.echo(
            f"  {one['modules']} modules, rank {ranks}, times {scalings}; {len(one['full_weights'])} full weights"
        )
        for name, became in one["files"].items():
            click.echo(f"  {name}: {became}")


def _show_robustness(merged: str, against: Sequence[str], largest: int | None, as_json: bool) -> None:
    from polymerge.analysis.robustness import robustness

    if not against:
        raise click.UsageError("--largest goes with --against ADAPTER")
    found = robustness(merged, against, largest)
    if as_json:
        click.echo(json.dumps({"merged": merged, "against": [asdict(one) for one in found]}, indent=1))
        return
    click.echo(f"{merged}: of each adapter's singular directions, |cosine| and merged / own singular value")
    for one in found:
        words = [
            f"{name} {group.cosine:.3f}, {group.ratio:.3f} ({group.count})" if group else f"{name} none"
            for name, group in (("largest", one.largest), ("rest", one.rest))
        ]
        click.echo(f"  {one.adapter}: {'; '.join(words)} over {len(one.modules)} modules")
        if one.absent:
            click.echo(f"    {len(one.absent)} of its modules are not in the merge, such as {one.absent[0]}")


@click.command()
@AS_JSON
def methods(as_json: bool) -> None:
    """List the merge methods, their parameters with defaults, and where each is from."""
    from polymerge.methods.table import ADAPTERS, METHODS

    if as_json:
        click.echo(json.dumps({name: asdict(row) for name, row in METHODS.items()}, indent=1, default=str))
        return
    for row in METHODS.values():
        click.echo(f"{row.name}: {row.title}\n  from: {row.source}\n  works on: {row.on}")
        for parameter in row.parameters:
            click.echo(f"  {_words(parameter)}")
    click.echo("any of them, where the models are adapters (space: only those that work on weights or deltas):")
    for parameter in ADAPTERS:
        click.echo(f"  {_words(parameter)}")


def _words(parameter: Parameter) -> str:
    """A parameter for people: its values, its default, whether each model has its own."""
    default = "required" if parameter.default is None else f"default {parameter.default}".lower()
    if parameter.optional:
        default = "optional" if parameter.default is None else f"{default}, null for none"
    span = " | ".join(parameter.choices) or (
        f"{parameter.low:g} to {parameter.high:g}" if parameter.high < float("inf") else parameter.kind
    )
    return f"{parameter.name}: {span}, {default}{', per model' if parameter.each else ''}"


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
