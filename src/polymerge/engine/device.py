"""Devices for block arithmetic: the CPU with numpy arrays, or a GPU, through which torch tensors are streamed."""

from __future__ import annotations

from typing import Any

import numpy as np

from polymerge.errors import MissingExtraError, RecipeError

__all__ = ["Device", "Torch", "open_device"]

Array = Any  # numpy.ndarray on the CPU, torch.Tensor on another device


class Device:
    """The CPU, the reference: numpy arrays, without transfers.

    takes_bits   whether its kernels read raw BF16 rows
    """

    name = "cpu"
    takes_bits = True

    @property
    def free(self) -> int | None:
        """Bytes that whole matrices may take there; None where that is the host's memory."""
        return None

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
        """Copy the bytes of a host buffer to the device; the buffer can be reused at once."""
        return raw

    def beside(self, raw: Array) -> Array:
        """A device buffer of the same size as a host buffer; the host buffer itself on the CPU."""
        return raw

    def download(self, encoded: Array, raw: Array) -> None:
        """Copy a device buffer into its host buffer, and wait until the copy is complete."""

    def numbers(self, values: Array, precision: str) -> Array:
        """An array of F32 or F64 on the device, contiguous, with these values: themselves where they are that."""
        return np.ascontiguousarray(values, np.float64 if precision == "F64" else np.float32)


class Torch(Device):
    """A torch device: page-locked host buffers, blocks on the device."""

    takes_bits = False

    def __init__(self, name: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(name)
        self.name = name

    @property
    def free(self) -> int | None:
        """Half of what a GPU has left now."""
        return int(self._torch.cuda.mem_get_info(self._device)[0]) // 2 if self._device.type == "cuda" else None

    def empty(self, shape: tuple[int, ...], precision: str) -> Array:
        """An uninitialised tensor on the device."""
        dtype = self._torch.float64 if precision == "F64" else self._torch.float32
        return self._torch.empty(shape, dtype=dtype, device=self._device)

    def host_bytes(self, size: int) -> Array:
        """A page-locked host buffer, which a GPU reads without an intermediate copy."""
        return self._torch.empty(size, dtype=self._torch.uint8, pin_memory=self._device.type == "cuda")

    def view(self, raw: Array) -> memoryview:
        """The memory of a buffer."""
        return memoryview(raw.numpy())

    def upload(self, raw: Array) -> Array:
        """Copy the bytes to the device; the copy is complete on return."""
        return raw.to(self._device)

    def beside(self, raw: Array) -> Array:
        """A buffer on the device."""
        return self._torch.empty(raw.shape, dtype=self._torch.uint8, device=self._device)

    def download(self, encoded: Array, raw: Array) -> None:
        """Copy the bytes to the host, waiting for the kernels queued before."""
        raw.copy_(encoded)

    def numbers(self, values: Array, precision: str) -> Array:
        """An array of F32 or F64 on the device, of values on the host or there."""
        dtype = self._torch.float64 if precision == "F64" else self._torch.float32
        return self._torch.as_tensor(values, dtype=dtype, device=self._device).contiguous()


def open_device(name: str) -> Device:
    """Open the device of this name: `cpu`, or a torch device such as `cuda` or `cuda:1`.

    raises MissingExtraError without torch, RecipeError for an unavailable device.
    """
    if name == "cpu":
        return Device()
    try:
        import torch
    except ImportError:
        raise MissingExtraError(f"device '{name}' needs torch: pip install 'polymerge[transformers]'") from None
    try:
        torch.empty(1, device=name).cpu()  # what is computed on it has to come back: it does not from `meta`
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"device '{name}': torch cannot use it: {str(error).splitlines()[0]}") from None
    return Torch(name)
