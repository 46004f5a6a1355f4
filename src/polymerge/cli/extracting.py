"""extract: a LoRA of a fine-tune."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from polymerge.cli.flags import FlagCommand, findings_with_flags
from polymerge.cli.option_types import FINITE, FOLDER, MODEL, argument, option
from polymerge.cli.progress import progress_bar
from polymerge.cli.shared_options import AS_JSON, IGNORE, SHA256, THREADS, TRUST
from polymerge.cli.streams import paint_for, say, show
from polymerge.errors import RecipeError, collecting, human_size, refuse
from polymerge.paths import given_path
from polymerge.tables import aligned

if TYPE_CHECKING:
    from polymerge.engine.extracted import Extracted
    from polymerge.planning.difference import Extraction

__all__ = ["extract"]

_FEW: Final = 4
"""How many of the tensors that are not in the adapter are named."""


@click.command(cls=FlagCommand)
@argument("tuned", metavar="TUNED", type=MODEL)
@option(
    "--base",
    metavar="MODEL",
    type=MODEL,
    required=True,
    help="Take the difference from this model, the adapter's base.",
)
@option("--rank", type=int, metavar="R", help="Keep this many components of each module, and of each expert.")
@option(
    "--energy", type=FINITE, metavar="SHARE",
    help="Instead of --rank: keep as many as hold this share of the squared norm of each difference, such as 0.95.",
)  # fmt: skip
@option("--max-rank", type=int, metavar="R", help="Highest rank with --energy; default: 256.")
@option("--parts", metavar="PART,...", help="Adapt linear layers of these parts; default: text.")
@option(
    "--match", metavar="GLOB", multiple=True,
    help="Adapt only these linear layers, of any part, by canonical name; repeatable.",
)  # fmt: skip
@option("--exclude", metavar="GLOB", multiple=True, help="Leave out tensors by canonical name; repeatable.")
@option(
    "--save", metavar="GLOB", multiple=True,
    help="Keep other tensors that differ in full (modules_to_save), such as text.embed_tokens.weight; repeatable.",
)  # fmt: skip
@IGNORE
@option("--dtype", metavar="DTYPE", help="Write factors in this dtype; default: float32.")
@option("-o", "--out", metavar="ADAPTER", type=FOLDER, required=True, help="Write the adapter to this folder.")
@option("--threads", type=THREADS, help="Decompose this many matrices at once; default: one per processor, up to 8.")
@option("--full", is_flag=True, help="Print one line per module instead of one per kind.")
@option("--force", is_flag=True, help="Replace ADAPTER if it exists.")
@option("--no-verify", "check", flag_value=False, default=True, help="Skip the final check that the adapter loads.")
@SHA256
@TRUST
@AS_JSON
def extract(
    tuned: str,
    base: str,
    parts: str | None,
    out: str,
    full: bool,
    as_json: bool,
    ignore: tuple[str, ...],
    **options: Any,
) -> None:
    """Extract a LoRA adapter from a fine-tune: its difference from its base, truncated by SVD.

    Linear layers of the text tower are adapted, and each of its experts; `polymerge fold` gives the fine-tune back as
    far as the rank allows.
    """
    from polymerge.checkpoints.target import check_target
    from polymerge.engine.extract import carry_out
    from polymerge.planning.difference import Wanted
    from polymerge.planning.extraction import plan_extraction
    from polymerge.planning.text_words import note_lines

    how = {name: options.pop(name) for name in ("force", "threads", "check", "trust_remote_code", "sha256")}
    with collecting(needed=True):
        if options["max_rank"] is not None and options["energy"] is None:
            refuse(RecipeError("--max-rank is for --energy"))
        with collecting():
            check_target(given_path(out), (), how["force"])
        options["parts"] = tuple(parts.split(",")) if parts else None
        wanted = Wanted(**{name: value for name, value in options.items() if value not in (None, ())})
        made = plan_extraction(tuned, base, wanted, ignore)
    for line in note_lines(made.warnings, paint_for(sys.stderr)):
        say(line)
    say(_cost(made, how["threads"]))
    with progress_bar("extracting") as progress:
        found = carry_out(made, out, progress=progress, **how)
    _report(found, full, as_json)


def _cost(made: Extraction, threads: int | None) -> str:
    """What an extraction takes, before it begins."""
    from polymerge.engine.differences import room_of
    from polymerge.planning.estimate import default_threads

    several = min(threads or default_threads(), made.matrices)
    at_once = f" ({several} at once)" if several > 1 else ""
    return (
        f"{made.matrices} matrices; memory: about {human_size(several * room_of(made))}{at_once}; adapter: at most "
        f"{human_size(made.size)}"
    )


def _report(found: Extracted, full: bool, as_json: bool) -> None:
    """Print what an adapter holds of each module, or of each kind of them, and what it does not hold."""
    from polymerge.planning.fit import layer_pattern

    if as_json:
        findings = found.verification.findings if found.verification else ()
        report = {"out": str(found.folder), **found.to_json(), "warnings": list(found.warnings)}
        show(json.dumps({**report, "verification": [vars(finding) for finding in findings]}, indent=1))
        return
    kinds: dict[str, list[str]] = {}
    for name in found.modules:
        kinds.setdefault(name if full else layer_pattern(name), []).append(name)
    rows = [("module", "count", "rank", "left out, mean", "at most")]
    for kind, names in kinds.items():
        ranks, errors = ([getattr(found.modules[name], what) for name in names] for what in ("rank", "error"))
        rank = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        rows.append((kind, str(len(names)), rank, f"{sum(errors) / len(errors):.2%}", f"{max(errors):.2%}"))
    for line in aligned(rows):
        show(f"  {line}")
    saved = f", {len(found.saved)} tensors in full" if found.saved else ""
    show(f"{found.folder}: {len(found.modules)} modules{saved}")
    if found.resumed:
        show(f"  went on where it was stopped: {found.resumed} matrices were decomposed already")
    show(f"  the ranks leave out {found.error:.2%} of the norm of their differences")
    if found.left_out:
        few = sorted(found.left_out, key=lambda name: -found.left_out[name].norm)[:_FEW]
        more = ", ..." if len(found.left_out) > _FEW else ""
        show(
            f"  not in the adapter: {len(found.left_out)} other tensors differ ({', '.join(few)}{more}); the adapter's "
            f"modules are {found.held:.1%} of the squared norm of the whole difference"
        )
    show(findings_with_flags(str(found.verification)) if found.verification else "  not verified (--no-verify)")
