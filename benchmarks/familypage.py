"""The page that `families.py` writes."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from familycases import CLASSLESS, TEXT_TYPES, TYPES, WITH_CODE
from familytools import ASKED_FOR, SEEDS
from familyverdicts import NEAR, Verdict
from polymerge.families.registry import GENERIC, claimed

TITLE = """# Every family, merged and judged

Tiny checkpoints of every model type that transformers has a class for, and of published families that it has none for,
merged from one recipe, and each output looked at: does it load with no tensor missing, unexpected or of another shape,
is it right to the last tensor, as a literal merge of the two models in memory has it, and does it answer as that one
does? The page is what this command has printed:
"""

READING = """
- **VLM + VLM** (LLM + LLM): two fine-tunes of one model. Every tensor of every part has to be 0.7 of one and 0.3 of the
  other.
- **names in memory**: the same, but the second has the names that transformers has in memory instead of those that it
  writes, as some trainers save them.
- **VLM + LLM**: with a language model that has the text tower's class, or that of the model it grew from, where there
  is one. Every tensor of the text tower has to be 0.7 of one and 0.3 of the other, all the rest the template's to the
  last bit.
- **right**: exit status 0, loads strictly by transformers' own class (where it has none, the file has the template's
  names and shapes), every merged tensor within rounding of the literal merge ({near:g} of its size), every other one
  equal to the template's, and it answers as the literal merge: it *generates* two tokens, or *passes* an input forward
  where its class does not generate tokens; where there is nothing, it takes none of the inputs that were tried.
- **refused**: said what is the matter, wrote nothing. **crash**: a Python error. Neither of them makes a wrong file.
- **exit 0** without *right*: the tool reported success, and this is what is wrong with its output.
"""

WITHOUT_A_TABLE = """
Default configs with all sizes shrunk. polymerge reads a type by a table if it has one for its class, by rules derived
from the class if it does not.
"""

LIMITS = """\
The checkpoints are random and tiny (two layers, some hundred words, float32, one file). Nothing is said of a merge's
quality.

Both tools run with their defaults on one recipe, which says `dtype: float32`; polymerge without its own check of the
output, and mergekit under PYTHONHASHSEED {seeds}, since its result may depend on it. Where it does, the
cell counts seeds and does not name them: which seed gives what depends on the names of the folders as well.

Where mergekit asks for {asked_for}, it gets it in another try, and counts as right if that is.

polymerge runs in the process that judges, mergekit's command in forks of a process that has imported it, in an
environment of its own. All outputs are loaded by the transformers of polymerge's.

What a model answers is asked with a text where its class takes one; its towers are then compared, not run.

transformers has no class of {classless}: these outputs are held against the names, shapes and values in files, and run
by nothing. They have the names of published checkpoints; of cambrian and deepseek_vl_original those that public code
shows, with few of their vision towers. Where code is published beside the weights ({with_code}), a config class that
takes everything stands for it here, which mergekit asks to run; the code of the others is in packages of their authors,
which mergekit's environment does not have.

