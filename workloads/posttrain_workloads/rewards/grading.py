"""Grades of mathematical answers, by worker processes that are killed when one takes too long.

It owns who grades what, and what is known already: each solution and answer is graded once, and all answers to one
solution go to one worker, which parses it once. It must not import math-verify, nor torch: the workers (grader.py) are
started by their file, without anything of the process that asks.

The workers are forked from a server of their own, so that a lost one is replaced in milliseconds. Libraries for pools
of processes were considered: none limits the processor time of a task, which on a busy machine is the difference
between a grade and a guess, and those that kill a worker import the main module anew into the next one.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from posttrain_workloads.rewards.shortcut import deciding_part

Config = Literal["accuracy", "length"]
"""Which of open-r1's configurations of math-verify is used (grader.py)."""

CPU_SECONDS = 1.0
"""Processor time for one answer, and for one solution."""

SILENCE_SECONDS = 120.0
"""Until a worker that uses no processor time either (it swaps, or was stopped) is given up."""

_REMEMBERED = 100_000
_SERVERS = 3
"""Started for one share of answers, before the next answer is given up."""

_CLOSED = "the pool of graders is closed"
_GRADER = Path(__file__).with_name("grader.py")


class GradingFailed(Exception):
    """The answer at `index` could not be graded, for no reason that lies in what it says."""

    def __init__(self, cause: str, *, index: int) -> None:
        super().__init__(cause)
        self.index = index


