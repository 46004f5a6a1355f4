"""Merge methods of the user's own: rows from a Python file that the user names, or from an installed package.

A file is run only where the user gives it as `methods`, never because a recipe, a plan or a checkpoint names it. What
it holds is known by the sha256 of its text, which plans and polymerge.json record: a plan that was made with one text
is not carried out with another.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Final, TypeAlias

from polymerge.errors import RecipeError, did_you_mean, shown
from polymerge.methods.method import Method, Parameter, keywords_of, method_function
from polymerge.methods.table import ADAPTERS, METHODS, SHARED, register
from polymerge.paths import because, given_path

__all__ = [
    "GROUP",
    "MethodFiles",
    "MethodsFile",
    "add_methods",
    "added",
    "check_methods",
    "find_method",
    "installed",
    "origins",
    "place_of",
]

GROUP: Final = "polymerge.methods"
"""The group of entry points: each is named as its method, and leads to its row."""

MethodFiles: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
"""One Python file with rows of methods, or several."""

_MOST_BYTES: Final = 16 << 20
_OWN: dict[str, MethodsFile | EntryPoint] = {}
"""Where each method comes from that is not polymerge's own."""


@dataclass(frozen=True)
class MethodsFile:
    """A Python file with rows of methods: its path and its text, which goes along to other processes and machines."""

    path: str
    text: bytes

    @property
    def sha256(self) -> str:
        """The digest of its text."""
        return hashlib.sha256(self.text).hexdigest()

    @classmethod
    def read(cls, said: str | os.PathLike[str]) -> MethodsFile:
        """Read a file; raises RecipeError if there is none, or it cannot be read."""
        path = given_path(said)
        try:
            if not path.is_file():
                raise RecipeError(f"methods: {path}: there is no such file. Name a Python file with rows of methods")
            if path.stat().st_size > _MOST_BYTES:
                raise RecipeError(f"methods: {path}: is too large to be a file of methods")
            return cls(str(path.resolve()), path.read_bytes())
        except OSError as error:
            raise RecipeError(f"methods: {path}: cannot be read: {because(error)}") from None

    def add(self) -> None:
        """Run the file and add its rows to the methods; nothing is done for a text that was added before.

        Rows of an earlier text of the same file are replaced. raises RecipeError if it does not run, has no rows, or
        one of them cannot work.
        """
        mine = [name for name, owner in _OWN.items() if isinstance(owner, MethodsFile) and owner.path == self.path]
        if mine and all(_OWN[name] == self for name in mine):
            return
        rows = self._rows()
        for row in rows:
            _refuse_faults(row, self.path, free=mine)
        for name in mine:
            register(name, None)
            del _OWN[name]
        for row in rows:
            register(row.name, replace(row, only_here=True))
            _OWN[row.name] = self

    def _rows(self) -> list[Method]:
        module = ModuleType(f"polymerge_methods_{self.sha256[:16]}")
        module.__file__ = self.path
        sys.modules[module.__name__] = module  # where functions that are named by text are looked up
        try:
            exec(compile(self.text, self.path, "exec", dont_inherit=True), module.__dict__)
        except Exception as error:  # the user's own code, which may raise anything
            raise RecipeError(f"methods: {self.path}: does not run: {type(error).__name__}: {shown(error)}") from error
        rows = [value for value in vars(module).values() if isinstance(value, Method) and value not in METHODS.values()]
        if not rows:
            raise RecipeError(
                f"methods: {self.path}: has no row of a method. Give a name of it a polymerge.Method(...), which says "
                "what the function is called with; docs/methods.md has an example"
            )
        return rows


def add_methods(files: MethodFiles) -> None:
    """Run Python files and add the rows of methods that they have, for all that follows in this process."""
    for file in [files] if isinstance(files, str | os.PathLike) else files:
        MethodsFile.read(file).add()


def added() -> tuple[MethodsFile, ...]:
    """The files whose methods were added, which another process has to add as well."""
    return tuple(dict.fromkeys(one for one in _OWN.values() if isinstance(one, MethodsFile)))