qwen3_vl_moe holds all experts of a layer in one tensor, the language model that it grows from has them one by one. As
published each expert lies transposed against what transformers writes; those who load it see by its shape which it is.
"""

COLUMNS = ("VLM + VLM", "names in memory", "VLM + LLM")
SECTIONS = (
    ("Model types with images or sound", [*TYPES], (*COLUMNS,)),
    ("As published", [], ("VLM + VLM", "VLM + LLM")),
    ("Language models", [*TEXT_TYPES], ("LLM + LLM", "names in memory")),
)


def to_markdown(command: Sequence[str], about: Mapping[str, str], found: Sequence[Verdict]) -> str:
    """Write the page."""
    lines = [TITLE, f"    python {shlex.join(command)}", "", *table(["", ""], about.items())]
    lines.append(READING.format(near=NEAR))
    for title, kinds, pairs in SECTIONS:
        inside = [one for one in found if (one.row in kinds if kinds else one.row not in TYPES | TEXT_TYPES)]
        if inside:
            lines += [f"## {title}", *section(inside, pairs), ""]
    return "\n".join([*lines, "## What this does not show", "", *limits()]) + "\n"


def section(found: Sequence[Verdict], pairs: Sequence[str]) -> Iterator[str]:
    """The numbers of one kind of models, a row for each, and the reasons where polymerge is not right."""
    built = [one for one in found if one.pair]
    rows = dict.fromkeys(one.row for one in built)
    columns = [(tool, pair) for tool in dict.fromkeys(one.tool for one in built) for pair in pairs]
    columns = [place for place in columns if any((one.tool, column(one.pair)) == place for one in built)]
    by_class = next(iter(rows)) in TYPES | TEXT_TYPES
    cells = {row: [[one for one in built if (one.row, one.tool, column(one.pair)) == (row, *place)]
                   for place in columns] for row in rows}  # fmt: skip
    yield WITHOUT_A_TABLE if by_class else ""
    sums = [sum(bool(row[at]) and right_always(row[at]) for row in cells.values()) for at in range(len(columns))]
    tried = [sum(bool(row[at]) for row in cells.values()) for at in range(len(columns))]
    counts = [f"**{right} of {all_}**" for right, all_ in zip(sums, tried, strict=True)]
    runs = {row: next((one.runs for one in built if one.row == row), "") for row in rows}
    read = {row: [reading(row), runs[row]] if by_class else [] for row in rows}
    how_many = [f"{sum(words[0] == 'a table' for words in read.values())} by a table",
                f"**{sum(one == 'generates' for one in runs.values())} generate**"] if by_class else []  # fmt: skip
    head = [*(["read by", "runs"] if by_class else []), *(f"{pair}: {tool}" for tool, pair in columns)]
    body = [[f"**{len(rows)}, right under every seed**", *how_many, *counts]]
    body += [[f"`{row}`", *read[row], *(cell(one) for one in cells[row])] for row in rows]
    yield from table(["model type" if by_class else "family", *head], body)
    notes = [note(one) for one in found if one.tool == "polymerge" and not one.right]
    if notes:
        yield from ("", "Not right, or not built here:", "", *notes)


def reading(kind: str) -> str:
    """What polymerge reads a model type by."""
    return "its class" if claimed({"architectures": [(TYPES | TEXT_TYPES)[kind]]}) is GENERIC else "a table"


def column(pair: str) -> str:
    """The column that a pair stands in."""
    if pair.endswith("memory's names"):
        return COLUMNS[1]
    return COLUMNS[2] if pair.startswith("VLM") and pair != COLUMNS[0] else pair


def note(one: Verdict) -> str:
    pair = f", {one.pair}" if one.pair else ""
    return textwrap.fill(f"- `{one.row}`{pair}: {one.text}", 120, subsequent_indent="  ", break_on_hyphens=False)


def cell(found: Sequence[Verdict]) -> str:
    """What one tool came to with one pair, over seeds and options, in a few words."""
    parts = []
    for options in dict.fromkeys(one.options for one in found):
        tried = [short(one.text) for one in found if one.options == options]
        if len(set(tried)) == 1 and tried[0] == "asks":
            continue  # it got it
        said = [text if len(set(tried)) == 1 else f"{tried.count(text)} of {len(tried)} seeds: {text}"
                for text in dict.fromkeys(tried)]  # fmt: skip
        parts.append("; ".join(said) + (f" ({options})" if options else ""))
    other = found[0].pair.removeprefix("VLM + ") if found else ""
    named = other not in ("LLM", "VLM") and found and column(found[0].pair) == COLUMNS[2]
    return (f"{other}: " if named else "") + ". ".join(parts)


def short(text: str) -> str:
    """The kind of a verdict, and its first point."""
    if text.startswith("refused: asks for"):
        return "asks"
    if text.startswith(("right", "refused")):
        return text.partition(":")[0]
    if text.startswith("crash"):
        return re.sub(r"^crash: (?:[\w.]*\.)?(\w+).*", r"crash, \1", text)
    if found := re.match(r"exit 0, says that it is a (\S+), and has (\d+) tensors where the template has (\d+)", text):
        return "exit 0, a {} of {} tensors instead of {}".format(*found.groups())
    return text.partition(";")[0].removesuffix(", the whole text tower among them")


def right_always(found: Sequence[Verdict]) -> bool:
    """Whether a tool was right under every seed, by its defaults or with what it asked for."""
    return any(all(one.right for one in found if one.options == options) for options in {one.options for one in found})


def limits() -> Iterator[str]:
    """What has to be known to read the tables, one point of a list each."""
    words = {
        "seeds": ", ".join(map(str, SEEDS)),
        "asked_for": " or ".join(f"`{option}`" for option in ASKED_FOR),
        "classless": ", ".join(CLASSLESS),
        "with_code": ", ".join(WITH_CODE),
        "transformers": version("transformers"),
    }
    for limit in LIMITS.split("\n\n"):
        point = f"- {limit.format(**words).strip()}"
        yield textwrap.fill(point, 120, subsequent_indent="  ", break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
