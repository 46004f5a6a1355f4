"""Families without a table: how checkpoints name tensors, derived from the class that transformers loads them with.

What is derived is a `Family` like those of the tables, with as few rules as explain all names. It is kept in the user's
cache, so that the next plan imports neither torch nor transformers:

    polymerge/families/<digest>.json   of a config, names and shapes, and transformers' version
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Final

import msgspec

from polymerge.checkpoints.bounds import INDEX_BYTES, read_bounded
from polymerge.durable import make_folder, write_file
from polymerge.errors import OutputError
from polymerge.families.blueprint import TURNS, Blueprint, Landing, NotBuiltError, blueprint
from polymerge.families.expressions import Shape
from polymerge.families.resolve import Split, Stack
from polymerge.families.rules import BUFFERS, Family, Rule
from polymerge.families.tables.llama_like import QUERIES_KEYS_VALUES, decoder
from polymerge.paths import own_cache

__all__ = ["SAVE_AGAIN", "Derivation", "as_table", "derive"]

_FORM: Final = 7
"""Part of what an entry of the cache is found by; raised whenever the same input derives another family."""

_APART: Final = {"MergeModulelist0", "Concatenate0", "Concatenate1"}
"""Operations that put stored tensors below or beside each other, and change no number."""
_SPLIT: Final = {"Chunk0", "Split0", TURNS}
"""Those that cut a stored tensor's rows into several, or put them in another order."""
_JOINS: Final = {("Concatenate0",), ("MergeModulelist0",), ("MergeModulelist0", "Concatenate1")}
"""Sequences of operations that put several tensors of files one below the other, or all experts in one."""
SAVE_AGAIN: Final = (
    "transformers writes published names of a model that it has not read from a file: load the folder, "
    "`new = type(old)(old.config)`, `new.load_state_dict(old.state_dict(), assign=True)`, `new.save_pretrained(...)`, "
    "and merge what that writes"
)
"""What to do where no plan can write published names; saving what was loaded writes the names that were read."""
_EXPERT: Final = re.compile(r"(?P<outer>.*\bexperts\.\d+\.)[^.]+(?P<kind>\.[^.]+)")


@dataclass(frozen=True)
class Derivation:
    """The family of a checkpoint as transformers loads it, or the reason why there is none.

    by           the class and the version that it was derived from, such as `transformers 5.0.0's BertModel`
    published    name as stored -> the shapes of what it holds by the names that files have, where those are others;
                 empty for a tensor that is part of one which is listed with an earlier name
    unpublished  why that cannot be told
    """

    family: Family | None = None
    by: str = ""
    why: str = ""
    published: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    unpublished: str = ""


@dataclass(frozen=True)
class _Held:
    """What a stored tensor holds: canonical names, and the way that its rows are split."""

    canonical: tuple[str, ...]
    split: str = ""


def derive(config: Mapping[str, Any], shapes: Mapping[str, Shape], splits: Mapping[str, Split]) -> Derivation:
    """Derive the family of a checkpoint from its config.json and the shapes of its tensors as stored.

    splits   what its config determines (see `config.splits`)
    """
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return Derivation(
            why="with transformers installed its class would be asked: pip install 'polymerge[transformers]'"
        )
    told = [_FORM, installed, config, sorted(shapes.items())]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=dict).encode()).hexdigest()
    note = own_cache("families") / f"{digest}.json"
    with suppress(OSError, msgspec.DecodeError):  # not derived yet, or nothing that we have written
        kept = msgspec.json.decode(read_bounded(note, INDEX_BYTES), type=Derivation)
        if kept.family is None or kept.family.explains(shapes):
            return kept
    try:
        built = blueprint(config, len(shapes))
        found = _derived(built, shapes, splits)
        found = replace(found, by=f"transformers {installed}'s {built.name}" if found.family else "")
    except NotBuiltError as error:
        found = Derivation(why=str(error))
        if not error.lasting:
            return found
    with suppress(OutputError):  # a cache that cannot be written is slower, not wrong
        make_folder(note.parent)
        write_file(note, msgspec.json.encode(found))
    return found


