"""A plan as text: one line for each kind of tensor, so that a person can check all of it at a glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from polymerge.families.expressions import Adapted, Concat, Expr, Read, Rows, Stacked, names_read
from polymerge.families.rules import text_layer
from polymerge.planning.estimate import memory_estimate
from polymerge.planning.fit import layer_pattern
from polymerge.planning.pairs import AdapterPlan
from polymerge.planning.plan import FATES, Plan, Step
from polymerge.planning.text_of_pairs import describe_adapters
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

__all__ = ["describe"]


_SHOWN = 12
"""Blocks of one tensor that a line names at most."""


def describe(plan: Plan | AdapterPlan, *, full: bool = False, paint: Paint = plain) -> str:
    """The plan as text, warnings first, by kinds of tensors (`full`: tensor by tensor), fates as `paint` has them."""
    if isinstance(plan, AdapterPlan):
        return describe_adapters(plan, full=full, paint=paint)
    return "\n".join(
        [
            *note_lines(plan.warnings, paint),
            *([""] if plan.warnings else []),
            *_inputs(plan),
            "",
            *_settings(plan),
            "",
            *_fates(plan, full, paint),
            *_left_out(plan, full, paint),
            "",
            *_totals(plan, paint),
        ]
    )


def _inputs(plan: Plan) -> Iterator[str]:
    yield f"{plan.recipe['merge_method']} of {len(plan.models)} model{'s' if len(plan.models) != 1 else ''}"
    width = max(len(entry.label) for entry in plan.inputs)
    for place, entry in enumerate(plan.inputs):
        roles = ["template"] if place == plan.template else []
        roles += [f"model {number}" for number, model in enumerate(plan.models) if model == place]
        roles += ["base"] if place == plan.base else []
        yield (
            f"  {entry.label:<{width}}  {', '.join(roles)}: family {entry.family}, {entry.tensors} tensors, "
            f"{human_size(entry.size)}, {entry.source}"
        )
        yield from (f"    {name}: {became}" for name, became in entry.files.items())
    yield from beside_words(plan.beside)


def _settings(plan: Plan) -> Iterator[str]:
    labels = [plan.inputs[place].label for place in plan.models]
    for number, setting in enumerate(plan.settings):
        counts = [sum(piece.setting == number for piece in step.pieces) for step in plan.steps]
        stored = sum(map(bool, counts))
        held = f", in {stored} that are stored" if stored < sum(counts) else ""
        yield f"[{number}] {setting_words(setting, labels)}: {sum(counts)} tensors{held}"


def _fates(plan: Plan, full: bool, paint: Paint) -> Iterator[str]:
    """The template's tensors by fate: merged ones by name, copied ones by the reason why they are."""
    for fate in FATES:
        steps = [step for step in plan.steps if step.fate == fate]
        if steps:
            yield f"{paint(fate, fate)}: {len(steps)} tensors, {human_size(sum(step.size for step in steps))}"
        if full:
            yield from (f"  {_line(plan, step)}" for step in steps)
        elif fate in ("merged", "folded"):
            yield from _merged(plan, steps)
        else:
            yield from by_reason((step.reason, step.name) for step in steps)


def _merged(plan: Plan, steps: Iterable[Step]) -> Iterator[str]:
    """Tensors that differ in their layer alone in one line."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        kinds[layer_pattern(_line(plan, step))].append(step)
    for line, alike in kinds.items():
        layers = sorted(layer for step in alike if (layer := text_layer(step.canonical)) is not None)
        yield f"  {line}{f', i = {ranges(layers)}' if layers else _times(len(alike))}"


def _line(plan: Plan, step: Step) -> str:
    """One tensor: `name [setting] <- where it is made from (what else there is to say)`."""
    merged = [piece for piece in step.pieces if piece.setting is not None]
    sources = [(place, [piece.reads[n] for piece in merged]) for n, place in enumerate(plan.models)] if merged else []
    if plan.base is not None:
        sources.append((plan.base, [piece.base for piece in merged if piece.base is not None]))
    reads = [_reads(plan, step, place, exprs) for place, exprs in sources if exprs]
    settings = dict.fromkeys(str(piece.setting) for piece in merged)
    how = f" [{','.join(settings)}] <- {'; '.join(reads)}" if reads else ""
    if step.fate == "folded":
        how = f" <- {', '.join(expression(expr) for piece in step.pieces for expr in piece.reads)}"
    return f"{step.name}{how}{f' ({step.reason})' if step.reason else ''}"


def _reads(plan: Plan, step: Step, place: int, exprs: Sequence[Expr]) -> str:
    """What a tensor takes from one input: its label alone where that is the template's own tensor."""
    label = plan.inputs[place].label
    if place == plan.template and all(names_read(expr) == (step.name,) for expr in exprs):
        return label
    return f"{label} {expression(exprs[0] if len(exprs) == 1 else Concat(tuple(exprs)))}"


def expression(expr: Expr) -> str:
    """A read expression as people write it: `name[0:4096]`, `cat(q, k, v)`."""
    match expr:
        case Read(name):
            return name
        case Rows(Adapted() as of, start, stop):
            return f"({expression(of)})[{start}:{stop}]"
        case Rows(of, start, stop):
            return f"{expression(of)}[{start}:{stop}]"
        case Concat(of) if len(of) > _SHOWN:
            return f"cat({expression(of[0])}, ..., {expression(of[-1])}: {len(of)} blocks)"
        case Concat(of):
            return f"cat({', '.join(map(expression, of))})"
        case Stacked(of, transposed):
            return f"{of.name}{'.T' if transposed else ''}"
        case Adapted(of):
            return f"{expression(of)} + adapter"


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
    yield f"output: {len(plan.steps)} tensors ({fates}), {human_size(plan.size)}"
    yield f"memory: about {human_size(memory_estimate(plan))} beside the interpreter, whatever the models' size"
    yield f"hash: {plan.hash}"


def _times(count: int) -> str:
    return f" x{count}" if count > 1 else ""
