"""Clusters that are too small or not there."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NoReturn

import pytest

from polymerge.engine.ray_cluster import check_room, connected, probe
from polymerge.errors import PolymergeError, RecipeError


def test_a_cluster_without_room_is_refused_and_not_waited_for() -> None:
    from types import SimpleNamespace

    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": False, "Resources": {}}])
    check_room(ray, "host:1", 3, {"CPU": 1.0})
    with pytest.raises(RecipeError, match="2 workers of 2 CPU each, and its 1 machines have room for 1"):
        check_room(ray, "host:1", 2, {"CPU": 2.0})


def test_an_address_where_nobody_listens() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RecipeError, match="no cluster can be reached there"):
            probe(address)


def test_a_machine_that_starts_no_cluster_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(ModuleType):
        def is_initialized(self) -> bool:
            return False

        def init(self, **_: object) -> NoReturn:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setitem(sys.modules, "ray", Busy("ray"))
    told = "no cluster started on this machine: The current node timed out during startup. Try again"
    with pytest.raises(PolymergeError, match=told), connected("local"):
        pytest.fail("connected")
    with pytest.raises(Exception, match=r"startup\.$"), connected("auto"):
        pytest.fail("connected")
