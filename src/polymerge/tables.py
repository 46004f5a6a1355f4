"""Results that are tables: as lines of text, in notebooks, and as a pandas.DataFrame if pandas is installed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import import_module
from typing import Any, Final

from polymerge.errors import MissingExtraError

__all__ = ["Table", "aligned", "html_table"]

_SHOWN: Final = 60
"""Number of rows shown in a notebook; `to_pandas` has all of them."""


class Table:
    """A result whose items all have the same fields; not an ABC, so that structs of msgspec can be one."""

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per row, all with the same keys in the same order; missing values are None."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of the rows; raises MissingExtraError without pandas."""
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise MissingExtraError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines in columns, two spaces apart; the first `left` columns begin, the others end in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table of HTML of rows with the same keys, the first of them where there are many."""
    if not rows:
        return "<p>no rows</p>"
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_text(value))}</td>' for value in row.values())}</tr>" for row in rows[:_SHOWN]
    )
    more = f"<p>{len(rows) - _SHOWN} more rows</p>" if len(rows) > _SHOWN else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
