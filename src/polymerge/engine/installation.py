"""What of polymerge is installed here: packages, extras, kernels and caches, and what of it is broken."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Final

from polymerge.checkpoints.hub_api import hub_cache
from polymerge.errors import human_size
from polymerge.paths import own_cache
from polymerge.tables import Table

__all__ = ["Extra", "Installation", "Kernels", "Package", "Place", "doctor"]

SERVES: Final[Mapping[str, str]] = {
    "transformers": "run models: search, evaluate, knockout, live; check that an output loads (verify)",
    "vision": "processors of Qwen's, InternVL's and other vision-language models",
    "adapters": "make adapters, and load merged ones with PEFT",
    "spectral": "methods on whole matrices in less memory",
    "report": "the page of `polymerge report`, and pictures beside numbers",
    "search": "all that a search needs: models, its picture, VLMEvalKit's .xlsx files",
    "optuna": "samplers of a search beside grid",
    "embeddings": "compare the answers of a search by embedding",
    "vllm": "run models by vLLM in this environment",
    "ray": "merge, search and evaluate on a cluster",
    "stores": "models and outputs in object stores (s3://, gs://)",
    "lm-eval": "text benchmarks by lm-eval in this environment",
    "datasets": "prompts from datasets of the hub",
    "captions": "BLEU, METEOR, ROUGE-L and CIDEr",
    "demo": "the whole story on small models (polymerge demo)",
    "notebook": "the notebook in examples/",
    "docs": "the documentation site",
    "test": "the tests, for work on polymerge itself",
}
"""What each extra is for."""

_OF_DEVELOPMENT: Final = ("test", "docs")
"""Extras that nobody misses who only merges."""

_PROGRAMS: Final = {"captions": ("java",)}
"""What an extra needs that no package brings: METEOR and its tokenizer are Java programs."""

_NO_IMPORT: Final = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
"""Packages that are imported by another name than they are installed by."""

_REQUIREMENT: Final = re.compile(
    r"(?P<name>[\w.-]+?)(?:\[(?P<extras>[\w, -]+)\])?\s*(?:\(?>=\s*(?P<low>[\d.]+)[^;]*)?"
    r"(?:;\s*(?:.*\band\s+)?extra\s*==\s*['\"](?P<extra>[\w-]+)['\"].*)?"
)


@dataclass(frozen=True)
class Package:
    """A package that polymerge uses, and its version; None if it is not installed.

    wanted   the lowest version that polymerge asks for; empty if any will do
    trouble  why it cannot be used; empty if it can
    """

    name: str
    version: str | None
    wanted: str
    trouble: str = ""


@dataclass(frozen=True)
class Extra:
    """A group of optional packages, and those of them that are missing or too old."""

    name: str
    serves: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Kernels:
    """Whether loops compile, and where their machine code is kept; no folder if it is compiled anew each time.

    kept  how many compiled functions lie there
    """

    compile: bool
    folder: str | None
    kept: int
    trouble: str = ""


@dataclass(frozen=True)
class Place:
    """A folder that polymerge writes to, and how many bytes are free on its disk."""

    use: str
    path: str
    free: int


@dataclass(frozen=True)
class Installation(Table):
    """What is installed; `problems` are what polymerge cannot do without, and is broken or missing."""

    python: str
    polymerge: str
    system: str
    processors: int
    packages: tuple[Package, ...]
    optional: tuple[Package, ...]
    extras: tuple[Extra, ...]
    kernels: Kernels
    places: tuple[Place, ...]
    settings: Mapping[str, str]
    problems: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each package, those that are not installed among them."""
        return [asdict(one) for one in (*self.packages, *self.optional)]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "settings": dict(self.settings)}


def doctor() -> Installation:
    """Find out what is installed and what of it works, without importing any optional package.

    The packages that polymerge always needs are imported, and one loop is compiled.
    """
    core, extras = _required()
    packages = tuple(_imported(*one) for one in core.items())
    shown = {name: group for name, group in extras.items() if name not in _OF_DEVELOPMENT}
    optional = {name: _found(name, low) for group in shown.values() for name, low in group.items() if name not in core}
    kernels = _kernels()
    problems = [f"{one.name}: {one.trouble}" for one in packages if one.trouble]
    problems += [f"kernels: {kernels.trouble}"] if kernels.trouble else []
    least = metadata("polymerge")["Requires-Python"] or ""
    if _below(platform.python_version(), least.removeprefix(">=")):
        problems.insert(0, f"Python {platform.python_version()} is older than polymerge needs ({least})")
    return Installation(
        python=f"{platform.python_version()} ({sys.executable})",
        polymerge=f"{version('polymerge')} ({Path(__file__).parents[1]})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processors=os.cpu_count() or 1,
        packages=packages,
        optional=tuple(optional[name] for name in sorted(optional)),
        extras=tuple(_extra(name, group, optional) for name, group in shown.items()),
        kernels=kernels,
        places=tuple(_places()),
        settings={name: os.environ[name] for name in _SETTINGS if name in os.environ},
        problems=tuple(problems),
    )


