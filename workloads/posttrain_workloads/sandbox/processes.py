"""A program's processes: which there are, what they take, and their end.

It owns what is read of /proc; it must not decide what is too much. Whoever calls is the subreaper of the program.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import time
from dataclasses import dataclass
from pathlib import Path

_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_NICE = 19


class CannotKillError(Exception):
    """Processes of a program are there after they were killed."""


@dataclass(frozen=True)
class Usage:
    """What all processes of a program take at one moment."""

    tasks: tuple[int, ...]
    """Threads of all processes, and processes that have ended and nobody has waited for."""
    pids: tuple[int, ...]
    resident_bytes: int
    """Pages that two processes share are counted twice."""
    cpu_seconds: float
    """Of these and of what they have waited for."""


def measure(*, keep: int) -> Usage:
    """Return what the descendants of this process take; its children that have ended are reaped, but for `keep`."""
    tasks: list[int] = []
    pids: list[int] = []
    resident, cpu = 0, 0.0
    for pid in _descendants():
        fields = _stat(pid)
        if fields is None:
            continue
        if fields[0] in {"Z", "X"}:
            if int(fields[1]) == os.getpid() and pid != keep:
                os.waitpid(pid, os.WNOHANG)
            else:
                tasks.append(pid)  # its parent does not wait for it, and it takes up a process number
            continue
        pids.append(pid)
        tasks += _tasks(pid)
        resident += int(fields[21]) * _PAGE
        cpu += sum(int(value) for value in fields[11:15]) / _TICKS
    return Usage(tuple(tasks), tuple(pids), resident, cpu)


def proportional_bytes(usage: Usage) -> int:
    """Return the memory of the processes with shared pages counted once: exact, and too slow to be asked often."""
    total = 0
    for pid in usage.pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def hidden_file_bytes(usage: Usage) -> int:
    """Return the size of the files that are open and have no name any more."""
    found: dict[tuple[int, int], int] = {}
    for pid in usage.pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                status = os.stat(f"/proc/{pid}/fd/{descriptor}")  # noqa: PTH116
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def give_way(usage: Usage) -> None:
    """Give the processes the least share of the CPUs, so that many of them do not crowd others out."""
    for task in usage.tasks:
        try:
            os.setpriority(os.PRIO_PROCESS, task, _NICE)
        except OSError:
            continue


def kill_all(*, deadline_seconds: float) -> None:
    """Kill and reap every descendant; no new one may come into being meanwhile.

    Raises:
        CannotKillError: some are still there after the deadline, as in a system call that cannot be interrupted.
    """
    deadline = time.monotonic() + deadline_seconds
    pause = 0.0005
    while True:
        for pid in _descendants():
            kill_quietly(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            raise CannotKillError(f"processes {_descendants()} do not end")
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def kill_quietly(pid: int) -> None:
    """Kill a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _descendants() -> list[int]:
    found: list[int] = []
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        for task in _tasks(pid):
            try:
                text = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
            except OSError:
                continue  # it has ended
            children = [int(child) for child in text.split()]
            found += children
            pending += children
    return found


def _tasks(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208
    except OSError:
        return []


def _stat(pid: int) -> list[str] | None:
    """Return the fields of a process after its name, which may hold anything: the first is its state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
