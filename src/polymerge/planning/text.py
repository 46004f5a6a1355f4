"""A plan as text, one line per kind of tensor, for review at a glance."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from polymerge.errors import human_size
from polymerge.families.expressions import Adapted, Concat, Expr, LowRank, Mean, Read, Rows, Scaled, Stacked, names_read
from polymerge.families.lent import LENT_BY
from polymerge.families.rules import text_layer
from polymerge.planning.estimate import memory_estimate
from polymerge.planning.fit import layer_pattern
from polymerge.planning.matrix_costs import cost_words
from polymerge.planning.module_steps import is_dense
from polymerge.planning.plan import FATES, Piece, Plan, Step
from polymerge.planning.text_words import (
    Paint,
    beside_words,
    by_reason,
    note_lines,
    plain,
    ranges,
    setting_words,
    vocabulary_words,
    warnings_of,
)
from polymerge.recipe.overrides import rest_of

__all__ = ["describe"]


_SHOWN = 12
"""Maximum number of blocks of one tensor on a line, and of settings with a line of their own."""

_FEW_SETTINGS = 3
"""Number of settings up to which each has lines of its own; with a setting for each layer there would be too many."""


def describe(plan: Plan, *, full: bool = False, paint: Paint = plain) -> str:
    """Format the plan as text, warnings of all stages first, grouped by kind of tensor (`full`: one line per tensor);
    `paint` styles fates.
    """
    notes = [*note_lines(warnings_of(plan), paint)]
    lines = [*notes, *([""] if notes else [])]
    for stage in plan.stages:
        lines += [f"--- stage {stage.name}", *_described(stage, full, paint)]
    lines += ["--- output"] if plan.stages else []
    return "\n".join([*lines, *_described(plan, full, paint)])


def _described(plan: Plan, full: bool, paint: Paint) -> Iterator[str]:
    """Everything of one merge but its warnings."""
    yield from (*_inputs(plan), "", *_settings(plan, full))
    yield from (f"{name} is a method of your own: {origin}" for name, origin in plan.methods.items())
    yield from ("", *_fates(plan, full, paint), *_left_out(plan, full, paint), "", *_totals(plan, paint))


def _inputs(plan: Plan) -> Iterator[str]:
    what = "adapter" if plan.of_adapters else "model"
    yield f"{plan.recipe['merge_method']} of {len(plan.models)} {what}{'s' if len(plan.models) != 1 else ''}"
    width = max(len(entry.label) for entry in plan.inputs)
    for place, entry in enumerate(plan.inputs):
        roles = ["template"] if place == plan.template else []
        roles += [f"model {number}" for number, model in enumerate(plan.models) if model == place]
        roles += ["base"] if place == plan.base else []
        yield (
            f"  {entry.label:<{width}}  {', '.join(roles)}: {'names of' if entry.kind == 'adapter' else 'family'} "
            f"{entry.family}, {entry.tensors} tensors, {human_size(entry.size)}, {entry.source}"
        )
        yield from (f"    {name}: {became}" for name, became in entry.files.items())
    yield from beside_words(plan.beside)
    yield from vocabulary_words(plan.vocabulary)


def _settings(plan: Plan, full: bool) -> Iterator[str]:
    merged: dict[int, list[tuple[Step, Piece]]] = {number: [] for number in range(len(plan.settings))}
    for step in plan.steps:
        for piece in step.pieces:
            if piece.setting is not None:
                merged[piece.setting].append((step, piece))
    if full or len(plan.settings) <= _SHOWN:
        yield from (_setting(plan, [number], own) for number, own in merged.items())
        return
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for number, own in merged.items():
        places = own[0][1].inputs if own else ()
        alike[plan.settings[number].method, places].append(number)
    for numbers in alike.values():
        yield _setting(plan, numbers, [one for number in numbers for one in merged[number]])


def _setting(plan: Plan, numbers: Sequence[int], own: Sequence[tuple[Step, Piece]]) -> str:
    """A line on a setting, or on several of one method, and what they merge."""
    setting, *others = (plan.settings[number] for number in numbers)
    places = next((piece.inputs for _, piece in own), ()) or plan.models
    stored = len(dict.fromkeys(step.name for step, _ in own))
    held = f", in {stored} that are stored" if stored < len(own) else ""
    layers = {layer for _, piece in own if (layer := text_layer(piece.canonical)) is not None}
    inside = bool(layers) and all(text_layer(piece.canonical) is not None for _, piece in own)
    if inside and len(plan.settings) > _FEW_SETTINGS:
        held += f", in layer{'s' if len(layers) > 1 else ''} {ranges(sorted(layers))}"
    what = "modules" if own and own[0][0].lora else "tensors"
    rest = rest_of(setting, len(places)) if setting.whole else setting
    beside = f"; others: [{plan.settings.index(rest)}]" if rest in plan.settings and rest is not setting else ""
    by_depth = f", {len(numbers)} settings by layer or name" if others else ""
    words = setting_words(setting, _labels(plan, places), others)
    return f"[{ranges(numbers)}] {words}: {len(own)} {what}{held}{beside}{by_depth}"


def _fates(plan: Plan, full: bool, paint: Paint) -> Iterator[str]:
    """The steps by fate: merged ones by name, copied ones by reason."""
    for fate in FATES:
        steps = [step for step in plan.steps if step.fate == fate]
        if steps:
            yield f"{paint(fate, fate)}: {_counted(plan, steps)}, {human_size(sum(step.size for step in steps))}"
        if full:
            yield from (f"  {_line(plan, step, _settings_of(step))}" for step in steps)
        elif fate in ("merged", "folded"):
            yield from _merged(plan, steps)
        else:
            yield from by_reason((step.reason, step.name) for step in steps)


def _merged(plan: Plan, steps: Iterable[Step]) -> Iterator[str]:
    """Merged tensors, with those that differ only in their layer on one line; in their setting too, if it has many."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    many = len(plan.settings) > _FEW_SETTINGS
    for step in steps:
        kinds[layer_pattern(_line(plan, step, "*" if many else _settings_of(step)))].append(step)
    for line, alike in kinds.items():
        if many:
            numbers = {piece.setting for step in alike for piece in step.pieces if piece.setting is not None}
            which = ranges(sorted(numbers))
            line = line.replace(
                " [*]", f" [{which if which.count(',') < _FEW_SETTINGS else f'{len(numbers)} settings'}]"
            )
        layers = sorted(layer for step in alike if (layer := text_layer(step.canonical)) is not None)
        yield f"  {line}{f', i = {ranges(layers)}' if layers else _times(len(alike))}"


