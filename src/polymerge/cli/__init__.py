"""The command line: parse, call one public function, print."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from polymerge.cli.analyze import ablate, knockout, overlap
from polymerge.cli.evaluate import compare, evaluate, score
from polymerge.cli.inspect import families, inspect, methods
from polymerge.cli.merge import fold, merge, plan, verify
from polymerge.cli.report import demo, report
from polymerge.cli.search import search
from polymerge.errors import PolymergeError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="polymerge")
def polymerge() -> None:
    """Merge multimodal language models without training, into a checkpoint that loads as it is."""


for command in (
    inspect, plan, merge, fold, verify, search, evaluate, score, compare, overlap, knockout, ablate, report, methods,
    families, demo,
):  # fmt: skip
    polymerge.add_command(command)


def main() -> NoReturn:
    """Run the command line; exit status 2 for a bad recipe or command line, 1 for anything else that fails."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        polymerge(prog_name="polymerge", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PolymergeError as error:
        click.echo(f"polymerge: {error}", err=True)
        sys.exit(error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        click.echo("polymerge: interrupted; no half-written output stands under its name", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has gone; so has what was left to say
        sys.exit(1)
    except OSError as error:
        click.echo(f"polymerge: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
