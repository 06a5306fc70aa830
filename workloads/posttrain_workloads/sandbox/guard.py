"""The guard: one process a job. It starts the programs behind their walls, watches what they take, and ends them.

It owns a program's life and its limits; it must not read anything into what a program writes. It is forked from the
fork server, has one thread, and all that the program starts are its descendants.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable

from posttrain_workloads.sandbox import processes, scratch, seccomp, walls
from posttrain_workloads.sandbox.job import Job, Limits, Stage, StageResult

_LENGTH = struct.Struct("=Q")
_TICK_SECONDS = 0.02
_TICKS_A_FILE_COUNT = 10
_CHUNK = 1 << 16
_CROWD = 16
"""Tasks from which on a program has to give way to others."""
_KILL_SECONDS = 60.0


class AbandonedError(Exception):
    """Nobody waits for the job's result any more."""


def guard_job(connection: socket.socket) -> None:
    """Read a job from the connection, do it, and write its results; the other end closes it when it has lost interest.

    The scratch folder is gone when the results are there.
    """
    walls.become_subreaper()
    try:
        job: Job = pickle.loads(_read_request(connection))
    except AbandonedError:
        return
    try:
        scratch.lay_out(job)
        results: list[StageResult] = []
        for stage in job.stages:
            results.append(_Program(job, stage, connection).run())
            if results[-1].status is not None:
                break
    except AbandonedError:
        return
    finally:
        scratch.remove(job.scratch)
    connection.sendall(pickle.dumps(results))


def pack_request(job: Job) -> bytes:
    """Return what to write to a guard: no end of the stream marks it, for that says that nobody waits any more."""
    payload = pickle.dumps(job)
    return _LENGTH.pack(len(payload)) + payload


def _read_request(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_read_exactly(connection, _LENGTH.size))
    return _read_exactly(connection, length)


