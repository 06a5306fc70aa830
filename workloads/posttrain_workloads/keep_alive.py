"""How a connection to a machine that is gone without a word comes to its end.

It owns the socket options for that; it must not know what the connection is for.
"""

from __future__ import annotations

import socket
import sys

SocketOptions = tuple[tuple[int, int, int], ...]
"""Level, option and value of each, as `socket.setsockopt` takes them."""


def keep_alive_options(*, idle_seconds: int, interval_seconds: int, tries: int) -> SocketOptions:
    """Return the options by which a peer is missed that does not answer `tries` probes of an idle connection.

    While something that was sent is not acknowledged there are no probes: TCP_USER_TIMEOUT is as long, and ends that.
    """
    if sys.platform != "linux":  # where vLLM serves; prepare, which comes by here too, runs elsewhere as well
        return ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),)
    missed_seconds = idle_seconds + tries * interval_seconds
    return (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, tries),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, missed_seconds * 1000),
    )


KEEP_ALIVE = keep_alive_options(idle_seconds=10, interval_seconds=5, tries=3)
"""A machine that is lost is missed after 25 seconds."""
