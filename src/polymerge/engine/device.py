"""Where blocks are computed: on the CPU in numpy arrays, or streamed through a GPU in torch tensors."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from polymerge.errors import MissingExtraError, RecipeError

__all__ = ["Device", "open_device"]

Array = Any


class Device(Protocol):
    """What the runner asks of a device."""

    name: str
    takes_bits: bool
    """Whether its kernels read rows of BF16 as they lie on disk."""

    def empty(self, shape: tuple[int, ...], precision: str) -> Array:
        """An array of F32 or F64 on the device."""

    def host_bytes(self, size: int) -> Array:
        """A buffer of bytes on the host."""

    def view(self, raw: Array) -> memoryview:
        """The bytes of a host buffer."""

    def upload(self, raw: Array) -> Array:
        """A host buffer's bytes on the device."""

    def beside(self, raw: Array) -> Array:
        """Bytes on the device, as many as a host buffer has; the buffer itself where there is nothing between them."""

    def download(self, encoded: Array, raw: Array) -> None:
        """Bring bytes that are `beside` a host buffer into it, and wait until they are there."""


class Cpu:
    """The reference: numpy arrays, nothing moves."""

    name = "cpu"
    takes_bits = True

    def empty(self, shape: tuple[int, ...], precision: str) -> Array:
        """An uninitialised numpy array."""
        return np.empty(shape, np.float64 if precision == "F64" else np.float32)

    def host_bytes(self, size: int) -> Array:
        """A numpy buffer."""
        return np.empty(size, np.uint8)

    def view(self, raw: Array) -> memoryview:
        """The buffer's memory."""
        return memoryview(raw)

    def upload(self, raw: Array) -> Array:
        """The buffer itself."""
        return raw

    def beside(self, raw: Array) -> Array:
        """The buffer itself."""
        return raw

    def download(self, encoded: Array, raw: Array) -> None:
        """Nothing: the bytes are there."""


class Torch:
    """A device of torch: page-locked buffers on the host, blocks on the device."""

    takes_bits = False

    def __init__(self, name: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(name)
        self.name = name

    def empty(self, shape: tuple[int, ...], precision: str) -> Array:
        """An uninitialised tensor on the device."""
        dtype = self._torch.float64 if precision == "F64" else self._torch.float32
        return self._torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, size: int) -> Array:
        """A buffer that the device reads without a copy in between."""
        return self._torch.empty(size, dtype=self._torch.uint8, pin_memory=self._device.type == "cuda")

    def view(self, raw: Array) -> memoryview:
        """The buffer's memory."""
        return memoryview(raw.numpy())

    def upload(self, raw: Array) -> Array:
        """The bytes on the device; done when it returns, since the buffer is used again at once."""
        return raw.to(self._device)

    def beside(self, raw: Array) -> Array:
        """A buffer on the device."""
        return self._torch.empty(raw.shape, dtype=self._torch.uint8, device=self._device)

    def download(self, encoded: Array, raw: Array) -> None:
        """Copy the bytes to the host; this waits for the kernels before it."""
        raw.copy_(encoded)


def open_device(name: str) -> Device:
    """The device of this name: `cpu`, or one that torch knows, such as `cuda` or `cuda:1`.

    raises MissingExtraError without torch, RecipeError for a device that is not there.
    """
    if name == "cpu":
        return Cpu()
    try:
        import torch
    except ImportError:
        raise MissingExtraError(f"--device {name} needs torch: pip install 'polymerge[transformers]'") from None
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"--device {name}: torch cannot use it: {str(error).splitlines()[0]}") from None
    return Torch(name)
