"""A container as its parent sees it: the shim that runs it, what it was started with, how it ended.

It owns the conversation with a shim; it must not know pods, nor what a container does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from posttrain.local import shim


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a container's main process is started with."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process for good: its id is given to others later, but not with the same start."""

    pid: int
    start_ticks: int | None

    def is_alive(self) -> bool:
        """Return whether that very process is still there."""
        return self.start_ticks is not None and shim.start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a container ended: exit code as Kubernetes shows it, 128 + n for signal n."""

    exit_code: int
    signal: int | None
    started_at: datetime
    finished_at: datetime


class Container:
    """A running container. Its end is told once, from a thread of its own; None: the shim itself was killed."""

    def __init__(self, command: Command, *, log: Path, on_end: Callable[[Ended | None], None]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._shim = open_shim(command, log=log, stderr=output)
        self._input_lock = Lock()
        line = json.loads(_output(self._shim).readline())
        self.shim = ProcessId(pid=self._shim.pid, start_ticks=shim.start_ticks(self._shim.pid))
        self.main = ProcessId(pid=line["pid"], start_ticks=line["startTicks"])
        self.started_at = datetime.fromisoformat(line["time"])
        self._reader = Thread(target=self._await_end, args=(on_end,), name=f"container-{self.main.pid}", daemon=True)
        self._reader.start()

    def terminate(self, *, grace_seconds: float) -> None:
        """End it: SIGTERM, and SIGKILL to everything in it when the grace period is over; 0 means at once.

        Nothing happens where it has ended already.
        """
        with self._input_lock, suppress(BrokenPipeError):
            assert self._shim.stdin is not None
            if not self._shim.stdin.closed:
                self._shim.stdin.write(f"terminate {grace_seconds}\n".encode())
                self._shim.stdin.flush()

    def wait(self, *, timeout_seconds: float | None = None) -> bool:
        """Wait for its end; return whether it came."""
        self._reader.join(timeout_seconds)
        return not self._reader.is_alive()

    def _await_end(self, on_end: Callable[[Ended | None], None]) -> None:
        ended = read_end(self._shim)
        self._shim.wait()
        with self._input_lock, suppress(BrokenPipeError):
            assert self._shim.stdin is not None
            self._shim.stdin.close()
        _output(self._shim).close()
        on_end(ended)


def open_shim(command: Command, *, log: Path | None, stderr: Any) -> subprocess.Popen[bytes]:
    """Start a shim and tell it what to run; it ends everything when its standard input is closed."""
    # A session of its own: a Ctrl-C in the terminal is for us, and we end containers in order.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", shim.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    spec = {
        "argv": list(command.argv),
        "env": dict(command.env),
        "cwd": str(command.cwd),
        "log": str(log) if log else None,
    }
    # Not in the arguments: those are for everyone to read, and the environment holds secrets.
    process.stdin.write((json.dumps(spec) + "\n").encode())
    process.stdin.flush()
    return process


def read_end(process: subprocess.Popen[bytes]) -> Ended | None:
    """Wait for the shim's last line; None if it was killed before it could write it."""
    for text in _output(process):
        line = json.loads(text)
        if line["event"] == "ended":
            return Ended(
                exit_code=line["exitCode"],
                signal=line["signal"],
                started_at=datetime.fromisoformat(line["startedAt"]),
                finished_at=datetime.fromisoformat(line["finishedAt"]),
            )
    return None


def _output(process: subprocess.Popen[bytes]) -> Any:
    return process.stdout
