"""The process of every container: it starts the work, passes SIGTERM on, and tells how it ended.

    python -m posttrain_workloads.launch sft
    python -m posttrain_workloads.launch prepare

It alone writes the termination message and the exit code. It must not import torch, nor decide anything about training.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from posttrain.api.reasons import advice_for
from posttrain.contract import environment
from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import ResultFact
from posttrain.contract.result import ExitCode, Result, to_termination_message
from posttrain_workloads.reporting import Reporter, open_reporter
from posttrain_workloads.runtime import Runtime
from posttrain_workloads.storage import StorageHoldsAnotherRun, claim_storage
from posttrain_workloads.verdict import Evidence, Verdict, judge

_TAIL_LINES = 50
_LINE_MAX_BYTES = 64 * 1024
_POLL_SECONDS = 0.2
_LAST_LINES_SECONDS = 5.0


def main() -> None:
    """Run one workload to its end and leave with its exit code."""
    parser = argparse.ArgumentParser(prog="posttrain_workloads.launch")
    parser.add_argument("workload", choices=("sft", "grpo", "prepare"))
    workload: str = parser.parse_args().workload
    sys.exit(launch(workload, environ=os.environ))


def launch(workload: str, *, environ: Mapping[str, str]) -> int:
    """Run one workload to its end; report its result; return the container's exit code."""
    stop = Stop()
    termination = Path(environ[environment.TERMINATION])
    try:
        config = TrainingConfig.from_json(Path(environ[environment.CONFIG]).read_text())
    except (OSError, ValidationError) as error:
        result = Result(
            reason="ConfigInvalid",
            message=f"config.json cannot be read: {error}",
            advice="The image and the operator are of different versions: use the image that the settings name.",
        )
        termination.write_text(to_termination_message(result))
        return ExitCode.INVALID

    node = int(environ.get("PET_NODE_RANK", "0"))
    storage = Path(environ[environment.STORAGE])
    try:
        claim_storage(storage, config)
    except StorageHoldsAnotherRun as error:
        reason = "StorageHoldsAnotherRun"
        verdict = Verdict(
            result=Result(reason=reason, message=str(error), advice=advice_for(reason)), exit_code=ExitCode.INVALID
        )
        reporter = open_reporter(config, environ=environ, source=f"launch-{node}", keep=False)
        return _tell(verdict, reporter=reporter, termination=termination, last_step=None)

    reporter = open_reporter(config, environ=environ, source=f"launch-{node}", node=node)
    reporter.beat(phase="preparing" if workload == "prepare" else "loading")
    reporter.resend()
    runtime = Runtime.of(environ)
    runtime.folder.mkdir(parents=True, exist_ok=True)
    evidence = _run(workload, config=config, node=node, environ=environ, runtime=runtime, stop=stop)
    return _tell(judge(evidence), reporter=reporter, termination=termination, last_step=runtime.last_step())


