"""Readiness probes: a container is asked over HTTP whether it serves, as a kubelet asks.

It owns when a container is asked and what the answers mean; it must not know pods.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

from posttrain.local.network import LOOPBACK


class ReadinessProbe:
    """Asks until it is stopped. Each change is told from a thread of its own; a container begins as not ready.

    `probe` is a pod spec's `readinessProbe` with `httpGet`, `port` where the container listens here.
    """

    def __init__(self, probe: Mapping[str, Any], *, port: int, on_change: Callable[[bool], None]) -> None:
        self._probe = probe
        self._port = port
        self._on_change = on_change
        self._stopped = Event()
        Thread(target=self._ask_on, name=f"readiness-{port}", daemon=True).start()

    def stop(self) -> None:
        """Ask no more; an answer that is on its way is told still."""
        self._stopped.set()

    def _ask_on(self) -> None:
        ready, failures = False, 0
        wait = float(self._probe.get("initialDelaySeconds", 0))
        while not self._stopped.wait(wait):
            wait = float(self._probe.get("periodSeconds", 10))
            good = self._ask()
            failures = 0 if good else failures + 1
            if good != ready and (good or failures >= self._probe.get("failureThreshold", 3)):
                ready = good
                self._on_change(ready)

    def _ask(self) -> bool:
        connection = http.client.HTTPConnection(
            LOOPBACK, self._port, timeout=float(self._probe.get("timeoutSeconds", 1))
        )
        try:
            connection.request("GET", self._probe["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
