"""Locate an adapter's parameters in a base, and explain those that the base does not have.

The model that an adapter was trained on need not be the base, and may have other names. An adapter of a language model
fits every multimodal model with that decoder, one of a bare body (`AutoModel`, names without `model.`) the model with a
head. Its names are read as canonical ones, all by one family's table, and looked up among those of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, Final, TypeAlias

from polymerge.checkpoints import Checkpoint, TensorInfo
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.files import read_config
from polymerge.errors import PolymergeError, RecipeError
from polymerge.families import FAMILIES, family_of
from polymerge.families.expressions import Expr, Ranges, Read, rows_of, shape_of
from polymerge.families.registry import GENERIC
from polymerge.families.rules import Family, text_layer
from polymerge.paths import exists, given_path
from polymerge.planning.model import EMBEDDING, HEAD, Model

__all__ = [
    "Block",
    "Parameters",
    "Place",
    "Reading",
    "base_named",
    "name_the_base",
    "named_family",
    "no_place_for_a_head",
    "other_projector",
    "reading_of",
    "unequal_rows",
    "unknown_head",
    "why_missing",
]

Block: TypeAlias = tuple[str, Ranges]
"""Rows of a tensor, given by its name on disk; no ranges stand for all rows."""

Place: TypeAlias = tuple[Block, ...]
"""The location of one adapter parameter in a base: several blocks if it is fused in the adapter and split in the base.
"""

_APART: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What transformers makes one tensor of all experts, by that tensor's name: the layers of one expert on disk."""

_BODY: Final = "model."
"""Prefix that transformers puts before the names of a body inside a class with a head."""


@dataclass(frozen=True)
class Reading:
    """One way to read an adapter's names: by a family's table, with `added` prepended or `removed` stripped.

    guessed  from the names alone; then only names of the text tower are used
    """

    family: Family
    added: str = ""
    removed: str = ""
    guessed: bool = False

    def canonical(self, parameter: str) -> tuple[str, ...]:
        """The canonical names of a parameter; empty if this reading does not explain it."""
        held = self.family.canonical(self.added + parameter.removeprefix(self.removed))
        return () if self.guessed and not all(name.startswith("text.") for name in held) else held

    def joint(self, parameter: str) -> str:
        """One name for everything that a parameter holds: see `Family.joint`."""
        return "+".join(self.canonical(parameter)).replace(".{e}.", ".")


@dataclass(frozen=True)
class Parameters:
    """The tensors of a base, in which the parameters of an adapter are looked up."""

    base: Model

    @cached_property
    def layout(self) -> Mapping[str, tuple[tuple[str, Ranges], ...]]:
        """Own name -> the canonical names it holds, each with its rows; includes the virtual tensor of a tied pair."""
        ties = self.base.ties
        if ties is None or not ties.virtual:
            return self.base.layout
        return {**self.base.layout, ties.virtual: ((HEAD if ties.virtual == ties.head else EMBEDDING, ()),)}

    @cached_property
    def joint(self) -> Mapping[str, str]:
        """Canonical content -> own name: see `Family.joint`."""
        return self.base.family.by_joint(self.layout)

    @cached_property
    def blocks(self) -> Mapping[str, Block]:
        """The location of each canonical tensor."""
        return {canonical: (own, ranges) for own, held in self.layout.items() for canonical, ranges in held}

    def entry(self, name: str) -> TensorInfo:
        """A tensor of the base, by its own name."""
        ties = self.base.ties
        return self.base.entries[ties.stored if ties and name == ties.virtual else name]

    def read(self, block: Block) -> Expr:
        """The expression that reads a block as stored."""
        own, ranges = block
        expr: Expr = Read(self.entry(own).name)
        return rows_of(self.base.views.get(own, expr), ranges) if ranges else expr

    def reading(self, adapter: Adapter) -> Reading:
        """The reading that locates most of an adapter's parameters; ties go to the most trusted one."""
        return self.reading_of(adapter.parameters, named_family(adapter))

    def reading_of(self, names: Collection[str], trusted: Sequence[Family] = ()) -> Reading:
        """The reading that locates most of these parameters, by the base's own family or one that is `trusted`."""
        families = (self.base.family, *trusted)
        return _best(families, names, lambda name, reading: self.place(name, reading) is not None)

    def place(self, parameter: str, reading: Reading) -> Place | None:
        """Locate a parameter, or return None; in a two-branch model a name without a branch means the text tokens'
        branch.
        """
        if parameter in self.layout:
            return ((parameter, ()),)
        if (joint := reading.joint(parameter)) in self.joint:
            return ((self.joint[joint], ()),)
        held = reading.canonical(parameter)
        found = [self.blocks.get(name) or self.blocks.get(f"{name}@text") for name in held]
        blocks = [block for block in found if block is not None]
        return tuple(blocks) if held and len(blocks) == len(held) else None

    def places_of_experts(self, parameter: str, experts: int, reading: Reading) -> tuple[Place, ...] | None:
        """The location of each of the experts that a parameter holds, or of the tensor that holds all of them; None if
        they are not there, or others are.
        """
        if parameter in self.layout and parameter not in self.base.views:
            return (((parameter, ()),),)
        held = reading.canonical(parameter) or (parameter,)
        if len(held) == 1 and ".{e}." not in held[0]:  # of a family without a rule for experts in one tensor
            if (block := self.blocks.get(held[0])) is not None:
                return ((block,),)
            module, _, kind = held[0].rpartition(".")
            held = tuple(f"{module}.{{e}}.{part}.weight" for part in _APART.get(kind, ()))
        if not held or not all(".{e}." in name for name in held):
            return None
        found = [
            tuple(block for name in held if (block := self.blocks.get(name.replace("{e}", str(expert)))) is not None)
            for expert in range(experts + 1)
        ]
        whole = not found.pop() and all(len(place) == len(held) for place in found)
        return tuple(found) if whole else None

    def of_experts(self, held: Sequence[str]) -> Iterator[Block]:
        """The blocks of canonical names with `{e}` in them, expert by expert, as far as there are any."""
        for expert in count():
            found = [self.blocks.get(name.replace("{e}", str(expert))) for name in held]
            if None in found:
                return
            yield from (block for block in found if block is not None)


