"""README and docs: every block of code runs in a test, or says why not and is understood; every link leads on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from paths import ROOT
from polymerge import read_recipe
from polymerge.cli import polymerge
from running import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = {"tutorial.md", "commands.md", "python.md", "changelog.md", "contributing.md"}
"""Pages that are made when the site is built, which builds strictly: `make docs`."""

RUN = {
    ("README.md", 1): "e2e/test_readme.py::test_the_recipe_in_the_readme_runs_on_what_the_project_ships",
    ("README.md", 2): "e2e/test_documents.py::test_the_first_merge_of_the_readme_runs",
    ("README.md", 4): "e2e/test_public_names.py::test_what_the_readme_shows_runs",
    ("docs/first-recipe.md", 0): "planning/test_first_recipe.py::test_the_page_shows_what_is_written",
    ("docs/methods.md", 1): "e2e/test_methods_page.py::test_the_worked_example_has_fifteen_lines_and_merges",
}
"""The blocks that tests run, by page and place."""


class Block(NamedTuple):
    page: str
    place: int
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    )
    for place, one in enumerate(found):
        yield Block(page.relative_to(ROOT).as_posix(), place, one[2], one[3], one[1])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(block: Block) -> str:
    return f"{block.page}-{block.place}"


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language != "text"], ids=named)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    test = RUN.get((block.page, block.place))
    assert (test is None) == (block.reason is not None), block.text
    if test is not None:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_there_are_no_other_blocks() -> None:
    assert len(BLOCKS) > 20
    assert {one.language for one in BLOCKS} <= {"text", "yaml", "sh", "python"}
    assert set(RUN) <= {(one.page, one.place) for one in BLOCKS}


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "yaml"], ids=named)
def test_every_recipe_is_read(block: Block, tmp_path: Path) -> None:
    text = block.text
    if "merge_method" not in text:  # some lines of one
        text = f"merge_method: task_arithmetic\nbase_model: org/base\nmodels: [org/a, org/b]\n{text}"
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert read_recipe(file).models


def commands_of(page: Path) -> Iterator[str]:
    """The command lines of a page, in blocks of shell and in those that are indented."""
    text = page.read_text(encoding="utf-8")
    shell = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(polymerge [a-z](?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    yield from re.findall(r"^(polymerge [a-z](?:.*\\\n)*.*)$", "\n".join(shell), flags=re.MULTILINE)
    yield from indented


LINES = [(f"{page.name}-{number}", line) for page in PAGES for number, line in enumerate(commands_of(page))]


@pytest.mark.parametrize("line", [line for _, line in LINES], ids=[name for name, _ in LINES])
def test_every_command_line_is_understood(line: str) -> None:
    words = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
    command = polymerge.commands[words[0]]
    with click.Context(polymerge, info_name="polymerge") as parent:
        command.make_context(words[0], words[1:], parent=parent)


def test_what_is_installed_and_made_is_there() -> None:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = re.findall(r"^([a-z-]+) = \[", declared, flags=re.MULTILINE)
    asked = {name for group in re.findall(r"(?:\.|polymerge)\[([a-z,-]+)\]'", texts) for name in group.split(",")}
    assert asked <= set(extras)
    told = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"`{name}`" not in told] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", texts)) <= targets


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)]
    return {head.replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        if place in MADE or anchor.startswith("only-"):
            place = "index.md"
            anchor = ""
        file = page if not place else page.parent / place
        assert file.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {link}"


def test_the_made_pages_are_those_of_the_site() -> None:
    made = (ROOT / "tools" / "site_pages.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in made for name in MADE)


def test_the_first_merge_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "first.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = text.split("```yaml\n")[1].split("```sh\n")[1].split("```")[0].splitlines()
    ran = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("polymerge")]
    assert [words[0] for words in ran] == ["plan", "merge"]
    for words in ran:
        said = cli(*words)
        assert said.status == 0, said.err
    assert (tmp_path / "merged" / "polymerge.json").is_file()
