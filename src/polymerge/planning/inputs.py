"""Open what a recipe names: each checkpoint once, its headers checked, its tensor names in canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polymerge.checkpoint import open_checkpoint
from polymerge.checkpoint.discovery import LAYOUTS
from polymerge.checkpoint.hub import locate
from polymerge.checkpoint.joined import open_joined, split_source
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.families import FAMILIES, family_of, splits, text_tower
from polymerge.families.quantization import why_quantized
from polymerge.mapping import Family
from polymerge.methods.table import METHODS
from polymerge.namemap import map_names
from polymerge.planning.adapted import changes, parted
from polymerge.planning.model import EMBEDDING, HEAD, Model, own_name, stored_in
from polymerge.planning.parameters import Parameters, Ties
from polymerge.reads import Expr, Read, replace_reads
from polymerge.recipe import Recipe

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


def open_models(recipe: Recipe, problems: list[PolymergeError]) -> Models | None:
    """Open every checkpoint that the recipe names; None, with the problems said, where one cannot be used."""
    sources = sources_of(recipe)
    families = {entry.model: entry.family for entry in recipe.models}
    opened = _open_all(sources, families, problems)
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


def open_each(sources: Sequence[str], problems: list[PolymergeError]) -> list[Model]:
    """Open checkpoints that stand in no recipe."""
    return list(_open_all(sources, {}, problems).values())


def _open_all(
    sources: Sequence[str],
    families: Mapping[str, str | None],
    problems: list[PolymergeError],
) -> dict[str, Model]:
    """Each source that can be opened; two names of one place give one model."""
    labels = labels_of(sources)
    by_path: dict[tuple[Path, Path | None], Model] = {}
    opened: dict[str, Model] = {}
    for source in dict.fromkeys(sources):
        try:
            base, adapter = split_source(source)
            path = (locate(base), None if adapter is None else locate(adapter))
            if path not in by_path:
                by_path[path] = _open(source, path, labels[source], families.get(source), problems)
            opened[source] = by_path[path]
        except PolymergeError as error:
            problems += error.problems
    return opened


def _open(
    source: str, paths: tuple[Path, Path | None], label: str, family: str | None, problems: list[PolymergeError]
) -> Model:
    path, adapter = paths
    if gguf := _gguf_in(path):
        raise RecipeError(f"'{label}' ({gguf}) {why_quantized({'quantization_config': {'quant_method': 'gguf'}}, {})}")
    checkpoint = open_checkpoint(source, path) if adapter is None else open_joined(source, path, adapter)
    stored = stored_in(checkpoint)
    dtypes = {name: entry.dtype for name, entry in stored.items()}
    if (why := why_quantized(checkpoint.config, dtypes)) is not None:
        # and no more of it: what its packed tensors lack beside others is no problem of its own
        raise RecipeError(f"'{label}' ({path}) {why}")
    if family is not None and family not in FAMILIES:
        problems.append(RecipeError(f"'{label}': there is no family '{family}'.{did_you_mean(family, FAMILIES)}"))
        family = None
    table = family_of(checkpoint.config, family)
    shapes = {name: entry.shape for name, entry in stored.items()}
    names = map_names(table, stored, f"'{label}' ({path})", splits(checkpoint.config), shapes)
    if names.lost:  # how the rest fits is not told, since what is lost would seem to be missing
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
    ties = _ties(checkpoint.config, table, names.tensors)
    adapted: dict[str, Expr] = {}
    apart = False
    if checkpoint.adapter is not None:
        layout = dict(names.layout)
        if ties is not None and ties.virtual:
            layout[ties.virtual] = ((HEAD if ties.virtual == ties.head else EMBEDDING, ()),)
        parameters = Parameters(checkpoint, table, layout, names.views, ties)
        made = changes(label, parameters, checkpoint.adapter, problems)
        adapted = dict(made.found)
        apart = parted(ties, adapted, checkpoint.adapter)
        checkpoint = replace(checkpoint, skipped={**checkpoint.skipped, **made.left_out})
    tensors = {
        canonical: replace_reads(expr, lambda own: adapted.get(own, Read(own)))
        for canonical, expr in names.tensors.items()
    }
    layout, borrowed = dict(names.layout), set[str]()
    if ties is not None and ties.virtual:
        canonical, same = (HEAD, EMBEDDING) if ties.virtual == ties.head else (EMBEDDING, HEAD)
        tensors[canonical] = adapted.get(ties.virtual, tensors[same])
        if apart:
            layout[ties.virtual] = ((canonical, ()),)
        else:
            borrowed.add(canonical)
    return Model(
        label, path, checkpoint, table, tensors, layout, names.views, frozenset(names.buffers),
        frozenset(borrowed), adapted, apart,
    )  # fmt: skip


def _ties(config: Mapping[str, object], family: Family, tensors: Mapping[str, Expr]) -> Ties | None:
    """Head and embedding of a checkpoint, where its config ties them or one of the two is not stored for it to be."""
    said = text_tower(config).ties_head
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