def _settings_of(step: Step) -> str:
    return ",".join(dict.fromkeys(str(piece.setting) for piece in step.pieces if piece.setting is not None))


def _line(plan: Plan, step: Step, settings: str) -> str:
    """One tensor or module: `name [setting] <- sources (remarks)`."""
    merged = [piece for piece in step.pieces if piece.setting is not None]
    how = f" [{settings}]" if merged else ""
    if step.lora is not None:
        places = step.pieces[0].inputs
        how += (
            f" rank {step.lora.rank} x {step.lora.scaling:g}, {list(step.shape)} <- {'; '.join(_labels(plan, places))}"
        )
    elif merged:
        places = merged[0].inputs or plan.models
        sources = [(place, [piece.reads[n] for piece in merged]) for n, place in enumerate(places)]
        if plan.base is not None:
            sources.append((plan.base, [piece.base for piece in merged if piece.base is not None]))
        how += f" <- {'; '.join(_reads(plan, step, place, exprs) for place, exprs in sources if exprs)}"
    elif step.fate in ("folded", "dequantized"):
        how = f" <- {', '.join(expression(expr) for piece in step.pieces for expr in piece.reads)}"
    return f"{step.name}{how}{f' ({step.reason})' if step.reason else ''}"


def _reads(plan: Plan, step: Step, place: int, exprs: Sequence[Expr]) -> str:
    """The sources of a tensor in one input: only its label if that is the template's, or an adapter's, own tensor."""
    entry = plan.inputs[place]
    its_own = place == plan.template or entry.kind == "adapter"
    if its_own and all(names_read(expr) == (step.name,) for expr in exprs):
        return entry.label
    read = expression(exprs[0] if len(exprs) == 1 else Concat(tuple(exprs)))
    return f"{entry.label} {re.sub(LENT_BY, lambda found: plan.inputs[int(found[1])].label + ':', read)}"


