"""The processes of a test cluster: started under a shim each, so that none outlives the process that started it.

It owns starting, stopping, pausing and recording them, and their logs; it must not know what they do.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from posttrain.local.container import Command, Container, Ended, ProcessId
from posttrain.local.shim import descendants
from tests.cluster.errors import ClusterError

T = TypeVar("T")

START_SECONDS = 90.0
"""A component on a busy machine with two cores."""
_POLL_SECONDS = 0.1
_TAIL_LINES = 40


def poll(look: Callable[[], T], *, what: str, seconds: float = START_SECONDS) -> T:
    """Return the first true value that `look` gives.

    Raises:
        ClusterError: none came in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s for {what}")
        time.sleep(_POLL_SECONDS)
    return found


def tail(log: Path, *, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class Process:
    """One component. It can be stopped and started again with the same arguments, or paused in between.

    `forks` says that the command is one that enters a PID namespace: the component is its child.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        folder: Path,
        ready: Callable[[], bool] = lambda: True,
        env: Mapping[str, str] | None = None,
        grace_seconds: float = 5.0,
        forks: bool = False,
    ) -> None:
        self.name = name
        self.argv = tuple(map(str, argv))
        self.log = folder / "logs" / f"{name}.log"
        self._env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", **(env or {})}
        self._folder = folder
        self._forks = forks
        self._ready = ready
        self._grace_seconds = grace_seconds
        self._record = folder / "processes" / f"{name}.json"
        self._container: Container | None = None

    @property
    def pid(self) -> int:
        """Its process id.

        Raises:
            ClusterError: it is not running.
        """
        if self._container is None or self._container.wait(timeout_seconds=0):
            raise ClusterError(f"{self.name} is not running")
        main = self._container.main.pid
        return next(iter(descendants(main)), main) if self._forks else main

    def is_running(self) -> bool:
        """Return whether it was started and has not ended."""
        return self._container is not None and not self._container.wait(timeout_seconds=0)

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it is ready.

        Raises:
            ClusterError: it ended, or is not ready in time; the message has the end of its log.
        """
        if self.is_running():
            return
        self._container = Container(
            Command(argv=self.argv, env=self._env, cwd=self._folder), log=self.log, on_end=_ignore_end
        )
        self._record.parent.mkdir(exist_ok=True)
        known = [self._container.main, self._container.shim]
        written = self._record.with_suffix(".new")
        written.write_text(json.dumps([[process.pid, process.start_ticks] for process in known]))
        written.replace(self._record)
        if wait:
            self.await_ready()

    def await_ready(self, *, seconds: float = START_SECONDS) -> None:
        """Wait until it is ready. Errors as `start`."""

        def look() -> bool:
            return bool(self.pid) and self._ready()

        try:
            poll(look, what=f"{self.name} to be ready", seconds=seconds)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{tail(self.log)}") from error

    def stop(self, *, grace_seconds: float | None = None) -> None:
        """End it: SIGTERM, and SIGKILL when the grace period is over; 0 means at once."""
        if self._container is not None:
            grace = self._grace_seconds if grace_seconds is None else grace_seconds
            with suppress(ClusterError, ProcessLookupError):
                self.resume()
                if grace > 0:
                    os.kill(self.pid, signal.SIGTERM)
            if not self._container.wait(timeout_seconds=grace):
                self._container.terminate(grace_seconds=0)
                self._container.wait()
            self._container = None
            self._record.unlink(missing_ok=True)

    def restart(self, *, grace_seconds: float | None = None) -> None:
        """Stop it and start it. Errors as `start`."""
        self.stop(grace_seconds=grace_seconds)
        self.start()

    def pause(self) -> None:
        """Freeze it, as a machine that hangs would: its connections stay, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)


def _ignore_end(_: Ended | None) -> None:
    """Whoever needs to know how a component ended looks at its log."""


def end_leftovers(folder: Path) -> None:
    """Kill what an earlier cluster in this folder left: exactly the processes that it recorded, and those below them.

    Raises:
        ClusterError: one of them does not end.
    """
    records = sorted((folder / "processes").glob("*.json"))
    recorded = [
        ProcessId(pid=pid, start_ticks=ticks) for record in records for pid, ticks in json.loads(record.read_text())
    ]

    def ended() -> bool:
        alive = [process for process in recorded if process.is_alive()]
        for process in alive:
            for pid in (*descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return not alive

    poll(ended, what=f"the end of what an earlier cluster left in {folder}")
    for record in records:
        record.unlink()
