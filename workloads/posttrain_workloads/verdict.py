"""How a container ended, judged from what it left behind.

It owns the order in which evidence counts; it must not read files, clocks or processes.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from posttrain.api.reasons import CONSEQUENCES, REASONS, advice_for
from posttrain.contract.facts import FirstError
from posttrain.contract.result import ExitCode, Result
from posttrain_workloads.runtime import RankError

_KILLED = frozenset({-signal.SIGKILL, -signal.SIGBUS})
_CRASHED = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE, -signal.SIGTRAP})
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a container's processes when the last of them has ended."""

    exit_code: int
    """Of the process that launch started; negative: a signal."""
    now: datetime
    oom_kills: int = 0
    """By how much the container's OOM counter grew."""
    errors: tuple[RankError, ...] = ()
    """Error files, the earliest first."""
    exits: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """Exit code (negative: a signal) and time of each rank that torchrun saw failing, by global rank."""
    terminated: bool = False
    """SIGTERM came from outside."""
    result: Result | None = None
    """What the workload left in case all ends well."""
    planned_world_size: int | None = None
    given_world_size: int | None = None
    """What torchrun's environment amounts to."""
    tails: Mapping[int | None, tuple[str, ...]] = field(default_factory=dict)
    """The last lines of each rank's log, by global rank; None: of torchrun's or the single process's own."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result to report, the container's exit code, and the error to tell of, if that is a cause."""

    result: Result
    exit_code: int
    first_error: FirstError | None = None


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict of the first check that has one."""
    for check in CHECKS:
        if verdict := check(evidence):
            return verdict
    raise AssertionError("the last check always has a verdict")


def completed(evidence: Evidence) -> Verdict | None:
    """Every process ended well, whatever was asked of it meanwhile."""
    if evidence.exit_code != 0 or evidence.errors:
        return None  # ranks that were told to stop end well, and leave word of it
    result = evidence.result or Result(reason="Completed", message=REASONS["Completed"].message)
    return Verdict(result=result, exit_code=ExitCode.DONE)


def out_of_memory(evidence: Evidence) -> Verdict | None:
    """The kernel killed something of this container for its memory: whatever else went wrong follows from it."""
    if evidence.oom_kills <= 0:
        return None
    rank, when = _first_exit(evidence, _KILLED)
    message = "the container reached its memory limit, and the kernel killed "
    message += f"{evidence.oom_kills} of its processes" if evidence.oom_kills > 1 else "one of its processes"
    return _failed(evidence, "HostOutOfMemory", message, rank=rank, when=when)


def rank_failed(evidence: Evidence) -> Verdict | None:
    """A rank said why; the earliest counts, for the others' errors follow from it."""
    error = next((error for error in evidence.errors if error.reason not in CONSEQUENCES), None)
    return _of_error(error) if error else None


def terminated(evidence: Evidence) -> Verdict | None:
    """We were told to stop and nothing broke: what died of a signal died of that."""
    ends = {code for code, _ in evidence.exits.values()}
    if not evidence.terminated or not ends <= {-signal.SIGTERM, -signal.SIGKILL}:
        return None
    return _terminated(evidence)


def rank_killed(evidence: Evidence) -> Verdict | None:
    """A rank, or what held the ranks together, was killed and could not say why."""
    rank, when = _first_exit(evidence, _KILLED)
    if rank is not None:
        message = f"rank {rank} was ended by {_signal_name(evidence.exits[rank][0])}, from outside"
    elif evidence.exit_code in _KILLED:
        message = f"the container's main process was ended by {_signal_name(evidence.exit_code)}, from outside"
    else:
        return None
    return _failed(evidence, "RankKilled", message, rank=rank, when=when, exit_code=ExitCode.TRANSIENT)


def rank_crashed(evidence: Evidence) -> Verdict | None:
    """A rank ended by a signal of its own making."""
    rank, when = _first_exit(evidence, _CRASHED)
    if rank is not None:
        code = evidence.exits[rank][0]
        what = f"rank {rank} ended by {_signal_name(code)}"
    elif evidence.exit_code in _CRASHED:
        what = f"the process ended by {_signal_name(evidence.exit_code)}"
    else:
        return None
    return _failed(evidence, "RankCrashed", what + _quote(_tail(evidence, rank)), rank=rank, when=when)


