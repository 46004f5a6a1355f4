"""Parse YAML as plain values: every key once, no more of it than a recipe has, and any fault as one kind of error.

PyYAML's safe loader runs no code. It does take the last of two equal keys, build whatever aliases unfold to (ten lines
of ten aliases are ten billion values once they are gone through), and let the errors of `int` or `datetime` through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from polymerge.checkpoints.bounds import DIGITS, NESTING, RECIPE_BYTES, RECIPE_VALUES, read_bounded
from polymerge.errors import RecipeError, shown

__all__ = ["parse_yaml", "read_documents"]

_NUMBERS: Final = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_documents(file: Path) -> list[Any]:
    """Read the documents of a YAML file, without empty ones beside others; raises RecipeError if it is not YAML or not
    UTF-8, and OSError if it cannot be read.
    """
    found = _parsed(read_bounded(file, RECIPE_BYTES), str(file))
    return [one for one in found if one is not None] or [None]


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Parse YAML of one document; `where` begins the message of the RecipeError for what is none, or larger than
    recipes are.
    """
    found = _parsed(text, where)
    if len(found) > 1:
        raise RecipeError(f"{where}: invalid YAML: expected a single document")
    return found[0] if found else None


def _parsed(text: str | bytes, where: str) -> list[Any]:
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return list(yaml.load_all(text, _Bounded))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: invalid YAML: is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise RecipeError(f"{where}: invalid YAML: nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, ValueError) as error:  # not YAML's own of an escape such as \\UFFFFFFFF
        raise RecipeError(f"{where}: invalid YAML: {' '.join(str(error).split())}") from None


class _Bounded(yaml.SafeLoader):
    """A safe loader that counts values as it meets them, those of aliases again, and refuses keys written twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0
        self.held: dict[int, int] = {}
        """By node, the number of values in it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, self.depth = self.count, self.depth + 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.depth > NESTING:
            raise yaml.composer.ComposerError(None, None, f"more than {NESTING} levels", mark)
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.held:
                raise yaml.composer.ComposerError(None, None, "an alias for what it is part of", mark)
            self.count += self.held[id(node)]
        else:
            node = super().compose_node(parent, index)
            self.count += 1
            self.held[id(node)] = self.count - before
        self.depth -= 1
        if self.count > RECIPE_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {RECIPE_VALUES} values", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    said = f"'{shown(key.value)}' is written twice"
                    raise yaml.composer.ComposerError(None, None, said, key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if node.tag in _NUMBERS and len(node.value) > DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {DIGITS} digits", node.start_mark)
        try:
            node.value.encode()
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # what the constructors of PyYAML stumble over in `!!bool maybe`, `!!timestamp x` or 2024-13-01
            whole = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
            said = str(error) if whole else f"'{shown(node.value)}' is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from None