def installed() -> Mapping[str, EntryPoint]:
    """The methods that installed packages offer, by name; none of them is loaded."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find_method(name: str) -> Method | None:
    """The method of this name, loaded from an installed package if one offers it; None if there is none.

    raises RecipeError if it cannot be loaded, or its row cannot work.
    """
    if name in METHODS:
        return METHODS[name]
    entry = installed().get(name)
    if entry is None:
        return None
    where = f"entry point {entry.name} = {entry.value}"
    try:
        row = entry.load()
    except Exception as error:  # a package of somebody else's, whose import may raise anything
        raise RecipeError(f"{where}: cannot be loaded: {type(error).__name__}: {shown(error)}") from error
    if not isinstance(row, Method) or row.name != name:
        raise RecipeError(f"{where}: has to be the row of a method '{name}' (a polymerge.Method), and is {shown(row)}")
    _refuse_faults(row, where)
    register(name, replace(row, only_here=True))
    _OWN[name] = entry
    return METHODS[name]


def origins(names: Iterable[str]) -> dict[str, str]:
    """Where the methods come from that are not polymerge's: the sha256 of a file, or a package with its version."""
    return {name: _origin(_OWN[name]) for name in sorted(set(names)) if name in _OWN}


def place_of(name: str) -> str | None:
    """The path of the file that a method comes from; None for polymerge's own, and for those of packages."""
    owner = _OWN.get(name)
    return owner.path if isinstance(owner, MethodsFile) else None


def check_methods(planned: Mapping[str, str], where: str) -> None:
    """Refuse to carry out a plan with other methods than those that it was made with; raises RecipeError."""
    for name, origin in planned.items():
        if find_method(name) is None:
            raise RecipeError(
                f"{where}: was planned with '{name}', a method of the user's own ({origin}), which is not there. Give "
                "its file as `methods`"
            )
        if (now := origins([name]).get(name, "polymerge")) != origin:
            raise RecipeError(f"{where}: was planned with another '{name}': {origin}, and there is {now}. Plan again")


def _origin(owner: MethodsFile | EntryPoint) -> str:
    if isinstance(owner, MethodsFile):
        return f"sha256 {owner.sha256}"
    return f"{owner.dist.name} {owner.dist.version}" if owner.dist is not None else owner.value


def _refuse_faults(row: Method, where: str, free: Sequence[str] = ()) -> None:
    """Raise RecipeError with the first of what is wrong with a row.

    free  names that are about to be given up
    """
    for fault in _faults(row, free):
        raise RecipeError(f"methods: {where}: {shown(row.name)}: {fault}")


def _faults(row: Method, free: Sequence[str]) -> Iterator[str]:
    if not isinstance(row.name, str) or not row.name.isidentifier():
        yield "the name of a method has to be a word of letters, digits and _"
    elif row.name in METHODS and row.name not in free:
        owner = place_of(row.name) or ("another package" if row.name in _OWN else "polymerge")
        yield f"the name is taken by a method of {owner}. Choose another"
    taken = {parameter.name for parameter in ADAPTERS}
    for parameter in row.parameters:
        if not isinstance(parameter, Parameter):
            yield f"parameters: {shown(parameter)} is not a polymerge.Parameter"
            return
        if parameter.name in taken:
            yield f"a parameter cannot be named '{parameter.name}', which merges of adapters have"
    if row.on == "nothing":
        yield "a method of one's own has to merge: on has to say what its function is called with"
        return
    try:
        function = method_function(row)
        signature = inspect.signature(function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        yield f"its function '{shown(row.function)}' is not there: {shown(error)}"
        return
    yield from _misfits(row, signature)


def _misfits(row: Method, signature: inspect.Signature) -> Iterator[str]:
    """What a row and the signature of its function disagree about."""
    if not signature.parameters:
        yield "its function takes nothing, and is called with a block of numbers first"
        return
    _, *others = signature.parameters.values()
    takes_any = any(one.kind is one.VAR_KEYWORD for one in others)
    named = {one.name: one for one in others if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    wanted = [one.name for one in row.parameters if one.name not in SHARED or (one.name == "scale" and row.scales)]
    wanted += keywords_of(row)
    for name in wanted:
        if name not in named and not takes_any:
            yield f"its function has no parameter '{name}', which the row says that it takes"
    for name, one in named.items():
        if name not in wanted and one.default is one.empty:
            yield f"its function needs '{name}', which the row does not say.{did_you_mean(name, wanted)}"
