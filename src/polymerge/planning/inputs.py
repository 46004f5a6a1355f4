"""Open the models that a recipe names: each checkpoint once, headers checked, tensor names in canonical form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from polymerge.checkpoints import Checkpoint, open_checkpoint
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.discovery import LAYOUTS
from polymerge.checkpoints.folder import ADAPTER, open_joined, renamed, split_source
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.names import is_lora, unwrapped, wrappers_in
from polymerge.errors import (
    CheckpointError,
    RecipeError,
    collecting,
    did_you_mean,
    refuse,
    refuse_if_any,
)
from polymerge.families import FAMILIES, nearest, read_names, splits, text_tower
from polymerge.families.expressions import Expr
from polymerge.families.fp8 import read_fp8
from polymerge.families.names_on_disk import as_published
from polymerge.families.quantization import why_quantized
from polymerge.families.registry import GENERIC
from polymerge.families.resolve import NameMap, map_names
from polymerge.families.rules import Family
from polymerge.methods.table import METHODS
from polymerge.paths import given_path
from polymerge.planning.folding import folded
from polymerge.planning.model import EMBEDDING, HEAD, Model, Ties, own_name, stored_in
from polymerge.planning.output_names import read_as_published, with_published_forms
from polymerge.recipe.recipe import ModelEntry, Recipe
from polymerge.recipe.stages import sources_of

__all__ = [
    "Models",
    "bases_among",
    "labels_of",
    "open_each",
    "open_models",
]


@dataclass(frozen=True)
class Models:
    """The inputs of a recipe by their roles.

    merged  the models to merge, in the recipe's order
    own     the index of each of them in the recipe
    """

    template: Model
    merged: tuple[Model, ...]
    own: tuple[int, ...]
    base: Model | None


def labels_of(sources: Iterable[str]) -> dict[str, str]:
    """A short label for each source: the shortest path suffix that makes all of them distinct."""
    paths = {source: _parts(source) for source in sources}
    deepest = max(map(len, paths.values()), default=1)
    for length in range(1, deepest + 1):
        labels = {source: "/".join(parts[-length:]) for source, parts in paths.items()}
        if len(set(labels.values())) == len(labels):
            return labels
    return {source: source for source in paths}


def open_models(recipe: Recipe, held: Mapping[str, Checkpoint]) -> Models | None:
    """Open every checkpoint that the recipe names; return None if one cannot be opened, which is refused.

    held  checkpoints that are already open, by their source in the recipe
    """
    sources = sources_of(recipe)
    families = {entry.model: entry.family for entry in recipe.models}
    ignored = _Ignored(recipe.ignore, recipe.models)
    opened = _open_all(sources, families, ignored, held)
    if len(opened) < len(sources) or not recipe.models or "models" in recipe.unread:
        return None
    merged = tuple(opened[entry.model] for entry in recipe.models)
    base = opened[recipe.base_model] if recipe.base_model else None
    template = opened[recipe.template] if recipe.template else _default_template(recipe, merged, base)
    if recipe.names == "published" and template.named.names:
        source = template.checkpoint.source
        adapter = split_source(source)[1]
        again = held.get(source) or _opened(source, template.path, locate(adapter) if adapter else None, template.label)
        other = _model(again, template.path, template.label, families.get(source), ignored, publish=True)
        merged = tuple(other if model is template else model for model in merged)
        base, template = other if base is template else base, other
    return Models(template=template, merged=merged, own=tuple(range(len(merged))), base=base)


def bases_among(recipe: Recipe, models: Models | None) -> tuple[int, ...]:
    """Indices of the models that are base_model; by source alone if the models could not be opened."""
    if models is None:
        return tuple(place for place, entry in enumerate(recipe.models) if entry.model == recipe.base_model)
    return tuple(place for place, model in enumerate(models.merged) if model is models.base)


def open_each(sources: Sequence[str], ignore: Sequence[str] = ()) -> list[Model]:
    """Open checkpoints without a recipe, leaving out the tensors that the globs `ignore` match.

    Problems are refused; checkpoints that cannot be opened are left out.
    """
    return list(_open_all(sources, {}, _Ignored(ignore), {}).values())


class _Ignored:
    """Globs on stored names that are left out of all inputs, or of one model."""

    def __init__(self, general: Sequence[str], models: Iterable[ModelEntry] = ()) -> None:
        self.general = tuple(general)
        self.own = {entry.model: entry.ignore for entry in models if entry.ignore}
        self._names: dict[str, frozenset[str]] = {}

    def of(self, source: str, names: Collection[str]) -> set[str]:
        """The names of a source that are left out."""
        globs = (*self.general, *self.own.get(source, ()))
        if not globs:
            return set()
        wrappers = wrappers_in([name for name in names if not _matched(name, globs)])
        plain = {name: unwrapped(name, wrappers) for name in names}
        self._names[source] = frozenset((*names, *plain.values()))
        return {name for name in names if _matched(name, globs) or _matched(plain[name], globs)}

    def problems(self) -> Iterator[RecipeError]:
        """An error for each glob that matches no name."""
        every = frozenset[str]().union(*self._names.values())
        said = [("ignore", glob, every) for glob in self.general]
        said += [
            (f"'{source}': ignore", glob, self._names[source])
            for source, globs in self.own.items()
            if source in self._names
            for glob in globs
        ]
        for where, glob, names in said:
            if not any(_matched(name, (glob,)) for name in names):
                near = get_close_matches(glob, names, n=1, cutoff=0.6)
                hint = f". Did you mean '{near[0]}'?" if near else f", such as {min(names, default='none')}"
                yield RecipeError(
                    f"recipe: {where}: '{glob}' matches no tensor; globs are matched against entire stored names{hint}"
                )


def _matched(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _open_all(
    sources: Sequence[str],
    families: Mapping[str, str | None],
    ignored: _Ignored,
    held: Mapping[str, Checkpoint],
) -> dict[str, Model]:
    """Open each source; two sources with the same location share one model."""
    labels = labels_of(sources)
    by_path: dict[tuple[Path, Path | None, str], Model] = {}
    opened: dict[str, Model] = {}
    with collecting():
        for source in dict.fromkeys(sources):
            with collecting():
                base, adapter = split_source(source)
                checkpoint = held.get(source)
                path = locate(base) if checkpoint is None else checkpoint.folder
                beside = None if adapter is None or checkpoint is not None else locate(adapter)
                key = (path, beside, "" if checkpoint is None else source)
                if key not in by_path:
                    checkpoint = checkpoint or _opened(source, path, beside, labels[source])
                    by_path[key] = _model(checkpoint, path, labels[source], families.get(source), ignored)
                opened[source] = by_path[key]
        if len(opened) == len(set(sources)):
            refuse(*ignored.problems())
    return opened


def _model(
    checkpoint: Checkpoint, path: Path, label: str, family: str | None, ignored: _Ignored, *, publish: bool = False
) -> Model:
    """Build one input from its headers, with its adapter's changes; raises if later checks would be meaningless.

    publish  read it under the names that its family is published with
    """
    where, source = f"'{label}' ({path})", checkpoint.source
    stored = stored_in(checkpoint)
    fp8 = read_fp8(checkpoint.config, stored)
    refuse_if_any(RecipeError(f"{where}: {problem}") for problem in fp8.problems)
    dtypes = {
        name: "BF16" if name in fp8.scaled else entry.dtype for name, entry in stored.items() if name not in fp8.beside
    }
    if (why := why_quantized(checkpoint.config, dtypes)) is not None:
        raise RecipeError(f"{where} {why}")
    if family is not None and family not in FAMILIES:
        refuse(RecipeError(f"'{label}': no such family '{family}'.{did_you_mean(family, FAMILIES)}"))
        family = None
    unread = ignored.of(source, [*stored, *_adapters_own(checkpoint)])
    shapes = {name: stored[name].shape for name in dtypes if name not in unread}
    reading = as_stored = read_names(checkpoint.config, shapes, family)
    if reading.wrappers:
        checkpoint = renamed(checkpoint, reading.wrappers)
        fp8 = read_fp8(checkpoint.config, stored_in(checkpoint))
    gone = {unwrapped(name, reading.wrappers) for name in stored if name in unread}
    if checkpoint.adapter is not None:
        before = _adapters_own(checkpoint)
        checkpoint = replace(checkpoint, adapter=_without(checkpoint.adapter, unread))
        gone |= {ADAPTER + name for name in before if name not in _adapters_own(checkpoint)}
    left = gone | fp8.beside
    shapes = {name: entry.shape for name, entry in stored_in(checkpoint).items() if name not in left}
    named, changed = as_published(checkpoint.config, reading, shapes), dict[str, str]()
    if publish:
        checkpoint, reading, changed = read_as_published(label, checkpoint, named, shapes, family)
        shapes = {changed.get(name, name): shape for name, shape in shapes.items()}
    table = reading.family
    known = table is not GENERIC or nearest(checkpoint.config) is not GENERIC
    _refuse_unfinished(where, shapes, table, known)
    names = _mapped(where, checkpoint, table, shapes)
    tensors, borrowed = dict(names.tensors), set[str]()
    ties = _ties(text_tower(checkpoint.config, table).ties_head, table, names.tensors)
    if ties is not None and ties.virtual:
        virtual, same = (HEAD, EMBEDDING) if ties.virtual == ties.head else (EMBEDDING, HEAD)
        tensors[virtual] = tensors[same]
        borrowed.add(virtual)
    model = Model(
        label, path, checkpoint, table, tensors, names.layout, names.views, frozenset(names.buffers),
        frozenset(borrowed), ignored=frozenset(gone), wrappers=as_stored.wrappers, other=as_stored.other, ties=ties,
        by=reading.by, why=reading.why, fp8=fp8, named=named, renamed=changed,
    )  # fmt: skip
    model = (model if checkpoint.adapter is None else folded(model, checkpoint.adapter)).with_scales()
    return with_published_forms(model) if publish else model


def _opened(source: str, path: Path, adapter: Path | None, label: str) -> Checkpoint:
    """Open the checkpoint at a path, with its adapter; raises RecipeError for GGUF."""
    if gguf := _gguf_in(path):
        raise RecipeError(f"'{label}' ({gguf}) {why_quantized({'quantization_config': {'quant_method': 'gguf'}}, {})}")
    return open_checkpoint(source, path) if adapter is None else open_joined(source, path, adapter)


def _mapped(where: str, checkpoint: Checkpoint, table: Family, shapes: Mapping[str, tuple[int, ...]]) -> NameMap:
    """Locate the canonical tensors of a checkpoint; raises if too many names are unknown for later checks to make
    sense.
    """
    names = map_names(table, shapes, where, splits(checkpoint.config, table), shapes)
    another = 2 * len(names.unknown) > len(shapes)  # another model: nothing else that is said of it would be true
    partly = bool(names.unknown) and all(table.explains([name.partition(".")[2]]) for name in names.unknown)
    if another or names.lost or partly:  # what is lost would seem to be missing
        refuse_if_any(names.problems)
    refuse(*names.problems)
    for own, blocks in names.layout.items():
        rows = sum(stop - start for _, ranges in blocks for start, stop in ranges)
        if rows and rows != shapes[own][0] and own not in names.views:
            refuse(
                CheckpointError(
                    f"{where}: {own} has {shapes[own][0]} rows, but the heads or the MLP in its config.json imply "
                    f"{rows}. Correct config.json"
                )
            )
    return names


def _ties(said: bool | None, family: Family, tensors: Mapping[str, Expr]) -> Ties | None:
    """Head and embedding of a checkpoint if its config ties them (`said`) or only one of the two is stored."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if said is False or (embedding is None and head is None):
        return None
    if embedding is not None and head is not None:
        return Ties(own_name(embedding), own_name(head)) if said else None
    if embedding is not None:
        beside = _beside(family, own_name(embedding), HEAD)
        return Ties(own_name(embedding), beside, beside)
    assert head is not None
    beside = _beside(family, own_name(head), EMBEDDING)
    return Ties(beside, own_name(head), beside)


