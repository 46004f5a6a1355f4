"""The command line: parse, call one public function, print."""

from __future__ import annotations

import platform
import sys
import traceback
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Final, NoReturn

import click

from polymerge.cli.analyze import ablate, knockout, overlap
from polymerge.cli.evaluate import compare, evaluate, score
from polymerge.cli.extracting import extract
from polymerge.cli.inspect import doctor, families, inspect, methods
from polymerge.cli.merge import fold, merge, plan, verify
from polymerge.cli.new import new
from polymerge.cli.report import demo, push, report
from polymerge.cli.search import search
from polymerge.cli.streams import heed_signals, open_streams, paint_for, say, unprinted
from polymerge.errors import PolymergeError
from polymerge.paths import because

__all__ = ["main"]

_ANSWERS: Final = "the answers so far are kept: the same command goes on"
_LEFT: Final = dict.fromkeys(("search", "evaluate", "knockout", "ablate"), _ANSWERS) | {
    "demo": "what is made so far is kept"
}
"""What a command leaves behind that is interrupted: no half-written output, if it is not named here."""


class _Commands(click.Group):
    """The outermost place: whatever ends a command leaves it as a message and an exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse words that could not be recorded, and that no name can have."""
        for word in args:
            if "\0" in word or not _is_utf8(word):
                raise click.UsageError(f"{ascii(word)[1:-1]}: is not UTF-8, or has a NUL character", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:  # the one place that takes an error which nobody foresaw
            if ctx.params["debug"]:
                say(traceback.format_exc())
            raise click.exceptions.Exit(_told(error, str(ctx.invoked_subcommand))) from None


def _told(error: BaseException, command: str) -> int:
    """Tell what ended a command; returns the exit status."""
    said, status = " ".join(str(error).split())[:300], 1
    match error:
        case PolymergeError():
            message, status = str(error), error.exit_status
        case KeyboardInterrupt() | click.Abort():
            message = f"interrupted; {said or _LEFT.get(command, 'no half-written output stands under its name')}"
        case BrokenPipeError(filename=str()):  # nobody reads standard output any more: `polymerge methods | head`
            return status
        case OSError():
            files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
            message = f"{files or command}: {because(error)}"
        case _ if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            message = f"{command}: memory is full. Take fewer threads or workers, or a smaller batch"
        case _:
            system = f"polymerge {version('polymerge')}, Python {platform.python_version()}, {platform.system()}"
            message = (
                f"{command} failed, and that is a mistake in polymerge: {type(error).__name__}: {said}\n"
                f"Please report it, with the command and what `polymerge --debug {command} ...` prints ({system})"
            )
    say(f"{paint_for(sys.stderr)('error', 'polymerge:')} {message}")
    return status


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="polymerge")
@click.option("--debug", is_flag=True, help="Print where in the code an error comes from.")
def polymerge(debug: bool) -> None:
    """Merge multimodal language models without training, into a checkpoint that loads as it is."""


for command in (
    new, inspect, plan, merge, fold, extract, verify, search, evaluate, score, compare, overlap, knockout, ablate,
    report, push, methods, families, doctor, demo,
):  # fmt: skip
    polymerge.add_command(command)


def main() -> NoReturn:
    """Run the command line; exit status 2 for a bad recipe or command line, 1 for anything else that fails."""
    open_streams()
    heed_signals()
    try:
        status = polymerge(prog_name="polymerge", standalone_mode=False) or 0
        sys.stdout.flush()
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        status = error.exit_code
    except OSError as error:  # of what click prints itself, and of what was left to print
        status = _told(unprinted(error), "polymerge")
    except (KeyboardInterrupt, click.Abort):  # before a command began
        status = _told(KeyboardInterrupt(), "polymerge")
    sys.exit(status)