_SETTINGS: Final = (
    "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NO_COLOR",
)  # fmt: skip
"""Variables of the environment that change what polymerge does; none of them is a secret."""


def _required() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The packages that are always needed, and those of each extra with what it takes in: name -> lowest version."""
    core, groups, taken = dict[str, str](), dict[str, dict[str, str]](), dict[str, list[str]]()
    for text in requires("polymerge") or ():
        said = _REQUIREMENT.fullmatch(text.strip())
        if said is None:
            continue  # of a platform or a form that we do not write
        name, extra = _normal(said["name"]), said["extra"]
        if extra is None:
            core[name] = said["low"] or ""
        elif name == "polymerge":
            taken.setdefault(extra, []).extend(part.strip() for part in said["extras"].split(","))
            groups.setdefault(extra, {})
        else:
            groups.setdefault(extra, {})[name] = said["low"] or ""

    def whole(extra: str) -> dict[str, str]:
        beneath = [whole(one) for one in taken.get(extra, ())]
        return {name: low for group in (*beneath, groups.get(extra, {})) for name, low in group.items()}

    return core, {name: whole(name) for name in groups}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _found(name: str, low: str) -> Package:
    """A package by its metadata alone."""
    try:
        own = version(name)
    except PackageNotFoundError:
        return Package(name, None, low, f"is not installed: pip install '{name}{f'>={low}' if low else ''}'")
    old = f"{own} is older than {low}: pip install -U '{name}>={low}'" if _below(own, low) else ""
    return Package(name, own, low, old)


def _imported(name: str, low: str) -> Package:
    """A package that is always needed, imported."""
    found = _found(name, low)
    if found.version is not None and not found.trouble:
        try:
            import_module(_NO_IMPORT.get(name, name.replace("-", "_")))
        except Exception as error:  # a broken package may raise anything while it is imported
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Package(name, found.version, low, f"does not import ({said}). Reinstall it")
    return found


def _below(own: str, low: str) -> bool:
    """Whether a version is lower than another, by its numbers."""
    one, other = (tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]) for text in (own, low))
    return one < other


def _extra(name: str, group: Mapping[str, str], optional: Mapping[str, Package]) -> Extra:
    missing = [one for one in group if one in optional and optional[one].trouble]
    missing += [program for program in _PROGRAMS.get(name, ()) if shutil.which(program) is None]
    return Extra(name, SERVES.get(name, ""), tuple(missing))


def _kernels() -> Kernels:
    """Compile and run the loop that reads bfloat16, and look where its machine code went."""
    try:
        import numpy as np

        from polymerge.methods.kernels.cpu.formats import decode, machine_code

        out = np.zeros(2, np.float32)
        decode(np.array([0x3F80, 0xC000], np.uint16).view(np.uint8), "BF16", out)
        if out.tolist() != [1.0, -2.0]:
            return Kernels(False, None, 0, f"bfloat16 1 and -2 were read as {out.tolist()}. Reinstall numba and numpy")
        folder = machine_code()
    except Exception as error:  # numba, llvmlite and numpy raise what they like where they do not fit each other
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Kernels(False, None, 0, f"do not compile ({said}). Reinstall numba, llvmlite and numpy")
    kept = len(list(folder.glob("*.nbc"))) if folder is not None else 0
    return Kernels(True, None if folder is None or not kept else str(folder), kept)


def _places() -> Iterator[Place]:
    """The folders that polymerge writes to, each with what is free on its disk."""
    places = {
        "models of the hub": hub_cache(),
        "what polymerge remembers": own_cache(""),
        "temporary files": Path(tempfile.gettempdir()),
        "this folder": Path.cwd(),
    }
    for use, path in places.items():
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        yield Place(use, str(path), shutil.disk_usage(there).free)


def describe(found: Installation) -> Iterator[tuple[str, list[list[str]]]]:
    """Titled tables of what is installed, for people."""
    system = f"{found.system}, {found.processors} processors"
    yield "", [["polymerge", found.polymerge], ["Python", found.python], ["system", system]]
    yield "always needed", [[one.name, one.version or "-", one.trouble or "ok"] for one in found.packages]
    told = {one.name: (one.trouble or "ok") if one.version else "missing" for one in found.optional}
    yield "optional", [[one.name, one.version or "-", told[one.name]] for one in found.optional]
    lacks = {one.name: f"misses {', '.join(one.missing)}" if one.missing else "complete" for one in found.extras}
    yield "extras", [[one.name, one.serves, lacks[one.name]] for one in found.extras]
    kernels = found.kernels
    kept = f"{kernels.kept} of them kept in {kernels.folder}" if kernels.folder else "none is kept on the disk"
    yield "kernels", [[kernels.trouble or f"loops compile; {kept}"]]
    yield "places", [[one.use, one.path, f"{human_size(one.free)} free"] for one in found.places]
    if found.settings:
        yield "set in the environment", [[name, value] for name, value in found.settings.items()]
