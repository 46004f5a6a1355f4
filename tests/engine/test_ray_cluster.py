"""Clusters that are too small or not there."""

from __future__ import annotations

import pytest

from polymerge.engine.ray_cluster import check_room, probe
from polymerge.errors import RecipeError


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
