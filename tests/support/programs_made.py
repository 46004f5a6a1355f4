"""Environments of stand-ins: programs with the interfaces of vLLM and llama.cpp, which answer by transformers."""

from __future__ import annotations

import sys
from pathlib import Path

STANDINS = Path(__file__).parent / "standins"


def environment_of_standins(folder: Path) -> Path:
    """A virtual environment in which `vllm` is the stand-in."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={STANDINS} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


def clone_of_standins(folder: Path) -> Path:
    """A clone of llama.cpp whose converters and server are the stand-ins."""
    server = folder / "build" / "bin" / "llama-server"
    server.parent.mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text((STANDINS / "llama_cpp_converter.py").read_text(encoding="utf-8"), encoding="utf-8")
    server.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDINS / "llama_cpp_server.py"} "$@"\n', encoding="utf-8")
    server.chmod(0o755)
    return folder
