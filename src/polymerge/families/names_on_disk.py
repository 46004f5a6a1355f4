"""The tensor names that a family is published with, for a checkpoint that has those of transformers' memory.

transformers 5 calls tensors otherwise in memory than files do, and writes them so where a model was not read from a
file (made anew, or saved with `save_original_format=False`). Programs that read files know the published names. A
family of the tables says in `published` what its tensors are called there; for a derived one transformers' own reverse
conversion is asked (see `blueprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from polymerge.families.config import Config, splits
from polymerge.families.expressions import Shape, shape_of
from polymerge.families.recognition import Reading
from polymerge.families.registry import GENERIC
from polymerge.families.resolve import NameMap, map_names
from polymerge.families.rules import Family

__all__ = ["Published", "as_published", "why_published"]

_CLIP: Final = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Model types of the towers whose class lost a level of its names in memory."""


@dataclass(frozen=True)
class Published:
    """What a checkpoint's tensors are called as its family is published.

    shapes  of all tensors by their published names, in the order of those that they are made of
    names   name as stored -> the published names of what it holds, where they are others; none for a tensor that lies
            in one which is listed with an earlier name
    why     why published names are not known; then there are none
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    why: str = ""


def as_published(config: Config, reading: Reading, shapes: Mapping[str, Shape]) -> Published:
    """The published names of a checkpoint's tensors.

    reading  how its names are read
    shapes   of the tensors by their names as stored, without wrappers
    """
    family = reading.family
    if family.name == GENERIC.name:
        return Published(why=reading.why or "its family is unknown")
    if family.inside:
        return Published(why=f"it has the names of the body alone, '{family.inside}' is missing before each")
    if reading.by:
        return Published(*_in_order(reading.published, shapes), why=reading.unpublished)
    if not (family.published or family.boxed or family.flipped):
        return Published(shapes)
    mapped = map_names(family, shapes, "", splits(config, family), shapes)
    boxed = family.boxed if _has_clip(config) else ""
    return Published(*_in_order({own: _table(family, boxed, own, shapes[own], mapped) for own in shapes}, shapes))


def why_published(who: str, found: Published) -> str:
    """A sentence on a checkpoint whose names are not the published ones, and what to do; empty if they are.

    who   the checkpoint, as the sentence begins
    """
    if not found.names:
        return ""
    changed = ((own, held[0]) for own, held in found.names.items() if held and held[0] != own)
    own, new = next(changed, (next(iter(found.names)), ""))
    has = f"'{own}' where its family is published with '{new}'" if new else f"each expert in '{own}' transposed"
    return (
        f"{who} has {has}. transformers 5 has it so in memory and loads it; vLLM refuses such a folder or takes it "
        "for another, and transformers 4 leaves random what it does not find. `names: published` in a recipe "
        "writes what others read; with merge_method: copy that is all"
    )


def _in_order(
    made: Mapping[str, Mapping[str, Shape]], shapes: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, tuple[str, ...]]]:
    """All published shapes, and what is called otherwise, from those that each stored tensor is made into."""
    new = {own: made.get(own, {own: shape}) for own, shape in shapes.items()}
    names = {own: tuple(held) for own, held in new.items() if dict(held) != {own: shapes[own]}}
    return {name: shape for held in new.values() for name, shape in held.items()}, names


def _table(family: Family, boxed: str, own: str, shape: Shape, mapped: NameMap) -> dict[str, Shape]:
    """The published names and shapes of what a stored tensor holds, by a family's table."""
    held = next((found for rule in family.published if (found := rule.apply(own)) is not None), (own,))
    view = mapped.views.get(own)
    if view is not None and any("{e}" in name for name in held):
        width = shape_of(view, {own: shape})[1:]
        rows = [stop - start for _, ((start, stop),) in mapped.layout[own]]
        apart = (name.replace("{e}", str(expert)) for expert in range(shape[0]) for name in held)
        return {name: (high, *width) for name, high in zip(apart, rows, strict=True)}
    (name,) = held
    if boxed and name.startswith(outer := f"{boxed[:-1].rpartition('.')[0]}.") and not name.startswith(boxed):
        name = boxed + name.removeprefix(outer)
    turned = family.flipped and view is not None and not view.transposed and shape[1] != shape[2]
    return {name: (shape[0], *shape[:0:-1]) if turned else shape}


def _has_clip(config: Config) -> bool:
    """Whether a config's vision tower is a CLIP or SigLIP, as it is by default in the families that ask."""
    tower = config.get("vision_config")
    return not isinstance(tower, Mapping) or tower.get("model_type", _CLIP[0]) in _CLIP