def as_table(family: Family) -> str:
    """A family as it would stand in a table, in Python."""
    lines = [f"{re.sub(r'[^A-Za-z0-9]', '_', family.name).upper()} = Family(", f"    {family.name!r},", "    rules=("]
    for rule in family.rules:
        split = f", split={rule.split!r}" if rule.split else ""
        lines.append(f"        Rule({rule.pattern!r}, {rule.canonical!r}{split}),")
    lines.append("    ),")
    for name in ("model_types", "architectures", "decoders", "buffers", "unloaded", "defaults", "ties"):
        value = getattr(family, name)
        if value and not (name == "buffers" and value == BUFFERS):
            lines.append(f"    {name}={value!r},")
    return "\n".join([*lines, ")"])


def _derived(built: Blueprint, shapes: Mapping[str, Shape], splits: Mapping[str, Split]) -> Derivation:
    if any(set("{}") & set(name) for name in shapes):
        return Derivation(why="its tensor names have braces")
    landed = {name: landing for name in shapes if (landing := built.land(name)) is not None}
    unloaded = [name for name in shapes if name not in landed and not _BUFFER.is_buffer(name)]
    got = {target for landing in landed.values() for target in landing.targets}
    missing = built.shapes.keys() - got - built.optional
    if not landed or (unloaded and missing):
        few = f"such as '{unloaded[0]}'" if unloaded else "none of them"
        return Derivation(
            why=f"{built.name} has no place for {len(unloaded)} of its {len(shapes)} tensors, {few}"
            + (f", and {len(missing)} of its own are not there, such as '{min(missing)}'" if missing else "")
        )
    numbers = [name for name, one in landed.items() if built.integers.issuperset(one.targets)]
    weighty = {name: one for name, one in landed.items() if name not in numbers and not _BUFFER.is_buffer(name)}
    try:
        files, unpublished = built.published(), ""
    except NotBuiltError as error:
        files, unpublished = {}, str(error)
    joined = _joined(built, files, splits)
    whole = {name: one for name, one in joined.items() if shapes.get(name) == built.shapes[name]}
    held = {name: whole.get(name) or _held(built, name, one, shapes, splits) for name, one in weighty.items()}
    # names of memory are read, too: adapters have them, and what is written under other names is made of such tensors
    live = {name: _in_memory(one, built.shapes[name], splits) for name, one in built.canonical.items()} | joined
    rules = _rules({**{name: one for name, one in live.items() if name not in shapes}, **held})
    family = Family(
        built.kind, rules, (built.kind,), (built.name,), (built.text,), f"derived from {built.name}",
        buffers=(*BUFFERS, *_patterns(numbers, held)), defaults=built.sizes, ties=built.ties,
        unloaded=_patterns(unloaded, [*held, *numbers]),
    )  # fmt: skip
    for name, wanted in held.items():
        if family.canonical(name) != wanted.canonical:
            return Derivation(why=f"no rule tells what '{name}' is")
    if unpublished:
        return Derivation(family, unpublished=unpublished)
    try:
        return Derivation(family, published=_published(built, landed, shapes, files))
    except NotBuiltError as error:
        return Derivation(family, unpublished=str(error))


