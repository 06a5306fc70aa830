"""Ports of a cluster's own, and whether something answers on them.

It owns that two clusters on one machine never pick the same port; it must not know what listens on it.
"""

from __future__ import annotations

import random
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.cluster.errors import ClusterError

LOOPBACK = "127.0.0.1"
_BLOCK = 32
_FIRST = 16384
_PROBE_SECONDS = 2.0


class Ports:
    """A block of ports, taken for as long as this object lives.

    They lie below the range from which the system picks ports for outgoing connections: a stopped API server gets its
    port back. The block is taken by a name that the kernel frees when this process ends.
    """

    def __init__(self) -> None:
        self._name, self._free = _take_block()

    def take(self) -> int:
        """Return a port that nobody listens on.

        Raises:
            ClusterError: the block is used up.
        """
        for port in self._free:
            if _is_free(port):
                return port
        raise ClusterError(f"none of the {_BLOCK} ports of this cluster is free")

    def close(self) -> None:
        """Give the block back."""
        self._name.close()


def _take_block() -> tuple[socket.socket, Iterator[int]]:
    starts = list(range(_FIRST, _first_ephemeral(), _BLOCK))
    random.shuffle(starts)
    for start in starts:
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            name.bind(f"\0posttrain-test-cluster-{start}")
        except OSError:
            name.close()
        else:
            return name, iter(range(start, start + _BLOCK))
    raise ClusterError(f"no ports are left: {len(starts)} clusters run on this machine")


def _first_ephemeral() -> int:
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    return max(int(text.split()[0]), _FIRST + _BLOCK)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("", port))  # refused where anything listens on any address
            return True
    return False


def answers(url: str, *, ca: Path | None = None, token: str | None = None) -> Callable[[], bool]:
    """Return a probe: whether a URL answers with a 2xx. Without a CA any certificate will do."""
    context = ssl.create_default_context(cafile=str(ca)) if ca else ssl._create_unverified_context()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    # A proxy of this machine's is not for loopback addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))

    def probe() -> bool:
        with suppress(OSError, urllib.error.URLError), opener.open(request, timeout=_PROBE_SECONDS) as response:
            return 200 <= response.status < 300
        return False

    return probe
