"""The commands that are timed, each on a disk that has nothing else to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

import polymerge
from contest import Case, Floats, sample
from measure import Measured, measure, settle
from polymerge.planning.estimate import default_threads
from polymerge.planning.matrix_costs import decomposed

__all__ = ["Bench", "Planned"]

SHARD = 500  # megabytes, at most, of an output file
IMPORTS = (
    "import polymerge.cli, polymerge.engine.merge, polymerge.methods.dare, polymerge.methods.sums, time; time.sleep(1)"
)
VERSIONS = "import importlib.metadata as m; print(*(f'{name} {m.version(name)}' for name in ('mergekit', 'torch')))"


@dataclass(frozen=True)
class Planned:
    """What a plan says that decomposing matrices takes: seconds of one core, bytes for as many at once as threads."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Bench:
    """Where things are.

    models    the folder with base, a and b
    scratch   for recipes, outputs and caches, on the disk of the models
    mergekit  mergekit's environment
    """

    models: Path
    scratch: Path
    mergekit: Path | None = None

    def cp(self) -> Measured:
        """Copy one checkpoint."""
        with self._output("copy") as out:
            return measure(["cp", "-r", str(self.models / "a"), str(out)])

    def imports(self) -> Measured:
        """Start the interpreter and import what a merge imports."""
        return measure([sys.executable, "-c", IMPORTS], self.caches)

    def run_polymerge(self, case: Case) -> tuple[Measured, list[Floats]]:
        """Merge with polymerge; a sample of the output."""
        program = Path(sys.executable).with_name("polymerge")
        with self.prepared(case) as (recipe, out):
            command = [str(program), "merge", str(recipe), "-o", str(out), "--no-verify", "--shard-size", f"{SHARD}MB"]
            return measure(command, self.caches), sample(out)

    @contextmanager
    def prepared(self, case: Case) -> Iterator[tuple[Path, Path]]:
        """The recipe for polymerge, and the folder for its output, which is removed in the end."""
        recipe = self._recipe("polymerge", case.for_polymerge(self.models))
        with self._output("polymerge") as out:
            yield recipe, out

    def planned(self, case: Case) -> Planned:
        """What polymerge says before it decomposes the matrices of a merge."""
        costs = [matrices for _, matrices in decomposed(polymerge.plan(case.for_polymerge(self.models)))]
        largest = sorted((one.room for one in costs for _ in range(one.count)), reverse=True)
        return Planned(sum(one.seconds for one in costs), sum(largest[: default_threads()]))

    def run_mergekit(self, case: Case) -> tuple[Measured, list[Floats]]:
        """Merge with mergekit; a sample of the output."""
        assert self.mergekit is not None
        recipe = self._recipe("mergekit", case.for_mergekit(self.models))
        program = self.mergekit / "bin" / "mergekit-yaml"
        with self._output("mergekit") as out:
            command = [str(program), str(recipe), str(out), "--out-shard-size", f"{SHARD}M"]
            return measure(command), sample(out)

    def forget_digests(self) -> None:
        """Have polymerge see the inputs as if for the first time."""
        shutil.rmtree(self.scratch / "cache" / "polymerge", ignore_errors=True)

    def forget_kernels(self) -> None:
        """Have polymerge compile its kernels anew."""
        shutil.rmtree(self.scratch / "numba", ignore_errors=True)

    def read_inputs(self) -> None:
        """Bring the inputs into the page cache."""
        buffer = np.empty(1 << 22, np.uint8)
        for file in self._shards():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer.data):
                    pass

    def forget_inputs(self) -> None:
        """Have the system drop the inputs from the page cache, which it does for files that nothing else has open."""
        for file in self._shards():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def cat(self) -> Measured:
        """Read the inputs and nothing else."""
        return measure(["sh", "-c", 'cat "$@" >/dev/null', "sh", *map(str, self._shards())])

    def versions(self) -> list[str]:
        """What is compared, with its version."""
        found = [
            f"Python {sys.version.split()[0]}",
            *(f"{name} {version(name)}" for name in ("polymerge", "numpy", "numba")),
        ]
        if self.mergekit is not None:
            command = [str(self.mergekit / "bin" / "python"), "-c", VERSIONS]
            found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        return found

    @property
    def caches(self) -> dict[str, str]:
        """The variables that name polymerge's caches."""
        return {"XDG_CACHE_HOME": str(self.scratch / "cache"), "NUMBA_CACHE_DIR": str(self.scratch / "numba")}

    def _shards(self) -> list[Path]:
        return sorted(self.models.glob("*/*.safetensors"))

    def _recipe(self, tool: str, recipe: dict[str, object]) -> Path:
        file = self.scratch / f"{tool}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return file

    @contextmanager
    def _output(self, name: str) -> Iterator[Path]:
        out = self.scratch / name
        shutil.rmtree(out, ignore_errors=True)
        settle()
        try:
            yield out
        finally:
            shutil.rmtree(out, ignore_errors=True)
