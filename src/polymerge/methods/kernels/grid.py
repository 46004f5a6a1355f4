"""The grid on which sums of products are taken, one for every device."""

from __future__ import annotations

from typing import Final

__all__ = ["CELL", "LANES"]

CELL: Final = 65536
"""Elements that are summed in float64 in a fixed order; the cells' sums are then added exactly."""

LANES: Final = 1024
"""Running sums within a cell: lane i takes the elements i, i + LANES, i + 2 LANES, ... in this order."""
