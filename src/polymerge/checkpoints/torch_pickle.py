"""Read pickles of torch.save as data: each name becomes an inert stand-in, and calls are only recorded.

A pickle is a program that imports and calls arbitrary names, which is how a checkpoint can run
code. Here nothing is imported and nothing is called, and a pickle with a name that torch.save does not write is
refused because every other program would execute it.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar, Final

from polymerge.checkpoints.bounds import PICKLE_STEPS, PROBLEMS
from polymerge.errors import CheckpointError

__all__ = [
    "DTYPES",
    "REBUILD",
    "UNREADABLE",
    "Call",
    "Dict",
    "Global",
    "Storage",
    "Unpickler",
    "kind_of",
    "tensor_call",
]

_STORAGES: Final = {
    **{f"torch.{kind}Storage": code for kind, code in (
        ("Double", "F64"), ("Float", "F32"), ("Half", "F16"), ("BFloat16", "BF16"), ("Long", "I64"), ("Int", "I32"),
        ("Short", "I16"), ("Char", "I8"), ("Byte", "U8"), ("Bool", "BOOL"), ("ComplexFloat", "C64"),
        ("ComplexDouble", "C128"),
        # quantized elements; their tensors are refused, but the storages have to be stepped over
        ("QInt8", "I8"), ("QUInt8", "U8"), ("QUInt4x2", "U8"), ("QUInt2x4", "U8"), ("QInt32", "I32"),
    )},
    "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
"""Storage classes: the dtype of their elements."""

DTYPES: Final = {
    f"torch.{name}": code
    for name, code in (
        ("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("int64", "I64"),
        ("int32", "I32"), ("int16", "I16"), ("int8", "I8"), ("uint64", "U64"), ("uint32", "U32"), ("uint16", "U16"),
        ("uint8", "U8"), ("bool", "BOOL"), ("complex64", "C64"), ("complex128", "C128"), ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"), ("float8_e8m0fnu", "F8_E8M0"), ("float8_e4m3fnuz", "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", "F8_E5M2FNUZ"),
    )
}  # fmt: skip
"""Dtypes that safetensors supports too."""

REBUILD: Final = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
"""Functions that build a plain tensor from (storage, offset, shape, strides, requires_grad, hooks, dtype): the
number of these arguments that each takes. One more may follow, with the marks of conjugate and negative views.
"""

UNREADABLE: Final = {
    "torch._utils._rebuild_qtensor": "is quantized",
    "torch._utils._rebuild_sparse_tensor": "is sparse",
    "torch._utils._rebuild_nested_tensor": "is nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "is on the meta device and has no values",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "is on a device whose tensors have no plain storage",
    "torch._utils._rebuild_device_tensor_from_numpy": "is on a device whose tensors have no plain storage",
    "torch._utils._rebuild_wrapper_subclass": "is of a tensor subclass",
}
"""Functions that build tensors which are not plain bytes: the reason why not."""

_PARAMETERS: Final = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
_TENSORS: Final = frozenset({*REBUILD, *UNREADABLE, *_PARAMETERS, _FROM_TYPE})
"""Every function whose result is a tensor; the last three wrap a tensor, or the call for one, in a parameter."""

_MOST_LAYERS: Final = 8  # calls around a tensor that make a parameter of it; torch writes two at most
_MOST_ARGUMENTS: Final = 16  # of a call; torch gives eight at most
_MOST_IN_A_NAME: Final = 200  # characters
_MOST_SHOWN: Final = 8  # names of a message
_BUILTINS: Final = ("builtins", "__builtin__")  # the latter is what protocol 2, torch's own, writes
_DICTS: Final = frozenset({"collections.OrderedDict", *(f"{module}.dict" for module in _BUILTINS)})

_KNOWN: Final = frozenset(
    {
        *_STORAGES, *DTYPES, *_TENSORS, *_DICTS, "_codecs.encode",
        *(f"{module}.{name}" for module in _BUILTINS for name in ("set", "frozenset", "bytearray", "complex")),
        "torch.Tensor", "torch.nn.parameter.Parameter",
        "torch.Size", "torch.device", "torch.serialization._get_layout",
    }
)  # fmt: skip
"""Names that a state dict may contain in addition to those of `_DTYPE`; every other name is code."""

_DTYPE: Final = re.compile(r"torch\.((b?float|complex|q?u?int|bits)\d\w*|per_(tensor|channel)_\w+)")
"""Names of dtypes, including those that safetensors lacks, and of quantization schemes."""


class _StandIn:
    """A stand-in for an object of a pickle; state that the pickle would set on it, such as attributes, is ignored."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(eq=False, slots=True)
class Storage(_StandIn):
    """A storage in a pickle: its key in the file, its number of elements and their dtype."""

    key: str
    dtype: str
    """Empty if the storage is not described as torch does."""
    elements: int


@dataclass(eq=False, slots=True)
class Global(_StandIn):
    """A name that the pickle would import, such as `torch._utils._rebuild_tensor_v2`; calling it gives a `Call`."""

    name: str

    def __call__(self, *arguments: Any) -> Call | Dict:
        """Record a call; a call of a dict class is a dict, with its first items if Python 2 wrote an OrderedDict."""
        if self.name in _DICTS:
            match arguments:
                case ():
                    return Dict()
                case ([*pairs],) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                    return Dict([(name, value) for name, value in pairs])
        return Call(self.name, arguments)