def _beside(family: Family, own: str, canonical: str) -> str:
    """The name of `canonical` in the layout that calls another tensor `own`: that of the nearest rule.

    Tables list each layout's embedding, layers and head in this order, one layout after another.
    """
    names = [rule.pattern for rule in family.rules]
    wanted = [
        place for place, rule in enumerate(family.rules) if rule.names == (canonical,) and "{" not in rule.pattern
    ]
    if own not in names or not wanted:
        return canonical
    place = names.index(own)
    after, before = [one for one in wanted if one > place], [one for one in wanted if one < place]
    return names[min(after) if canonical == HEAD and after else max(before) if before else min(after)]


def _refuse_unfinished(where: str, shapes: Mapping[str, tuple[int, ...]], family: Family, known: bool) -> None:
    """Refuse checkpoints that were saved too early: unmerged LoRA, or ZeRO-3 shards that were not gathered.

    known  whether the model's family is known, and so has no modules of this kind
    """
    lora = [name for name in shapes if known and is_lora(name)]
    if lora:
        raise CheckpointError(
            f"{where}: has unmerged LoRA factors, in {len(lora)} of its {len(shapes)} tensors, such as "
            f"'{lora[0]}'. Load it with PEFT, and save the result of merge_and_unload(); or save its adapter alone "
            "(PeftModel.save_pretrained), and `polymerge fold` it into its base"
        )
    empty = [name for name, shape in shapes.items() if shape == (0,) and not family.is_buffer(name)]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} of its {len(shapes)} tensors are empty, of shape [0], such as '{empty[0]}': "
            "DeepSpeed's ZeRO-3 keeps them in shards, and they were saved without being gathered. Gather them from the "
            "checkpoint of the training (python zero_to_fp32.py CHECKPOINT OUT), or save again with "
            "stage3_gather_16bit_weights_on_model_save"
        )


