"""What models are asked: one prompt with its images, and its right answer where one is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polymerge.inference.images import ImageSource

__all__ = ["Prompt"]


@dataclass(frozen=True)
class Prompt:
    """One question to a model.

    id      unique among the prompts; a whole number or a text, as the file has it
    text    what is asked, without image marks: the chat template puts them in
    images  absolute paths, in the order in which the model sees them; or images in rows of a dataset, which
            `polymerge.inference.prompts.materialise` turns into files
    answer  the right answer, or several, for scorers; None where there is none
    """

    id: int | str
    text: str
    images: tuple[ImageSource, ...] = ()
    answer: Any = None
