"""How an attempt ends: which of the many errors of a gang is the cause, and which budget it is charged to.

It owns the judgement over the pods of one attempt; it must not decide whether the run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from posttrain.api.reasons import CONSEQUENCES, REASONS, advice_for
from posttrain.api.training_run_status import FirstErrorReport, ResultReport
from posttrain.contract.result import ExitCode, Result, parse_termination_message
from posttrain.plan.manifests import (
    deletion_requested,
    is_being_deleted,
    is_live,
    node_name,
    parse_time,
    pod_condition,
    pod_phase,
    terminated_state,
)
from posttrain.plan.names import pod_name
from posttrain.plan.pytorchjob import JobState
from posttrain.plan.trainer_pod import TRAINER_CONTAINER
from posttrain.plan.types import Manifest

Budget = Literal["infrastructure", "application", "none"]

COMPLETED = "Completed"
TERMINATED = "Terminated"
NON_FINITE = "NonFiniteLoss"

_SETTLING = timedelta(seconds=10)
"""How long the other pods of a failed gang may take to say their part: the first to be seen is not always the cause."""
_RESULT_GRACE = timedelta(seconds=60)
"""How long the result of a gang that ended well may take to arrive."""

_SIGKILLED = 137
_SIGNALS_OF_ITS_OWN = frozenset({132, 134, 135, 136, 139})
"""128 plus SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV."""

_NODE_GONE = frozenset({"DeletionByPodGC", "DeletionByTaintManager"})
_NODE_REASONS = frozenset({"NodeLost", "NodeShutdown", "NodeAffinity"})

_BUDGETS: dict[str, Budget] = {
    "ConfigInvalid": "none",
    "CheckpointUnusable": "none",
    "CodeImportFailed": "none",
    "StorageHoldsAnotherRun": "none",
    "Evicted": "infrastructure",
    "NcclTimeout": "infrastructure",
    "NodeLost": "infrastructure",
    "PeerLost": "infrastructure",
    "PodDeleted": "infrastructure",
    "RankKilled": "infrastructure",
    "Terminated": "infrastructure",
}
"""Where no exit code says it; every other reason is the application's."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an attempt ended, and the budget that its successor is charged to."""

    reason: str
    message: str
    budget: Budget
    pod: str | None = None
    node: str | None = None
    rank: int | None = None
    exit_code: int | None = None
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One attempt as it is observed."""

    run: str
    attempt: int
    size: int
    ranks_per_node: int
    job: JobState | None
    pods: tuple[Manifest, ...]
    hash_when_running: str | None
    """`gang_hash` of the pods when all of them ran; None if that was never seen."""
    first_error: FirstErrorReport | None
    result: ResultReport | None
    departed: tuple[Manifest, ...] = ()
    """Last states of pods of it that the cluster took, or that somebody deleted."""

    @property
    def runs(self) -> bool:
        """Whether every pod of the gang is there and running."""
        return len(self.pods) == self.size and all(pod_phase(pod) == "Running" for pod in self.pods)


def gang_hash(pods: tuple[Manifest, ...]) -> str:
    """Return a short text that changes when a pod is replaced."""
    uids = sorted(f"{pod['metadata']['name']}={pod['metadata'].get('uid', '')}" for pod in pods)
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()[:16]


def completed_result(gang: Gang) -> ResultReport | None:
    """Return the result of a gang whose job succeeded and which says itself that it is complete."""
    if gang.job is None or gang.job.phase != "Succeeded":
        return None
    told = [gang.result] if gang.result is not None and gang.result.reason == COMPLETED else []
    for pod in gang.pods:
        result = _termination_result(pod)
        if result is not None and result.reason == COMPLETED and pod_phase(pod) == "Succeeded":
            told.append(
                ResultReport(
                    reason=result.reason,
                    message=result.message,
                    advice=result.advice or None,
                    metrics=result.metrics or None,
                    artifacts=result.artifacts or None,
                )
            )
    # Every node says so, and only rank 0's knows what was made: whoever is heard first.
    return next((result for result in told if result.artifacts), told[0] if told else None)


def settling_until(gang: Gang, *, now: datetime) -> datetime | None:
    """Return until when to wait before an ended gang is judged, or None to judge it now."""
    if gang.job is None:
        return None
    if gang.job.phase == "Succeeded" and gang.job.ended is not None:
        return _later(gang.job.ended + _RESULT_GRACE, now)
    ends = [end for pod in gang.pods if pod_phase(pod) == "Failed" and (end := _finished_at(pod)) is not None]
    if not ends or not any(is_live(pod, now=now) and not is_being_deleted(pod) for pod in gang.pods):
        return None
    return _later(min(ends) + _SETTLING, now)


def _later(time: datetime, now: datetime) -> datetime | None:
    return time if time > now else None


def find_cause(gang: Gang, *, now: datetime) -> Cause | None:
    """Return why the gang has ended, or None while it has not. `completed_result` is asked first."""
    if gang.job is None or gang.job.being_deleted:
        return Cause(
            reason="JobDeleted",
            message=f"attempt {gang.attempt}: its PyTorchJob was deleted by somebody else",
            budget="infrastructure",
        )
    failed = any(pod_phase(pod) == "Failed" for pod in gang.pods)
    if gang.job.phase == "Failed" or failed:
        error = _earliest_error(gang, now=now)
        if error is not None and error.reason not in CONSEQUENCES:
            return error
        return _disrupted(gang, now=now) or _deleted(gang) or error or _unexplained(gang)
    if gang.job.phase == "Succeeded":
        return _ended_without_result(gang)
    return _lost_pod(gang, now=now)


def _lost_pod(gang: Gang, *, now: datetime) -> Cause | None:
    if gang.hash_when_running is None or gang_hash(gang.pods) == gang.hash_when_running:
        return None
    disrupted = _disrupted(gang, now=now)
    if disrupted is not None:
        return disrupted
    expected = [pod_name(gang.run, attempt=gang.attempt, node=node) for node in range(gang.size)]
    missing = sorted(set(expected) - {pod["metadata"]["name"] for pod in gang.pods})
    if missing:
        message = f"attempt {gang.attempt}: pod {missing[0]} was deleted while the gang ran"
    else:
        message = f"attempt {gang.attempt}: a pod was replaced while the gang ran; the other ranks wait for the old one"
    return Cause(reason="PodDeleted", message=message, budget="infrastructure", pod=missing[0] if missing else None)


def _disrupted(gang: Gang, *, now: datetime) -> Cause | None:
    """Return why the cluster took a pod of which nothing is left: that of a lost node goes as it says so."""
    taken = (pod for pod in gang.departed if _disruption(pod) is not None)
    errors = [error for pod in taken if (error := _pod_error(gang, pod, now=now)) is not None]
    return min(errors, key=lambda error: error.time).cause if errors else None


def _deleted(gang: Gang) -> Cause | None:
    """Return which pod somebody deleted before any other had ended: the others of its gang go because of that.

    Its node has nothing to do with it. The training operator may delete the others within the same second, the unit of
    these times: then all of them are named, and what the job says.
    """
    pods = (*gang.departed, *gang.pods)
    requested = {pod["metadata"]["name"]: time for pod in pods if (time := deletion_requested(pod)) is not None}
    if not requested:
        return None
    first = min(requested.values())
    ends = [end for pod in gang.pods if not is_being_deleted(pod) and (end := _finished_at(pod)) is not None]
    if ends and min(ends) < first:
        return None
    deleted = sorted(name for name, time in requested.items() if time == first)
    message = f"attempt {gang.attempt}: pod {deleted[0]} was deleted while the gang ran"
    if len(deleted) > 1:
        said = f" (the job says: {gang.job.message})" if gang.job is not None and gang.job.message else ""
        names = ", ".join(deleted)
        message = f"attempt {gang.attempt}: pods {names} were deleted in the same second while the gang ran{said}"
    pod = deleted[0] if len(deleted) == 1 else None
    return Cause(reason="PodDeleted", message=message, budget="infrastructure", pod=pod)


def _ended_without_result(gang: Gang) -> Cause:
    said = gang.result or next((r for pod in gang.pods if (r := _termination_result(pod)) is not None), None)
    what = f"it says {said.reason}: {said.message}" if said else "it left no result"
    return Cause(
        reason="TrainingFailed",
        message=f"attempt {gang.attempt}: the job ended without an error, but is not complete: {what}",
        budget="application",
    )


def _unexplained(gang: Gang) -> Cause:
    message = gang.job.message if gang.job else ""
    return Cause(
        reason="PodDeleted",
        message=f"attempt {gang.attempt}: the job failed and no pod is left that says why"
        + (f" (the job says: {message})" if message else ""),
        budget="infrastructure",
    )


# --- The cause among many errors -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Error:
    weight: int
    """How likely it is a consequence of another one (`_WEIGHTS`)."""
    time: datetime
    cause: Cause


def _earliest_error(gang: Gang, *, now: datetime) -> Cause | None:
    """Return the earliest error that is not a consequence: the contract's order of judgement (Failure)."""
    errors = [error for pod in gang.pods if (error := _pod_error(gang, pod, now=now)) is not None]
    if gang.first_error is not None:
        errors.append(_reported_error(gang, gang.first_error, errors))
    if not errors:
        return None
    return min(errors, key=lambda error: (error.weight, error.time)).cause


