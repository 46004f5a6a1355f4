"""Make Markdown of the house's docstrings, for the reference of the Python API.

A block of lines such as `name  what it is` becomes a list, and a sentence that begins with `raises` stands by itself.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_NAME = re.compile(r"^(\w+(?:, \w+)*)\s{1,}(\S.*)$")


def as_markdown(text: str) -> str:
    """The Markdown of a docstring."""
    blocks = re.split(r"\n\s*\n", dedent(text).strip("\n"))
    return "\n\n".join(_block(block, first=number == 0) for number, block in enumerate(blocks))


def _block(block: str, *, first: bool) -> str:
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return block  # code
    if first or lines[0].startswith("raises ") or not _is_list(lines):
        return block
    entries: list[str] = []
    for line in lines:
        if line.startswith(" "):
            entries[-1] += " " + line.strip()
        else:
            name, said = _NAME.match(line).groups()  # type: ignore[union-attr]
            entries.append(f"- **`{name}`** {said}")
    return "\n".join(entries)


def _is_list(lines: list[str]) -> bool:
    """Whether lines have names, each followed by what it is, and what goes on is indented."""
    heads = [line for line in lines if not line.startswith(" ")]
    if not all(_NAME.match(line) for line in heads):
        return False
    return any(re.match(r"^[\w, ]+\s{2,}\S", line) for line in heads) or len(heads) < len(lines)


class Docstrings(Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
