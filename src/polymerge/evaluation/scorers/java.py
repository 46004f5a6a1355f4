"""What pycocoevalcap brings and Java runs: the Penn Treebank tokenizer, by lines.

The tokenizer is not run through pycocoevalcap's own wrapper, which writes into the installed package and goes on when
Java has failed.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from polymerge.errors import MissingExtraError, PolymergeError

__all__ = ["NEEDS_JAVA", "captions_module", "has_java", "ptb_lines", "ptb_punctuation"]

NEEDS_JAVA = (
    "there is no `java` on the PATH, which METEOR and the Penn Treebank tokenizer need. Install a Java runtime, such "
    "as default-jre-headless"
)


def has_java() -> bool:
    """Whether `java` can be run."""
    return shutil.which("java") is not None


def captions_module(name: str) -> Any:
    """A module of pycocoevalcap.

    raises MissingExtraError without it.
    """
    try:
        return import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"caption metrics need {error.name}: pip install 'polymerge[captions]'") from None


def ptb_punctuation() -> frozenset[str]:
    """The tokens that caption metrics leave out."""
    return frozenset(captions_module("tokenizer.ptbtokenizer").PUNCTUATIONS)


@lru_cache(maxsize=8)  # the references of a task are the same for every model
def ptb_lines(text: str) -> tuple[str, ...]:
    """The tokens of each line of a text, joined by blanks; what ends a line is the tokenizer's to say.

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError where the tokenizer fails.
    """
    module = captions_module("tokenizer.ptbtokenizer")
    if not has_java():
        raise MissingExtraError(NEEDS_JAVA)
    jar = Path(module.__file__).parent / module.STANFORD_CORENLP_3_4_1_JAR
    options = ["-encoding", "utf-8", "-preserveLines", "-lowerCase"]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise PolymergeError(f"the Penn Treebank tokenizer failed with status {done.returncode}: {' '.join(said[-3:])}")
    return tuple(done.stdout.decode("utf-8").split("\n"))
