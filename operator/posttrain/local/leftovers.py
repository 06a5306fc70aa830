"""Processes of a run whose `posttrain run` was killed together with its shims.

It owns how they are found and ended; it must not touch a process that cannot be told to be one of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from posttrain.errors import UserError
from posttrain.local.container import ProcessId
from posttrain.local.shim import descendants

_RETRY_SECONDS = 0.02
_PATIENCE_SECONDS = 60


def end_leftovers(folder: Path, *, recorded: Iterable[ProcessId] = ()) -> None:
    """Kill what is left of the pods below `folder`, and wait until it is gone.

    Two things tell that a process is one of them: it is below a recorded one; or, where the system shows it (Linux),
    its environment has a path below `folder`, which every process below a pod's inherits.

    Raises:
        UserError: one of them does not end.
    """
    known = tuple(recorded)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while found := {pid for process in known for pid in _lowest(process)} | set(_find_below(folder)):
        if time.monotonic() > deadline:
            raise UserError(
                f"process {min(found)} of an earlier `posttrain run` of this run cannot be ended: it hangs in the "
                "kernel (a device or a network file system that does not answer) or is another user's. End it, then "
                "run the command again."
            )
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_RETRY_SECONDS)


def _lowest(process: ProcessId) -> list[int]:
    """Return what is below a process, or itself when nothing is: a shim must not die before those that it holds."""
    if not process.is_alive():
        return []
    return descendants(process.pid) or [process.pid]


def _find_below(folder: Path) -> list[int]:
    needle = f"={folder}/".encode()
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if int(entry.name) != os.getpid() and needle in _read_environment(entry)
    ]


def _read_environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        # Gone meanwhile, or another user's.
        return b""
