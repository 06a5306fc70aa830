"""Ports of clusters that run beside each other."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cluster.addresses import LOOPBACK, Ports
from tests.cluster.errors import ClusterError

pytestmark = pytest.mark.skipif(not Path("/proc/sys/net").exists(), reason="the test cluster runs on Linux only")


def take_all(ports: Ports) -> list[int]:
    taken = []
    with pytest.raises(ClusterError, match="ports of this cluster"):
        while True:
            taken.append(ports.take())
    return taken


def test_two_clusters_share_no_port() -> None:
    first, second = Ports(), Ports()
    try:
        assert not set(take_all(first)) & set(take_all(second))
    finally:
        first.close()
        second.close()


def test_ports_are_not_those_of_outgoing_connections() -> None:
    ports = Ports()
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    assert max(take_all(ports)) < lowest
    ports.close()


def test_a_port_that_something_listens_on_is_left_out() -> None:
    ports = Ports()
    first = ports.take()
    with socket.create_server((LOOPBACK, first + 1)):
        assert ports.take() == first + 2
    ports.close()
