"""How the libraries' errors are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.contract.result import ExitCode
from posttrain_workloads.failures import explain_failure
from posttrain_workloads.runtime import RankFailure, Runtime

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23456"
NCCL = "NCCL communicator was aborted on rank 1. Original reason: Watchdog caught collective operation timeout"


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError, which is not importable here."""


class DistBackendError(RuntimeError):
    """As torch.distributed.DistBackendError."""


def outcome(error: BaseException) -> tuple[str, int]:
    failure = explain_failure(error)
    return failure.reason, failure.exit_code


@pytest.mark.parametrize(
    ("error", "reason", "exit_code"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CudaOutOfMemory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "HostOutOfMemory", 1),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "DiskFull", 1),
        (RuntimeError(GLOO), "PeerLost", 138),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), "PeerLost", 138),
        (DistBackendError(NCCL), "NcclTimeout", 138),
        (ValueError("the timeout of my own code"), "TrainingFailed", 1),
        (ConnectionResetError("Connection reset by peer"), "TrainingFailed", 1),
        (RankFailure("ConfigInvalid", "no", exit_code=ExitCode.INVALID), "ConfigInvalid", 2),
    ],
)
def test_an_error_is_known_by_its_class_and_text(error: BaseException, reason: str, exit_code: int) -> None:
    assert outcome(error) == (reason, exit_code)


def test_a_full_disk_is_known_by_the_systems_own_error() -> None:
    with pytest.raises(OSError) as caught, Path("/dev/full").open("w") as file:
        file.write("x")
        file.flush()
    assert outcome(caught.value) == ("DiskFull", 1)


def test_the_cause_counts_whatever_it_was_wrapped_in() -> None:
    try:
        try:
            raise OutOfMemoryError("CUDA out of memory")
        except OutOfMemoryError as error:
            raise RuntimeError("the step failed") from error
    except RuntimeError as error:
        assert outcome(error) == ("CudaOutOfMemory", 1)


def test_an_unknown_error_is_told_in_its_own_words() -> None:
    assert str(explain_failure(KeyError("labels"))) == "KeyError: 'labels'"


def test_only_the_first_error_of_a_rank_is_kept(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    runtime.write_error(RankFailure("DiskFull", "first"), rank=1)
    runtime.write_error(RankFailure("TrainingFailed", "second"), rank=1)
    runtime.write_error(RankFailure("PeerLost", "other"), rank=0)
    assert [(error.rank, error.reason, error.message) for error in runtime.errors()] == [
        (1, "DiskFull", "first"),
        (0, "PeerLost", "other"),
    ]
    assert "checkpoints.keepLast" in runtime.errors()[0].advice
