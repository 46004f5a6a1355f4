"""inspect, methods, families and doctor: what is available, before a merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from polymerge.cli.flags import FlagCommand
from polymerge.cli.option_types import MODEL, PATH, argument, option
from polymerge.cli.shared_options import AS_JSON, IGNORE
from polymerge.cli.streams import paint_for, show
from polymerge.errors import collecting, human_size
from polymerge.tables import aligned

if TYPE_CHECKING:
    from polymerge.methods.method import Parameter
    from polymerge.planning.compare import AdapterPortrait, Joint, Portrait

__all__ = ["doctor", "families", "inspect", "methods"]


@click.command(cls=FlagCommand)
@argument("models", metavar="MODEL...", nargs=-1, required=True, type=MODEL)
@option(
    "--against",
    metavar="ADAPTER...",
    multiple=True,
    help="Show how much of these source adapters the first, merged one preserves.",
)
@IGNORE
@option(
    "--largest", type=click.IntRange(min=1), help="With --against: treat this many singular directions as the largest."
)
@AS_JSON
def inspect(
    models: tuple[str, ...], against: tuple[str, ...], ignore: tuple[str, ...], largest: int | None, as_json: bool
) -> None:
    """Describe models or adapters, from headers alone, and tell which can be merged with each other.

    MERGED --against A B ... compares a merged adapter by singular vectors with those that went into it.
    """
    if against or largest:
        # a shell's `MERGED --against A B C` reaches this as against A, models MERGED B C
        _show_robustness(models[0], (*against, *models[1:]), largest, as_json)
        return
    from polymerge.planning.compare import inspect as run

    found = run(*models, ignore=ignore)
    if as_json:
        if found.adapters:
            show(json.dumps({"adapters": list(map(asdict, found.adapters))}, indent=1))
        if found.models:
            report = {"models": list(map(asdict, found.models)), "pairs": list(map(asdict, found.pairs))}
            show(json.dumps(report, indent=1))
        return
    described = _model_table if sys.stdout.isatty() else _model_lines
    for line in (*_adapter_lines(found.adapters), *described(found.models), *_pair_lines(found.pairs)):
        show(line)


def _adapter_lines(adapters: Sequence[AdapterPortrait]) -> Iterator[str]:
    for one in adapters:
        ranks, scalings = (", ".join(f"{value:g}" for value in values) for values in (one.ranks, one.scalings))
        yield f"{one.adapter}: LoRA adapter ({one.layout} layout) of {one.base or 'a base not named'}"
        yield f"  {one.modules} modules, rank {ranks}, times {scalings}; {len(one.full_weights)} full weights"
        yield from (f"  {name}: {became}" for name, became in one.files.items())


def _model_lines(models: Sequence[Portrait]) -> Iterator[str]:
    for one in models:
        yield f"{one.label}: family {one.family}, {one.tensors} tensors, {human_size(one.size)}"
        yield (
            f"  text tower: {one.text_tower or 'unknown'}, {one.layers} layers, width {one.width}, "
            f"vocabulary {one.vocabulary}, head {'tied' if one.tied_head else 'its own'}"
        )
        yield from (f"  {part}: {count} tensors, {human_size(size)}" for part, (count, size) in one.parts.items())
        yield f"  dtypes: {', '.join(f'{count} {dtype}' for dtype, count in one.dtypes.items())}"
        yield from (f"  note: {remark}" for remark in one.remarks)


def _model_table(models: Sequence[Portrait]) -> Iterator[str]:
    """The same as columns, for a terminal."""
    if not models:
        return
    parts = list(dict.fromkeys(part for one in models for part in one.parts))
    head = ["model", "family", "text tower", "layers", "width", "vocabulary", "head", "dtypes", "size", *parts]
    rows = [
        [
            one.label, one.family, one.text_tower or "unknown", str(one.layers), str(one.width), str(one.vocabulary),
            "tied" if one.tied_head else "its own", ", ".join(one.dtypes), human_size(one.size),
            *(human_size(one.parts[part][1]) if part in one.parts else "-" for part in parts),
        ]
        for one in models
    ]  # fmt: skip
    first, *others = aligned([head, *rows], left=3)
    yield paint_for(sys.stdout)("head", first)
    yield from others
    yield from (f"note: {one.label}: {remark}" for one in models for remark in one.remarks)


def _pair_lines(pairs: Sequence[Joint]) -> Iterator[str]:
    for one in pairs:
        can = "can be merged into" if not one.obstacles else "cannot be merged into"
        parts = f" in {', '.join(one.parts)} ({one.joined} tensors)" if not one.obstacles and one.parts else ""
        yield f"{one.other} {can} {one.template}{parts}"
        yield from (f"  {line}" for line in (*one.obstacles, *one.kept))


def _show_robustness(merged: str, against: Sequence[str], largest: int | None, as_json: bool) -> None:
    from polymerge.analysis.robustness import robustness

    if not against:
        raise click.UsageError("--largest goes with --against ADAPTER")
    found = robustness(merged, against, largest)
    if as_json:
        show(json.dumps({"merged": merged, "against": [asdict(one) for one in found]}, indent=1))
        return
    show(f"{merged}: of each adapter's singular directions, |cosine| and merged / own singular value")
    for one in found:
        words = [
            f"{name} {group.cosine:.3f}, {group.ratio:.3f} ({group.count})" if group else f"{name} none"
            for name, group in (("largest", one.largest), ("rest", one.rest))
        ]
        show(f"  {one.adapter}: {'; '.join(words)} over {len(one.modules)} modules")
        if one.absent:
            show(f"    {len(one.absent)} of its modules are not in the merge, such as {one.absent[0]}")


@click.command(cls=FlagCommand)
@argument("files", metavar="[FILE...]", nargs=-1, type=PATH)
@AS_JSON
def methods(files: tuple[str, ...], as_json: bool) -> None:
    """List the merge methods, their parameters with defaults, and their sources.

    With FILEs, those of your own in these Python files, too, which are run; methods of installed packages are listed.
    """
    from polymerge.methods.own import add_methods, find_method, installed
    from polymerge.methods.table import ADAPTERS, METHODS, MODIFIERS

    add_methods(files)
    for name in installed():
        find_method(name)
    if as_json:
        rows = {name: asdict(row) for name, row in METHODS.items()}
        show(json.dumps(rows, indent=1, default=lambda function: f"{function.__module__}:{function.__qualname__}"))
        return
    for row in METHODS.values():
        show(f"{paint_for(sys.stdout)('head', row.name)}: {row.title}\n  from: {row.source}\n  works on: {row.on}")
        for parameter in row.parameters:
            show(f"  {_words(parameter)}")
    show("any of them that works on deltas or matrices:")
    for parameter in MODIFIERS:
        show(f"  {_words(parameter)}")
    show("any of them, where the models are adapters (space: only those that work on weights or deltas):")
    for parameter in ADAPTERS:
        show(f"  {_words(parameter)}")


def _words(parameter: Parameter) -> str:
    """Describe a parameter: its values, its default, whether each model has its own."""
    default = "required" if parameter.default is None else f"default {parameter.default}".lower()
    if parameter.optional:
        default = "optional" if parameter.default is None else f"{default}, null for none"
    span = " | ".join(parameter.choices) or (
        f"{parameter.low:g} to {parameter.high:g}" if parameter.high < float("inf") else parameter.kind
    )
    return f"{parameter.name}: {span}, {default}{', per model' if parameter.each else ''}"


@click.command(cls=FlagCommand)
@argument("models", metavar="[MODEL...]", nargs=-1, type=MODEL)
@IGNORE
@AS_JSON
def families(models: tuple[str, ...], ignore: tuple[str, ...], as_json: bool) -> None:
    """List the model families, the rules for their tensor names, and an example of each.

    With MODELs, say which way each of them is read: by a family's table, by rules derived from the class that
    transformers has for it, which are printed as a table that can be added, or by the names alone (generic).
    """
    from polymerge.families import FAMILIES

    if models:
        for line in _reading_lines(models, ignore, as_json):
            show(line)
        return
    if as_json:
        show(json.dumps({name: asdict(family) for name, family in FAMILIES.items()}, indent=1))
        return
    for family in FAMILIES.values():
        example = f", such as {family.source}" if family.source else ""
        show(f"{paint_for(sys.stdout)('head', family.name)}: {family.title}{example}")
        for rule in family.rules:
            show(f"  {rule.pattern} -> {rule.canonical}")
    show("any other model that transformers can build is read as its class loads it: polymerge families MODEL")


def _reading_lines(models: Sequence[str], ignore: Sequence[str], as_json: bool) -> Iterator[str]:
    """Say how each model's names are read; as JSON, with its family."""
    from polymerge.families.derived import as_table
    from polymerge.planning.inputs import open_each

    with collecting(needed=True):
        opened = open_each(models, ignore)
    if as_json:
        found = {one.label: {"derived from": one.by or None, "family": asdict(one.family)} for one in opened}
        yield json.dumps(found, indent=1)
        return
    for one in opened:
        if one.generic:
            yield f"{one.label}: generic: no table covers it, tensors are joined by identical names{one.why_generic}"
        elif one.by:
            yield f"{one.label}: derived from {one.by}, which is this table:"
            yield as_table(one.family)
        else:
            yield f"{one.label}: table of family {one.family.name} ({one.family.title})"
            yield from (f"  {rule.pattern} -> {rule.canonical}" for rule in one.family.rules)


@click.command(cls=FlagCommand)
@AS_JSON
def doctor(as_json: bool) -> None:
    """Say what is installed and works: packages, extras and what they are for, kernels, caches, free space.

    Ends with status 1 if something that polymerge cannot do without is missing or broken.
    """
    from polymerge.engine.installation import describe
    from polymerge.engine.installation import doctor as run

    found = run()
    paint = paint_for(sys.stdout)
    if as_json:
        show(json.dumps(found.to_json(), indent=1))
    else:
        for title, rows in describe(found):
            if title:
                show(f"\n{paint('head', title)}")
            for line in aligned(rows, left=3):
                show(f"  {line}")
        said = "passed" if not found.problems else "FAILED"
        words = "everything that polymerge needs is here" if not found.problems else "\n".join(found.problems)
        show(f"\n{paint(said, words)}")
    if found.problems:
        raise click.exceptions.Exit(1)
