"""What stands between a program and everything else: put up in a process of its own, between fork and exec.

It owns the order of the walls; it must not start a process or a thread, and there is no way back from it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
from pathlib import Path
from typing import NoReturn

from posttrain_workloads.sandbox import landlock, seccomp
from posttrain_workloads.sandbox.job import Job, Limits, Stage

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
_PR_SET_CHILD_SUBREAPER = 36
_SECUREBITS = 0b101111
"""NOROOT and NO_SETUID_FIXUP, both locked, KEEP_CAPS locked off: root without capabilities stays without."""
_CLOSE_RANGE, _CLOSE_ON_EXEC = 436, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63

OPEN_FILES = 256
_DEVICES_TO_WRITE = ("/dev/null", "/dev/full")
_DEVICES_TO_READ = ("/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Make the orphans among this process's descendants its children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def enter(job: Job, stage: Stage, *, descriptors: tuple[int, int, int], questions: socket.socket) -> NoReturn:
    """Become the stage's program behind its walls.

    `descriptors` become its standard input, output and error; on `questions` goes the descriptor that the kernel asks
    about new processes on.

    Raises:
        OSError: a wall could not be put up, or there is no such program; the caller's process must end.
    """
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target, inheritable=True)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o077)
    os.chdir(box(job.scratch))
    # Under memory pressure the kernel takes the program, not the guard.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    abi = job.walls.landlock_abi or landlock.abi_version()
    if job.walls.files:
        landlock.restrict(_open_paths(job), abi=abi)
    listener = seccomp.load_filter(
        seccomp.FilterRules(
            network=job.walls.network,
            change_mode=stage.change_mode,
            own_process_only=os.getpid() if job.walls.files and abi < landlock.SIGNAL_ABI else None,
            refuse_truncate=job.walls.files and abi < landlock.TRUNCATE_ABI,
        )
    )
    socket.send_fds(questions, [b"?"], [listener])
    if _libc.syscall(_CLOSE_RANGE, 3, ctypes.c_uint(0xFFFFFFFF), _CLOSE_ON_EXEC) < 0:
        raise OSError(ctypes.get_errno(), "open files cannot be closed")
    _set_limits(stage.limits, stack_bytes=stage.stack_bytes)
    environment = job.environment if job.walls.environment else {**os.environ, **job.environment}
    os.execve(stage.argv[0], stage.argv, environment)


def box(scratch: str) -> str:
    """Return the folder that a job's programs start in."""
    return f"{scratch}/box"


def temporary(scratch: str) -> str:
    """Return the folder for what they keep for a while."""
    return f"{scratch}/tmp"


def _open_paths(job: Job) -> list[tuple[str, int]]:
    return [
        *((path, landlock.READ) for path in job.readable),
        *((path, landlock.READ) for path in _DEVICES_TO_READ),
        *((path, landlock.WRITE_DEVICE) for path in _DEVICES_TO_WRITE),
        (box(job.scratch), landlock.OWN),
        (temporary(job.scratch), landlock.OWN),
    ]


def _set_limits(limits: Limits, *, stack_bytes: int) -> None:
    for kind, value in (
        # Private memory of one process; mappings that are only reserved do not count, as Java's and V8's.
        (resource.RLIMIT_DATA, limits.memory_bytes),
        (resource.RLIMIT_STACK, stack_bytes),
        # The guard counts over all processes; this is for what it does not get round to.
        (resource.RLIMIT_CPU, int(limits.cpu_seconds) + 2),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, sets) == 0 and not any(sets):
        return
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # there are no more of them, or we may not: then the sets below are what counts
    # May be refused where the capabilities are few; NO_NEW_PRIVS gives none back either.
    _libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0)
    none = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, none) < 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")