@dataclass(eq=False, slots=True)
class Call(_StandIn):
    """A call that the pickle requests. Its arguments precede it, so that calls cannot form cycles."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(eq=False, slots=True)
class Dict(_StandIn):
    """The items of a dict or set of any class, in order; nothing is hashed, so that no key can be nested too deeply."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class _Metered(dict[int, Callable[[Any], None]]):
    """The instructions of a pickle, of which no more than a bound are carried out.

    A byte can make a list, which takes 80, and another copy what was made of a million before it.
    """

    left = PICKLE_STEPS

    def __getitem__(self, code: int, /) -> Callable[[Any], None]:
        self.spend(1)
        return super().__getitem__(code)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"it has more than {PICKLE_STEPS} steps")


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    """Reads one pickle from a stream, as stand-ins, and leaves the stream positioned after it.

    It is Python's unpickler and not the one in C, because that one allocates memory for any memo index in a pickle,
    and because here opcodes can be replaced: dicts and sets hash what they hold, which for tuples in tuples overflows
    the stack or takes forever; a bytearray takes its memory before its bytes are there; extension codes bypass
    `find_class`.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined,unused-ignore]
        if bytes([code]) not in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
    }

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        super().__init__(stream, encoding="latin-1")
        self.file = file
        self.storages: list[Storage] = []
        self.code: dict[str, None] = {}  # a set that keeps its order
        self.metered = self.dispatch = _Metered(type(self).dispatch)  # type: ignore[misc]

    def value(self) -> Any:
        """The value; raises CheckpointError, naming the file, if the pickle is damaged or contains unknown names."""
        damage: Exception | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)  # an escape in a text that nobody writes on purpose
                value = self.load()
            if self.stack or self.metastack:
                raise ValueError(f"{len(self.stack)} values are left on the stack")
        except Exception as error:  # a damaged pickle can fail in every way
            damage = error
        if self.code:
            more = f" and {len(self.code) - _MOST_SHOWN} more" if len(self.code) > _MOST_SHOWN else ""
            names = ", ".join(islice(self.code, _MOST_SHOWN))
            raise CheckpointError(
                f"{self.file}: holds code: {names}{more}. Loading it with pickle would run that, so it is refused. Ask "
                "for safetensors files; or, if you trust it, load it with torch and save its plain state dict anew."
            )
        if damage is not None:
            raise CheckpointError(
                f"{self.file}: its pickle is damaged, or none that torch.save writes ({_cause(damage)}). Download it "
                "again."
            ) from None
        return value

    def find_class(self, module: str, name: str) -> Global:
        """The stand-in for a name; nothing is imported, and unknown names are collected to be refused all at once."""
        if len(module) + len(name) > _MOST_IN_A_NAME or len(self.code) > PROBLEMS:
            raise ValueError("it imports what has no name, or more than any program does")
        known = f"{module}.{name}"
        if known not in _KNOWN and not _DTYPE.fullmatch(known):
            self.code[known] = None
        return Global(known)

    def persistent_load(self, persistent_id: Any) -> Storage:
        """A storage: `('storage', class, key, device, count)`, followed by a view or None in the legacy format."""
        storage = Storage("", "", 0)
        match persistent_id:
            case ("storage", Global(name=kind), str(key), str(), int(count), *view) if view in ([], [None]):
                if kind in _STORAGES and 0 <= count < 2**63:
                    storage = Storage(key, _STORAGES[kind], count)
        self.storages.append(storage)
        return storage

    def load_dict(self) -> None:
        """DICT: a dict of the items above the mark."""
        flat = self.pop_mark()
        self.append(Dict(list(zip(flat[::2], flat[1::2], strict=True))))

    def load_reduce(self) -> None:
        """REDUCE: a call with the arguments on the stack, which are copied."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise ValueError("a call has other arguments than torch gives")
        self.metered.spend(sum(len(one) for one in arguments if isinstance(one, list | tuple)))
        self.append(function(*arguments))

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Dict())
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.APPENDS[0]]
    dispatch[pickle.FROZENSET[0]] = dispatch[pickle.LIST[0]]
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]


def tensor_call(value: Any) -> Call | None:
    """The call that builds a tensor, without wrappers that make a parameter of it; None if there is no tensor.

    A wrapper without a tensor in it is returned itself, to be refused: a tensor was intended.
    """
    call = None
    for _ in range(_MOST_LAYERS):
        if not (isinstance(value, Call) and value.name in _TENSORS):
            break
        call = value
        match call.name, call.arguments:
            case name, (inner, *_) if name in _PARAMETERS:
                value = inner
            case name, (Global(name=function), _, tuple(arguments), _) if name == _FROM_TYPE:
                value = Call(function, arguments)
            case _:
                break
    return call


def kind_of(value: Any) -> str:
    """Describe a value in a word or two; its repr could be of any length and circular."""
    match value:
        case None | bool():
            return str(value)
        case Dict():
            return "a dict"
        case Call(name=name) | Global(name=name):
            return name
        case Storage():
            return "a storage"
    return f"of type {type(value).__name__}"


def _cause(damage: Exception) -> str:
    """What an error of the unpickler says of a file; some of its errors are a bare number, or nothing."""
    match damage:
        case EOFError() | IndexError(args=("index out of range",)):  # the latter of the bytes that were read
            return "it ends too early"
        case KeyError(args=(int(code),)) if code < 256:
            return f"opcode {bytes([code])!r} is unknown"
    return str(damage) or type(damage).__name__
