"""What many tests share: the command line, small checkpoints with chosen tensors, a look at files and at models."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from polymerge.cli import main


@dataclass
class Ran:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


def cli(*words: object) -> Ran:
    """Run `polymerge WORDS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    argv = ["polymerge", *map(str, words)]
    try:
        with (
            patch.object(sys, "argv", argv),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert isinstance(end.value.code, int)
    return Ran(end.value.code, out.getvalue(), err.getvalue())


def merged(recipe: Mapping[str, Any], out: Path, *words: object) -> Path:
    """Merge by the command line, expect that it succeeds, and return the folder."""
    ran = cli("merge", recipe_file(recipe, out.with_name(f"{out.name}.yaml")), "-o", out, *words)
    assert ran.status == 0, ran.err
    return out


def fold(base: Path, adapter: Path, out: Path, *words: object) -> Path:
    """Fold an adapter by the command line, expect that it succeeds, and return the folder."""
    ran = cli("fold", adapter, "--base", base, "-o", out, *words)
    assert ran.status == 0, ran.err
    return out


def recipe_file(recipe: Mapping[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False), encoding="utf-8")
    return file


def checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of one safetensors file; a Llama if no config is given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}), encoding="utf-8")
    return folder


def small_llama(seed: int, dtype: torch.dtype = torch.bfloat16, rows: int = 7) -> dict[str, Tensor]:
    """The tensors of a very small Llama, or of something that has its names."""
    shapes = {
        "model.embed_tokens.weight": (rows, 6),
        "model.layers.0.mlp.up_proj.weight": (9, 6),
        "model.layers.1.mlp.up_proj.weight": (9, 6),
        "model.norm.weight": (6,),
        "lm_head.weight": (rows, 6),
    }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def two_llamas(folder: Path) -> tuple[Path, Path]:
    return checkpoint(folder / "one", small_llama(1)), checkpoint(folder / "other", small_llama(2))


def with_tokens(folder: Path, seed: int, tokens: list[str] | str | None, rows: int = 7) -> Path:
    """A model with a tokenizer.json of some tokens, of some text, or without one."""
    checkpoint(folder, small_llama(seed, rows=rows))
    if isinstance(tokens, list):
        tokens = json.dumps({"model": {"vocab": {token: place for place, token in enumerate(tokens)}}})
    if tokens is not None:
        (folder / "tokenizer.json").write_text(tokens, encoding="utf-8")
    return folder


def linear(*models: object, **more: Any) -> dict[str, Any]:
    """The recipe of a plain average."""
    return {"merge_method": "linear", "models": list(map(str, models)), "parameters": {"weight": 0.5}, **more}


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a folder of safetensors, by name, with dtype and shape in front of them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = f"{entry['dtype']}{entry['shape']}".encode() + data[8 + size + start : 8 + size + end]
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """Every weight file and index of a folder, whole."""
    files = [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]
    return {file.name: file.read_bytes() for file in sorted(files)}


def tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a folder with a single weight file."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


def leftovers(folder: Path) -> list[str]:
    """What lies in a folder under a hidden name, as an unfinished output would."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def killed_in_the_middle(command: Sequence[object], begun: Callable[[], bool]) -> None:
    """Start a command, and kill it as soon as what it does has begun."""
    started = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not begun() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert started.returncode == -signal.SIGKILL, "it was done before it could be killed"


def with_config(folder: Path, **changes: Any) -> Path:
    """Change a checkpoint's config.json; None takes a key out."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def same_weights(model: Any, other: Any) -> None:
    """Two models have the same weights, to the bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, theirs[name]))), name


def loaded_by(code: str) -> set[str]:
    """The packages that are loaded after some code has run in a fresh interpreter."""
    report = "import sys; sys.stderr.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stderr.split())