class _Key(NamedTuple):
    """What a grade depends on."""

    config: Config
    gold: str
    answer: str

    def digest(self) -> bytes:
        """Return what tells it from any other: texts of a completion's length are not kept."""
        return hashlib.blake2b(json.dumps(self).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _Share:
    """Answers to one solution, for one worker."""

    config: Config
    gold: str
    answers: tuple[str, ...]


class _WorkerLost(Exception):
    """A worker ended, or went silent, before it had answered."""

    def __init__(self, how: str, *, parsed: bool, out_of_time: bool = False, with_server: bool = False) -> None:
        super().__init__(how)
        self.parsed = parsed
        """It had parsed the solution, so it is an answer that it was lost on."""
        self.out_of_time = out_of_time
        self.with_server = with_server


class _Channel:
    """A worker, as seen by the one thread that it works for."""

    def __init__(self, end: socket.socket) -> None:
        end.settimeout(SILENCE_SECONDS)
        self._end = end
        self._lines = end.makefile("rb")

    def ask(self, share: _Share, *, skip: int, cpu_seconds: float) -> Iterator[bool | str | None]:
        """Yield the grade of each answer but the first `skip`, or why it has none.

        Raises:
            _WorkerLost: before the last one was graded.
        """
        answers = share.answers[skip:]
        request = {"config": share.config, "gold": share.gold, "answers": answers, "seconds": cpu_seconds}
        try:
            self._end.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _WorkerLost("was ended", parsed=False, with_server=True) from error
        if not self._receive(parsed=False)["parsed"]:
            yield from [None] * len(answers)
            return
        for _ in answers:
            reply = self._receive(parsed=True)
            yield reply.get("error", reply["correct"])

    def close(self) -> None:
        """End the worker, if it lives."""
        self._lines.close()
        self._end.close()

    def _receive(self, *, parsed: bool) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise _WorkerLost(f"said nothing for {SILENCE_SECONDS:.0f} s", parsed=parsed) from error
        except ConnectionError:
            line = b""
        if not line:
            raise _WorkerLost("was ended", parsed=parsed, with_server=True)
        reply: dict[str, Any] = json.loads(line)
        if "died" in reply:
            number = reply["died"]
            raise _WorkerLost(f"ended by signal {number}", parsed=parsed, out_of_time=number == signal.SIGPROF)
        return reply


class _Server:
    """The process that forks the workers."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            # Without -P the folder of the file would stand before the libraries.
            command = [sys.executable, "-P", str(_GRADER)]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)

    def start_worker(self) -> _Channel | None:
        """Return a new worker, None if the server has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            except OSError:
                ours.close()
                return None
        return _Channel(ours)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


class _OwnWorker(threading.local):
    """The worker of the thread that looks at it."""

    channel: _Channel | None = None


class Grader(Protocol):
    """What the rewards grade with."""

    def grade(self, config: Config, golds: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Return for each answer whether it equals its solution; None where the solution cannot be parsed.

        Raises:
            GradingFailed: an answer could not be graded.
        """


class GradingPool:
    """Worker processes that grade; every method may be called from any thread.

    The server starts with the pool, and the workers with the first answers. All end with `close`, or with this process,
    however it ends.
    """

    def __init__(self, workers: int, *, cpu_seconds: float = CPU_SECONDS) -> None:
        self.workers = workers
        self._cpu_seconds = cpu_seconds
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
        self._own = _OwnWorker()
        self._channels: set[_Channel] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._server: _Server | None = _Server()
        self._known: dict[bytes, bool | None] = {}

    def grade(self, config: Config, golds: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Return for each answer whether it equals its solution; None where the solution cannot be parsed.

        An answer that takes more than its processor time is wrong.

        Raises:
            GradingFailed: an answer could not be graded, because math-verify raised or its process was ended.
            RuntimeError: the pool is closed.
        """
        parts = [deciding_part(answer) for answer in answers]
        keys = [_Key(config, gold, part) for gold, part in zip(golds, parts, strict=True)]
        known = self._recall(keys)
        shares = _share_out([key for key in dict.fromkeys(keys) if key not in known], workers=self.workers)
        futures = [self._threads.submit(self._grade_share, share) for share in shares]
        failures: dict[_Key, str] = {}
        try:
            for share, future in zip(shares, futures, strict=True):
                for answer, grade in zip(share.answers, future.result(), strict=True):
                    key = _Key(share.config, share.gold, answer)
                    if isinstance(grade, str):
                        failures[key] = grade
                    else:
                        known[key] = grade
        finally:
            for future in futures:
                future.cancel()
            self._remember(known)
        for index, key in enumerate(keys):
            if key in failures:
                raise GradingFailed(failures[key], index=index)
        return [known[key] for key in keys]

    def close(self) -> None:
        """End all processes; what is being graded fails."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()
        self._threads.shutdown(cancel_futures=True)
        while self._channels:
            self._channels.pop().close()

    def _recall(self, keys: Sequence[_Key]) -> dict[_Key, bool | None]:
        digests = {key: key.digest() for key in keys}
        with self._lock:
            if self._closed:
                raise RuntimeError(_CLOSED)
            return {key: self._known[digest] for key, digest in digests.items() if digest in self._known}

    def _remember(self, known: Mapping[_Key, bool | None]) -> None:
        digests = {key.digest(): grade for key, grade in known.items()}
        with self._lock:
            self._known.update(digests)
            for digest in list(itertools.islice(self._known, max(0, len(self._known) - _REMEMBERED))):
                del self._known[digest]

    def _grade_share(self, share: _Share) -> list[bool | str | None]:
        """Return the grade of each answer, or why it has none."""
        grades: list[bool | str | None] = []
        servers = 1
        while len(grades) < len(share.answers):
            channel = self._worker()
            try:
                for grade in channel.ask(share, skip=len(grades), cpu_seconds=self._cpu_seconds):
                    grades.append(grade)
            except _WorkerLost as loss:
                self._own.channel = None
                self._channels.discard(channel)
                channel.close()
                if loss.out_of_time:
                    # Without the solution none of its answers can be graded.
                    grades += [False] if loss.parsed else [None] * (len(share.answers) - len(grades))
                elif loss.with_server and servers < _SERVERS:
                    servers += 1  # the next worker comes from another one
                else:
                    grades.append(f"the process that graded it {loss}")
        return grades

    def _worker(self) -> _Channel:
        if self._own.channel is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError(_CLOSED)
                self._own.channel = self._start_worker()
                self._channels.add(self._own.channel)
        return self._own.channel

    def _start_worker(self) -> _Channel:
        if self._server is not None:
            channel = self._server.start_worker()
            if channel is not None:
                return channel
            self._server.close()
        self._server = _Server()
        channel = self._server.start_worker()
        if channel is None:
            raise RuntimeError("the process that starts the graders ended at once: the log has what it said")
        return channel


def _share_out(keys: Sequence[_Key], *, workers: int) -> list[_Share]:
    """Return the work in shares of one solution each, none larger than a worker's part.

    What may take long comes first, so that no worker waits for another at the end: what is no whole number, and of
    these the longest texts.
    """
    by_gold: dict[tuple[Config, str], list[str]] = {}
    for config, gold, answer in keys:
        by_gold.setdefault((config, gold), []).append(answer)
    part = max(1, -(-len(keys) // workers))
    shares = [
        _Share(config, gold, tuple(answers[at : at + part]))
        for (config, gold), answers in by_gold.items()
        for at in range(0, len(answers), part)
    ]
    return sorted(shares, key=lambda share: (share.gold.strip("$").isdigit(), -sum(map(len, share.answers))))


# --- The pool of this process -----------------------------------------------------------------------------------------

_shared_lock = threading.Lock()
_shared: Grader | None = None


def shared_pool() -> Grader:
    """Return what the rewards of this process grade with: by default a worker for each processor of this rank."""
    global _shared  # noqa: PLW0603 - processes are a process's own
    with _shared_lock:
        if _shared is None:
            pool = GradingPool(default_workers(os.environ))
            atexit.register(pool.close)
            _shared = pool
        return _shared


def share_pool(grader: Grader | None) -> None:
    """Let the rewards of this process grade with another pool from now on, None for a new one of the default size.

    The former one is left as it is.
    """
    global _shared  # noqa: PLW0603
    with _shared_lock:
        _shared = grader


def default_workers(environ: Mapping[str, str]) -> int:
    """Return this rank's part of the processors that its node and its container let it use."""
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    allowed = min(processors, processor_limit(Path("/sys/fs/cgroup")))
    return max(1, int(allowed) // int(environ.get("LOCAL_WORLD_SIZE", "1")))


def processor_limit(groups: Path) -> float:
    """Return the limit of a container whose control groups are mounted there, in processors; infinity: it has none."""
    if (file := groups / "cpu.max").is_file():  # version 2
        quota, period = file.read_text().split()
    elif (file := groups / "cpu" / "cpu.cfs_quota_us").is_file():  # version 1
        quota, period = file.read_text().strip(), file.with_name("cpu.cfs_period_us").read_text()
    else:
        return math.inf
    return math.inf if quota in {"max", "-1"} else int(quota) / int(period)


def _forget_shared() -> None:
    """A forked process has neither the threads nor the sockets to itself."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_shared)