def _published(
    built: Blueprint, landed: Mapping[str, Landing], shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> dict[str, dict[str, Shape]]:
    """What stored tensors are called in files, as in `Derivation.published`.

    wanted   the shapes of all tensors by those names

    raises NotBuiltError if a file's tensors are made of those in memory by more than moving rows.
    """
    there = {target for landing in landed.values() for target in landing.targets}
    files: dict[str, list[str]] = {}
    for name, shape in wanted.items():
        landing = built.land(name)
        if landing is None or not there.issuperset(landing.targets):
            continue  # of a tensor that is not stored, such as a tied head
        moves = set(landing.operations) <= {*_APART, *_SPLIT} and _is_told(landing)
        if not (moves or _is_experts(landing.targets[0], landing)) and shapes.get(name) != shape:
            raise NotBuiltError(
                f"'{name}' is made of others by transformers' {' and '.join(landing.operations)}, and the plan has no "
                f"expression for that. {SAVE_AGAIN}"
            )
        for target in landing.targets:
            files.setdefault(target, []).append(name)
    made: dict[str, dict[str, Shape]] = {}
    seen = set[str]()
    for own, landing in landed.items():
        if wanted.get(own) == shapes[own]:
            continue  # it is called so in files
        held = dict.fromkeys(name for target in landing.targets for name in files.get(target, ()) if name not in shapes)
        if held:
            made[own] = {name: wanted[name] for name in held if name not in seen}
            seen.update(held)
    return {own: held for own, held in made.items() if held != {own: shapes[own]}}


_BUFFER: Final = Family("", ())


# --- what a tensor holds


def _held(
    built: Blueprint, name: str, landing: Landing, shapes: Mapping[str, Shape], splits: Mapping[str, Split]
) -> _Held:
    """The canonical names in a stored tensor: those of what it becomes in memory where its rows say so, or its own, in
    the place of what it becomes.
    """
    final, shape, operations = landing.targets[0], shapes[name], set(landing.operations)
    if not operations or _is_experts(final, landing):
        return _in_memory(built.canonical[final], shape, splits)
    own = _moved(built.canonical[final], final, landing.renamed)
    if operations == {"Concatenate1"} and len(shape) == 3:
        whole = _in_memory(built.canonical[final], built.shapes[final], splits).canonical
        if len(whole) == landing.place[1]:
            return _Held((whole[landing.place[0]],), f"experts {shape[1]}:{shape[2]}")
    if operations <= _APART:
        apart = _EXPERT.fullmatch(own) if "MergeModulelist0" in operations else None
        if apart is None:
            first = built.canonical[final] == "text.embed_tokens.weight" and landing.place[0] == 0
            return _Held((built.canonical[final] if first else own,))
        return _Held((f"{apart['outer']}{_expert(final, landing)}{apart['kind']}",))
    rows = [built.shapes[target][0] if built.shapes.get(target) else 0 for target in landing.targets]
    several = len(rows) > 1 or TURNS in operations
    if operations <= _SPLIT and several and shape and sum(rows) == shape[0] and all(rows) and _is_told(landing):
        return _Held(tuple(built.canonical[target] for target in landing.targets), _split(rows, splits, landing.turned))
    return _Held((own,))


def _joined(built: Blueprint, files: Mapping[str, Shape], splits: Mapping[str, Split]) -> dict[str, _Held]:
    """By name in memory, what tensors hold that are made of several in files: one below the other, or experts.

    files   the shapes of tensors by their names in files
    """
    below: dict[str, dict[int, list[tuple[str, str]]]] = {}
    stacked = set[str]()
    for name in files:
        landing = built.land(name)
        if landing is None or len(landing.targets) != 1 or landing.operations not in _JOINS:
            continue
        target = landing.targets[0]
        (canonical,) = _held(built, name, landing, files, splits).canonical
        below.setdefault(target, {}).setdefault(landing.place[0], []).append((name, canonical))
        if landing.operations[0] == "MergeModulelist0":
            stacked.add(target)
    found: dict[str, _Held] = {}
    for target, parts in below.items():
        firsts, shape = [parts[place][0] for place in sorted(parts)], built.shapes[target]
        rows, width = [files[name][0] for name, _ in firsts], files[firsts[0][0]][1:]
        if target in stacked:
            each = tuple(re.sub(r"(?<=\.experts\.)\d+(?=\.)", "{e}", canonical) for _, canonical in firsts)
            as_text = _in_memory(built.canonical[target], shape, splits).split
            if not as_text and len({*rows}) == len(width) == 1 and shape[1:] == (sum(rows), *width):
                found[target] = _Held(each, f"experts {sum(rows)}:{width[0]}")
        elif len(rows) > 1 and sum(rows) == shape[0]:
            found[target] = _Held(tuple(canonical for _, canonical in firsts), _split(rows, splits))
    return found


def _in_memory(canonical: str, shape: Shape, splits: Mapping[str, Split]) -> _Held:
    """What a tensor holds that is stored as transformers has it in memory: a decoder's may be fused."""
    before, _, last = canonical.rpartition(".experts.")
    if before.startswith("text.layers.") and len(shape) == 3 and last in _EXPERTS:
        parts, split = _EXPERTS[last]
        stack = splits.get(split)
        if isinstance(stack, Stack) and stack.ways(shape, len(parts)):
            return _Held(tuple(f"{before}.experts.{{e}}.{part}.weight" for part in parts), split)
    before, found, kind = canonical.rpartition(".gate_up_proj.")
    if found and before.startswith("text.layers.") and shape and shape[0] % 2 == 0:
        split = _split([shape[0] // 2] * 2, splits)
        return _Held((f"{before}.gate_proj.{kind}", f"{before}.up_proj.{kind}"), split)
    before, found, kind = canonical.rpartition(".self_attn.qkv_proj.")
    heads = splits.get("qkv")
    if found and before.startswith("text.layers.") and isinstance(heads, tuple) and shape[:1] == (heads[-1][-1][1],):
        return _Held(tuple(f"{before}.{part}.{kind}" for part in QUERIES_KEYS_VALUES), "qkv")
    return _Held((canonical,))


_EXPERTS: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), "experts_in"),
    "up_proj": (("up_proj",), "experts_in"),
    "down_proj": (("down_proj",), "experts_out"),
}
"""By the name of a tensor that holds all experts of a layer, what each of them has in it, and the split."""


