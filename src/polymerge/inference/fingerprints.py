"""Tell by a few bytes whether what answers depend on is what it was: prompts with their images, checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from polymerge.checkpoints.hub_files import remote_of
from polymerge.inference.images import ImageSource, StoredImage, encode_png
from polymerge.inference.prompts import Prompt
from polymerge.planning import Plan

__all__ = ["of_files", "of_inputs", "of_prompts"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".py", ".tiktoken")
_SAMPLES, _SAMPLE = 64, 4096


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """sha256 of prompts and their images; what the right answers are does not matter to a model."""
    told = hashlib.sha256()
    for prompt in prompts:
        images = [hashlib.sha256(_bytes(image)).hexdigest() for image in prompt.images]
        told.update(json.dumps([prompt.id, prompt.text, images]).encode())
    return told.hexdigest()


def of_inputs(plan: Plan) -> list[dict[str, str]]:
    """What of a plan's models answers depend on: where they lie, their headers, their content."""
    return [
        {"path": one.path, "headers": one.headers, "content": of_files(filter(None, (one.path, one.adapter)))}
        for one in plan.inputs
    ]


def of_files(places: Iterable[str | Path]) -> str:
    """sha256 of a model's files: of each its name, its size, and some blocks of its content spread over it.

    places  a folder, or a file, each; a base and its adapter are two

    Any training changes nearly every number of the tensors that it changes, so that the blocks tell, and copying or
    touching a file changes nothing. What lies on the hub is told by its commit, whether its files are here or not.
    """
    told = hashlib.sha256()
    for place in map(Path, places):
        remote = remote_of(place)
        if remote is not None:
            told.update(f"{remote.repository}\0{remote.commit}\0".encode())
            continue
        files = [place] if place.is_file() else sorted(place.iterdir())
        for file in files:
            if file.is_file() and file.suffix in _SUFFIXES and file.name != "polymerge.json":
                told.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                _sample(file, told)
    return told.hexdigest()


def _bytes(image: ImageSource) -> bytes:
    return encode_png(image) if isinstance(image, StoredImage) else Path(image).read_bytes()


def _sample(file: Path, told: hashlib._Hash) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
            told.update(stream.read(_SAMPLE))
            if size <= _SAMPLE:
                return
