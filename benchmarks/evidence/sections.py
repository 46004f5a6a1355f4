"""By experiment, what of it is on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from contest_sections import of_adapters, of_finetunes
from delta_sections import of_layers, of_schedules, of_vlm
from family_section import of_two_families
from section import Results, Section

__all__ = ["SECTIONS", "Section"]

SECTIONS: Mapping[str, Callable[[Results], Sequence[Section]]] = {
    "into_vlm": lambda found: [of_vlm(found)],
    "layers": lambda found: [of_layers(found)],
    "two_families": lambda found: [of_two_families(found)],
    "adapters": lambda found: [of_adapters(found, "common"), of_adapters(found, "own")],
    "finetunes": lambda found: [of_finetunes(found)],
    "schedules": lambda found: [of_schedules(found)],
}
"""By experiment, what of it is on the page."""