def _is_experts(final: str, landing: Landing) -> bool:
    """Whether a conversion only turns the experts of a layer over, which shapes tell as well."""
    return landing.operations == ("Transpose",) and len(landing.targets) == 1 and landing.renamed == final


def _is_told(landing: Landing) -> bool:
    """Whether it is known in what order the rows of a tensor lie."""
    return TURNS not in landing.operations or any(landing.turned)


def _expert(final: str, landing: Landing) -> str:
    """What the tensor of one expert is called in a plain decoder: gate comes before up where both become one."""
    last, (which, count) = final.rpartition(".")[2], landing.place
    parts = _EXPERTS.get(last, ((), ""))[0]
    return parts[which] if len(parts) == count else landing.renamed.split(".")[-2]


def _moved(canonical: str, final: str, renamed: str) -> str:
    """The canonical name of a tensor with its own last components instead of those that a conversion gives it."""
    words, own = final.split("."), renamed.split(".")
    same = next((place for place, pair in enumerate(zip(words, own, strict=False)) if pair[0] != pair[1]), len(own) - 1)
    tail = ".".join(words[same:])
    if canonical.endswith(f".{tail}"):
        return canonical.removesuffix(tail) + ".".join(own[same:])
    return f"{canonical.partition('.')[0]}.{renamed}"


def _split(rows: list[int], splits: Mapping[str, Split], turned: tuple[int, ...] = ()) -> str:
    """The name of a way to split rows: one that the config determines, or a description of its own."""
    if any(turned):
        return "rows " + ":".join(
            f"{high}@{head}" if head else f"{high}" for high, head in zip(rows, turned, strict=True)
        )
    edges = [sum(rows[:place]) for place in range(len(rows) + 1)]
    ranges = tuple(((start, stop),) for start, stop in pairwise(edges))
    named = next((name for name, split in splits.items() if split == ranges), "")
    return named or ("equal" if len(set(rows)) == 1 else f"rows {':'.join(map(str, rows))}")


# --- rules


