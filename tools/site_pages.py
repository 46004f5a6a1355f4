"""Pages of the site that are made when it is built: the tutorial from its notebook, the reference of commands and of
the Python API, and what lies beside docs/. A hook of mkdocs."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import polymerge  # noqa: E402
from polymerge.cli import polymerge as command_line  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

MADE = ("tutorial.md", "commands.md", "python.md", "changelog.md", "contributing.md")
"""The pages that are made."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made = (tutorial(), commands(), python(), beside("CHANGELOG.md"), beside("CONTRIBUTING.md"))
    for name, text in zip(MADE, made, strict=True):
        files.append(File.generated(config, name, content=text))
    return files


def tutorial() -> str:
    """The notebook as a page."""
    cells = json.loads((ROOT / "examples" / "first_merge.ipynb").read_text(encoding="utf-8"))["cells"]
    where = "The same as a notebook and as a script: `examples/first_merge.ipynb`, `examples/first_merge.py`."
    return "\n\n".join([*(text for cell in cells for text in _cell(cell)), where])


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            picture = f"data:image/png;base64,{data['image/png']}"
            yield f'<div class="shown"><img alt="what the code above draws" src="{picture}"></div>'
        elif "text/html" in data:
            yield f'<div class="shown">{_short("".join(data["text/html"]))}</div>'
        else:
            said = "".join(output.get("text", data.get("text/plain", "")))
            yield f'<pre class="shown"><code>{html.escape(said)}</code></pre>'


def _short(table: str, rows: int = 12) -> str:
    """A table of HTML with its first rows."""
    found = re.findall(r"<tr>.*?</tr>", table)
    if len(found) <= rows + 1:
        return table
    head, *body = found
    return (
        f"<table><thead>{head}</thead><tbody>{''.join(body[:rows])}</tbody></table><p>and {len(body) - rows} more</p>"
    )


def commands() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    lines = [
        "# The command line", "",
        "A command ends with status 0; with 2 if the recipe or the command line cannot be carried out, and with 1 if",
        "anything else fails. `polymerge COMMAND --help` prints what is here.",
    ]  # fmt: skip
    for name, command in command_line.commands.items():
        context = click.Context(command, info_name=name, parent=click.Context(command_line, info_name="polymerge"))
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        lines += ["", f"## polymerge {name}", "", f"    {usage}", "", _escaped(_paragraphs(command.help or "")), ""]
        options = [
            record for one in command.get_params(context) if (record := one.get_help_record(context)) is not None
        ]
        lines += ["| option | what it does |", "|---|---|"]
        lines += [f"| {_code(flag)} | {_escaped(' '.join(said.split()))} |" for flag, said in options]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(block.split()) for block in text.replace("\b", "").split("\n\n"))


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Text whose signs Markdown would take for its own."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([\\*_\[\]<>|])", r"\\\1", part)
        for part in parts
    )


def python() -> str:
    """Every public name with its signature and docstring."""
    about = (polymerge.__doc__ or "").strip()
    verbs, kinds = ([name for name in polymerge.__all__ if name[0].islower() == lower] for lower in (True, False))
    lines = ["# Python", "", about, ""]
    for name in (*verbs, *kinds):
        module, _, own = polymerge._HOMES[name].partition(":")
        lines += [f"::: polymerge.{module}.{own or name}", ""]
        if own:
            lines += ["    options:", f"      heading: {name}", f"      toc_label: {name}", ""]
    return "\n".join(lines)


def beside(file: str) -> str:
    """A page that lies beside docs/, with its links as seen from there."""
    return (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](")
