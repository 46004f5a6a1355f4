"""A plan as text: one line for each kind of tensor, so that a person can check all of it at a glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from polymerge.mapping import text_layer
from polymerge.planning.data import Plan, Step
from polymerge.planning.estimate import memory_estimate
from polymerge.planning.fit import layer_pattern
from polymerge.reads import Concat, Expr, Read, Rows, names_read
from polymerge.settings import Setting

__all__ = ["describe", "human_size"]

_FEW = 4


def describe(plan: Plan, *, full: bool = False) -> str:
    """The plan as text, by kinds of tensors (`full`: tensor by tensor)."""
    return "\n".join(
        [
            *_inputs(plan),
            "",
            *_settings(plan),
            "",
            *_fates(plan, full),
            *_left_out(plan, full),
            "",
            *_totals(plan),
            *(f"note: {warning}" for warning in plan.warnings),
        ]
    )


def human_size(size: float) -> str:
    """Bytes as people write them: 16.1 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _inputs(plan: Plan) -> Iterator[str]:
    yield f"{plan.recipe['merge_method']} of {len(plan.models)} models"
    width = max(len(entry.label) for entry in plan.inputs)
    for place, entry in enumerate(plan.inputs):
        roles = ["template"] if place == plan.template else []
        roles += [f"model {number}" for number, model in enumerate(plan.models) if model == place]
        roles += ["base"] if place == plan.base else []
        yield (
            f"  {entry.label:<{width}}  {', '.join(roles)}: family {entry.family}, {entry.tensors} tensors, "
            f"{human_size(entry.size)}, {entry.source}"
        )


def _settings(plan: Plan) -> Iterator[str]:
    labels = [plan.inputs[place].label for place in plan.models]
    for number, setting in enumerate(plan.settings):
        count = sum(piece.setting == number for step in plan.steps for piece in step.pieces)
        yield f"[{number}] {_setting(setting, labels)}: {count} tensors"


def _setting(setting: Setting, labels: Sequence[str]) -> str:
    words = []
    for name, value in setting.parameters.items():
        if isinstance(value, tuple):
            if len(set(value)) == 1 and name != "weight":
                words.append(f"{name} {value[0]:g}")
            else:
                words.append(
                    f"{name} " + ", ".join(f"{share:g} {label}" for share, label in zip(value, labels, strict=True))
                )
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}".lower())
    return f"{setting.method}{' (' + '; '.join(words) + ')' if words else ''}"


def _fates(plan: Plan, full: bool) -> Iterator[str]:
    """The template's tensors by fate: merged ones by name, copied ones by the reason why they are."""
    for fate in ("merged", "copied", "tied"):
        steps = [step for step in plan.steps if step.fate == fate]
        if steps:
            yield f"{fate}: {len(steps)} tensors, {human_size(sum(step.size for step in steps))}"
        if full:
            yield from (f"  {_line(plan, step)}" for step in steps)
        elif fate == "merged":
            yield from _merged(plan, steps)
        else:
            yield from _by_reason((step.reason, step.name) for step in steps)


def _merged(plan: Plan, steps: Iterable[Step]) -> Iterator[str]:
    """Tensors that differ in their layer alone in one line."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        kinds[layer_pattern(_line(plan, step))].append(step)
    for line, alike in kinds.items():
        layers = sorted(layer for step in alike if (layer := text_layer(step.canonical)) is not None)
        yield f"  {line}{f', i = {_ranges(layers)}' if layers else _times(len(alike))}"


def _line(plan: Plan, step: Step) -> str:
    """One tensor: `name [setting] <- where it is made from (what else there is to say)`."""
    merged = [piece for piece in step.pieces if piece.setting is not None]
    sources = [(place, [piece.reads[n] for piece in merged]) for n, place in enumerate(plan.models)] if merged else []
    if plan.base is not None:
        sources.append((plan.base, [piece.base for piece in merged if piece.base is not None]))
    reads = [_reads(plan, step, place, exprs) for place, exprs in sources if exprs]
    settings = dict.fromkeys(str(piece.setting) for piece in merged)
    how = f" [{','.join(settings)}] <- {'; '.join(reads)}" if reads else ""
    return f"{step.name}{how}{f' ({step.reason})' if step.reason else ''}"


def _reads(plan: Plan, step: Step, place: int, exprs: Sequence[Expr]) -> str:
    """What a tensor takes from one input: its label alone where that is the template's own tensor."""
    label = plan.inputs[place].label
    if place == plan.template and all(names_read(expr) == (step.name,) for expr in exprs):
        return label
    return f"{label} {expression(exprs[0] if len(exprs) == 1 else Concat(tuple(exprs)))}"


def _by_reason(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """(reason, name) pairs, one line a reason: how many names, and what they begin with."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason, name in entries:
        kinds[reason].append(name)
    for reason, names in kinds.items():
        if len(names) <= _FEW:
            shown = ", ".join(names)
        else:
            stems = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            few = [stem if stem in names else f"{stem}.*" for stem in stems]
            shown = ", ".join(few) if len(few) <= _FEW else f"{names[0]}, ..."
        yield f"  {reason}: {len(names)} ({shown})"


def expression(expr: Expr) -> str:
    """A read expression as people write it: `name[0:4096]`, `cat(q, k, v)`."""
    match expr:
        case Read(name):
            return name
        case Rows(of, start, stop):
            return f"{expression(of)}[{start}:{stop}]"
        case Concat(of):
            return f"cat({', '.join(map(expression, of))})"


def _left_out(plan: Plan, full: bool) -> Iterator[str]:
    if plan.left_out:
        yield f"left out of the inputs: {len(plan.left_out)} tensors"
    for place, model in enumerate(plan.inputs):
        own = [(entry.reason, entry.name) for entry in plan.left_out if entry.input == place]
        if full:
            yield from (f"  {model.label}: {name} ({reason})" for reason, name in own)
        else:
            yield from (f"  {model.label}:{line[1:]}" for line in _by_reason(own))


def _totals(plan: Plan) -> Iterator[str]:
    counts = plan.counts()
    fates = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    yield f"output: {len(plan.steps)} tensors ({fates}), {human_size(plan.size)}"
    yield f"memory: about {human_size(memory_estimate(plan))} beside the interpreter, whatever the models' size"
    yield f"hash: {plan.hash}"


def _times(count: int) -> str:
    return f" x{count}" if count > 1 else ""


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in order as people write them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