def _labels(plan: Plan, places: Iterable[int]) -> list[str]:
    return [plan.inputs[place].label for place in places]


def _counted(plan: Plan, steps: Sequence[Step]) -> str:
    """The number of tensors, or of modules and full weights."""
    if not plan.of_adapters:
        return f"{len(steps)} tensors"
    modules = sum(step.lora is not None for step in steps)
    kinds = {"modules": modules, "full weights": len(steps) - modules}
    return " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "0 modules"


def expression(expr: Expr) -> str:
    """Format a read expression: `name[0:4096]`, `cat(q, k, v)`."""
    match expr:
        case Read(name):
            return name
        case Scaled(Read(name), by):
            return f"{name} * {by}"
        case Rows((Adapted() | Scaled()) as of, start, stop):
            return f"({expression(of)})[{start}:{stop}]"
        case Rows(of, start, stop):
            return f"{expression(of)}[{start}:{stop}]"
        case Concat(of) if len(of) > _SHOWN:
            return f"cat({expression(of[0])}, ..., {expression(of[-1])}: {len(of)} blocks)"
        case Concat(of):
            return f"cat({', '.join(map(expression, of))})"
        case Mean(of):
            return f"mean({', '.join(map(expression, of))})"
        case Stacked(Read(name), transposed):
            return f"{name}{'.T' if transposed else ''}"
        case Stacked(of, transposed):
            return f"({expression(of)}){'.T' if transposed else ''}"
        case Adapted(of):
            return f"{expression(of)} + adapter"
        case LowRank(a, b):
            return f"{b} {a}"


def _left_out(plan: Plan, full: bool, paint: Paint) -> Iterator[str]:
    if plan.left_out:
        yield f"{paint('left out', 'left out')} of the inputs: {len(plan.left_out)} tensors"
    for place, model in enumerate(plan.inputs):
        own = [(entry.reason, entry.name) for entry in plan.left_out if entry.input == place]
        if full:
            yield from (f"  {model.label}: {name} ({reason})" for reason, name in own)
        else:
            yield from (f"  {model.label}:{line[1:]}" for line in by_reason(own))


def _totals(plan: Plan, paint: Paint) -> Iterator[str]:
    counts = plan.counts()
    fates = ", ".join(f"{count} {paint(fate, fate)}" for fate, count in counts.items() if count)
    yield f"output: {_counted(plan, plan.steps)} ({fates}), {human_size(plan.size)}"
    if cost := cost_words(plan):
        yield f"cost: {cost}"
    elif not plan.of_adapters:
        yield f"memory: about {human_size(memory_estimate(plan))} beside the interpreter, whatever the models' size"
    elif dense := [step for step, _, setting in plan.merged_pieces() if step.lora and is_dense(setting)]:
        most = max(step.shape[0] * step.shape[1] * 4 for step in dense)
        yield f"memory: up to {human_size(most)} a thread: the method needs the whole update of a module"
    if plan.stages:
        size = human_size(sum(stage.size for stage in plan.stages))
        yield f"stages: {len(plan.stages)}, whose outputs take {size} on the disk until the output is complete"
    yield f"hash: {plan.hash}"


def _times(count: int) -> str:
    return f" x{count}" if count > 1 else ""