_WEIGHTS = {"TrainingFailed": 1, "RankCrashed": 1, "NcclTimeout": 2, **dict.fromkeys(CONSEQUENCES, 3)}
"""When a rank is gone, the others fail too, sooner than its node's end is noticed: by a closed connection, an abort in
native code, a timeout. A reason that says what happened comes before those; a mere consequence is never the cause."""


def _weight(reason: str) -> int:
    return _WEIGHTS.get(reason, 0)


def _known(reason: str) -> str:
    """Return the reason, or TrainingFailed for a word that no catalogue explains."""
    return reason if reason in REASONS else "TrainingFailed"


def _reported_error(gang: Gang, reported: FirstErrorReport, errors: list[_Error]) -> _Error:
    """Return the error that a rank reported as a fact, with what its pod adds to it."""
    name = None
    if reported.rank is not None:
        name = pod_name(gang.run, attempt=gang.attempt, node=reported.rank // gang.ranks_per_node)
    of_pod = next((error.cause for error in errors if name is not None and error.cause.pod == name), None)
    reason = _known(reported.reason)
    agrees = of_pod is not None and of_pod.reason == reason
    cause = Cause(
        reason=reason,
        message=f"attempt {gang.attempt}: {reported.message}",
        budget=of_pod.budget if of_pod and agrees else _BUDGETS.get(reason, "application"),
        pod=name,
        node=of_pod.node if of_pod else None,
        rank=reported.rank,
        exit_code=of_pod.exit_code if of_pod and agrees else None,
        advice=(of_pod.advice if of_pod and agrees else "") or advice_for(reason),
    )
    return _Error(weight=_weight(reason), time=reported.time, cause=cause)


def _pod_error(gang: Gang, pod: Manifest, *, now: datetime) -> _Error | None:
    disruption = _disruption(pod)
    if disruption is not None:
        reason, detail, since = disruption
        cause = Cause(
            reason=reason,
            message=_message(gang, pod, detail),
            budget="infrastructure",
            pod=pod["metadata"]["name"],
            node=node_name(pod),
        )
        return _Error(weight=0, time=since or _finished_at(pod) or now, cause=cause)
    if pod_phase(pod) != "Failed":
        return None
    terminated = terminated_state(pod, TRAINER_CONTAINER) or {}
    cause = _container_cause(gang, pod, terminated)
    return _Error(weight=_weight(cause.reason), time=_finished_at(pod) or now, cause=cause)


def _disruption(pod: Manifest) -> tuple[str, str, datetime | None] | None:
    """Return (reason, what happened, since when) where the cluster, not the container, ended the pod."""
    status = pod.get("status") or {}
    if status.get("reason") in _NODE_REASONS:
        return "NodeLost", status.get("message") or REASONS["NodeLost"].message, None
    target = pod_condition(pod, "DisruptionTarget")
    if target is not None and target.get("status") == "True":
        reason = "NodeLost" if target.get("reason") in _NODE_GONE else "Evicted"
        told = target.get("message") or status.get("message") or target.get("reason")
        detail = told or REASONS[reason].message
        return reason, detail, parse_time(target.get("lastTransitionTime"))
    if status.get("reason") == "Evicted":
        return "Evicted", status.get("message") or REASONS["Evicted"].message, None
    return None


def _container_cause(gang: Gang, pod: Manifest, terminated: Mapping[str, Any]) -> Cause:
    code = terminated.get("exitCode")
    result = _termination_result(pod)
    said = _known(result.reason) if result is not None and result.reason != COMPLETED else None
    reason = "HostOutOfMemory" if terminated.get("reason") == "OOMKilled" else said or _reason_of_code(code)
    detail = result.message if result is not None and said == reason else REASONS[reason].message
    return Cause(
        reason=reason,
        message=_message(gang, pod, f"{detail.rstrip('.')} (exit code {code})" if code is not None else detail),
        budget=_budget_of_code(code, reason=reason),
        pod=pod["metadata"]["name"],
        node=node_name(pod),
        rank=result.rank if result else None,
        exit_code=code,
        advice=(result.advice if result else "") or advice_for(reason),
    )


def _reason_of_code(code: int | None) -> str:
    if code is None:
        return "PodDeleted"
    if code == ExitCode.INVALID:
        return "ConfigInvalid"
    if code in (_SIGKILLED, ExitCode.TRANSIENT):
        return "RankKilled"
    if code == ExitCode.TERMINATED:
        return TERMINATED
    return "RankCrashed" if code in _SIGNALS_OF_ITS_OWN else "TrainingFailed"


def _budget_of_code(code: int | None, *, reason: str) -> Budget:
    if reason == "HostOutOfMemory":
        return "application"
    if code == ExitCode.INVALID:
        return "none"
    if code is None or code in (ExitCode.TRANSIENT, ExitCode.TERMINATED, _SIGKILLED):
        return "infrastructure"
    return "application"


def _message(gang: Gang, pod: Manifest, detail: str) -> str:
    node = node_name(pod)
    where = f"pod {pod['metadata']['name']}" + (f" on node {node}" if node else "")
    return f"attempt {gang.attempt}, {where}: {detail}"


def _termination_result(pod: Manifest) -> Result | None:
    message = (terminated_state(pod, TRAINER_CONTAINER) or {}).get("message")
    return parse_termination_message(message) if message else None


def _finished_at(pod: Manifest) -> datetime | None:
    return parse_time((terminated_state(pod, TRAINER_CONTAINER) or {}).get("finishedAt"))
