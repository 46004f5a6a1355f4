"""Open what a recipe names: each checkpoint once, its headers checked, its tensor names in canonical form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from polymerge.checkpoints import Checkpoint, open_checkpoint
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.discovery import LAYOUTS
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.joined import ADAPTER, open_joined, renamed, split_source
from polymerge.checkpoints.wrappers import is_lora, unwrapped, wrappers_in
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.families import FAMILIES, nearest, read_names, splits, text_tower
from polymerge.families.expressions import Expr, Read, replace_reads
from polymerge.families.generic import GENERIC
from polymerge.families.quantization import why_quantized
from polymerge.families.resolve import map_names
from polymerge.families.rules import Family
from polymerge.methods.table import METHODS
from polymerge.planning.adapted import changes, parted
from polymerge.planning.adapter_places import Parameters, Ties
from polymerge.planning.model import EMBEDDING, HEAD, Model, own_name, stored_in
from polymerge.recipe.recipe import ModelEntry, Recipe

__all__ = [
    "Models",
    "bases_among",
    "labels_of",
    "open_each",
    "open_models",
    "sources_of",
]


@dataclass(frozen=True)
class Models:
    """The inputs of a recipe by the part that each plays.

    merged  the models that are merged, in the recipe's order
    own     for each of them its place in the recipe
    """

    template: Model
    merged: tuple[Model, ...]
    own: tuple[int, ...]
    base: Model | None


def labels_of(sources: Iterable[str]) -> dict[str, str]:
    """A short name for each source: the last part of its path, or as many as it takes to tell them apart."""
    paths = {source: _parts(source) for source in sources}
    deepest = max(map(len, paths.values()), default=1)
    for length in range(1, deepest + 1):
        labels = {source: "/".join(parts[-length:]) for source, parts in paths.items()}
        if len(set(labels.values())) == len(labels):
            return labels
    return {source: source for source in paths}


def sources_of(recipe: Recipe) -> tuple[str, ...]:
    """Everything that a recipe names, each once."""
    named = [entry.model for entry in recipe.models]
    named += [name for name in (recipe.template, recipe.base_model) if name is not None]
    return tuple(dict.fromkeys(named))


def open_models(
    recipe: Recipe, problems: list[PolymergeError], held: Mapping[str, Checkpoint] | None = None
) -> Models | None:
    """Open every checkpoint that the recipe names; None, with the problems said, where one cannot be used.

    held  those that are open already, by what the recipe calls them
    """
    sources = sources_of(recipe)
    families = {entry.model: entry.family for entry in recipe.models}
    opened = _open_all(sources, families, _Ignored(recipe.ignore, recipe.models), problems, held or {})
    if len(opened) < len(sources) or not recipe.models or "models" in recipe.unread:
        return None
    merged = tuple(opened[entry.model] for entry in recipe.models)
    base = opened[recipe.base_model] if recipe.base_model else None
    return Models(
        template=opened[recipe.template] if recipe.template else _default_template(recipe, merged, base),
        merged=merged,
        own=tuple(range(len(merged))),
        base=base,
    )


def bases_among(recipe: Recipe, models: Models | None) -> tuple[int, ...]:
    """The places of models that are base_model; by their names alone where the models could not be opened."""
    if models is None:
        return tuple(place for place, entry in enumerate(recipe.models) if entry.model == recipe.base_model)
    return tuple(place for place, model in enumerate(models.merged) if model is models.base)


def open_each(sources: Sequence[str], problems: list[PolymergeError], ignore: Sequence[str] = ()) -> list[Model]:
    """Open checkpoints that stand in no recipe, without the tensors that the globs `ignore` match."""
    return list(_open_all(sources, {}, _Ignored(ignore), problems, {}).values())


class _Ignored:
    """The globs on names as stored that say what is left out: of all inputs, or of one model."""

    def __init__(self, general: Sequence[str], models: Iterable[ModelEntry] = ()) -> None:
        self.general = tuple(general)
        self.own = {entry.model: entry.ignore for entry in models if entry.ignore}
        self._names: dict[str, frozenset[str]] = {}

    def of(self, source: str, names: Collection[str]) -> set[str]:
        """The names of a source that are left out, of those that it stores."""
        globs = (*self.general, *self.own.get(source, ()))
        if not globs:
            return set()
        wrappers = wrappers_in([name for name in names if not _matched(name, globs)])
        plain = {name: unwrapped(name, wrappers) for name in names}
        self._names[source] = frozenset((*names, *plain.values()))
        return {name for name in names if _matched(name, globs) or _matched(plain[name], globs)}

    def problems(self) -> Iterator[RecipeError]:
        """The globs that match no name where they should."""
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
                    f"recipe: {where}: '{glob}' matches no tensor; globs are matched against whole names as stored"
                    f"{hint}"
                )


def _matched(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _open_all(
    sources: Sequence[str],
    families: Mapping[str, str | None],
    ignored: _Ignored,
    problems: list[PolymergeError],
    held: Mapping[str, Checkpoint],
) -> dict[str, Model]:
    """Each source that can be opened; two names of one place give one model."""
    labels = labels_of(sources)
    by_path: dict[tuple[Path, Path | None], Model] = {}
    opened: dict[str, Model] = {}
    for source in dict.fromkeys(sources):
        try:
            if (checkpoint := held.get(source)) is None:
                base, adapter = split_source(source)
                path = (locate(base), None if adapter is None else locate(adapter))
            else:
                path = (checkpoint.folder, checkpoint.adapter.folder if checkpoint.adapter else None)
            if path not in by_path:
                by_path[path] = _open(source, path, labels[source], families.get(source), ignored, problems, checkpoint)
            opened[source] = by_path[path]
        except PolymergeError as error:
            problems += error.problems
    if len(opened) == len(set(sources)):
        problems += ignored.problems()
    return opened


def _open(
    source: str,
    paths: tuple[Path, Path | None],
    label: str,
    family: str | None,
    ignored: _Ignored,
    problems: list[PolymergeError],
    checkpoint: Checkpoint | None,
) -> Model:
    path, adapter = paths
    if gguf := _gguf_in(path):
        raise RecipeError(f"'{label}' ({gguf}) {why_quantized({'quantization_config': {'quant_method': 'gguf'}}, {})}")
    if checkpoint is None:
        checkpoint = open_checkpoint(source, path) if adapter is None else open_joined(source, path, adapter)
    stored = stored_in(checkpoint)
    dtypes = {name: entry.dtype for name, entry in stored.items()}
    if (why := why_quantized(checkpoint.config, dtypes)) is not None:
        # and no more of it: what its packed tensors lack beside others is no problem of its own
        raise RecipeError(f"'{label}' ({path}) {why}")
    if family is not None and family not in FAMILIES:
        problems.append(RecipeError(f"'{label}': there is no family '{family}'.{did_you_mean(family, FAMILIES)}"))
        family = None
    unread = ignored.of(source, [*stored, *_adapters_own(checkpoint)])
    reading = read_names(checkpoint.config, [name for name in stored if name not in unread], family)
    table = reading.family
    checkpoint = renamed(checkpoint, reading.wrappers)
    gone = {unwrapped(name, reading.wrappers) for name in stored if name in unread}
    if checkpoint.adapter is not None:
        before = _adapters_own(checkpoint)
        checkpoint = replace(checkpoint, adapter=_without(checkpoint.adapter, unread))
        gone |= {ADAPTER + name for name in before if name not in _adapters_own(checkpoint)}
    stored = {name: entry for name, entry in stored_in(checkpoint).items() if name not in gone}
    shapes = {name: entry.shape for name, entry in stored.items()}
    known = table is not GENERIC or nearest(checkpoint.config) is not GENERIC
    _refuse_unfinished(f"'{label}' ({path})", shapes, table, known)
    names = map_names(table, stored, f"'{label}' ({path})", splits(checkpoint.config), shapes)
    if 2 * len(names.unknown) > len(stored):  # it is another model: nothing else that is said of it would be true
        refuse_if_any(names.problems)
    partly = bool(names.unknown) and all(table.explains([name.partition(".")[2]]) for name in names.unknown)
    if names.lost or partly:  # how the rest fits is not told, since what is lost would seem to be missing
        refuse_if_any(names.problems)
    problems.extend(names.problems)
    for own, blocks in names.layout.items():
        rows = sum(stop - start for _, ranges in blocks for start, stop in ranges)
        shape = shapes[own]
        if rows and rows != shape[0] and own not in names.views:
            problems.append(
                CheckpointError(
                    f"'{label}' ({path}): {own} has {shape[0]} rows, the heads or the MLP in its config.json make "
                    f"{rows}. Mend config.json"
                )
            )
    ties = _ties(text_tower(checkpoint.config, table).ties_head, table, names.tensors)
    adapted: dict[str, Expr] = {}
    apart = False
    layout = dict(names.layout)
    if ties is not None and ties.virtual:
        virtual, same = (HEAD, EMBEDDING) if ties.virtual == ties.head else (EMBEDDING, HEAD)
        layout[ties.virtual] = ((virtual, ()),)
    if checkpoint.adapter is not None:
        parameters = Parameters(checkpoint, table, layout, names.views, ties)
        made = changes(label, parameters, checkpoint.adapter, problems)
        adapted = dict(made.found)
        apart = parted(ties, adapted, checkpoint.adapter)
        checkpoint = replace(checkpoint, skipped={**checkpoint.skipped, **made.left_out})
    tensors = {
        canonical: replace_reads(expr, lambda own: adapted.get(own, Read(own)))
        for canonical, expr in names.tensors.items()
    }
    borrowed = set[str]()
    if ties is not None and ties.virtual:
        tensors[virtual] = adapted.get(ties.virtual, tensors[same])
        if not apart:
            del layout[ties.virtual]
            borrowed.add(virtual)
    return Model(
        label, path, checkpoint, table, tensors, layout, names.views, frozenset(names.buffers),
        frozenset(borrowed), adapted, apart, frozenset(gone), reading.wrappers, reading.other,
    )  # fmt: skip


def _ties(said: bool | None, family: Family, tensors: Mapping[str, Expr]) -> Ties | None:
    """Head and embedding of a checkpoint, where its config ties them or one of the two is not stored for it to be."""
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
    """The name that `canonical` has in a layout in which another tensor is called `own`: that of the nearest rule.

    Tables have a layout's embedding, its layers and its head in this order, one layout after the other.
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
    """Refuse what was saved too early: with LoRA that is not merged, or with shards that were not gathered.

    known  whether the model is of a kind that has no such modules of its own
    """
    lora = [name for name in shapes if known and is_lora(name)]
    if lora:
        raise CheckpointError(
            f"{where}: has LoRA in it that is not merged, in {len(lora)} of its {len(shapes)} tensors, such as "
            f"'{lora[0]}'. Load it with PEFT, and save what merge_and_unload() gives; or save its adapter alone "
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
    """The names of the tensors of the adapter that stands with a checkpoint, as its files have them."""
    return [entry.name for entry in checkpoint.adapter.entries] if checkpoint.adapter else []


def _without(adapter: Adapter, names: Collection[str]) -> Adapter:
    """An adapter without some of its tensors; a module loses both factors where one of them is named."""
    pairs = {
        module: pair
        for module, pair in adapter.pairs.items()
        if not any(entry is not None and entry.name in names for entry in (pair.a, pair.b, pair.bias))
    }
    extras = {parameter: entry for parameter, entry in adapter.extras.items() if entry.name not in names}
    tokens = {parameter: found for parameter, found in adapter.tokens.items() if found[1].name not in names}
    return replace(adapter, pairs=pairs, extras=extras, tokens=tokens)


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path is, or the first one of a folder that has no weights that can be read."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:
        return None  # which is said when it is opened
    if any(file.suffix in LAYOUTS for file in files):
        return None
    return next((file for file in files if file.suffix == ".gguf"), None)


def _default_template(recipe: Recipe, merged: Sequence[Model], base: Model | None) -> Model:
    """The template of a recipe that names none.

    As in mergekit it is base_model, where the recipe reads that: for deltas, or as one of the models. But the first
    multimodal one comes before all others, since no language model has a place for the rest of it.
    """
    candidates = list(merged)
    if base is not None and (METHODS[recipe.merge_method].on == "deltas" or base in merged):
        beside_none = any(model.checkpoint.config for model in merged) and not base.checkpoint.config
        candidates[:0] = [] if beside_none else [base]  # a bare file has no config to give
    return next((model for model in candidates if model.multimodal), candidates[0])


def _parts(source: str) -> tuple[str, ...]:
    return Path(source).expanduser().absolute().parts