def _read_exactly(connection: socket.socket, length: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < length:
        chunk = connection.recv(min(length - len(buffer), 1 << 20))
        if not chunk:
            raise AbandonedError
        buffer += chunk
    return bytes(buffer)


class _Program:
    """One stage while it runs."""

    def __init__(self, job: Job, stage: Stage, connection: socket.socket) -> None:
        self.job, self.stage, self.connection = job, stage, connection
        self.limits: Limits = stage.limits
        self.stdout, self.stderr, self.output = bytearray(), bytearray(), bytearray()
        self.verdict: tuple[str, str] | None = None
        """Status and message, once a limit was hit."""
        self.granted = 0
        """New tasks since they were last counted."""
        self.usage = processes.Usage((), (), 0, 0.0)
        self.peak_bytes, self.cpu_seconds = 0, 0.0
        self.ticks = 0
        self.pid = -1
        self.cpu_before = _cpu_of_children()

    def run(self) -> StageResult:
        """Start the program, wait for its end or bring it about, and end all that it has started."""
        started = time.monotonic()
        stdin, stdout, stderr, failure, questions, pid = self._start()
        self.pid = pid
        # The end of what was put in front of exec: nothing where exec went well.
        reason = _read_fd(failure)
        listener = _receive_listener(questions) if not reason else -1
        questions.close()
        process = os.pidfd_open(pid)
        handlers: dict[int, Callable[[int], bool]] = {
            stdout: lambda fd: self._collect(fd, self.stdout, "OL", "stdout"),
            stderr: lambda fd: self._collect(fd, self.stderr, "EL", "stderr"),
        }
        try:
            if not reason:
                self._watch(handlers, stdin=stdin, listener=listener, process=process, started=started)
        finally:
            # Without its listener a program gets no new process any more: what is killed now is all there is.
            if listener >= 0:
                os.close(listener)
            status, maximum_bytes = _end(pid)
            for descriptor in (stdin, process):
                os.close(descriptor)
        for fd, handler in handlers.items():
            while handler(fd):
                pass
            os.close(fd)
        if reason:
            return StageResult(status="XX", message=reason)
        self.peak_bytes = max(self.peak_bytes, maximum_bytes)
        self.cpu_seconds = max(self.cpu_seconds, _cpu_of_children() - self.cpu_before)
        return self._result(status, wall_seconds=time.monotonic() - started)

    def _start(self) -> tuple[int, int, int, int, socket.socket, int]:
        stdin_read, stdin = os.pipe()
        stdout, stdout_write = os.pipe()
        stderr, stderr_write = os.pipe()
        failure, failure_write = os.pipe()
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.connection.close()
                walls.enter(
                    self.job, self.stage, descriptors=(stdin_read, stdout_write, stderr_write), questions=theirs
                )
            except BaseException as error:
                os.write(failure_write, f"the program was not started: {type(error).__name__}: {error}".encode()[:4000])
            finally:
                os._exit(126)
        for descriptor in (stdin_read, stdout_write, stderr_write, failure_write):
            os.close(descriptor)
        theirs.close()
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        return stdin, stdout, stderr, failure, ours, pid

    def _watch(
        self,
        outputs: dict[int, Callable[[int], bool]],
        *,
        stdin: int,
        listener: int,
        process: int,
        started: float,
    ) -> None:
        """Serve the program's pipes and questions until it ends or a limit is hit."""
        poll = select.poll()
        for descriptor in (*outputs, listener, process):
            poll.register(descriptor, select.POLLIN)
        poll.register(self.connection, select.POLLIN | select.POLLRDHUP)
        unwritten = memoryview(self.stage.stdin)
        poll.register(stdin, select.POLLOUT)
        deadline = started + self.limits.wall_seconds
        next_tick = time.monotonic() + _TICK_SECONDS
        while self.verdict is None:
            now = time.monotonic()
            if now >= deadline:
                self._hit("TO", f"time limit of {self.limits.wall_seconds:g} s exceeded")
                return
            for descriptor, event in poll.poll(max(0.0, min(next_tick, deadline) - now) * 1000):
                if descriptor == process:
                    return
                if descriptor == listener:
                    if event & select.POLLIN:
                        self._answer(listener)
                    else:
                        poll.unregister(listener)
                elif descriptor == stdin:
                    unwritten = _feed(stdin, unwritten)
                    if not unwritten:
                        poll.unregister(stdin)
                        _close_write(stdin)
                elif descriptor in outputs:
                    if not outputs[descriptor](descriptor) and event & select.POLLHUP:
                        poll.unregister(descriptor)
                else:
                    raise AbandonedError
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + _TICK_SECONDS

    def _answer(self, listener: int) -> None:
        asked = seccomp.receive_question(listener)
        if asked is None:
            return
        if len(self.usage.tasks) + self.granted + 1 > self.limits.processes or self.granted >= _CROWD:
            self._measure()
        allow = len(self.usage.tasks) + self.granted < self.limits.processes
        self.granted += allow
        seccomp.answer_question(listener, asked[0], allow=allow)

    def _measure(self) -> None:
        self.usage = processes.measure(keep=self.pid)
        self.granted = 0
        self.peak_bytes = max(self.peak_bytes, self.usage.resident_bytes)
        if len(self.usage.tasks) > _CROWD:
            processes.give_way(self.usage)

    def _tick(self) -> None:
        self.ticks += 1
        self._measure()
        self.cpu_seconds = max(self.cpu_seconds, self.usage.cpu_seconds + _cpu_of_children() - self.cpu_before)
        if self.cpu_seconds > self.limits.cpu_seconds:
            self._hit("TO", f"time limit of {self.limits.cpu_seconds:g} s of CPU exceeded")
        elif (
            self.usage.resident_bytes > self.limits.memory_bytes
            and processes.proportional_bytes(self.usage) > self.limits.memory_bytes
        ):
            self._hit("SG", f"memory limit of {self.limits.memory_bytes >> 20} MiB exceeded")
        elif self.ticks % _TICKS_A_FILE_COUNT == 0:
            left = self.limits.scratch_bytes - processes.hidden_file_bytes(self.usage)
            if scratch.exceeds(self.job.scratch, max_bytes=left):
                self._hit("SG", f"more than {self.limits.scratch_bytes >> 20} MiB or {scratch.MAX_FILES} files written")

    def _collect(self, descriptor: int, into: bytearray, status: str, name: str) -> bool:
        """Read once; return whether there may be more."""
        try:
            chunk = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        room = self.limits.output_bytes - len(into)
        into += chunk[:room]
        self.output += chunk[:room]
        if len(chunk) > room:
            self._hit(status, f"{name} length exceeded: more than {self.limits.output_bytes} bytes")
            return False
        return bool(chunk)

    def _hit(self, status: str, message: str) -> None:
        self.verdict = self.verdict or (status, message)

    def _result(self, wait_status: int, *, wall_seconds: float) -> StageResult:
        code: int | None = None
        name: str | None = None
        status: str | None = None
        message: str | None = None
        if self.verdict is not None:
            (status, message), name = self.verdict, "SIGKILL"
        elif os.WIFSIGNALED(wait_status):
            name = signal.Signals(os.WTERMSIG(wait_status)).name
            status, message = "SG", f"caught signal {name}"
        else:
            code = os.WEXITSTATUS(wait_status)
            if code != 0:
                status, message = "RE", f"exited with code {code}"
        return StageResult(
            stdout=bytes(self.stdout),
            stderr=bytes(self.stderr),
            output=bytes(self.output),
            code=code,
            signal=name,
            status=status,
            message=message,
            memory_bytes=self.peak_bytes or None,
            cpu_seconds=self.cpu_seconds,
            wall_seconds=wall_seconds,
        )


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _read_fd(descriptor: int) -> str:
    chunks = []
    while chunk := os.read(descriptor, _CHUNK):
        chunks.append(chunk)
    os.close(descriptor)
    return b"".join(chunks).decode(errors="replace")


def _receive_listener(questions: socket.socket) -> int:
    _, descriptors, _, _ = socket.recv_fds(questions, 1, 1, socket.MSG_CMSG_CLOEXEC)
    (listener,) = descriptors
    return listener


def _feed(descriptor: int, unwritten: memoryview) -> memoryview:
    """Write what the pipe takes; nothing is left to write when the program has closed it."""
    if not unwritten:
        return unwritten
    try:
        return unwritten[os.write(descriptor, unwritten[:_CHUNK]) :]
    except BlockingIOError:
        return unwritten
    except BrokenPipeError:
        return unwritten[:0]


def _close_write(descriptor: int) -> None:
    """Let the reader see the end, and keep the number in use until the program is gone."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def _end(pid: int) -> tuple[int, int]:
    """Kill the program and all it started; return how it ended, before or now, and the most memory it had."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    processes.kill_all(deadline_seconds=_KILL_SECONDS)
    return status, usage.ru_maxrss * 1024
