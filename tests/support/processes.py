"""Small programs that run as real processes, and waiting for what they do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WAIT_SECONDS = 60.0


def wait_for(look: Callable[[], T], *, what: str, seconds: float = WAIT_SECONDS) -> T:
    """Return the first true value that `look` gives; fail with `what` when it takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return found


def python(program: str) -> tuple[str, ...]:
    """Return the command line of a Python program given as text."""
    return (sys.executable, "-c", program)


def is_alive(pid: int) -> bool:
    """Return whether a process is there, and neither a zombie nor dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def read_pids(folder: Path) -> list[int]:
    """Return the process ids that programs left as names of files in a folder."""
    return [int(file.name) for file in folder.iterdir() if file.name.isdecimal()]


def await_pids(folder: Path, *, count: int) -> list[int]:
    """Wait until so many programs have left their ids in a folder."""
    wait_for(lambda: len(read_pids(folder)) >= count, what=f"{count} processes")
    return read_pids(folder)


def await_gone(pids: list[int], *, seconds: float = WAIT_SECONDS) -> None:
    """Wait until none of the processes is alive."""
    wait_for(lambda: not any(map(is_alive, pids)), what=f"the end of {pids}", seconds=seconds)


TELL = "import os, pathlib, signal, subprocess, sys, time; pathlib.Path(os.environ['PIDS'], str(os.getpid())).touch()\n"
"""Beginning of a program that leaves its process id."""

FOREVER = TELL + "signal.pause()\n"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
"""Does not end when it is told to."""

DAEMON = (
    TELL
    + """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path(os.environ['PIDS'], str(os.getpid())).touch()
        signal.pause()
    os._exit(0)
os.wait()
"""
)
"""Starts a daemon, as daemons are started: with a double fork and a session of its own."""


def main_process(pod: Mapping[str, Any]) -> int:
    """Return the process on this host that is the main one of a pod's container."""
    uid = pod["metadata"]["uid"]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, groups = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
        except OSError:
            continue
        if uid in groups and b"posttrain_workloads.launch" in command:
            return int(folder.name)
    raise AssertionError(f"no process of {pod['metadata']['name']} is found")
