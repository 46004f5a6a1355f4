"""Where blocks are computed: on the CPU in numpy arrays, or streamed through a GPU in torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from polymerge.errors import MissingExtraError, RecipeError

__all__ = ["Device", "Torch", "open_device"]

Array = Any  # numpy.ndarray on the CPU, torch.Tensor on another device


class Device:
    """The CPU, which is the reference: numpy arrays, and nothing moves.

    takes_bits   whether its kernels read rows of BF16 as they lie on disk
    """

    name = "cpu"
    takes_bits = True

    def empty(self, shape: tuple[int, ...], precision: str) -> Array:
        """An uninitialised array of F32 or F64 on the device."""
        return np.empty(shape, np.float64 if precision == "F64" else np.float32)

    def host_bytes(self, size: int) -> Array:
        """A buffer of `size` bytes on the host."""
        return np.empty(size, np.uint8)

    def view(self, raw: Array) -> memoryview:
        """The memory of a host buffer."""
        return memoryview(raw)

    def upload(self, raw: Array) -> Array:
        """The bytes of a host buffer on the device; the buffer may be used again at once."""
        return raw

    def beside(self, raw: Array) -> Array:
        """As many bytes on the device as a host buffer has; the buffer itself where host and device are one."""
        return raw

    def download(self, encoded: Array, raw: Array) -> None:
        """Copy bytes that are `beside` a host buffer into it, and wait until they are there."""


class Torch(Device):
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
        """A buffer that a GPU reads without a copy in between."""
        return self._torch.empty(size, dtype=self._torch.uint8, pin_memory=self._device.type == "cuda")

    def view(self, raw: Array) -> memoryview:
        """The memory of a buffer."""
        return memoryview(raw.numpy())

    def upload(self, raw: Array) -> Array:
        """The bytes on the device; they are there when it returns."""
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
        return Device()
    try:
        import torch
    except ImportError:
        raise MissingExtraError(f"device '{name}' needs torch: pip install 'polymerge[transformers]'") from None
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"device '{name}': torch cannot use it: {str(error).splitlines()[0]}") from None
    return Torch(name)
