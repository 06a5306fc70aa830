"""From an exception in a rank to a reason of the catalogue and an exit code.

It owns how libraries' errors are told apart; it must not import torch: an error is known by its class's name and text.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from posttrain.contract.result import ExitCode
from posttrain_workloads.runtime import RankFailure

UNKNOWN = "TrainingFailed"
"""The reason where none is known from the error."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# torch.save and safetensors do not pass the system's error on.
_FULL_TEXTS = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter failed writing file")
_TIMEOUT_TEXTS = ("timed out", "timeout")
_PEER_TEXTS = (
    "connection closed by peer",
    "connection was likely closed",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "socket closed",
    "recvvalue failed",
    "ncclremoteerror",
)
# gloo's and c10d's errors are plain RuntimeErrors or these.
_DISTRIBUTED_CLASSES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
_DISTRIBUTED_TEXTS = ("gloo", "nccl", "tcpstore", "processgroup")


def explain_failure(error: BaseException) -> RankFailure:
    """Return the failure that an exception stands for."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, RankFailure):
            return link
    for link in chain:
        if failure := _known(link):
            return failure
    return RankFailure(UNKNOWN, _say(error))


def _known(error: BaseException) -> RankFailure | None:
    name, text = type(error).__name__, str(error).lower()
    if name == "OutOfMemoryError":
        return RankFailure("CudaOutOfMemory", _say(error))
    if isinstance(error, MemoryError) or "defaultcpuallocator: can't allocate memory" in text:
        return RankFailure("HostOutOfMemory", _say(error))
    if (isinstance(error, OSError) and error.errno in _FULL) or any(full in text for full in _FULL_TEXTS):
        return RankFailure("DiskFull", _say(error))
    if name in _DISTRIBUTED_CLASSES or (isinstance(error, RuntimeError) and any(t in text for t in _DISTRIBUTED_TEXTS)):
        if any(peer in text for peer in _PEER_TEXTS):
            return RankFailure("PeerLost", _say(error), exit_code=ExitCode.TRANSIENT)
        if any(timeout in text for timeout in _TIMEOUT_TEXTS):
            return RankFailure("NcclTimeout", _say(error), exit_code=ExitCode.TRANSIENT)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _say(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
