"""Every family in the modules of `families.tables`, and the family that a config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Final

from polymerge.checkpoints.files import class_names
from polymerge.families import tables
from polymerge.families.rules import Family, Rule

__all__ = ["FAMILIES", "GENERIC", "claimed"]

GENERIC: Final = Family(
    "generic",
    rules=(Rule("{rest}", "{rest}"),),
    title="any checkpoint, merged with others of the very same layout",
)
"""The family of all other checkpoints: names are used as stored, so they only merge with identical ones."""


def _tables() -> Iterator[Family]:
    """The families in the modules of the tables, in each module's order."""
    for module in iter_modules(tables.__path__, f"{tables.__name__}."):
        found = vars(import_module(module.name)).values()
        yield from (family for family in found if isinstance(family, Family))


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {family.name: family for family in (*sorted(_tables(), key=lambda family: family.parts == ("text",)), GENERIC)}
)
"""Every family by its name: multimodal models, language models, and `generic` last."""


def claimed(config: Mapping[str, object]) -> Family:
    """The family that a config names; `generic` if it names none.

    The architecture takes precedence: the first LLaVA checkpoints have transformers' model type and tensor names of
    their own. The model type decides if no architecture is named.
    """
    architectures = class_names(config)
    for family in FAMILIES.values():
        if architectures:
            if any(name in family.architectures for name in architectures):
                return family
        elif config.get("model_type") in family.model_types:
            return family
    return GENERIC
