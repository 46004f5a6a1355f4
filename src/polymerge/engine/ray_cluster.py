"""A Ray cluster: connecting to one as a driver, what it has room for, and what its errors mean."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

from polymerge.errors import MissingExtraError, PolymergeError, RecipeError

__all__ = ["alive", "cause_of", "check_room", "connected", "is_of_ray", "probe"]

_PATIENCE: Final = 10.0  # seconds to reach a cluster's address


@contextmanager
def connected(address: str, processors: int = 1) -> Iterator[Any]:
    """Connect to a Ray cluster as a driver, or use the caller's connection; yields the module `ray`.

    address     host:port or ray://host:port of a cluster, `auto` for the environment's, or `local` to start one on this
                machine
    processors  that one on this machine has at least

    raises MissingExtraError without Ray, RecipeError if the cluster cannot be reached,
    PolymergeError if one on this machine does not start.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise MissingExtraError("a Ray cluster needs Ray: pip install 'polymerge[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"num_cpus": max(processors, os.cpu_count() or 1), "include_dashboard": False}
    probe(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **(local if address == "local" else {}))
    except Exception as error:  # a bare Exception, too: of a machine that is too busy to start one in time
        if address == "local":
            said = f"no cluster started on this machine: {error}".rstrip(".")
            raise PolymergeError(f"ray local: {said}. Try again, or without") from None
        if not isinstance(error, (ConnectionError, ValueError, RuntimeError)):
            raise
        token = "" if os.environ.get("RAY_AUTH_MODE") else ". If it asks for a token, set RAY_AUTH_MODE=token here"
        raise RecipeError(f"ray {address}: no cluster can be reached there: {error}{token}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def probe(address: str) -> None:
    """Check that the address accepts connections, since Ray itself would retry for minutes; raises RecipeError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except OSError as error:
        raise RecipeError(f"ray {address}: no cluster can be reached there: {error}") from None


def check_room(ray: Any, address: str, count: int, need: Mapping[str, float]) -> None:
    """Raise RecipeError if the cluster cannot have as many workers at once.

    need  what each of them takes: CPU or GPU
    """
    nodes = [node["Resources"] for node in alive(ray)]
    ((what, each),) = need.items()
    places = sum(int(node.get(what, 0) // each) for node in nodes)
    if places < count:
        raise RecipeError(
            f"ray {address}: {count} workers of {each:g} {what} each, and its {len(nodes)} machines have room for "
            f"{places}. Ask for fewer workers or torch_threads"
        )


def alive(ray: Any) -> list[dict[str, Any]]:
    """The machines of a cluster, as Ray describes them."""
    return [node for node in ray.nodes() if node.get("Alive", node.get("alive"))]


def is_of_ray(error: BaseException) -> bool:
    """Return whether an error is of Ray's own: a worker or its machine is gone, for good or at the moment."""
    return type(error).__module__ == "ray.exceptions"


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error that was raised in a worker, which Ray wraps in one of its own."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error
