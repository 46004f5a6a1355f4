"""Images of prompts: on disk, or still in a row of a dataset; opened, written as PNG, made square."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """An image in a row of a dataset; nothing of it is read before `read`.

    source  the dataset, as messages call it
    column  where in it
    row     from 0
    place   which one, where a row has several
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
        """The bytes of the image file that the row holds."""
        cell = self.rows[self.row : self.row + 1].column(0)[0].as_py()
        image = cell[self.place] if isinstance(cell, list) else cell
        data: bytes = image["bytes"] if isinstance(image, dict) else image
        return data


ImageSource = str | StoredImage
"""What a prompt holds for an image: its absolute path, or where in a dataset it is."""


def open_image(image: ImageSource) -> Any:
    """The image as a model sees it: a PIL image in RGB, turned as its EXIF orientation says.

    raises what PIL raises where it is missing or broken, MissingExtraError without PIL.
    """
    pillow, ops = _pillow()
    with pillow.open(_file(image)) as opened:
        turned = ops.exif_transpose(opened)
        if turned.mode == "P" and "transparency" in turned.info:
            turned = turned.convert("RGBA")  # PIL warns about the direct way
        return turned.convert("RGB")


def verify_image(image: ImageSource) -> None:
    """Read the image's header and what checksums its format has, without decoding it; raises as `open_image` does."""
    pillow, _ = _pillow()
    with pillow.open(_file(image)) as opened:
        opened.verify()


def encode_png(image: ImageSource) -> bytes:
    """The image as `open_image` gives it, in the bytes of a PNG file."""
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(data: bytes, folder: Path) -> Path:
    """Write a PNG file under a name made from its content, so that no other image ever has it, and return its path."""
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
    return path


class SquareImages:
    """A processor whose images are first padded to squares, as LLaVA's evaluation pads them.

    The padding has the mean colour that the processor subtracts, or is black where it names none. Everything else is
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
            more["images"] = [[padded(image, self._colour) for image in group] for group in images]
        return self._processor(**more)


def padded(image: Any, colour: tuple[int, ...]) -> Any:
    """Centre a PIL image in a square of its longer side, one pixel up or to the left where the padding is odd."""
    pillow, _ = _pillow()
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    made = pillow.new(image.mode, (side, side), colour)
    made.paste(image, ((side - width) // 2, (side - height) // 2))
    return made


def _file(image: ImageSource) -> Any:
    return io.BytesIO(image.read()) if isinstance(image, StoredImage) else image


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError("opening images needs pillow: pip install 'polymerge[transformers]'") from None
    return Image, ImageOps
