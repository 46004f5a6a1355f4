"""A plan of adapters as text: modules that differ in their layer alone in one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from polymerge.families.rules import text_layer
from polymerge.planning.fit import layer_pattern
from polymerge.planning.pairs import AdapterPlan, PairStep
from polymerge.planning.text_words import (
    Paint,
    beside_words,
    by_reason,
    human_size,
    note_lines,
    plain,
    ranges,
    setting_words,
)

__all__ = ["describe_adapters"]


def describe_adapters(plan: AdapterPlan, *, full: bool = False, paint: Paint = plain) -> str:
    """The plan as text, warnings first, by kinds of modules (`full`: module by module), fates as `paint` has them."""
    return "\n".join(
        [
            *note_lines(plan.warnings, paint),
            *([""] if plan.warnings else []),
            *_inputs(plan),
            "",
            *_settings(plan),
            "",
            *_modules(plan, full, paint),
            *_extras(plan),
            *_left_out(plan, paint),
            *_totals(plan, paint),
        ]
    )


def _inputs(plan: AdapterPlan) -> Iterator[str]:
    yield f"{plan.recipe['merge_method']} of {len(plan.models)} adapters"
    for place, entry in enumerate(plan.inputs):
        role = "base" if place == plan.base else "template" if place == plan.template else f"model {place}"
        size = f"{entry.tensors} tensors, {human_size(entry.size)}"
        yield f"  {entry.label}  {role}: names of {entry.family}, {size}, {entry.source}"
        yield from (f"    {name}: {became}" for name, became in entry.files.items())
    yield from beside_words(plan.beside)


def _settings(plan: AdapterPlan) -> Iterator[str]:
    for number, setting in enumerate(plan.settings):
        steps = [step for step in plan.pairs if step.setting == number]
        labels = [plan.inputs[read.input].label for read in steps[0].reads]
        yield f"[{number}] {setting_words(setting, labels)}: {len(steps)} modules"


def _modules(plan: AdapterPlan, full: bool, paint: Paint) -> Iterator[str]:
    for fate in ("merged", "copied"):
        steps = [step for step in plan.pairs if step.fate == fate]
        if steps:
            yield f"{paint(fate, fate)}: {len(steps)} modules"
        kinds: dict[str, list[PairStep]] = defaultdict(list)
        for step in steps:
            line = _line(plan, step)
            kinds[line if full else layer_pattern(line)].append(step)
        for line, alike in kinds.items():
            layers = sorted(layer for step in alike if (layer := text_layer(step.canonical)) is not None)
            times = f", i = {ranges(layers)}" if layers and not full else f" x{len(alike)}" if len(alike) > 1 else ""
            yield f"  {line}{times}"


def _line(plan: AdapterPlan, step: PairStep) -> str:
    labels = "; ".join(plan.inputs[read.input].label for read in step.reads)
    how = f" [{step.setting}]" if step.setting is not None else ""
    size = f"rank {step.rank} x {step.scaling:g}, {list(step.shape)}"
    return f"{step.module}{how} {size} <- {labels}{f' ({step.reason})' if step.reason else ''}"


def _extras(plan: AdapterPlan) -> Iterator[str]:
    for step in plan.extras.steps if plan.extras else ():
        (piece,) = step.pieces
        setting = plan.extras.settings[piece.setting] if plan.extras and piece.setting is not None else None
        labels = [plan.inputs[place].label for place in piece.inputs]
        how = setting_words(setting, labels) if setting else "copied"
        yield f"full weight: {step.name} {list(step.shape)} {how}{f' ({step.reason})' if step.reason else ''}"


def _left_out(plan: AdapterPlan, paint: Paint) -> Iterator[str]:
    if plan.left_out:
        yield f"{paint('left out', 'left out')} of the inputs: {len(plan.left_out)} tensors"
    for place, entry in enumerate(plan.inputs):
        lines = by_reason((one.reason, one.name) for one in plan.left_out if one.input == place)
        yield from (f"  {entry.label}:{line[1:]}" for line in lines)


def _totals(plan: AdapterPlan, paint: Paint) -> Iterator[str]:
    yield ""
    counts = ", ".join(f"{count} {paint(fate, fate)}" for fate, count in plan.counts().items() if count)
    full = len(plan.extras.steps) if plan.extras else 0
    yield f"output: {len(plan.pairs)} modules and {full} full weights ({counts}), {human_size(plan.size)}"
    dense = [step for step in plan.pairs if _is_dense(plan, step)]
    if dense:
        most = max(step.shape[0] * step.shape[1] * 4 for step in dense)
        yield f"memory: up to {human_size(most)} a thread: the method needs the whole update of a module"
    yield f"hash: {plan.hash}"


def _is_dense(plan: AdapterPlan, step: PairStep) -> bool:
    from polymerge.methods.table import METHODS

    if step.setting is None:
        return False
    setting = plan.settings[step.setting]
    return setting.parameters.get("space") == "delta" and not METHODS[setting.method].additive
