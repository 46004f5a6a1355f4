"""A pickle read as data: what it would build, without building it.

A pickle is a program for a small stack machine. Python's own machine imports every name that the program mentions and
calls what it is told to call, which is how a checkpoint can run code. The machine here has the same stack and memo but
imports nothing and calls nothing: a name stays a `Global`, a call stays a `Call`. Nothing is hashed or compared
either, so no structure, however deep or circular, can make it recurse.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from polymerge.errors import CheckpointError

__all__ = ["DICT", "PICKLE_LIMIT", "Call", "Global", "Persistent", "Pickle", "read_pickle"]

PICKLE_LIMIT: Final = 32 * 2**20
"""No pickle may be longer, in bytes; that of a model with a thousand tensors takes about 150 kB."""


class Global(NamedTuple):
    """A name that the pickle would import, such as `torch._utils._rebuild_tensor_v2`."""

    name: str


class Persistent(NamedTuple):
    """Something that lies outside the pickle; for torch, a storage."""

    id: Any


@dataclass(eq=False, slots=True)
class Call:
    """A call that the pickle asks for, and what it would then do to the result. Dicts are calls of `DICT`."""

    function: Any
    arguments: Any
    items: list[tuple[Any, Any]] = field(default_factory=list)
    state: Any = None


@dataclass(frozen=True, slots=True)
class Pickle:
    """What a pickle holds, and every persistent id in it, in order."""

    value: Any
    persistent_ids: tuple[Any, ...]


DICT: Final = Global("builtins.dict")

_PUSH_ARGUMENT: Final = frozenset(
    {
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING",
        "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
_PUSH_CONSTANT: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED: Final = frozenset({"PROTO", "FRAME", "STOP"})


def read_pickle(stream: IO[bytes], file: Path, known: Collection[str]) -> Pickle:
    """Read one pickle from where `stream` stands, and leave the stream behind it.

    `known` are the names that it may mention. Nothing is imported or called in any case; a file with other names is
    refused because every other program would run what it names.

    Raises CheckpointError, naming `file`, where the pickle mentions other names or is damaged.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # an escape in a text that nobody writes on purpose
            for opcode, argument, _ in pickletools.genops(stream):
                machine.step(opcode.name, argument)
        value = machine.result()
    except (ValueError, IndexError, KeyError, DeprecationWarning) as error:
        raise CheckpointError(
            f"{file}: its pickle is damaged, or none that torch.save writes ({error or type(error).__name__}). "
            "Download it again."
        ) from None
    if code := [name for name in machine.globals if name not in known]:
        raise CheckpointError(
            f"{file}: holds code: {', '.join(code)}. Loading it with pickle would run that, so it is refused. Ask for "
            "safetensors files; or, if you trust it, load it with torch and save its plain state dict anew."
        )
    return Pickle(value, tuple(machine.persistent_ids))


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, None] = {}  # a set that keeps its order
        self.persistent_ids: list[Any] = []

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _PUSH_ARGUMENT:
            stack.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(self.top(_TUPLES[opcode]))]
        elif opcode in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[opcode])
        elif opcode == "MARK":
            self.below_marks.append(stack)
            self.stack = []
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(Call(stack.pop(), arguments))
        elif opcode == "TUPLE":
            marked = tuple(self.since_mark())
            self.stack.append(marked)
        elif opcode in ("BINPERSID", "PERSID"):
            persistent_id = argument if opcode == "PERSID" else stack.pop()
            self.persistent_ids.append(persistent_id)
            stack.append(Persistent(persistent_id))
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode == "GLOBAL":
            self.push_global(argument.replace(" ", "."))
        elif opcode == "STACK_GLOBAL":
            module, name = self.top(2)
            del stack[-2:]
            self.push_global(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")
        elif opcode not in _IGNORED:
            self.rare_step(opcode, argument)

    def rare_step(self, opcode: str, argument: Any) -> None:
        """The opcodes that a state dict has a few of at most."""
        if opcode == "EMPTY_DICT":
            self.stack.append(Call(DICT, ()))
        elif opcode in ("EMPTY_LIST", "EMPTY_SET"):
            self.stack.append([])
        elif opcode == "DICT":
            marked = self.since_mark()
            self.stack.append(Call(DICT, (), _pairs(marked)))
        elif opcode in ("LIST", "FROZENSET"):
            marked = self.since_mark()
            self.stack.append(marked)
        elif opcode in ("SETITEM", "SETITEMS"):
            added = self.popped(2) if opcode == "SETITEM" else self.since_mark()
            self.target(Call).items.extend(_pairs(added))
        elif opcode in ("APPEND", "APPENDS", "ADDITEMS"):
            added = self.popped(1) if opcode == "APPEND" else self.since_mark()
            self.target(list).extend(added)
        elif opcode == "BUILD":
            state = self.stack.pop()
            self.target(Call).state = state
        elif opcode == "NEWOBJ_EX":
            function, positional, by_name = self.popped(3)
            self.stack.append(Call(function, (positional, by_name)))
        elif opcode in ("INST", "OBJ"):
            marked = self.since_mark()
            if opcode == "INST":
                self.push_global(argument.replace(" ", "."))
                marked.insert(0, self.stack.pop())
            self.stack.append(Call(marked[0], tuple(marked[1:])))
        elif opcode == "POP" and self.stack:
            self.stack.pop()
        elif opcode in ("POP", "POP_MARK"):
            self.since_mark()
        elif opcode == "DUP":
            self.stack.append(self.stack[-1])
        else:
            raise ValueError(f"opcode {opcode}")

    def push_global(self, name: str) -> None:
        self.globals[name] = None
        self.stack.append(Global(name))

    def top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        return self.stack[-count:]

    def popped(self, count: int) -> list[Any]:
        values = self.top(count)
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[Any]:
        marked, self.stack = self.stack, self.below_marks.pop()
        return marked

    def target(self, kind: type) -> Any:
        """What lies on top of the stack, to be added to."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below_marks:
            raise ValueError(f"{len(self.stack)} values are left on the stack")
        return self.stack[0]


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))
