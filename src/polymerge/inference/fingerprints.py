"""Tell by a few bytes whether what answers depend on is what it was: prompts with their images, checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from polymerge.checkpoints.identity import content_digest
from polymerge.inference.images import ImageSource, StoredImage, encode_png
from polymerge.inference.prompts import Prompt
from polymerge.planning import Plan

__all__ = ["of_inputs", "of_prompts"]


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
        {
            "path": one.path,
            "headers": one.headers,
            "content": content_digest([Path(place) for place in (one.path, one.adapter) if place]),
        }
        for one in plan.inputs
    ]


def _bytes(image: ImageSource) -> bytes:
    return encode_png(image) if isinstance(image, StoredImage) else Path(image).read_bytes()
