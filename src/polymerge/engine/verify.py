"""Does an output load as it is?"""

from __future__ import annotations

from pathlib import Path

from polymerge.checkpoints.adapter import is_adapter
from polymerge.checkpoints.folder import bring
from polymerge.checkpoints.hub import locate
from polymerge.engine.findings import Finding, Verification
from polymerge.engine.verify_adapter import verify_adapter
from polymerge.engine.verify_checkpoint import verify_checkpoint
from polymerge.errors import PolymergeError, RecipeError

__all__ = ["Finding", "Verification", "verify"]


def verify(folder: str | Path, *, base: str | None = None, trust_remote_code: bool = False) -> Verification:
    """Check that a checkpoint folder, or an adapter, loads as it is, without taking memory for its weights.

    folder             or a hub id, all of which is fetched
    base               of an adapter: where its base is, if that is not where its config says
    trust_remote_code  run Python files that lie in the folder, where its model needs them

    raises RecipeError or CheckpointError where a hub id cannot be had; all else that is wrong is a finding.
    """
    path = Path(folder).expanduser()
    if not (path.exists() or path.is_absolute() or path.parent.is_dir()):
        path = locate(str(folder))
        bring(str(folder), path)
    try:
        if is_adapter(path):
            return verify_adapter(path, base=base, trust_remote_code=trust_remote_code)
        if base is not None:
            raise RecipeError(f"{path}: is a checkpoint, and --base is for adapters")
        return verify_checkpoint(path, trust_remote_code=trust_remote_code)
    except PolymergeError as error:
        return Verification(path, (Finding("files", False, "; ".join(map(str, error.problems))),))
