"""Where the services of a run listen on this machine, which has no network of its own for them.

It owns the port of each container that serves, and what the addresses in a pod's variables become; it must not know
who reads them. A plan writes addresses into variables only: `http://<service>:<port>`, and for the pods of a headless
service `http://<pod>.<service>:<port>`; where a container listens it is told by `POSTTRAIN_LISTEN`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable

from posttrain.plan.types import Manifest

LOOPBACK = "127.0.0.1"

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_ADDRESS = re.compile(rf"(?<=http://)(?P<host>{_LABEL}(?:\.{_LABEL})?):(?P<port>[0-9]+)(?![0-9])")


def free_port() -> int:
    """Return a port that is free now: whoever is to have it binds it some seconds later."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class Network:
    """The ports of a run's services, each chosen when it is first asked for, and kept however often its container ends.

    `services` gives the Service objects that are there.
    """

    def __init__(self, services: Callable[[], Iterable[Manifest]]) -> None:
        self._services = services
        self._ports: dict[tuple[str, int], int] = {}

    def port_of(self, pod: Manifest, port: int) -> int:
        """Return where the container of a pod listens here, in place of a port of its own in a cluster."""
        for service in self._services():
            selector = service["spec"]["selector"]
            if selector.items() <= pod["metadata"]["labels"].items():
                name = service["metadata"]["name"]
                host = f"{pod['metadata']['name']}.{name}" if _is_headless(service) else name
                return self._port(host, port)
        raise ValueError(f"no plan has a pod that serves without a Service, as {pod['metadata']['name']}")

    def listen(self, pod: Manifest, address: str) -> str:
        """Return where a pod's container is to listen, in place of `0.0.0.0:<port>`."""
        return f"{LOOPBACK}:{self.port_of(pod, int(address.rpartition(':')[2]))}"

    def localize(self, text: str) -> str:
        """Return a text with every address of the run's services as it is here; any other address stays."""
        services = {service["metadata"]["name"]: _is_headless(service) for service in self._services()}

        def here(found: re.Match[str]) -> str:
            _, dot, service = found["host"].rpartition(".")
            if services.get(service) is not bool(dot):
                return found[0]
            return f"{LOOPBACK}:{self._port(found['host'], int(found['port']))}"

        return _ADDRESS.sub(here, text)

    def _port(self, host: str, port: int) -> int:
        if (host, port) not in self._ports:
            self._ports[host, port] = free_port()
        return self._ports[host, port]


def _is_headless(service: Manifest) -> bool:
    return bool(service["spec"].get("clusterIP") == "None")