def named_family(adapter: Adapter) -> tuple[Family, ...]:
    """The family of the model that an adapter was trained on, if a local config tells."""
    config = adapter.model_config
    base = adapter.config.get("base_model_name_or_path")
    file = given_path(str(base)) / "config.json" if base and exists(str(base)) else None
    if not config and file is not None and file.is_file():
        config = read_config(file)
    return (family_of(config),) if config else ()


def base_named(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's config names, with its revision; None if it names none."""
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base and revision and not exists(str(base)):
        return f"{base}@{revision}"
    return base or None


def reading_of(names: Collection[str], trusted: Sequence[Family]) -> Reading:
    """The reading that explains most names if no base is available; ties go to the most trusted one."""
    return _best(trusted, names, lambda name, reading: bool(reading.canonical(name)))


def _best(trusted: Sequence[Family], names: Collection[str], explains: Callable[[str, Reading], bool]) -> Reading:
    """The first reading that explains the most names."""
    best, most = Reading(trusted[0]), -1
    for reading in _readings(trusted):
        count = sum(explains(name, reading) for name in names)
        if count > most:
            best, most = reading, count
        if count == len(names):
            break
    return best


def _readings(trusted: Sequence[Family]) -> Iterator[Reading]:
    """All readings, most trusted first: the families that a config names, then any family by its text tower's names."""
    said = {family.rules: family for family in trusted}.values()
    yield from (Reading(family) for family in said)
    yield from (Reading(family, added=_BODY) for family in said)
    yield from (Reading(family, removed=_BODY) for family in said)
    tables = {family.rules: family for family in reversed(list(FAMILIES.values())) if family is not GENERIC}
    by_parts = sorted(tables.values(), key=lambda family: len(family.parts))  # language models first
    for added in ("", _BODY):
        yield from (Reading(family, added=added, guessed=True) for family in by_parts)


def why_missing(
    parameters: Parameters, adapter: Adapter, reading: Reading, missing: Iterable[str]
) -> Iterable[PolymergeError]:
    """One error for each cause of parameters missing from the base, with the next step."""
    base = parameters.base
    parts = {name.partition(".")[0] for name in parameters.blocks}
    causes: dict[tuple[str, str], list[str]] = {}
    name_base = name_the_base(base.checkpoint, adapter)
    for parameter in missing:
        held = reading.canonical(parameter) or next(
            (found for family in FAMILIES.values() if family is not GENERIC and (found := family.canonical(parameter))),
            (),
        )
        part, layer = (held[0].partition(".")[0], text_layer(held[0])) if held else ("", None)
        pair = adapter.pairs.get(parameter.removesuffix(".bias"))
        if (experts := adapter.pairs.get(parameter)) is not None and experts.experts:
            cause = (f": experts in one tensor, {experts.experts} of them", name_base)
        elif pair is not None and pair.bias is not None and parameters.place(f"{pair.module}.weight", reading):
            why = ": lora_bias gives a bias to layers that have none, and no class of the base has a place for it"
            cause = (why, "Use it with PEFT as it is, or train it again without lora_bias")
        elif ".experts." in parameter:
            cause = ("", f"{name_base} (or a copy in which experts lie as they did there)")
        elif layer is not None and layer >= base.depth:
            cause = (f": its text tower has {base.depth} layers", name_base)
        elif part and part != "text" and base.family is not GENERIC and part not in parts:
            why = f": it is a model without {'a ' if part == 'projector' else ''}{part}"
            cause = (why, f"Name a base that has one, or {_with_config(adapter)}")
        elif part == "projector" and base.family is not GENERIC:
            cause = (": its projector is of another kind", other_projector(adapter))
        else:
            cause = ("" if held else ": no family has names like these", name_base)
        causes.setdefault(cause, []).append(parameter)
    for (why, way), names in causes.items():
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield RecipeError(
            f"'{base.label}': the adapter ({adapter.where(names)}) has weights for {few}, which its base "
            f"({base.checkpoint.folder}, family {base.family.name}) does not have{why}. {way}"
        )


def name_the_base(checkpoint: Checkpoint, adapter: Adapter) -> str:
    """Advice to name another base, or, if the config names this one, on how the two may have come to differ."""
    named = base_named(adapter.config)
    if named and exists(named) and given_path(named).resolve() == checkpoint.folder:
        return (
            "Its config names this base, but the model there is not the one that was trained: name the model as it was "
            "when training began"
        )
    return "Name the base that it was trained on" + (f"; its config names '{named}'" if named else "")


def _with_config(adapter: Adapter) -> str:
    """Advice on how an adapter can bring its own parts along."""
    if adapter.model_config:
        return (
            "the language model whose module names the adapter has: these weights then come from the adapter, and "
            "the output is the model of the config.json beside it"
        )
    return (
        "put the config.json of the model that was trained beside the adapter: on the language model that it was "
        "trained from, the output is then that model, with these weights"
    )


def other_projector(adapter: Adapter) -> str:
    """Advice for an adapter and a base whose projectors differ in kind."""
    kind = adapter.model_config.get("mm_projector_type")
    said = f" ('{kind}' in the config.json beside the adapter)" if kind else ""
    return f"Name a base whose projector has the layers and widths that were trained{said}, or {_with_config(adapter)}"


def unequal_rows(parameters: Parameters, found: Mapping[str, Expr]) -> Iterable[PolymergeError]:
    """Refuse an adapter that resizes only one of embedding and head, which share one vocabulary."""
    base, ties = parameters.base, parameters.base.ties
    if not {EMBEDDING, HEAD} <= set(parameters.blocks) or (ties and ties.virtual and ties.virtual not in found):
        return
    names = [parameters.blocks[canonical][0] for canonical in (EMBEDDING, HEAD)]
    before = [parameters.entry(name).shape[0] for name in names]
    after = [shape_of(found.get(name, parameters.read((name, ()))), base.shapes)[0] for name in names]
    changed = [new - old for old, new in zip(before, after, strict=True)]
    if changed[0] == changed[1]:
        return
    one = 0 if changed[0] else 1
    where = (
        f"'{base.label}': the adapter has {names[one]} with {after[one]} rows, its base {before[one]}, and "
        f"{names[1 - one]} would have {after[1 - one]}"
    )
    if before[0] != before[1]:
        yield RecipeError(
            f"{where}: in this base embedding and head differ by {abs(before[0] - before[1])} rows, those of images, "
            "which the model that it was trained on has not. Fold it into that one, and merge the two with "
            "vocab: overlap"
        )
        return
    yield RecipeError(
        f"{where}: a vocabulary has as many in both. Save the adapter with both of them "
        '(modules_to_save: ["embed_tokens", "lm_head"], or save_embedding_layers=True), or name the base as it was '
        "resized for training"
    )


def no_place_for_a_head(parameters: Parameters, missing: dict[str, None]) -> Iterable[PolymergeError]:
    """Remove heads from `missing` that a base of an unknown family ties, and refuse them for that reason."""
    base = parameters.base
    if not base.checkpoint.config.get("tie_word_embeddings"):
        return
    for head in [name for name in missing if name.rpartition(".")[0].endswith("lm_head")]:
        del missing[head]
        yield RecipeError(
            f"'{base.label}': the adapter has a {head} of its own, and its base ties the head to the embedding, so a "
            "checkpoint of it has no place for one. Keep the adapter apart, or untie the base first"
        )


def unknown_head(parameters: Parameters, adapter: Adapter) -> Iterable[PolymergeError]:
    """Refuse a change to an embedding that may also be the head if no family tells whether it is."""
    base = parameters.base
    heads = any(name.endswith("lm_head.weight") for name in parameters.layout)
    if base.family is not GENERIC or heads or base.checkpoint.config.get("tie_word_embeddings") is False:
        return
    alone = [
        *(name for name in adapter.non_lora if name.endswith(".embed_tokens.weight")),
        *(f"{pair.module}.weight" for pair in adapter.pairs.values() if pair.embedding),
    ]
    if alone:
        yield RecipeError(
            f"'{base.label}': the adapter changes {alone[0]} alone, which may be the head as well: its base stores no "
            "lm_head.weight, and its family is not known, so nothing says what that one becomes. Fold it with PEFT's "
            "merge_and_unload(), or set `family:` for the model"
        )
