"""Images of prompts: on disk, or in a row of a dataset; opened, written as PNG, padded to squares."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from polymerge.checkpoints.bounds import open_regular
from polymerge.durable import write_file
from polymerge.errors import MissingExtraError

__all__ = [
    "ImageSource",
    "SquareImages",
    "StoredImage",
    "encode_png",
    "open_image",
    "padded",
    "verify_image",
    "write_png",
]


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a dataset; it is not read before `read`.

    source  the dataset's name in messages
    column  its column
    row     from 0
    place   its index, if a row has several
    rows    the column as a dataset in arrow format
    """

    source: str
    column: str
    row: int
    place: int
    rows: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.source}: row {self.row}, {self.column}[{self.place}]"

    def read(self) -> bytes:
        """Read the bytes of the image file in the row."""
        cell = self.rows[self.row : self.row + 1].column(0)[0].as_py()
        image = cell[self.place] if isinstance(cell, list) else cell
        data: bytes = image["bytes"] if isinstance(image, dict) else image
        return data


ImageSource = str | StoredImage
"""An image of a prompt: its absolute path, or its location in a dataset."""


def open_image(image: ImageSource) -> Any:
    """Open an image for a model: a PIL image in RGB, rotated according to its EXIF orientation.

    raises PIL's errors if it is missing or broken, MissingExtraError without PIL.
    """
    pillow, ops = _pillow()
    with _file(image) as file, pillow.open(file) as opened:
        turned = ops.exif_transpose(opened)
        if turned.mode == "P" and "transparency" in turned.info:
            turned = turned.convert("RGBA")  # PIL warns about the direct way
        return turned.convert("RGB")


def verify_image(image: ImageSource) -> None:
    """Read the image's header and any checksums, without decoding it; raises as `open_image` does."""
    pillow, _ = _pillow()
    with _file(image) as file, pillow.open(file) as opened:
        opened.verify()


def encode_png(image: ImageSource) -> bytes:
    """Encode an image, as opened by `open_image`, as PNG."""
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(data: bytes, folder: Path) -> Path:
    """Write a PNG file named after a hash of its content, and return its path."""
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    return path if path.exists() else write_file(path, data)


class SquareImages:
    """A processor that first pads images to squares, as LLaVA's evaluation does.

    The padding has the mean colour that the processor subtracts, or black without one. Everything else is
    the processor's own.
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
            more["images"] = [self.pad(group) for group in images]
        return self._processor(**more)

    def pad(self, images: Iterable[Any]) -> list[Any]:
        """Pad images to squares."""
        return [padded(image, self._colour) for image in images]


def padded(image: Any, colour: tuple[int, ...]) -> Any:
    """Centre a PIL image in a square of its longer side, one pixel up or left if the padding is odd."""
    pillow, _ = _pillow()
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    made = pillow.new(image.mode, (side, side), colour)
    made.paste(image, ((side - width) // 2, (side - height) // 2))
    return made


def _file(image: ImageSource) -> BinaryIO:
    return io.BytesIO(image.read()) if isinstance(image, StoredImage) else open_regular(Path(image))


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError("opening images needs pillow: pip install 'polymerge[transformers]'") from None
    return Image, ImageOps
