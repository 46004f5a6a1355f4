"""What is run again and again: small merges of every kind, the inputs they read, and what each has to leave behind."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge import durable

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

Contents = Mapping[str, str]
"""The files of a folder: path within it -> sha256 of what is in it."""

_PLAIN = ("--no-verify", "--shard-size", "300KB", "--threads", "1")
_EARLIER = "0.9,0.1"
_NEW = "0.5,0.5"


@dataclass(frozen=True)
class Scenario:
    """A command and what lies under its output's name before.

    words    the command line after `polymerge`, without the output; inputs by their names
    earlier  the same for the output that is there already, or None where the name is free
    prepare  what the process does first
    """

    name: str
    words: tuple[str, ...]
    earlier: tuple[str, ...] | None = None
    prepare: Callable[[], None] | None = None


def _pair(one: str, other: str, weight: str, *more: str) -> tuple[str, ...]:
    return ("merge", "--method", "linear", "--template", one, "--with", other, "--weight", weight, *more)


def _without_exchange() -> None:
    """As on a system or disk that can rename, but not exchange two names nor refuse to replace one."""
    durable._renamed = lambda *_: False


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("merge", _pair("one", "other", _NEW, *_PLAIN)),
        Scenario("merge, forced", _pair("one", "other", _NEW, *_PLAIN), _pair("one", "other", _EARLIER, *_PLAIN)),
        Scenario(
            "merge, no exchange",
            _pair("one", "other", _NEW, *_PLAIN),
            _pair("one", "other", _EARLIER, *_PLAIN),
            _without_exchange,
        ),
        Scenario("adapter", _pair("left", "right", _NEW, *_PLAIN), _pair("left", "right", _EARLIER, *_PLAIN)),
        Scenario("fold", ("fold", "left", "--base", "base", "--no-verify")),
        Scenario("torch", _pair("one", "other", _NEW, *_PLAIN, "--format", "torch")),
        Scenario("adapter, llava", _pair("left", "right", _NEW, *_PLAIN, "--layout", "llava")),
        Scenario("merge, checked", _pair("one", "other", _NEW, *_PLAIN[1:]), _pair("one", "other", _EARLIER, *_PLAIN)),
    )
}


def make_inputs(folder: Path) -> Path:
    """Write the checkpoints and adapters that the scenarios read: 1 to 2 MB each, with tokenizer, processor and config.

    They are made in another process: the less there is in this one, the less its forks take.
    """
    if (pid := os.fork()) == 0:
        try:
            _make_inputs(folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise ChildProcessError("the inputs could not be made")
    return folder


def _make_inputs(folder: Path) -> None:
    tiny: Any = importlib.import_module("tiny")
    warnings.simplefilter("ignore")  # peft asks transformers by an old name
    folder.mkdir()
    tiny.build("llava", folder / "one", vocab=16000, layers=1)
    tiny.perturbed(folder / "one", folder / "other", seed=1)
    base = tiny.AutoModelForCausalLM.from_pretrained(tiny.build("llama", folder / "base", vocab=16000))
    for seed, name in enumerate(("left", "right")):
        _save_adapter(base, folder / name, seed)


def _save_adapter(base: Any, folder: Path, seed: int) -> None:
    """An adapter as PEFT saves it, with a weight that is no LoRA module, every trainable number of which is random."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    adapter = get_peft_model(copy.deepcopy(base), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    adapter.save_pretrained(str(folder))


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder, or of a file that stands where one is expected; times and commands are left out."""
    if not folder.is_dir():
        return {"": _sha256(folder.read_bytes())}
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = _sha256(_timeless(path))
    return found


def _timeless(file: Path) -> bytes:
    """The content of a file; of polymerge.json, what does not depend on the time and the way it was asked for."""
    content = file.read_bytes()
    if file.name != "polymerge.json":
        return content
    try:
        record = json.loads(content)
    except ValueError:
        return content
    return json.dumps({key: record[key] for key in record if key not in ("created", "command")}).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Known:
    """The whole outputs that may stand under a scenario's name, and the inputs as they have to stay."""

    inputs: Contents
    new: Contents
    earlier: Contents | None

    def stands(self, out: Path) -> str:
        """What is under the name: `nothing`, `earlier`, `new`, or in what it differs from the new one."""
        if not os.path.lexists(out):
            return "nothing"
        found = contents(out)
        if found == self.new:
            return "new"
        if found == self.earlier:
            return "earlier"
        differs = [name for name in {**found, **self.new} if found.get(name) != self.new.get(name)]
        return f"neither the earlier nor the new output: {', '.join(differs[:4])} of {len(self.new)} files"


@dataclass(frozen=True)
class Place:
    """Where one scenario runs: `inputs`, and the folder `beside` with nothing but the output `out` in it."""

    inputs: Path
    beside: Path
    stash: Path
    scenario: Scenario

    @property
    def out(self) -> Path:
        return self.beside / "out"

    def words(self, *more: str, earlier: bool = False) -> list[str]:
        """The command line that makes the output, or the earlier one; the latter replaces nothing."""
        said = self.scenario.earlier if earlier and self.scenario.earlier else self.scenario.words
        here = {path.name: str(path) for path in self.inputs.iterdir()}
        return ["polymerge", *(here.get(word, word) for word in said), "-o", str(self.out), *more]

    def reset(self) -> None:
        """Put everything beside the inputs as it is before the command."""
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside.mkdir()
        if self.scenario.earlier:
            shutil.copytree(self.stash, self.out, symlinks=True)

    def keeps(self, said: str, known: Known) -> bool:
        """Remove a new output that could not get its name and has another one, which the message has to say."""
        kept = self.out.with_name("out-1")
        if not kept.is_dir() or str(kept) not in said or contents(kept) != known.new:
            return False
        shutil.rmtree(kept)
        return True

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.beside.iterdir() if path != self.out)
