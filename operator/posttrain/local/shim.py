"""The process that stands for a container runtime: one container's command, and everything below it, end with it.

It owns starting and ending processes so that none outlives its pod, however its parent ends; it must not import
anything but the standard library: it is started as a file, without site-packages, in some 30 ms.

    python -I -S shim.py

One JSON line on standard input says what to start: `argv`, `env`, `cwd` and `log`, a file that gets both outputs
(null: they go to the shim's own standard error). Further lines may say `terminate <seconds>`. On standard output it
writes a JSON line when the command was started and one when it, and everything below it, has ended.

Everything below the command is killed as soon as the command has ended, as in a container. The command is ended
(SIGTERM to it, SIGKILL to everything when the grace period is over) by `terminate`, by a SIGTERM to the shim, and when
standard input ends: then the parent is dead, whatever killed it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

ORPHAN_GRACE_SECONDS = 5.0
"""Enough to flush a file, and not to write a checkpoint: whoever killed the parent expects everything to be gone."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_RETRY_SECONDS = 0.05
_LINUX = sys.platform == "linux"


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if it is gone or the system does not tell.

    A process id alone says little: it is given to another process later.
    """
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def descendants(root: int) -> list[int]:
    """Return the ids of every process below `root`."""
    children = defaultdict(list)
    for pid, parent in _parents():
        children[parent].append(pid)
    found: list[int] = []
    pending = [root]
    while pending:
        below = children[pending.pop()]
        found += below
        pending += below
    return found


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the third (state) on; the second may contain anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _parents() -> list[tuple[int, int]]:
    if not _LINUX:
        with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as listing:
            found = [(int(pid), int(parent)) for pid, parent in map(str.split, listing.stdout or ())]
        return [(pid, parent) for pid, parent in found if pid != listing.pid]
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()]
    return [(pid, int(fields[1])) for pid in pids if (fields := _stat_fields(pid))]


class Shim:
    """One command and what is below it."""

    def __init__(self, spec: Mapping[str, Any], *, prctl: Any) -> None:
        self._spec = spec
        self._prctl = prctl
        self._started_at = _now()
        self._deadline: float | None = None
        self._status: int | None = None
        self._pid = self._start()

    def _start(self) -> int:
        parent = os.getpid()
        log = self._spec["log"]
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else os.dup(2)
        pid = os.fork()
        if pid == 0:
            self._become_command(output, parent=parent)
        os.close(output)
        _tell({"event": "started", "pid": pid, "startTicks": start_ticks(pid), "time": self._started_at})
        return pid

    def _become_command(self, output: int, *, parent: int) -> NoReturn:
        try:
            os.setsid()
            if self._prctl is not None:
                self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(128 + signal.SIGKILL)
            for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self._spec["cwd"])
            os.execvpe(self._spec["argv"][0], self._spec["argv"], self._spec["env"])
        except OSError as error:
            os.write(2, f"cannot start {self._spec['argv']}: {error}\n".encode())
        finally:
            os._exit(127)

    def terminate(self, grace_seconds: float) -> None:
        """End the command; a second call can only shorten the grace period."""
        deadline = time.monotonic() + grace_seconds
        if self._deadline is None and grace_seconds > 0:
            self._signal(self._pid, signal.SIGTERM)
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def watch(self, wakeup: int, *, orders: bytes, terminations: list[int]) -> None:
        """Return when the command and everything below it has ended; `orders` is input that was read already."""
        watched = [0, wakeup]
        if orders:
            self._obey(orders)
        while not self._reap():
            timeout = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
            ready, _, _ = select.select(watched, [], [], timeout)
            if wakeup in ready:
                os.read(wakeup, 4096)
            if terminations:
                terminations.clear()
                self.terminate(ORPHAN_GRACE_SECONDS)
            if 0 in ready and not self._obey(os.read(0, 4096)):
                watched.remove(0)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._kill([*descendants(self._pid), self._pid])
                _await(wakeup)
        self._end_descendants(wakeup)
        code = os.waitstatus_to_exitcode(self._status or 0)
        _tell(
            {
                "event": "ended",
                "exitCode": code if code >= 0 else 128 - code,
                "signal": -code if code < 0 else None,
                "startedAt": self._started_at,
                "finishedAt": _now(),
            }
        )

    def _obey(self, data: bytes) -> bool:
        for line in data.decode().splitlines():
            self.terminate(float(line.removeprefix("terminate ")))
        if not data:
            self.terminate(ORPHAN_GRACE_SECONDS)
        return bool(data)

    def _end_descendants(self, wakeup: int) -> None:
        if not _LINUX:
            # No subreaper: the rest of the command's process group has another parent by now.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
        while remaining := descendants(os.getpid()):
            self._kill(remaining)
            _await(wakeup)
            self._reap()

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            self._signal(pid, signal.SIGKILL)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)

    def _reap(self) -> bool:
        """Reap what has ended, orphans too; return whether the command has."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._pid:
                    self._status = status
        return self._status is not None


def _await(wakeup: int) -> None:
    """Wait a moment for the end of a child."""
    if select.select([wakeup], [], [], _RETRY_SECONDS)[0]:
        os.read(wakeup, 4096)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _tell(line: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(1, (json.dumps(line) + "\n").encode())


def _read_spec() -> tuple[Any, bytes]:
    """Return what is to be started, and the input that came behind it; nothing where the parent died before."""
    text = b""
    while b"\n" not in text:
        piece = os.read(0, 65536)
        if not piece:
            return None, b""
        text += piece
    spec, _, orders = text.partition(b"\n")
    return json.loads(spec), orders


def main() -> int:
    """Start what standard input names, and stay until it has ended."""
    # Python keeps SIGPIPE ignored; a terminal's signals do not reach a session of its own.
    prctl = ctypes.CDLL(None, use_errno=True).prctl if _LINUX else None
    if prctl is not None and prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")
    wakeup, wakeup_write = os.pipe()
    for end in (wakeup, wakeup_write):
        os.set_blocking(end, False)
    terminations: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: terminations.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    spec, orders = _read_spec()
    if spec is not None:
        Shim(spec, prctl=prctl).watch(wakeup, orders=orders, terminations=terminations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
