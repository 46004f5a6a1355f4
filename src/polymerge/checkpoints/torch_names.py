"""The names that a pickle of torch.save may mention, and what each stands for.

They are compared as text; nothing is ever imported.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from polymerge.checkpoints.pickled import DICT, Global
from polymerge.dtypes import BITS

__all__ = ["DICTS", "DTYPES", "KNOWN", "REBUILD", "STORAGES", "TENSORS", "UNREADABLE", "StorageId", "storage_id"]

STORAGES: Final = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.ComplexDoubleStorage": "C128",
    "torch.storage.UntypedStorage": "U8",
    # quantized elements; their tensors are refused, but the storages have to be stepped over
    "torch.QInt8Storage": "I8",
    "torch.QUInt8Storage": "U8",
    "torch.QUInt4x2Storage": "U8",
    "torch.QUInt2x4Storage": "U8",
    "torch.QInt32Storage": "I32",
}
"""Storage classes: the dtype of their elements."""

DTYPES: Final = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.complex128": "C128",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""Dtypes that safetensors has too."""

_OTHER_DTYPES: Final = frozenset(
    f"torch.{name}"
    for name in (
        "complex32", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
        "qint8", "qint32", "quint8", "quint4x2", "quint2x4", "per_tensor_affine", "per_tensor_symmetric",
        "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams",
    )
)  # fmt: skip

REBUILD: Final = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
"""The functions that make a plain tensor from (storage, offset, shape, strides, requires_grad, hooks, dtype): how many
of these each takes. One more argument may follow, with the marks of conjugate and negative views."""

UNREADABLE: Final = {
    "torch._utils._rebuild_qtensor": "is quantized",
    "torch._utils._rebuild_sparse_tensor": "is sparse",
    "torch._utils._rebuild_nested_tensor": "is nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "is on the meta device and has no values",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "is on a device whose tensors have no plain storage",
    "torch._utils._rebuild_device_tensor_from_numpy": "is on a device whose tensors have no plain storage",
    "torch._utils._rebuild_wrapper_subclass": "is of a tensor subclass",
}
"""The functions that make tensors which are no plain bytes: what is so about them."""

TENSORS: Final = frozenset(
    {
        *REBUILD, *UNREADABLE,
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
    }
)  # fmt: skip
"""Every function whose result is a tensor; the last three take one, or the call for one, and make a parameter of it."""

_PYTHON_2: Final = "__builtin__"  # the name that protocol 2, torch's own, writes for builtins

DICTS: Final = frozenset({DICT.name, f"{_PYTHON_2}.dict", "collections.OrderedDict"})

_PLAIN_DATA: Final = frozenset(
    f"{module}.{name}" for module in ("builtins", _PYTHON_2) for name in ("set", "frozenset", "bytearray", "complex")
) | {"_codecs.encode"}

KNOWN: Final = frozenset(
    {
        *STORAGES, *DTYPES, *_OTHER_DTYPES, *TENSORS, *DICTS, *_PLAIN_DATA,
        "torch.Tensor", "torch.nn.parameter.Parameter",
        "torch.Size", "torch.device", "torch.serialization._get_layout",
    }
)  # fmt: skip
"""Everything that a state dict may mention; every other name is code."""


class StorageId(NamedTuple):
    """What a pickle says of a storage: its key in the file, and how many elements of which dtype it holds."""

    key: str
    dtype: str
    elements: int

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.elements * BITS[self.dtype] // 8


def storage_id(persistent_id: Any) -> StorageId:
    """Read `('storage', class, key, device, count)`, with a view or None behind it in the legacy format.

    Raises ValueError where it is anything else.
    """
    match persistent_id:
        case ("storage", Global(kind), str(key), str(), int(count)) if kind in STORAGES and count >= 0:
            return StorageId(key, STORAGES[kind], count)
        case ("storage", Global(kind), str(key), str(), int(count), None) if kind in STORAGES and count >= 0:
            return StorageId(key, STORAGES[kind], count)
    raise ValueError("has a storage that is not described as torch describes one. Save it again with torch >= 1.0.")
