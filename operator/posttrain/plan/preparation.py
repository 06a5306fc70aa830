"""How far prepare has come, and what it found.

It owns the judgement over prepare's Job, pods and facts; it must not decide whether the run goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from posttrain.api.reasons import REASONS, advice_for
from posttrain.api.training_run_status import PrepareReport
from posttrain.contract.result import Result, parse_termination_message
from posttrain.plan import labels
from posttrain.plan.deadlines import prepare_deadline
from posttrain.plan.manifests import is_being_deleted, is_live, pod_phase, pods_of_role, terminated_state
from posttrain.plan.pods import find_obstacle, find_refusal
from posttrain.plan.prepare_job import parse_prepare_state, prepare_ref
from posttrain.plan.situation import Situation
from posttrain.plan.sources import moving_sources
from posttrain.plan.status import Says
from posttrain.plan.trainer_pod import PREPARE_CONTAINER
from posttrain.plan.types import Manifest

_RESULT_GRACE = timedelta(seconds=60)
"""How long the result of a Job that is complete may take to arrive."""

_NO_CAUSE = frozenset({"Completed", "Terminated", "PrepareFailed"})
_LEADING_WORD = re.compile(r"^(?P<reason>[A-Z][A-Za-z]+): ")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Unneeded: nothing is to be checked or resolved. Wanted: its Job is to be made. Running: it has not ended.

    `obstacle`: what keeps its pod from running.
    """

    state: Literal["Unneeded", "Wanted", "Running", "Done", "Failed"]
    reason: str = ""
    message: str = ""
    advice: str = ""
    pod: str | None = None
    exit_code: int | None = None
    commits: Mapping[str, str] = field(default_factory=dict)
    obstacle: Says | None = None
    look_again: datetime | None = None


def is_needed(situation: Situation) -> bool:
    """Return whether prepare runs: for its checks, or because a revision on the Hub is to be resolved to a commit."""
    prepare = situation.run.spec.prepare
    return prepare.enabled or prepare.dry_run or bool(moving_sources(situation.sources))


def judge_preparation(situation: Situation) -> Preparation:
    """Return how far prepare has come; it is asked before the first attempt only."""
    if not is_needed(situation):
        return Preparation(state="Unneeded")
    progress = situation.progress
    report = progress.prepare if progress else None
    pod = _newest_pod(situation)
    terminated = terminated_state(pod, PREPARE_CONTAINER) if pod else None
    result = parse_termination_message((terminated or {}).get("message") or "")
    job = situation.observed.objects.get(prepare_ref(situation.name))
    if job is None:
        if report is None:
            return Preparation(state="Wanted")
        if report.problems:
            return _failed(report, result, pod=pod, job_message="")
        return Preparation(state="Done", commits=report.commits or {})
    state = parse_prepare_state(job)
    if state.phase == "Failed" or (state.phase == "Complete" and report is not None and report.problems):
        return _failed(report, result, pod=pod, job_message=state.message)
    if state.phase == "Pending":
        return _judge_unfinished(situation)
    commits = (report.commits if report else None) or _commits(result)
    unresolved = sorted(set(moving_sources(situation.sources)) - set(commits))
    if not unresolved:
        return Preparation(state="Done", commits=commits)
    until = (state.ended or situation.now) + _RESULT_GRACE
    if state.ended is not None and situation.now < until:
        return Preparation(state="Running", look_again=until)
    return Preparation(
        state="Failed",
        reason="PrepareFailed",
        message=f"prepare ended well, but the commits of {', '.join(unresolved)} never arrived: was its pod deleted? "
        "Delete the run and apply it again",
        advice=advice_for("PrepareFailed"),
    )


def _judge_unfinished(situation: Situation) -> Preparation:
    """Return how far a Job has come that has not ended: its pod runs, or waits for as long as the user allows."""
    pods = pods_of_role(situation.observed.pods, labels.ROLE_PREPARE)
    job = prepare_ref(situation.name).name
    live = [pod for pod in pods if is_live(pod, now=situation.now)]
    waiting = [pod for pod in live if pod_phase(pod) == "Pending" and not is_being_deleted(pod)]
    refused = find_refusal(situation.observed.creation_events, of=job, missing=0 if live else 1, size=1)
    obstacle = refused or find_obstacle(waiting, events=situation.observed.pod_events)
    deadline = prepare_deadline(situation)
    if deadline is None or situation.now < deadline:
        return Preparation(state="Running", obstacle=obstacle, look_again=deadline)
    names = ", ".join(pod["metadata"]["name"] for pod in live)
    why = obstacle.message if obstacle else f"pod {names} has not started" if live else f"Job {job} makes no pod"
    seconds = situation.run.spec.pending_deadline_seconds
    return Preparation(
        state="Failed",
        reason="PendingDeadlineExceeded",
        message=f"prepare did not run within {seconds} s (spec.pendingDeadlineSeconds): {why}",
        advice=advice_for("PendingDeadlineExceeded"),
        pod=waiting[-1]["metadata"]["name"] if waiting else None,
    )


def _failed(
    report: PrepareReport | None, result: Result | None, *, pod: Manifest | None, job_message: str
) -> Preparation:
    problems = (report.problems if report else None) or []
    reason = "PrepareFailed"
    if result is not None and result.reason in REASONS and result.reason not in _NO_CAUSE:
        reason = result.reason
    elif problems:
        word = _LEADING_WORD.match(problems[0])
        reason = word["reason"] if word and word["reason"] in REASONS else reason
    found = problems[0].removeprefix(f"{reason}: ") if len(problems) == 1 else "\n".join(problems)
    message = found or (result.message if result else "") or job_message or REASONS[reason].message
    terminated = (terminated_state(pod, PREPARE_CONTAINER) if pod else None) or {}
    return Preparation(
        state="Failed",
        reason=reason,
        message=message,
        advice=(result.advice if result else "") or advice_for(reason),
        pod=pod["metadata"]["name"] if pod else None,
        exit_code=terminated.get("exitCode"),
    )


def _newest_pod(situation: Situation) -> Manifest | None:
    pods = pods_of_role(situation.observed.pods, labels.ROLE_PREPARE)
    return pods[-1] if pods else None


def _commits(result: Result | None) -> dict[str, str]:
    """Return the commits among a result's artifacts: `hf://org/name@<commit>` under the key of its source."""
    if result is None:
        return {}
    return {name: uri.rpartition("@")[2] for name, uri in result.artifacts.items() if uri.startswith("hf://")}
