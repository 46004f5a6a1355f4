"""Does an adapter load as it is? Its files, its config against its shapes, its values, PEFT's reading of the config."""

from __future__ import annotations

import warnings
from pathlib import Path

from polymerge.checkpoint.adapter import Adapter, open_adapter
from polymerge.verification.findings import Finding, Verification
from polymerge.verification.values import finite

__all__ = ["verify_adapter"]


def verify_adapter(folder: str | Path) -> Verification:
    """Check an adapter folder without its base: what it holds fits its config, is finite, and PEFT reads the config.

    Whether its modules are there in a base is what loading it with that base, or `polymerge fold`, tells.

    raises PolymergeError where it cannot be opened.
    """
    path = Path(folder)
    adapter = open_adapter(str(folder), path)
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    held = f"{len(adapter.pairs)} modules of rank {', '.join(map(str, ranks))}, {len(adapter.extras)} full weights"
    return Verification(path, (Finding("files", True, held), _names(adapter), finite(adapter.entries), _config(path)))


def _names(adapter: Adapter) -> Finding:
    """Whether PEFT finds each full weight where it looks: in `base_layer`, where the module has factors too."""
    lost = [
        entry.name
        for parameter, entry in adapter.extras.items()
        if parameter.rpartition(".")[0] in adapter.pairs and ".base_layer." not in entry.name
    ]
    if lost:
        return Finding("names", False, f"{len(lost)} weights of modules with factors are not in base_layer: {lost[0]}")
    return Finding("names", True, "every full weight has the name that PEFT looks for")


def _config(path: Path) -> Finding:
    try:
        from peft import PeftConfig
    except ImportError as error:
        return Finding("loads", None, f"peft cannot be imported: {error}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # whatever PEFT raises means that the folder does not load
        return Finding("loads", False, f"PeftConfig: {type(error).__name__}: {error}")
    return Finding("loads", True, f"{type(config).__name__}, rank {getattr(config, 'r', '?')}")
