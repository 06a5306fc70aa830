"""The walls, tried from within by a program before the first one is served.

It owns what each wall has to hold, and what to change where one does not; it must not put one up.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain_workloads.sandbox import landlock, seccomp
from posttrain_workloads.sandbox.job import Job, Limits, Stage, StageResult
from posttrain_workloads.sandbox.languages import PATH, python_program, python_readable
from posttrain_workloads.sandbox.walls import box

_MIB = 1 << 20
_LIMITS = Limits(
    wall_seconds=120.0,
    cpu_seconds=60.0,
    memory_bytes=256 * _MIB,
    output_bytes=_MIB,
    file_bytes=_MIB,
    scratch_bytes=16 * _MIB,
    processes=8,
)

# Runs behind the walls: prints by each wall's name what went through it. Nothing is harmed where one is missing.
_PROBE = r"""
import ctypes, json, os, signal, socket, sys

outside, secret, pid, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
through = {}

def attempt(wall, what, act):
    try:
        result = act()
    except (OSError, MemoryError, ValueError):
        return
    if result is not None and result is not False:
        through.setdefault(wall, what)

def read(path):
    with open(path, "rb") as file:
        return file.read(1) or None

def write(path, flags=os.O_WRONLY):
    os.close(os.open(path, flags))
    return True

def forks():
    made = []
    try:
        for _ in range(64):
            child = os.fork()
            if child == 0:
                signal.pause()
            made.append(child)
    except OSError:
        return None
    finally:
        for child in made:
            os.kill(child, signal.SIGKILL)
    return True

def changes_mode():
    os.chmod(outside, 0o600)
    return True

def truncates():
    os.truncate(outside, 0)
    return True

def opens_to_truncate():
    return write(outside, os.O_RDONLY | os.O_TRUNC)

def signals():
    os.kill(pid, 0)
    return True

def sees_environment():
    return any(secret in value for value in os.environ.values())

def connects():
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        return True

def big_file():
    with open("big", "wb") as file:
        file.write(bytes(2 << 20))
    return True

def unshares():
    return ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt("files", "reads " + outside, lambda: read(outside))
attempt("files", "writes " + outside, lambda: write(outside))
attempt("files", "truncates " + outside, truncates)
attempt("files", "truncates while opening " + outside, opens_to_truncate)
attempt("files", "makes a file beside it", lambda: write(outside + ".new", os.O_WRONLY | os.O_CREAT))
attempt("files", "changes the mode of " + outside, changes_mode)
attempt("files", "lists /", lambda: os.listdir("/"))
attempt("environment", "sees the server's environment", sees_environment)
attempt("environment", "reads it from /proc", lambda: read(f"/proc/{pid}/environ"))
attempt("network", "opens a TCP socket", lambda: socket.socket())
attempt("network", "opens a UNIX socket", lambda: socket.socket(socket.AF_UNIX))
attempt("network", "connects to this machine", connects)
attempt("signals", "may send a signal to the server", signals)
attempt("processes", "starts 64 processes", forks)
attempt("memory", "has 512 MiB", lambda: bytearray(512 << 20))
attempt("file size", "writes a file of 2 MiB", big_file)
attempt("privileges", "makes a user namespace", unshares)
print(json.dumps(through))
"""


class WallError(Exception):
    """A wall does not hold: the sandbox must not serve."""


@dataclass(frozen=True)
class _Wall:
    stands_on: str
    fix: str


_KERNEL_FIX = (
    "run it on Linux 5.13 or newer, not under gVisor, with a seccomp profile that allows landlock_create_ruleset, "
    "landlock_add_rule, landlock_restrict_self and seccomp (containerd's and Docker's default profiles do)"
)
_WALLS = {
    "files": _Wall("Landlock", _KERNEL_FIX),
    "environment": _Wall("a clean environment and Landlock", _KERNEL_FIX),
    "network": _Wall("seccomp and Landlock", _KERNEL_FIX),
    "signals": _Wall("Landlock or seccomp", _KERNEL_FIX),
    "processes": _Wall("seccomp's questions to the guard", _KERNEL_FIX),
    "memory": _Wall("RLIMIT_DATA", "run it on Linux 4.7 or newer"),
    "file size": _Wall("RLIMIT_FSIZE", "run it on Linux"),
    "privileges": _Wall("seccomp", _KERNEL_FIX),
}


def check_kernel() -> None:
    """Raise what can be known before anything is started.

    Raises:
        WallError: there is no Landlock, or the machine's system calls are not known.
    """
    if not seccomp.supported():
        raise WallError(f"the sandbox knows the system calls of x86-64 and arm64, not of {os.uname().machine}")
    if landlock.abi_version() == 0:
        raise WallError(
            f"this kernel ({os.uname().release}) does not let the sandbox use Landlock, which keeps programs from "
            f"everybody's files: {_KERNEL_FIX}; or use a Piston of your own"
        )


def plant_secret() -> str:
    """Put a secret into this process's environment, for the program that tries the walls to look for."""
    secret = secrets.token_hex(16)
    os.environ["POSTTRAIN_SANDBOX_SECRET"] = secret
    return secret


async def check_walls(run: Callable[[Job], Awaitable[list[StageResult]]], *, work: Path, secret: str) -> None:
    """Have a program try every wall. The secret was planted before the fork server started.

    Raises:
        WallError: something went through, with the fix; or the program did not run at all.
    """
    with tempfile.TemporaryDirectory(dir=work) as outside:
        canary = Path(outside, "canary")
        canary.write_text("intact", encoding="ascii")
        canary.chmod(0o640)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = int(server.sockets[0].getsockname()[1])
            folder = str(work / secrets.token_hex(16))
            result = (await run(_probe_job(folder, canary=canary, secret=secret, port=port)))[-1]
        if result.code != 0:
            tail = result.output.decode(errors="replace").strip()[-800:]
            raise WallError(f"the program that tries the walls did not run ({result.message}): {tail}")
        through: dict[str, str] = json.loads(result.stdout)
        if not through and (canary.read_text(encoding="ascii") != "intact" or canary.stat().st_mode & 0o777 != 0o640):
            through["files"] = f"changed {canary}"
    if through:
        lines = (
            f"the wall '{wall}' does not hold, a program {what}. It stands on {_WALLS[wall].stands_on}: "
            f"{_WALLS[wall].fix}"
            for wall, what in through.items()
        )
        raise WallError("\n".join(lines))


def _probe_job(folder: str, *, canary: Path, secret: str, port: int) -> Job:
    argv = (python_program(), "probe.py", str(canary), secret, str(os.getpid()), str(port))
    return Job(
        scratch=folder,
        files=(("probe.py", _PROBE.encode()),),
        stages=(Stage(argv, _LIMITS),),
        readable=python_readable(),
        environment={"PATH": PATH, "HOME": box(folder)},
    )
