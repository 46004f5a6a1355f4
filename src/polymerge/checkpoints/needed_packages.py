"""Which package a model or its processor needs that is not there, as a whole sentence, with how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

__all__ = ["needed_package", "torchvision_fault"]

_FITTING: Final = (
    "pip install 'polymerge[vision]'; where torch is not the one of PyPI, such as a build for CPUs, the torchvision "
    "that was built with it (https://pytorch.org/get-started/locally)"
)


def torchvision_fault() -> str:
    """Why torchvision cannot be used, and what to do: it is missing, or does not import; empty if it can be.

    Processors of Qwen's and others' vision-language models need it. One that was built for another torch is found, and
    raises where it registers its operators ("operator torchvision::nms does not exist").
    """
    if find_spec("torchvision") is None:
        return f"torchvision is missing: {_FITTING}"
    try:
        import_module("torchvision")
    except Exception as error:  # its own code runs there, and raises RuntimeError, OSError or ImportError
        return (
            f"torchvision {_version('torchvision')} does not import beside torch {_version('torch')} "
            f"({_sentence(error)}): uninstall it, or install one that fits: {_FITTING}"
        )
    return ""


def needed_package(error: Exception) -> str:
    """The package that was missing when `error` was raised, as a whole sentence; empty if that was not the cause.

    transformers says with ImportError and with ValueError that a package is missing, in several lines.
    """
    chain = list(_causes(error))
    said = " ".join(map(str, chain))
    missing = isinstance(error, ImportError) or "to be installed" in said
    if "torchvision" in said.lower() and (fault := torchvision_fault()):
        return fault
    if not missing:
        return ""
    return f"a package that it needs is not installed: {_sentence(chain[-1] if 'Could not import' in said else error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _sentence(error: BaseException) -> str:
    """The first sentence of an error's message, which may be in several lines; without its full stop."""
    said = " ".join(str(error).split())
    return said.partition(". ")[0].removesuffix(".") or type(error).__name__


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
