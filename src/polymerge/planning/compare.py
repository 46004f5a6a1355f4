"""Describe models and tell which of them can be merged, before there is a recipe."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

from polymerge.checkpoints.adapter import Adapter, is_adapter, open_adapter
from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import locate
from polymerge.errors import PolymergeError, collecting, refuse
from polymerge.families.rules import PARTS, counterpart, without_branch
from polymerge.planning.compatibility import config_warnings, other_lineages
from polymerge.planning.fit import Misfits, common_parts, joinable
from polymerge.planning.inputs import open_each
from polymerge.planning.model import VOCABULARY, Model, part_of
from polymerge.tables import Table, html_table

__all__ = ["AdapterPortrait", "Inspection", "Joint", "Portrait", "inspect"]


@dataclass(frozen=True)
class Portrait:
    """A checkpoint as seen from its headers; `parts` holds the number of tensors and bytes of each part."""

    label: str
    path: str
    family: str
    text_tower: str | None
    layers: int
    width: int | None
    vocabulary: int | None
    tied_head: bool
    tensors: int
    size: int
    parts: dict[str, tuple[int, int]]
    dtypes: dict[str, int]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joint:
    """The outcome of merging `other` into `template`: the number of joined tensors, or why they cannot be merged."""

    template: str
    other: str
    parts: tuple[str, ...]
    joined: int
    kept: tuple[str, ...]
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class AdapterPortrait:
    """A LoRA adapter as seen from its headers.

    files  what each weight file in its folder holds, in words
    size   in bytes
    """

    adapter: str
    base: str | None
    layout: str
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    full_weights: tuple[str, ...]
    files: dict[str, str]
    size: int


@dataclass(frozen=True)
class Inspection(Table):
    """Descriptions of models and adapters, and for each ordered pair of models whether they can be merged."""

    models: tuple[Portrait, ...]
    pairs: tuple[Joint, ...]
    adapters: tuple[AdapterPortrait, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per model; adapters are in `adapters`."""
        return [
            {
                "model": one.label,
                "family": one.family,
                "text tower": one.text_tower,
                "layers": one.layers,
                "width": one.width,
                "vocabulary": one.vocabulary,
                "tensors": one.tensors,
                "GB": one.size / 1e9,
            }
            for one in self.models
        ]

    def _repr_html_(self) -> str:
        """The models, which of them can be merged, and the adapters."""
        tables = [self.rows(), *([asdict(one) for one in some] for some in (self.pairs, self.adapters))]
        return "".join(html_table(rows) for rows in tables if rows)


def inspect(*sources: str | os.PathLike[str], ignore: Sequence[str] = ()) -> Inspection:
    """Describe checkpoints and adapters from their headers, and try every ordered pair of checkpoints.

    sources  folders, files or hub ids; BASE+ADAPTER is a checkpoint
    ignore   globs on names of tensors as stored, which are left out

    raises Refused with every problem found.
    """
    adapters, models = list[Adapter](), list[Model]()
    with collecting(needed=True):
        given = [os.fspath(source) for source in sources]
        own = [source for source in given if _is_adapter(source)]
        for source in own:
            with collecting():
                adapters.append(open_adapter(source, locate(source)))
        models = open_each([source for source in given if source not in own], ignore)
    return Inspection(
        tuple(map(_portrait, models)),
        tuple(_joint(one, other) for one, other in permutations(models, 2)),
        tuple(map(_adapter_portrait, adapters)),
    )


def _is_adapter(source: str) -> bool:
    try:
        return split_source(source)[1] is None and is_adapter(locate(source))
    except PolymergeError:
        return False  # said, with all else that is wrong, when it is opened


def _adapter_portrait(adapter: Adapter) -> AdapterPortrait:
    return AdapterPortrait(
        adapter=adapter.source,
        base=adapter.config.get("base_model_name_or_path"),
        layout=adapter.layout,
        modules=len(adapter.pairs),
        ranks=tuple(sorted({pair.rank for pair in adapter.pairs.values()})),
        scalings=tuple(sorted({pair.scaling for pair in adapter.pairs.values()})),
        full_weights=tuple(sorted(adapter.non_lora)),
        files=dict(adapter.became),
        size=sum(tensor.nbytes for tensor in adapter.entries),
    )