def _rules(held: Mapping[str, _Held]) -> tuple[Rule, ...]:
    """As few rules as map all names: for a prefix, for one kind of tensor in each layer, or for one name."""
    samples = {name: held[name].canonical for name in _samples(held)}
    wanted = dict.fromkeys(next(_prefix_rules(name, held[name]), _rule(name, held[name])) for name in samples)
    ordered = _with_decoder(sorted(wanted, key=_specific))
    for name, canonical in samples.items():
        if _canonical(ordered, name) != canonical:  # inside of what a shorter prefix is right for
            longer = (rule for rule in _prefix_rules(name, held[name]) if _is_right(rule, samples))
            ordered.insert(0, next(longer, _rule(name, held[name])))
    literal = [Rule(name, one.canonical[0]) for name, one in held.items() if _canonical(ordered, name) != one.canonical]
    kept = sorted({next(rule for rule in ordered if rule.apply(name)) for name in samples}, key=ordered.index)
    for rule in list(kept):
        without = [one for one in kept if one is not rule]
        if "{" in rule.pattern and all(_canonical(without, name) == one for name, one in samples.items()):
            kept = without
    return (*literal, *kept)


def _is_right(rule: Rule, samples: Mapping[str, tuple[str, ...]]) -> bool:
    return all(rule.apply(name) in (None, canonical) for name, canonical in samples.items())


def _canonical(rules: Iterable[Rule], name: str) -> tuple[str, ...]:
    return next((found for rule in rules if (found := rule.apply(name)) is not None), ())


def _samples(held: Mapping[str, _Held]) -> list[str]:
    """Of each kind of name, which differ in numbers alone, the first and the last."""
    kinds: dict[str, list[str]] = {}
    for name in held:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name), []).append(name)
    return list(dict.fromkeys(name for names in kinds.values() for name in (names[0], names[-1])))


def _specific(rule: Rule) -> tuple[int, int, str]:
    """The order of rules: those for one name first, then the longest prefixes."""
    return ("{rest}" in rule.pattern, -rule.pattern.count("."), rule.pattern)


def _rule(name: str, held: _Held) -> Rule:
    """The rule of one kind of tensor: a name, in which the first number is the layer and the second the expert."""
    pattern, canonical = name, held.canonical
    for mark in ("{i}", "{e}"):
        number = re.search(r"(?<=\.)\d+(?=\.)", pattern)
        if number is None or any("{e}" in one for one in canonical if mark == "{e}"):
            break
        changed = tuple(re.sub(rf"(?<=\.){number[0]}(?=\.)", mark, one, count=1) for one in canonical)
        if any(mark not in one for one in changed):
            break
        pattern, canonical = pattern[: number.start()] + mark + pattern[number.end() :], changed
    return Rule(pattern, canonical[0] if len(canonical) == 1 and not held.split else canonical, split=held.split)


def _prefix_rules(name: str, held: _Held) -> Iterator[Rule]:
    """The rules for all that follows a prefix as it does in canonical names, the shortest first; none for head and
    embedding, whose names are looked for.
    """
    if held.split or held.canonical[0].startswith(("text.lm_head.", "text.embed_tokens.")):
        return
    own, canonical = name.split("."), held.canonical[0].split(".")
    same = 0
    while same < min(len(own), len(canonical)) - 1 and own[-1 - same] == canonical[-1 - same]:
        same += 1
    for rest in range(same, 0, -1):
        yield _rule(".".join((*own[:-rest], "{rest}")), _Held((".".join((*canonical[:-rest], "{rest}")),)))


def _with_decoder(rules: list[Rule]) -> list[Rule]:
    """The rules with those that tables have for a plain decoder before the one that is for all of it."""
    for place, rule in enumerate(rules):
        if rule.canonical == "text.{rest}":
            plain = decoder(rule.pattern.removesuffix("{rest}"))
            return [*(one for one in rules[:place] if one not in plain), *plain, *rules[place:]]
    return rules


def _patterns(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match all `names` and none of the `others`: by a prefix, by the last component, or one by one."""
    taken = {name[:stop] for name in others for stop, character in enumerate(f"{name}.") if character == "."}
    lasts = Counter(name.rpartition(".")[2] for name in others)
    found: dict[str, None] = {}
    for name in names:
        stops = [stop for stop, character in enumerate(name) if character == "."]
        stem = next((name[:stop] for stop in stops if name[:stop] not in taken), None)
        last = name.rpartition(".")[2]
        found[f"{stem}.{{rest}}" if stem else f"{{rest}}.{last}" if stops and not lasts[last] else name] = None
    return tuple(found)
