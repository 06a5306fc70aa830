"""The runtime folder: how the processes of one pod and their launch talk to each other.

It owns the names and shapes of the files there; it must not judge what they mean, nor import torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, Self

from posttrain.api.reasons import advice_for
from posttrain.contract import environment
from posttrain.contract.config import ContractModel
from posttrain.contract.result import ExitCode, Result

_PR_SET_PDEATHSIG = 1
_MESSAGE_MAX_LENGTH = 4000


class RankError(ContractModel):
    """How a rank failed, in its own words: `rank-<rank>.error.json`."""

    rank: int
    time: float
    """Seconds since the epoch, by this machine's clock."""
    reason: str
    message: str
    exit_code: int
    advice: str = ""

    @classmethod
    def of(cls, failure: RankFailure, *, rank: int) -> Self:
        """Return a failure of this moment in the shape that travels."""
        return cls(
            rank=rank,
            time=time.time(),
            reason=failure.reason,
            message=str(failure)[:_MESSAGE_MAX_LENGTH],
            exit_code=int(failure.exit_code),
            advice=failure.advice or advice_for(failure.reason),
        )


class RankFailure(Exception):
    """An end that the rank itself has a reason for; whoever catches it at the top writes the error file."""

    def __init__(self, reason: str, message: str, *, exit_code: ExitCode = ExitCode.FAILED, advice: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code
        self.advice = advice


class Runtime:
    """The files of one runtime folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """Return the runtime folder that the environment names."""
        return cls(Path(environ[environment.RUNTIME]))

    # --- Written by ranks --------------------------------------------------------------------------------------------

    def write_error(self, failure: RankFailure, *, rank: int) -> None:
        """Leave word of a failure; only the first one of a rank counts."""
        target = self.folder / f"rank-{rank}.error.json"
        if not target.exists():
            _write(target, RankError.of(failure, rank=rank).model_dump_json())

    def write_result(self, result: Result) -> None:
        """Leave the result that launch is to report if every process ends well."""
        _write(self.folder / "result.json", result.model_dump_json())

    def write_last_step(self, step: int) -> None:
        """Remember the step that was done last."""
        _write(self.folder / "last-step", str(step))

    def mark_training(self) -> None:
        """Say that from now on there is something to save before the end."""
        (self.folder / "training").touch()

    def stop_requested(self) -> bool:
        """Tell whether the ranks are to save a checkpoint and end."""
        return (self.folder / "stop").exists()

    # --- Written by torchrun's wrapper -------------------------------------------------------------------------------

    def write_exits(self, exits: Mapping[int, tuple[int, float]]) -> None:
        """Leave the exit code (negative: a signal) and the time of each rank that failed, by global rank."""
        _write(self.folder / "exits.json", json.dumps({str(rank): list(end) for rank, end in exits.items()}))

    # --- Used by launch ----------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        (self.folder / "stop").touch()

    def training_began(self) -> bool:
        """Tell whether the ranks have something to save."""
        return (self.folder / "training").exists()

    def errors(self) -> tuple[RankError, ...]:
        """Return what the ranks left, the earliest first."""
        errors = [RankError.model_validate_json(file.read_bytes()) for file in self.folder.glob("rank-*.error.json")]
        return tuple(sorted(errors, key=lambda error: error.time))

    def exits(self) -> dict[int, tuple[int, float]]:
        """Return the exit code and time of each rank that torchrun saw failing."""
        file = self.folder / "exits.json"
        if not file.exists():
            return {}
        return {int(rank): (code, when) for rank, (code, when) in json.loads(file.read_text()).items()}

    def result(self) -> Result | None:
        """Return the result that the workload left."""
        file = self.folder / "result.json"
        return Result.model_validate_json(file.read_bytes()) if file.exists() else None

    def last_step(self) -> int | None:
        """Return the step that was done last."""
        file = self.folder / "last-step"
        return int(file.read_text()) if file.exists() else None

    def log_pipe(self, local_rank: int) -> Path:
        """Return the named pipe into which a rank of this pod writes its log."""
        return self.folder / f"log-{local_rank}"


def end_rank(
    failure: RankFailure, *, environ: Mapping[str, str], first: Callable[[], object] | None = None
) -> NoReturn:
    """Leave word of a failure, do what is to be done `first`, and end this rank, from whatever thread."""
    Runtime.of(environ).write_error(failure, rank=int(environ["RANK"]))
    if first is not None:
        first()
    sys.stderr.flush()
    # Not sys.exit: the process groups' and the data loaders' own clean-up may wait for ranks that are gone.
    os._exit(failure.exit_code)


def _write(target: Path, text: str) -> None:
    """Write a file that its readers see whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(target)


def die_with_parent(parent: int | None = None) -> None:
    """End this process, however hard, when its parent ends.

    `parent` is the parent's process id where the caller knows it: then an end before this call counts too.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    else:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), name="watch-parent", daemon=True).start()
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    """Do what PR_SET_PDEATHSIG does, where there is none."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