def _portrait(model: Model) -> Portrait:
    parts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, entry in model.stored.items():
        canonical = () if model.generic else model.family.canonical(name)
        part = "buffers" if name in model.buffers else part_of(canonical[0]) if canonical else "all"
        parts[part] += 1
        sizes[part] += entry.nbytes
    tower = model.tower
    norm = model.shape("text.norm.weight") if "text.norm.weight" in model.tensors else ()
    embedding = "text.embed_tokens.weight"
    return Portrait(
        label=model.label,
        path=str(model.path),
        family=model.family.name,
        text_tower=tower.model_type,
        layers=model.depth,
        width=norm[0] if norm else tower.hidden_size,
        vocabulary=model.shape(embedding)[0] if embedding in model.tensors else tower.vocab_size,
        tied_head=model.ties_head,
        tensors=len(model.stored),
        size=sum(entry.nbytes for entry in model.stored.values()),
        parts={part: (count, sizes[part]) for part, count in parts.items()},
        dtypes=dict(Counter(entry.dtype for entry in model.stored.values())),
        remarks=(
            *model.remarks(),
            *([f"{len(model.ignored)} of its tensors are ignored"] if model.ignored else []),
        ),
    )


def _joint(template: Model, other: Model) -> Joint:
    misfits, kept = Misfits(), list[str]()
    common = common_parts((template, other))
    parts = None if template.generic else common
    joined, obstacles = 0, tuple[PolymergeError, ...]()
    try:
        with collecting() as problems:
            joinable(template, other, parts, misfits)
            if template.generic == other.generic:
                joined, kept = _tensors(template, other, parts, misfits)
            refuse(*misfits.problems(template.label))
            if not common and not template.generic and not problems:
                refuse(PolymergeError("they have no part in common"))
    except PolymergeError as error:
        obstacles = error.problems
    return Joint(
        template.label,
        other.label,
        tuple(sorted(common)),
        joined,
        (*kept, *_warnings(template, other, parts)),
        tuple(map(str, obstacles)),
    )


def _tensors(template: Model, other: Model, parts: frozenset[str] | None, misfits: Misfits) -> tuple[int, list[str]]:
    """The number of tensors that join, and remarks on those that stay the template's; misfits are noted."""
    joined, kept = 0, list[str]()
    unread: Counter[str] = Counter()
    for name in template.tensors:
        if name in template.borrowed or (parts is not None and part_of(name) not in parts):
            continue
        found = other.find(name)
        if found is None:
            misfits.note_missing(other, name)
        elif template.shape(name) == other.shape(found):
            joined += 1
        elif name in VOCABULARY and template.shape(name)[1:] == other.shape(found)[1:]:
            kept.append(
                f"{name}: {other.shape(found)[0]} rows into {template.shape(name)[0]}, kept unless vocab says otherwise"
            )
        else:
            misfits.note_shape(other, found, template, name)
    taken = {other.find(name) for name in template.tensors}
    for name in other.tensors:
        if name in taken or name in other.borrowed or (parts is not None and part_of(name) not in parts):
            continue
        if counterpart(without_branch(name), template.tensors):
            unread[name[name.index("@") :]] += 1
        else:
            misfits.note_extra(other, name)
    return joined, kept + [
        f"{count} tensors of its branch {branch} have no place in the template" for branch, count in unread.items()
    ]


def _warnings(template: Model, other: Model, parts: frozenset[str] | None) -> Iterator[str]:
    """The warnings that a merge of two models would give."""
    if template.generic != other.generic:
        return
    if parts is not None and "text" in parts:
        yield from other_lineages(template, [other])
    ours, theirs = ((one.label, one.checkpoint.config) for one in (template, other))
    yield from config_warnings(ours, [theirs], PARTS if parts is None else parts)
