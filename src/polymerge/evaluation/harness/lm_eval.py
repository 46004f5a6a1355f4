"""lm-evaluation-harness: its command line for the text tower of a model, and its output.

`OUT/<model>/results_<stamp>.json` holds the numbers, `samples_<task>_<stamp>.jsonl` beside it every document, once for
each filter. See `evaluator_files`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.harness.evaluator_files import FileNames, read_results
from polymerge.evaluation.harness.registered_classes import OWN_CODE, family_of
from polymerge.evaluation.results import TaskResult

__all__ = ["SCRIPT", "command", "place", "read"]

SCRIPT = Path(__file__).parent / "programs" / "text_tower.py"
"""What the tool's Python runs: the harness with one model more."""

_NAMES = FileNames("lm-eval", re.compile(r"results_(?P<stamp>.+)\.json"), "samples_{task}_{stamp}.jsonl")
_NO_ARGUMENT = re.compile(r"[^\w./~+@:-]")


def place(config: Mapping[str, object], folder: Path, links: Path) -> Path:
    """A path to the checkpoint that can be one of lm-eval's arguments: its own, or a link to it.

    raises RecipeError if that of the link cannot be one, either, or transformers has no class for the family.
    """
    family = family_of(config)
    if family in OWN_CODE:
        raise RecipeError(
            f"lm-eval loads a checkpoint with transformers' own classes, and there is none for the family {family}. "
            "Evaluate the language model that it was made from"
        )
    found = folder if not _NO_ARGUMENT.search(str(folder)) else links / _NO_ARGUMENT.sub("-", folder.name)
    if _NO_ARGUMENT.search(str(found)):
        raise RecipeError(f"{found}: for lm-eval a path ends at such characters. Name another `out`")
    return found


def command(
    folder: Path, tasks: Sequence[str], out: Path, device: str, batch_size: int, trusted: bool
) -> tuple[str, ...]:
    """Arguments of the Python executable; answers are kept in `out`, so that an unfinished run goes on."""
    arguments = f"pretrained={folder}{',trust_remote_code=True' if trusted else ''}"
    return (
        str(SCRIPT), "--model", "text-tower", "--model_args", arguments, "--tasks", ",".join(tasks),
        "--batch_size", str(batch_size), "--device", device, "--log_samples", "--output_path", str(out),
        "--use_cache", str(out / "answers"),
    )  # fmt: skip


def read(folder: Path, tasks: Sequence[str], before: set[Path]) -> tuple[dict[str, TaskResult], list[PolymergeError]]:
    """Read the results of the newest run below a folder; arguments and result are those of `read_results`."""
    return read_results(_NAMES, folder, tasks, before)