def _adapters_own(checkpoint: Checkpoint) -> list[str]:
    """The tensor names of a checkpoint's adapter, as stored."""
    return [entry.name for entry in checkpoint.adapter.entries] if checkpoint.adapter else []


def _without(adapter: Adapter, names: Collection[str]) -> Adapter:
    """An adapter without the named tensors; a module loses both factors if either is named."""
    pairs = {
        module: pair
        for module, pair in adapter.pairs.items()
        if not any(entry is not None and entry.name in names for entry in (pair.a, pair.b, pair.bias))
    }
    non_lora = {parameter: entry for parameter, entry in adapter.non_lora.items() if entry.name not in names}
    tokens = {parameter: found for parameter, found in adapter.tokens.items() if found[1].name not in names}
    return replace(adapter, pairs=pairs, non_lora=non_lora, tokens=tokens)


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file at a path, or the first in a folder without other weights; None if there is none."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:
        return None  # which is said when it is opened
    if any(file.suffix in LAYOUTS for file in files):
        return None
    return next((file for file in files if file.suffix == ".gguf"), None)


def _default_template(recipe: Recipe, merged: Sequence[Model], base: Model | None) -> Model:
    """The template of a recipe that does not name one.

    As in mergekit it is base_model if the recipe reads it: for deltas, or as one of the models. But the first
    multimodal model comes before all others, since no language model has a place for its other parts.
    """
    candidates = list(merged)
    if base is not None and (METHODS[recipe.merge_method].reads_base or base in merged):
        beside_none = any(model.checkpoint.config for model in merged) and not base.checkpoint.config
        candidates[:0] = [] if beside_none else [base]  # a bare file has no config to give
    return next((model for model in candidates if model.multimodal), candidates[0])


def _parts(source: str) -> tuple[str, ...]:
    return given_path(source).absolute().parts
