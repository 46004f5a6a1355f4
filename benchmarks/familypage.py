"""The page that `families.py` writes."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from familycases import CLASSLESS, WITH_CODE
from familytools import ASKED_FOR, SEEDS
from familyverdicts import NEAR, Verdict
from polymerge.families import FAMILIES

PAIRS = ("VLM + LLM", "VLM + VLM")

INTRODUCTION = """# Every family, merged and judged

Tiny checkpoints of each family, merged by both tools from the same recipe, and each output looked at: does it load with
no tensor missing, unexpected or of another shape, and is it right to the last tensor, as a literal merge of the two
models in memory has it? The page is what this command has printed:
"""

READING = """
- **VLM + LLM**: the family's model and a plain language model near its text tower. Every tensor of the text tower has
  to be 0.7 of one and 0.3 of the other, all the rest the template's to the last bit.
- **VLM + VLM**: two fine-tunes of one model. Every tensor of every part has to be 0.7 of one and 0.3 of the other.
- **right**: exit status 0, loads strictly by transformers' own class (where it has none, the file has the template's
  names and shapes), every merged tensor within rounding of the literal merge ({near:g} of its size), every other one
  equal to the template's.
- **refused**: said what is the matter, wrote nothing. **crash**: a Python error. Neither of them makes a wrong file.
- **exit 0** without *right*: the tool reported success, and this is what is wrong with its output.
"""

LIMITS = """\
The checkpoints are random and tiny (two layers, 64 words, float32, one file, head not tied) and have the names that
transformers {transformers} writes, or those of 2024, which published checkpoints have, where these were others, or
published names where it has no class. Nothing is said of a merge's quality.

The embedding of mllama has eight rows more than that of its language model, and stays the template's.

Both tools run with their defaults on one recipe, which says `dtype: float32`; polymerge without its own check of the
output, `--no-verify`, and mergekit under PYTHONHASHSEED {seeds}, since its result may depend on it. Where it does, the
cell counts seeds and does not name them: which seed gives what depends on the names of the folders as well.

Where mergekit asks for {asked_for}, it gets it in another try, and counts as right if that is.

mergekit's command runs in forks of a process that has imported it, one for each hash seed.

mergekit runs in an environment of its own; all outputs are loaded by the transformers of polymerge's.

transformers has no class of {classless}: these outputs are held against the names, shapes and values in files, and run
by nothing. They have the names of published checkpoints; of cambrian and deepseek_vl_original those that public code
shows, with few of their vision towers. Where code is published beside the weights ({with_code}), a config class that
takes everything stands for it here, which mergekit asks to run; the code of the others is in packages of their authors,
which mergekit's environment does not have.

qwen3_vl_moe holds all experts of a layer in one tensor, the language model that it grows from has them one by one. As
published each expert lies transposed against what transformers writes; those who load it see by its shape which it is.

The vision tower of qwen3_vl and qwen3_vl_moe has three layers with a merger each, as many mergers as published ones
have, since mergekit looks for them whatever the config says.

Families of plain language models ({llms}) have no row: the first columns merge those that a model of images grows
from.
"""


def cell(found: Sequence[Verdict]) -> str:
    """What one tool came to with one pair, over seeds and options."""
    parts = []
    for options in dict.fromkeys(one.options for one in found):
        tried = [one for one in found if one.options == options]
        texts = dict.fromkeys(one.text for one in tried)
        counts = {text: sum(one.text == text for one in tried) for text in texts}
        said = [text if len(texts) == 1 else f"{counts[text]} of {len(tried)} hash seeds: {text}" for text in texts]
        parts.append((f"with `{options}`: " if options else "") + "; ".join(said))
    return ". ".join(parts)


def to_markdown(
    command: Sequence[str], about: Mapping[str, str], found: Sequence[Verdict], tools: Iterable[str]
) -> str:
    """Write the page."""
    names = dict.fromkeys(one.row for one in found)
    columns = [(pair, tool) for pair in PAIRS for tool in tools]
    lines = [INTRODUCTION, f"    python {shlex.join(command)}", "", *table(["", ""], about.items())]
    lines.append(READING.format(near=NEAR))
    rows = {name: [_of(found, name, pair, tool) for pair, tool in columns] for name in names}
    body = [[name, *map(cell, row)] for name, row in rows.items()]
    sums = [sum(map(right_always, column)) for column in zip(*rows.values(), strict=True)]
    body.append(["**right under every seed**", *(f"**{count} of {len(rows)}**" for count in sums)])
    lines += table(["family", *(f"{pair}: {tool}" for pair, tool in columns)], body)
    lines += ["", "## What this does not show", "", *limits()]
    return "\n".join(lines) + "\n"


def limits() -> Iterator[str]:
    """What has to be known to read the table, one point of a list each."""
    words = {
        "transformers": version("transformers"),
        "seeds": ", ".join(map(str, SEEDS)),
        "asked_for": " or ".join(f"`{option}`" for option in ASKED_FOR),
        "classless": ", ".join(CLASSLESS),
        "with_code": ", ".join(WITH_CODE),
        "llms": ", ".join(name for name in FAMILIES if FAMILIES[name].parts == ("text",)),
    }
    for limit in LIMITS.split("\n\n"):
        point = f"- {limit.format(**words).strip()}"
        yield textwrap.fill(point, 120, subsequent_indent="  ", break_on_hyphens=False)


def right_always(found: Sequence[Verdict]) -> bool:
    """Whether a tool was right under every seed, by its defaults or with what it asked for."""
    return any(all(one.right for one in found if one.options == options) for options in {one.options for one in found})


def _of(found: Sequence[Verdict], *place: str) -> list[Verdict]:
    return [one for one in found if (one.row, one.pair, one.tool) == place]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
