"""Workers as actors of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from polymerge.errors import MissingExtraError, RecipeError
from polymerge.inference.workers import LazyWorker

if TYPE_CHECKING:
    from polymerge.inference.workers import Job

__all__ = ["actors"]

PATIENCE = 10.0  # seconds to reach a cluster's address


@contextmanager
def actors(job: Job, count: int, address: str) -> Iterator[Callable[..., Future[Any]]]:
    """Actors that load the job's model; checkpoints and images have to lie under the same paths on every machine.

    address  host:port or ray://host:port of a cluster, `auto` for the one of the environment, `local` to start one here
    returns  what hands an actor, by its number, the name of a method and its arguments

    raises MissingExtraError without Ray, RecipeError where the cluster cannot be reached or has no room for the actors.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise MissingExtraError("--ray needs Ray: pip install 'polymerge[ray]'") from None
    need = {"GPU": 1.0} if job.device.startswith("cuda") else {"CPU": float(job.torch_threads or 1)}
    with _cluster(ray, address, int(count * need.get("CPU", 1))):
        _check_room(ray, address, count, need)
        actor = ray.remote(num_cpus=need.get("CPU", 0), num_gpus=need.get("GPU", 0))(LazyWorker)
        crew = [actor.remote(job) for _ in range(count)]

        def submit(worker: int, what: str, *given: object) -> Future[Any]:
            future: Future[Any] = crew[worker].do.remote(what, *given).future()
            return future

        yield submit


@contextmanager
def _cluster(ray: Any, address: str, processors: int) -> Iterator[None]:
    """Be a driver of a cluster, of the caller's own where there is one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"num_cpus": max(processors, os.cpu_count() or 1), "include_dashboard": False}
    _probe(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **(local if address == "local" else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RecipeError(f"--ray {address}: no cluster can be reached there: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """See whether anybody listens, since Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError as error:
        raise RecipeError(f"--ray {address}: no cluster can be reached there: {error}") from None


def _check_room(ray: Any, address: str, count: int, need: dict[str, float]) -> None:
    """Refuse actors that would wait for a place for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive", node.get("alive"))]
    ((what, each),) = need.items()
    places = sum(int(node.get(what, 0) // each) for node in nodes)
    if places < count:
        raise RecipeError(
            f"--ray {address}: {count} workers of {each:g} {what} each, and its {len(nodes)} machines have room for "
            f"{places}. Ask for fewer --workers or --torch-threads"
        )
