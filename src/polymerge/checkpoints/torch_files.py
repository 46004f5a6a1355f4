"""Files of torch.save, read without torch: what tensors they hold, and where the bytes of each lie.

Nothing that such a file holds is executed. Its pickle is read as data (`pickled`), and the calls that would rebuild
the tensors are taken apart here: `_rebuild_tensor_v2(storage, offset, shape, strides, ...)` says all there is to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from polymerge.checkpoints.pickled import Call, Global, Persistent
from polymerge.checkpoints.tensor_info import Contents, Entry
from polymerge.checkpoints.torch_container import Region, read_container
from polymerge.checkpoints.torch_names import DICTS, DTYPES, REBUILD, TENSORS, UNREADABLE, storage_id
from polymerge.dtypes import byte_count
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["read_torch"]

_NESTS: Final = ("state_dict", "model", "module")
_MOST_DIMENSIONS: Final = 64  # torch's own limit
_AGAIN: Final = "Save the file again."


def read_torch(file: Path) -> Contents:
    """Every tensor of a state dict that torch.save wrote, in either of its two formats.

    Tensors with one offset stay in the order of the dict. Those with the same dtype and shape too are aliases: the
    first is the tensor, the later ones are tied to it. Views of parts of a storage are tensors of their own.

    The state dict may lie one level down, under `state_dict`, `model` or `module`, when no tensor lies beside it.

    Raises CheckpointError where the file cannot be read at all or holds code, Refused with everything that is wrong
    with its tensors, and OSError where it cannot be opened.
    """
    container = read_container(file)
    state_dict, skipped = _find_state_dict(file, container.pickle.value)
    entries: dict[str, Entry] = {}
    problems: list[CheckpointError] = []
    for position, (name, value) in enumerate(state_dict):
        call = _tensor_call(value)
        if call is None:
            skipped[_label(name, position)] = f"is {_kind(value)}, not a tensor"
        elif not isinstance(name, str):
            problems.append(CheckpointError(f"{file}: a tensor's name is {_kind(name)}, not a string. {_AGAIN}"))
        elif name in entries:
            problems.append(CheckpointError(f"{file}: two tensors have the name '{name}'. {_AGAIN}"))
        else:
            try:
                entries[name] = _entry(name, call, file, container.storages)
            except ValueError as error:
                problems.append(CheckpointError(f"{file}: '{name}' {error}"))
    refuse_if_any(problems)
    return Contents(
        tuple(sorted(entries.values(), key=lambda entry: entry.start)),
        MappingProxyType(_aliases(entries)),
        MappingProxyType(skipped),
    )


def _find_state_dict(file: Path, value: Any) -> tuple[list[tuple[Any, Any]], dict[str, str]]:
    """The pairs of the state dict, and what lies beside it."""
    top = _pairs(value)
    if top is None:
        raise CheckpointError(f"{file}: holds {_kind(value)}, not a dict of tensors. Save the model's state_dict().")
    if any(_tensor_call(inner) for _, inner in top):
        return top, {}
    nests = {name: pairs for name, inner in top if name in _NESTS and (pairs := _pairs(inner)) is not None}
    if len(nests) > 1:
        raise CheckpointError(
            f"{file}: holds dicts under {' and '.join(nests)}, only one can be the model. Save that one alone."
        )
    for nest, pairs in nests.items():
        return pairs, {
            _label(name, position): f"lies beside '{nest}', which is the model"
            for position, (name, _) in enumerate(top)
            if name != nest
        }
    return top, {}


def _pairs(value: Any) -> list[tuple[Any, Any]] | None:
    """The items of a dict of whatever class, or None for what is no dict."""
    if not (isinstance(value, Call) and isinstance(value.function, Global) and value.function.name in DICTS):
        return None
    match value.arguments:
        case ():
            return value.items
        case ([*initial],) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in initial):
            return [(name, inner) for name, inner in initial] + value.items  # as Python 2 wrote an OrderedDict
    return None


def _tensor_call(value: Any) -> Call | None:
    """The call that makes a tensor, out of the layers that make a parameter of it; None where there is no tensor.

    A layer without a tensor in it is given back itself, to be refused: a tensor was meant.
    """
    call = None
    while isinstance(value, Call) and isinstance(value.function, Global) and value.function.name in TENSORS:
        call = value
        match call.function.name, call.arguments if isinstance(call.arguments, tuple) else ():
            # a tuple was there before the call that it is passed to, so this cannot go in circles
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (inner, *_):
                value = inner
            case "torch._tensor._rebuild_from_type_v2", (function, _, arguments, _):
                value = Call(function, arguments)
            case _:
                break
    return call


def _entry(name: str, call: Call, file: Path, storages: Mapping[str, Region]) -> Entry:
    """Where the bytes of one tensor lie; raises ValueError with what is wrong and what to do."""
    identity, offset, shape, dtype_name = _plain_tensor(call)
    storage = storage_id(identity)
    dtype = storage.dtype
    if dtype_name is not None:
        if dtype_name not in DTYPES:
            raise ValueError(f"is of dtype {dtype_name}, which safetensors does not have. Save it as another.")
        dtype = DTYPES[dtype_name]
    region = storages.get(storage.key)
    if region is None:
        raise ValueError(f"has its bytes in storage '{storage.key}', which the file lacks. Download it again.")
    nbytes = byte_count(dtype, shape)
    skip = byte_count(dtype, (offset,)) if nbytes else 0
    there = min(region.nbytes, storage.nbytes)
    if skip + nbytes > there:
        raise ValueError(
            f"needs {skip + nbytes} bytes of storage '{storage.key}', which has {there}. Download the file again."
        )
    return Entry(name, dtype, shape, file, region.start + skip, nbytes)


def _plain_tensor(call: Call) -> tuple[Any, int, tuple[int, ...], str | None]:
    """What the call says: id of the storage, offset into it, shape, and dtype where the storage does not tell it.

    Raises ValueError where the tensor is no contiguous range of a storage.
    """
    function, arguments = call.function.name, call.arguments
    if function in UNREADABLE:
        raise ValueError(f"{UNREADABLE[function]}, which cannot be merged. Save it as a plain tensor.")
    count = REBUILD.get(function, 0)
    match arguments[:count] if isinstance(arguments, tuple) else ():
        case (Persistent(identity), int(offset), sizes, steps, *others) if len(others) == count - 4 and offset >= 0:
            shape, strides = _sizes(sizes), _sizes(steps)
        case _:
            raise ValueError(f"is not described as torch describes a tensor. {_AGAIN}")
    if any(isinstance(marks, Call) and marks.items for marks in arguments[count:]):
        raise ValueError("is a conjugate or negative view. Save it after .resolve_conj().resolve_neg().")
    expected = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    # a stride counts only where there is a second element to step to
    if len(strides) != len(shape) or (
        0 not in shape and any(size > 1 and s != e for size, s, e in zip(shape, strides, expected, strict=True))
    ):
        raise ValueError(
            f"is not contiguous: strides {list(strides)} for shape {list(shape)}, {list(expected)} expected. Save it "
            "after .contiguous()."
        )
    if count < REBUILD["torch._utils._rebuild_tensor_v3"]:
        return identity, offset, shape, None
    return identity, offset, shape, others[-1].name if isinstance(others[-1], Global) else _kind(others[-1])


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape or strides, as a tuple or a torch.Size."""
    match value:
        case Call(function=Global("torch.Size"), arguments=([*sizes],)) | [*sizes]:
            if len(sizes) <= _MOST_DIMENSIONS and all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                return tuple(sizes)
    raise ValueError(f"has a shape or strides that are not at most {_MOST_DIMENSIONS} sizes. {_AGAIN}")


def _aliases(entries: Mapping[str, Entry]) -> dict[str, str]:
    first: dict[tuple[int, int, str, tuple[int, ...]], str] = {}
    found: dict[str, str] = {}
    for name, entry in entries.items():
        # tensors without elements have no bytes to share
        earlier = first.setdefault((entry.start, entry.nbytes, entry.dtype, entry.shape), name)
        if entry.nbytes and earlier != name:
            found[name] = earlier
    return found


def _label(name: Any, position: int) -> str:
    return name if isinstance(name, str) else f"entry {position}"


def _kind(value: Any) -> str:
    """What a value is, in a word or two; its repr could be of any length and circular."""
    match value:
        case None | bool():
            return str(value)
        case Call(function=Global(name)) if name in DICTS:
            return "a dict"
        case Call(function=Global(name)) | Global(name):
            return name
        case Persistent():
            return "a storage"
    return f"of type {type(value).__name__}"
