"""Find the family whose table explains a checkpoint's names, even if config.json names another class or none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.names import unwrapped, wrappers_in
from polymerge.families.config import Config, family_of, splits, text_config
from polymerge.families.derived import derive
from polymerge.families.expressions import Shape
from polymerge.families.registry import FAMILIES, GENERIC, claimed
from polymerge.families.rules import Family

__all__ = ["Reading", "nearest", "read_names"]

_BODY: Final = "model."
"""Prefix of the body in nearly every class; AutoModel saves names without it."""


@dataclass(frozen=True)
class Reading:
    """How to read the names of a checkpoint.

    family    the family whose table explains them, or the one that its config names if none does
    wrappers  prefixes added by trainers (see `checkpoints.names.unwrapped`)
    other     the class in config.json if it is not one of that family, such as `Qwen2Model`; otherwise empty
    by        what the family was derived from where no table explains the names: a class of transformers
    why       why no family explains them: why none was derived
    published, unpublished   of a derived family: see `Derivation`
    """

    family: Family
    wrappers: tuple[str, ...] = ()
    other: str = ""
    by: str = ""
    why: str = ""
    published: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)
    unpublished: str = ""


def read_names(config: Config, shapes: Mapping[str, Shape], told: str | None = None) -> Reading:
    """Find the family and the wrappers that explain every name.

    The family that the config's class names comes first, then that of its model type, then those whose text towers have
    the same lineage, if there is one among these. A known class whose names nothing explains stays what it is; for an
    unknown one transformers' class is asked (see `derived`), and if that does not explain them it is `generic`.

    shapes  of the tensors by their names as stored
    told    the family that the user names, if any; no other is tried
    """
    if told is None and not config:
        return Reading(GENERIC)  # nothing says whose names these are
    first = family_of(config, told)
    wrappers = wrappers_in(shapes)
    plain = [unwrapped(name, wrappers) for name in shapes]
    forms = [(wrappers, plain, "")]
    around, inner = wrappers, plain
    while prefix := _before_all(inner):  # such as `model.` of Lightning, `actor.` of trainers of two models
        inner = [name.removeprefix(prefix) for name in inner]
        more = wrappers_in(inner)
        around, inner = (*around, prefix, *more), [unwrapped(name, more) for name in inner]
        forms.append((around, inner, ""))
    forms.append((wrappers, plain, _BODY))
    for form, held, inside in forms:
        found = _fitting(config, first, held, inside, told is not None)
        if found is not None:
            return Reading(replace(found, inside=inside) if inside else found, form, _other(config, found, inside))
    if first is not GENERIC or told is not None:
        return Reading(first, wrappers)
    why, known = "", splits(config)
    for form, held, _ in forms[:-1]:
        asked = derive(config, dict(zip(held, shapes.values(), strict=True)), known)
        if asked.family is not None:
            return Reading(asked.family, form, by=asked.by, published=asked.published, unpublished=asked.unpublished)
        why = why or asked.why
    return Reading(first, wrappers, why=why)


def _before_all(names: Collection[str]) -> str:
    """The common first component of all names with its dot; empty if they do not share one."""
    first = {name.partition(".")[0] for name in names if "." in name}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""


def nearest(config: Config) -> Family:
    """The family of a config's model type, regardless of its class; `generic` if no family has that type."""
    return claimed({"model_type": config.get("model_type")})


def _fitting(config: Config, first: Family, names: Collection[str], inside: str, told: bool) -> Family | None:
    """The family that explains all names, each prefixed with `inside`; None if there is none, or no single one."""

    def fits(family: Family) -> bool:
        return family is not GENERIC and replace(family, inside=inside).explains(names)

    explained = fits(first)
    if told or (explained and first.has_mark(names)):
        return first if explained else None
    others = [family for family in _relatives(config, first) if fits(family) and family.has_mark(names)]
    by_type = [family for family in others if family.name == nearest(config).name]
    only = by_type or (others if len(others) == 1 else [])
    return only[0] if only else first if explained else None


def _relatives(config: Config, first: Family) -> Iterator[Family]:
    """Other families that a config may mean than the one of its class."""
    by_type = nearest(config)
    if first is GENERIC and by_type is GENERIC:
        return
    inner = claimed({"model_type": text_config(config).get("model_type")})
    lineages = {lineage for family in (first, by_type, inner) for lineage in family.decoders}
    for family in FAMILIES.values():
        if family.name == by_type.name or (family.name != first.name and lineages & set(family.decoders)):
            yield family_of(config, family.name)


def _other(config: Config, family: Family, inside: str) -> str:
    """The class in a config that the family does not have; empty if it has that class, or its body."""
    if claimed(config).name == family.name:
        return ""
    named = next(iter(class_names(config)), "")
    return "" if inside and named.endswith("Model") else named or f"model_type '{config.get('model_type')}'"