class Stop:
    """Whether SIGTERM has come, from the moment that this is made."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.requested = True


def _run(
    workload: str, *, config: TrainingConfig, node: int, environ: Mapping[str, str], runtime: Runtime, stop: Stop
) -> Evidence:
    """Run the workload's processes and return what is known of their end."""
    ooms_before = count_oom_kills()
    logs = Logs()
    local_ranks = config.gang.processes_per_node if workload != "prepare" else 0
    with logs.pipes(runtime, first_rank=node * local_ranks, count=local_ranks):
        child = subprocess.Popen(
            _command(workload),
            env={
                **environ,
                "PATH": os.pathsep.join((str(Path(sys.executable).parent), environ.get("PATH", os.defpath))),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert child.stdout is not None
        logs.follow(child.stdout.fileno(), rank=None)
        exit_code = _supervise(child, runtime=runtime, stop=stop)
    return Evidence(
        exit_code=exit_code,
        now=datetime.now(UTC),
        oom_kills=count_oom_kills() - ooms_before,
        errors=runtime.errors(),
        exits=runtime.exits(),
        terminated=stop.requested,
        result=runtime.result(),
        planned_world_size=config.gang.world_size if workload != "prepare" else None,
        given_world_size=_given_world_size(environ),
        tails=logs.tails(),
    )


def _command(workload: str) -> list[str]:
    if workload == "prepare":
        return [sys.executable, "-u", "-m", "posttrain_workloads.prepare"]
    torchrun = [sys.executable, "-u", "-m", "posttrain_workloads.ranks", str(os.getpid())]
    return [*torchrun, "--max-restarts", "0", "-m", f"posttrain_workloads.{workload}"]


def _supervise(child: subprocess.Popen[bytes], *, runtime: Runtime, stop: Stop) -> int:
    """Wait for the end. On SIGTERM: end what has nothing to save, else ask for a checkpoint and wait for it."""
    told = False
    while True:
        try:
            return child.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if stop.requested and not told:
            told = True
            # Both, in this order: ranks that begin to train in this very moment find the request.
            runtime.request_stop()
            if not runtime.training_began():
                child.terminate()


def _tell(verdict: Verdict, *, reporter: Reporter, termination: Path, last_step: int | None) -> int:
    """Write the termination message, send the facts, return the exit code."""
    result = verdict.result
    print(f"posttrain: {result.reason}: {result.message}", file=sys.stderr, flush=True)
    termination.write_text(to_termination_message(result))
    if verdict.first_error is not None:
        reporter.send(verdict.first_error)
    reporter.send(ResultFact(result=result, last_step=last_step))
    reporter.flush(timeout_seconds=1)  # into the log, so that `resend` finds only what others left
    reporter.resend()
    reporter.close(timeout_seconds=5)
    return verdict.exit_code


def _given_world_size(environ: Mapping[str, str]) -> int | None:
    try:
        return int(environ.get("PET_NNODES", "1")) * int(environ.get("PET_NPROC_PER_NODE", "1"))
    except ValueError:
        return None  # `gpu`, or a range of nodes


# --- Logs ------------------------------------------------------------------------------------------------------------


class Logs:
    """Passes every line of the processes on to stdout, with its rank before it, and remembers the last ones."""

    def __init__(self) -> None:
        self._tails: dict[int | None, deque[str]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    @contextmanager
    def pipes(self, runtime: Runtime, *, first_rank: int, count: int) -> Iterator[None]:
        """Keep a named pipe for each rank of this pod; a rank that finds none writes into torchrun's output."""
        writers = []
        for local_rank in range(count):
            pipe = runtime.log_pipe(local_rank)
            os.mkfifo(pipe)
            # Read and write: opening does not wait for the rank, and no end of file is seen before it opens.
            reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            writers.append(os.open(pipe, os.O_WRONLY))
            os.set_blocking(reader, True)
            self.follow(reader, rank=first_rank + local_rank)
        try:
            yield
        finally:
            for writer in writers:
                os.close(writer)
            for thread in self._threads:
                thread.join(timeout=_LAST_LINES_SECONDS)

    def follow(self, descriptor: int, *, rank: int | None) -> None:
        """Pass on what comes out of a pipe until its last writer has closed it."""
        self._tails[rank] = deque(maxlen=_TAIL_LINES)
        thread = threading.Thread(target=self._pump, args=(descriptor, rank), name=f"log-{rank}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def tails(self) -> dict[int | None, tuple[str, ...]]:
        """Return the last lines by rank."""
        return {rank: tuple(lines) for rank, lines in self._tails.items()}

    def _pump(self, descriptor: int, rank: int | None) -> None:
        prefix = b"" if rank is None else f"[rank {rank}] ".encode()
        with os.fdopen(descriptor, "rb", closefd=rank is not None) as stream:
            for line in iter(partial(stream.readline, _LINE_MAX_BYTES), b""):
                self._tails[rank].append(line.decode(errors="replace").rstrip())
                with self._lock:
                    sys.stdout.buffer.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
                    sys.stdout.buffer.flush()


# --- The container ---------------------------------------------------------------------------------------------------


def count_oom_kills(*, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes of this container the kernel has killed for memory; 0 where it does not say.

    Inside a container the mount shows the container's own cgroup at its root, on a bare machine all of them.
    """
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, file = root, "memory.events"
        elif "memory" in controllers.split(","):
            folder, file = root / "memory", "memory.oom_control"
        else:
            continue
        for counters in (folder / path.lstrip("/") / file, folder / file):
            try:
                values = dict(row.split() for row in counters.read_text().splitlines())
            except OSError:
                continue
            return int(values.get("oom_kill", "0"))
    return 0


if __name__ == "__main__":
    main()
