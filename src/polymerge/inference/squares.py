"""Images made square before a processor sees them, as LLaVA's evaluation pads them."""

from __future__ import annotations

from typing import Any

__all__ = ["Squares", "squared"]


class Squares:
    """A processor whose images are made square first, with the mean colour that it subtracts around them.

    Everything else of it is the processor's own. A processor that names no mean colour gets black.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        mean = getattr(getattr(processor, "image_processor", None), "image_mean", None) or (0.0, 0.0, 0.0)
        self._colour = tuple(int(255 * share) for share in mean)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: Any = None, **more: Any) -> Any:
        """Process texts and the images of each."""
        if images is not None:
            more["images"] = [[squared(image, self._colour) for image in group] for group in images]
        return self._processor(**more)


def squared(image: Any, colour: tuple[int, ...]) -> Any:
    """A PIL image in the middle of a square of its longer side, one pixel up or left of it where the rest is odd."""
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    made = Image.new(image.mode, (side, side), colour)
    made.paste(image, ((side - width) // 2, (side - height) // 2))
    return made
