"""demo: the whole story on small models."""

from __future__ import annotations

from pathlib import Path

import click

from polymerge.errors import MissingExtraError

__all__ = ["demo"]


@click.command()
@click.option("-o", "--out", default="demo-output", show_default=True, help="Folder for models, table and plot.")
@click.option("--train", is_flag=True, help="Train the three small models first (10 to 20 minutes on two cores).")
def demo(out: str, train: bool) -> None:
    """Merge a small reasoning model into a small VLM, and measure what it gains and loses."""
    try:
        from polymerge.demo.story import run
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the demo needs {error.name}: pip install 'polymerge[demo]'") from None
    run(Path(out), train=train)
