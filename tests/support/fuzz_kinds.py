"""Every kind of input that is fuzzed, by its name."""

from __future__ import annotations

import fuzz_beside
import fuzz_formats
import fuzz_meanings
import fuzz_records
import fuzz_values
from fuzz_judge import Kind

__all__ = ["KINDS"]

_MODULES = (fuzz_beside, fuzz_formats, fuzz_meanings, fuzz_records, fuzz_values)

KINDS: dict[str, Kind] = {kind.name: kind for module in _MODULES for kind in module.KINDS}