def peer_lost(evidence: Evidence) -> Verdict | None:
    """Nothing broke here, but a rank lost one that is elsewhere, or was told to stop."""
    return _of_error(evidence.errors[0]) if evidence.errors else None


def signalled(evidence: Evidence) -> Verdict | None:
    """A SIGTERM came past launch."""
    codes = {code for code, _ in evidence.exits.values()} or {evidence.exit_code}
    return _terminated(evidence) if codes == {-signal.SIGTERM} else None


def gang_differs(evidence: Evidence) -> Verdict | None:
    """Torchrun itself failed, and was told of another gang than the one that was planned."""
    planned, given = evidence.planned_world_size, evidence.given_world_size
    if evidence.exits or planned is None or planned == given:
        return None
    message = f"torchrun failed: its PET_* variables make {given} ranks, where {planned} are planned"
    return _failed(evidence, "WorldSizeMismatch", message + _quote(_tail(evidence, None)), exit_code=ExitCode.INVALID)


def failed_without_a_word(evidence: Evidence) -> Verdict | None:
    """All that is left is the log."""
    rank, when = _first_exit(evidence, None)
    who = "the process" if rank is None else f"rank {rank}"
    code = evidence.exit_code if rank is None else evidence.exits[rank][0]
    ended = f"ended by {_signal_name(code)}" if code < 0 else f"ended with exit code {code}"
    return _failed(evidence, "TrainingFailed", f"{who} {ended}{_quote(_tail(evidence, rank))}", rank=rank, when=when)


CHECKS = (
    completed,  # every process ended with 0
    out_of_memory,  # the OOM counter grew
    rank_failed,  # an error file, other than of a consequence
    terminated,  # SIGTERM, and nothing else
    rank_killed,  # SIGKILL, SIGBUS
    rank_crashed,  # SIGSEGV, SIGABRT, …
    peer_lost,  # an error file of a consequence
    signalled,  # a SIGTERM that launch did not see
    gang_differs,  # torchrun could not begin
    failed_without_a_word,  # the last lines of the log
)


def _of_error(error: RankError) -> Verdict:
    first = None
    if error.reason not in CONSEQUENCES:
        when = datetime.fromtimestamp(error.time, UTC)
        first = FirstError(rank=error.rank, time=when, reason=error.reason, message=error.message)
    result = Result(reason=error.reason, message=error.message, advice=error.advice, rank=error.rank)
    return Verdict(result=result, exit_code=error.exit_code, first_error=first)


def _failed(
    evidence: Evidence,
    reason: str,
    message: str,
    *,
    rank: int | None = None,
    when: datetime | None = None,
    exit_code: ExitCode = ExitCode.FAILED,
) -> Verdict:
    return Verdict(
        result=Result(reason=reason, message=message, advice=advice_for(reason), rank=rank),
        exit_code=exit_code,
        first_error=FirstError(rank=rank, time=when or evidence.now, reason=reason, message=message),
    )


def _terminated(evidence: Evidence) -> Verdict:
    saved = next((error.message for error in evidence.errors if error.reason == "Terminated"), None)
    result = Result(reason="Terminated", message=saved or REASONS["Terminated"].message)
    return Verdict(result=result, exit_code=ExitCode.TERMINATED)


def _first_exit(evidence: Evidence, codes: frozenset[int] | None) -> tuple[int | None, datetime | None]:
    """Return the rank that ended first with one of the codes (None: with any that torchrun did not cause itself)."""
    wanted = {
        rank: when
        for rank, (code, when) in evidence.exits.items()
        if (code in codes if codes is not None else code != -signal.SIGTERM)
    }
    if not wanted:
        return None, None
    rank = min(wanted, key=lambda rank: (wanted[rank], rank))
    return rank, datetime.fromtimestamp(wanted[rank], UTC)


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _tail(evidence: Evidence, rank: int | None) -> tuple[str, ...]:
    return evidence.tails.get(rank) or evidence.tails.get(None) or ()


def _quote(lines: tuple[str, ...]) -> str:
    return "; the log ends with:\n" + "\n".join(lines[-_TAIL_LINES:]) if lines else ""
