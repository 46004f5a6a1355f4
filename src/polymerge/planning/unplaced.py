"""What to say of weights of an adapter that have no place in a base: the cause, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.adapter import Adapter
from polymerge.errors import PolymergeError, RecipeError
from polymerge.families import FAMILIES
from polymerge.families.expressions import Expr, shape_of
from polymerge.families.registry import GENERIC
from polymerge.families.rules import text_layer
from polymerge.planning.adapter_places import Parameters, Reading
from polymerge.planning.folding import base_named
from polymerge.planning.model import EMBEDDING, HEAD

__all__ = ["name_the_base", "no_place_for_a_head", "other_projector", "unequal_rows", "unknown_head", "why_missing"]


def why_missing(
    label: str, parameters: Parameters, adapter: Adapter, reading: Reading, missing: Sequence[str]
) -> Iterable[PolymergeError]:
    """What to say of parameters that the base does not have: one message for each cause, and what to do about it."""
    parts = {name.partition(".")[0] for name in parameters.blocks}
    causes: dict[tuple[str, str], list[str]] = {}
    name_base = name_the_base(parameters.checkpoint, adapter)
    for parameter in missing:
        held = reading.canonical(parameter) or next(
            (found for family in FAMILIES.values() if family is not GENERIC and (found := family.canonical(parameter))),
            (),
        )
        part, layer = (held[0].partition(".")[0], text_layer(held[0])) if held else ("", None)
        pair = adapter.pairs.get(parameter.removesuffix(".bias"))
        if pair is not None and pair.bias is not None and parameters.place(f"{pair.module}.weight", reading):
            way = "Use it with PEFT as it is, or train it again without lora_bias"
            cause = (
                ": lora_bias gives a bias to layers that have none, and no class of the base has a place for it",
                way,
            )
        elif ".experts." in parameter:
            cause = ("", f"{name_base} (or a copy in which experts lie as they did there)")
        elif layer is not None and layer >= parameters.depth:
            cause = (f": its text tower has {parameters.depth} layers", name_base)
        elif part and part != "text" and parameters.family is not GENERIC and part not in parts:
            way = f"Name a base that has one, or {_with_config(adapter)}"
            cause = (f": it is a model without {'a ' if part == 'projector' else ''}{part}", way)
        elif part == "projector" and parameters.family is not GENERIC:
            cause = (": its projector is of another kind", other_projector(adapter))
        else:
            cause = ("" if held else ": no family has names like these", name_base)
        causes.setdefault(cause, []).append(parameter)
    for (why, way), names in causes.items():
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield RecipeError(
            f"'{label}': the adapter ({adapter.where(names)}) has weights for {few}, which its base "
            f"({parameters.checkpoint.folder}, family {parameters.family.name}) does not have{why}. {way}"
        )


def name_the_base(checkpoint: Checkpoint, adapter: Adapter) -> str:
    """The advice to name another base; where its config names this one, what may have become of it."""
    named = base_named(adapter.config)
    if named and Path(named).expanduser().resolve() == checkpoint.folder:
        return (
            "Its config names this base, so what was trained is not what lies there: name the model as it was when "
            "training began"
        )
    return "Name the base that it was trained on" + (f"; its config names '{named}'" if named else "")


def _with_config(adapter: Adapter) -> str:
    """How an adapter brings parts of its own along."""
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
    """The advice where the projectors of an adapter and of its base are not of one kind."""
    kind = adapter.model_config.get("mm_projector_type")
    said = f" ('{kind}' in the config.json beside the adapter)" if kind else ""
    return f"Name a base whose projector has the layers and widths that were trained{said}, or {_with_config(adapter)}"


def unequal_rows(label: str, parameters: Parameters, found: Mapping[str, Expr]) -> Iterable[PolymergeError]:
    """Embedding and head are of one vocabulary: where one is resized and the other is not, the model has none."""
    ties = parameters.ties
    if not {EMBEDDING, HEAD} <= set(parameters.blocks) or (ties and ties.virtual and ties.virtual not in found):
        return
    shapes = {name: entry.shape for name, entry in parameters.checkpoint.entries.items()}
    names = [parameters.blocks[canonical][0] for canonical in (EMBEDDING, HEAD)]
    before = [parameters.entry(name).shape[0] for name in names]
    after = [shape_of(found.get(name, parameters.read((name, ()))), shapes)[0] for name in names]
    changed = [new - old for old, new in zip(before, after, strict=True)]
    if changed[0] == changed[1]:
        return
    one = 0 if changed[0] else 1
    where = (
        f"'{label}': the adapter has {names[one]} with {after[one]} rows, its base {before[one]}, and {names[1 - one]} "
        f"would have {after[1 - one]}"
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


def no_place_for_a_head(label: str, parameters: Parameters, missing: dict[str, None]) -> Iterable[PolymergeError]:
    """Take out of `missing` the heads that a base of an unknown family ties, and refuse them with that reason."""
    if not parameters.checkpoint.config.get("tie_word_embeddings"):
        return
    for head in [name for name in missing if name.rpartition(".")[0].endswith("lm_head")]:
        del missing[head]
        yield RecipeError(
            f"'{label}': the adapter has a {head} of its own, and its base ties the head to the embedding, so a "
            "checkpoint of it has no place for one. Keep the adapter apart, or untie the base first"
        )


def unknown_head(label: str, parameters: Parameters, adapter: Adapter) -> Iterable[PolymergeError]:
    """Refuse what changes an embedding that may be the head as well, where no family says whether it is."""
    heads = any(name.endswith("lm_head.weight") for name in parameters.layout)
    if parameters.family is not GENERIC or heads or parameters.checkpoint.config.get("tie_word_embeddings") is False:
        return
    alone = [
        *(name for name in adapter.extras if name.endswith(".embed_tokens.weight")),
        *(f"{pair.module}.weight" for pair in adapter.pairs.values() if pair.embedding),
    ]
    if alone:
        yield RecipeError(
            f"'{label}': the adapter changes {alone[0]} alone, which may be the head as well: its base stores no "
            "lm_head.weight, and its family is not known, so nothing says what that one becomes. Fold it with PEFT's "
            "merge_and_unload(), or say `family:` beside the model"
        )
