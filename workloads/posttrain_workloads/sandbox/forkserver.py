"""The fork server: a small process of one thread that a guard is forked from for each job.

It owns the guards' lives; it must not look into a job. Forking it takes a millisecond, where starting a Python takes
thirty; and the server, which has threads, must not be forked at all.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from posttrain_workloads.sandbox import processes, walls
from posttrain_workloads.sandbox.guard import guard_job, pack_request
from posttrain_workloads.sandbox.job import Job, StageResult

_CONTROL_VARIABLE = "POSTTRAIN_SANDBOX_CONTROL"
_WAKEUPS = 4096


class GuardError(Exception):
    """A job has no result, and that is not its programs' doing."""


class ForkServer:
    """The fork server as the process that started it sees it."""

    def __init__(self) -> None:
        """Start it. It ends when this process does, however that comes about."""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env={**os.environ, _CONTROL_VARIABLE: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    async def run(self, job: Job) -> list[StageResult]:
        """Have a job done. Cancelling ends its programs.

        Raises:
            GuardError: its guard failed; the server's standard error says how.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"j"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise GuardError(f"the fork server is gone: {error}") from error
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(pack_request(job))
            await writer.drain()
            reply = await reader.read()
        except OSError as error:
            raise GuardError(f"the guard is gone: {error}") from error
        finally:
            writer.close()
        if not reply:
            raise GuardError("the guard ended without a result")
        results: list[StageResult] = pickle.loads(reply)
        return results

    def close(self) -> None:
        """End it once the jobs at hand are done, or abandoned."""
        self._control.close()
        self._process.wait()


def main() -> None:
    """Fork a guard for each connection that comes on the control socket, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    walls.become_subreaper()
    guards: set[int] = set()
    control = socket.socket(fileno=int(os.environ.pop(_CONTROL_VARIABLE)))
    control.set_inheritable(False)
    # A handler that reaped would be interrupted by the next end, in the midst of whatever it does.
    ends, wakeup = socket.socketpair()
    for end in (ends, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    serving = True
    while serving or guards:
        readable, _, _ = select.select([ends, control] if serving else [ends], [], [])
        if ends in readable:
            ends.recv(_WAKEUPS)
            _reap(guards)
        if control in readable:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                serving = False
                continue
            connection = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                _be_guard(connection, others=(control, ends, wakeup))
            guards.add(pid)
            connection.close()


def _be_guard(connection: socket.socket, *, others: Sequence[socket.socket]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in others:
            other.close()
        guard_job(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reap(guards: set[int]) -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            break
        guards.discard(pid)
    # What is left of a guard that was killed: its listener is closed, so that nothing new comes of it.
    for task in os.listdir("/proc/self/task"):  # noqa: PTH208
        children = Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii").split()
        for orphan in {int(child) for child in children} - guards:
            processes.kill_quietly(orphan)


if __name__ == "__main__":
    main()
