"""What each kind of decision means for the status, the conditions and the objects.

It owns the consequences, budgets among them; it must not decide which decision is due.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from posttrain.api.methods import table_of
from posttrain.api.reasons import REASONS, advice_for
from posttrain.api.training_run_status import FailureStatus, HoldStatus, ProvenanceStatus, RestartsStatus, Stage
from posttrain.plan.attempts import Budget, Cause
from posttrain.plan.children import (
    attempt_children,
    frozen_job,
    run_children,
    service_children,
    service_refs,
    waiting_refs,
)
from posttrain.plan.deadlines import active_deadline, pending_deadline, silences, stall_deadline
from posttrain.plan.manifests import is_being_deleted
from posttrain.plan.names import attempt_name
from posttrain.plan.objects import code_hash
from posttrain.plan.pods import explain_running, explain_waiting
from posttrain.plan.preparation import is_needed
from posttrain.plan.prepare_job import parse_prepare_state, prepare_ref
from posttrain.plan.pytorchjob import job_ref
from posttrain.plan.quota import explain_quota, is_taken_unsaid, report_pods_ready, say_unused, withdraw
from posttrain.plan.rollout_servers import count_restarts
from posttrain.plan.sandbox import explain_unready
from posttrain.plan.servers import explain_servers
from posttrain.plan.signal import explain_signal
from posttrain.plan.situation import CONFIG_MAP, Situation
from posttrain.plan.status import Says, Verdict
from posttrain.plan.types import Manifest, ObjectRef, StatusPatch
from posttrain.plan.usage import end_attempt

_NODE_FAILURES_TO_AVOID = 2
_NODES_REMEMBERED = 32
MESSAGE_MAX_LENGTH = 1024
"""Of a failure: the status is bounded, and a condition tells the same at greater length."""


def refuse(situation: Situation, reason: str, message: str) -> Verdict:
    """Return the verdict on a run that nothing is done for, or against, until somebody changes something."""
    says = Says("False", reason, message)
    # Nothing of a gang is there before the first attempt, whatever was said of its quota before.
    quota = Says("Unknown", "Pending") if not situation.attempt else None
    return Verdict(
        stage=situation.status.stage or "Pending", accepted=says, quota_reserved=quota, succeeded=says, stalled=True
    )


def accept(situation: Situation, verdict: Verdict) -> Verdict:
    """Return the verdict of an accepted run: its spec is pinned by hash, and its own children are there."""
    changes = {"provenance": pin_spec(situation), **verdict.changes}
    return replace(
        verdict,
        accepted=Says("True", "Accepted"),
        quota_reserved=verdict.quota_reserved or explain_quota(situation),
        server_ready=verdict.server_ready or explain_servers(situation),
        signal_healthy=explain_signal(situation),
        changes=changes,
        objects=(*run_children(situation), *verdict.objects),
    )


def pin_spec(situation: Situation) -> ProvenanceStatus:
    """Return the provenance with what a run is accepted with; what is pinned already stays, but for another profile."""
    provenance = situation.provenance
    asked_for = situation.run.spec.resources.profile
    changed = provenance.profile is not None and provenance.profile_name != asked_for
    if changed and not situation.was_created and not situation.problems:
        provenance = pin_profile(situation)
    if provenance.config_hash is not None:
        return provenance
    seed = situation.spec.training.args.get("seed", table_of(situation.spec.method).keys["seed"].default)
    return provenance.model_copy(
        update={
            "config_hash": situation.config_hash,
            "code_hash": code_hash(situation.code) if situation.code is not None else None,
            "model_source": situation.model_source if situation.run.spec.model.run_ref is not None else None,
            "seed": seed if isinstance(seed, int) else None,
        }
    )


def pin_profile(situation: Situation) -> ProvenanceStatus:
    """Return the provenance with the profile of the attempts from now on."""
    profile = situation.profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    changes = {"profile": profile, "profile_name": situation.run.spec.resources.profile}
    return situation.provenance.model_copy(update=changes)


def say_prepared(situation: Situation) -> Says | None:
    """Return what `Prepared` says once attempts begin; None where nothing can be told from a spec that is refused."""
    if situation.problems:
        return None
    return Says("True", "Prepared" if is_needed(situation) else "PrepareDisabled")


def explain_gang(situation: Situation) -> Says:
    """Return why not every pod of the current attempt runs: what it has to have first, or what stands in their way."""
    if situation.awaits_quota:
        return explain_quota(situation)
    unserved = explain_unserved(situation)
    observed = situation.observed
    return unserved or explain_waiting(
        situation.gang, creation_events=observed.creation_events, pod_events=observed.pod_events
    )


def explain_unserved(situation: Situation) -> Says | None:
    """Return why nobody serves the gang that is to be made; None where it is there, and all that it needs serves."""
    return None if situation.was_created else _explain_unready(situation)


def _explain_unready(situation: Situation) -> Says | None:
    unready = _explain_sandbox(situation)
    if unready is None and not situation.servers_ready:
        unready = explain_servers(situation)
    return unready


def _explain_sandbox(situation: Situation) -> Says | None:
    wanted = situation.run.spec.own_sandbox is not None
    return explain_unready(situation.name, situation.observed) if wanted else None


def go_on(
    situation: Situation,
    *,
    message: str = "",
    waits: Says | None = None,
    objects: tuple[Manifest, ...] = (),
    deletes: tuple[ObjectRef, ...] = (),
    patches: tuple[StatusPatch, ...] = (),
    deadlines: tuple[datetime, ...] = (),
) -> Verdict:
    """Return the verdict on an attempt that has not ended; `waits` says why it cannot begin, where its pods do not."""
    gang, progress = situation.gang, situation.attempt_progress
    failure = situation.status.failure
    pods_ready = explain_running(gang) if gang.runs else waits or explain_gang(situation)
    stage: Stage = "Starting"
    told = pods_ready.message or (REASONS[pods_ready.reason].message if not gang.runs else "")
    if situation.status.attempt_running_time is not None:
        trains = progress is not None and progress.attempt_start is not None
        stage, told = ("Training", told or _say_training(situation)) if trains else (stage, told or "the gang loads")
    elif situation.awaits_quota:
        stage, told = "Queued", f"waiting for quota: {told}"
    elif failure is not None and failure.attempt == situation.attempt - 1:
        stage = "Restarting"
    outage = _explain_sandbox(situation) if pods_ready.status == "True" else None
    if outage is not None and outage.reason != "SandboxStarting":  # one that only misses a probe is no news
        pods_ready = outage
    message = message or f"attempt {situation.attempt}: {told}"
    # Like the gang, what serves it holds nothing while there is no quota.
    services = () if situation.awaits_quota else service_children(situation)
    spare = present_refs(situation, waiting_refs(situation)) if situation.awaits_quota else ()
    times = (
        active_deadline(situation),
        pending_deadline(situation),
        stall_deadline(situation),
        *silences(situation, situation.server_pods),
        *deadlines,
    )
    return accept(
        situation,
        Verdict(
            stage=stage,
            prepared=say_prepared(situation),
            pods_ready=pods_ready,
            succeeded=Says("False", "InProgress", message),
            changes={"hold": None},
            objects=(*services, *objects, *_lost_config_map(situation), *frozen_job(situation)),
            deletes=(*old_refs(situation), *spare, *deletes),
            patches=(*report_pods_ready(situation), *patches),
            deadlines=tuple(time for time in times if time is not None),
            commit=is_taken_unsaid(situation),
        ),
    )


def hold_nothing(
    situation: Situation,
    *,
    stage: Stage,
    says: Says,
    changes: dict[str, Any] | None = None,
    deadlines: tuple[datetime | None, ...] = (),
) -> Verdict:
    """Return the verdict on an attempt that may not have a gang: no quota is held, and nothing that would serve one."""
    times = (*silences(situation, situation.trainer_pods), *deadlines)
    return accept(
        situation,
        Verdict(
            stage=stage,
            prepared=say_prepared(situation),
            server_ready=says if situation.run.spec.rollout_servers is not None else None,
            pods_ready=says,
            succeeded=says,
            quota_reserved=say_unused(situation, says),
            changes=changes or {},
            deletes=(
                *old_refs(situation),
                *present_refs(situation, waiting_refs(situation)),
                *withdraw(situation),
            ),
            deadlines=tuple(time for time in times if time is not None),
        ),
    )


def _say_training(situation: Situation) -> str:
    """Return that the gang trains, and which of those that serve it is started again meanwhile."""
    unready = _explain_unready(situation)
    return "the gang trains" if unready is None else f"the gang trains; {unready.message}"


def begin_attempt(situation: Situation, *, kept: bool = False, changes: dict[str, Any] | None = None) -> Verdict:
    """Return the commit of another attempt's beginning, hence of the current one's end."""
    attempt = situation.attempt
    return accept(
        situation,
        Verdict(
            stage="Starting",
            prepared=say_prepared(situation),
            succeeded=Says("False", "InProgress", f"attempt {attempt + 1} begins"),
            changes={
                "attempt": attempt + 1,
                "attempt_queued_time": None,
                "attempt_created_time": None,
                "attempt_running_time": None,
                "gang_hash": None,
                "server_restarts": _server_restarts(situation),
                "restarts": _restarts(situation),
                "usage": end_attempt(situation, kept=kept),
                **(changes or {}),
            },
            commit=True,
        ),
    )


def _server_restarts(situation: Situation) -> dict[str, int] | None:
    """Return the restarts of servers that count no more: a gang is made when all of them answer."""
    if not situation.was_created:
        return situation.status.server_restarts
    return count_restarts(situation.server_pods) or None


def build_cause(situation: Situation, reason: str, message: str, *, budget: Budget = "none") -> Cause:
    """Return the cause of an end of the current attempt that the plan itself has found, with the catalogue's advice."""
    told = f"attempt {situation.attempt}: {message}"
    return Cause(reason=reason, message=told, budget=budget, advice=advice_for(reason))


def charge(situation: Situation, cause: Cause) -> Verdict:
    """Return the verdict on a failed attempt: another one, where the budget allows it."""
    restarts, spec = _restarts(situation), situation.run.spec.restarts
    if cause.budget == "none":
        return fail(situation, cause)
    if cause.budget == "infrastructure":
        spent, allowed, key = restarts.infrastructure or 0, spec.max_infrastructure_restarts, "infrastructure"
    else:
        spent, allowed, key = restarts.application or 0, spec.max_application_restarts, "application"
    if spent >= allowed:
        return fail(situation, cause if allowed == 0 else _spent(cause, allowed))
    changes = {
        "restarts": restarts.model_copy(update={key: spent + 1, **_blame_node(situation, cause)}),
        "failure": _failure(situation, cause),
    }
    return begin_attempt(situation, changes=changes)


def _restarts(situation: Situation) -> RestartsStatus:
    return situation.status.restarts or RestartsStatus(infrastructure=0, application=0, steps_lost=0)


def _spent(cause: Cause, allowed: int) -> Cause:
    return replace(
        cause,
        reason="RestartBudgetSpent",
        message=f"the budget of {cause.budget} restarts ({allowed}) is spent; the last cause is {cause.reason}: "
        f"{cause.message}",
        advice=advice_for("RestartBudgetSpent"),
    )


def _blame_node(situation: Situation, cause: Cause) -> dict[str, Any]:
    """Return how the memory of bad nodes changes: one that failed this run twice is avoided."""
    restarts = _restarts(situation)
    if cause.budget != "infrastructure" or cause.node is None or not situation.run.spec.restarts.avoid_nodes:
        return {}
    failures = dict(restarts.node_failures or {})
    failures[cause.node] = failures.pop(cause.node, 0) + 1
    avoided = set(restarts.avoided_nodes or ())
    if failures[cause.node] >= _NODE_FAILURES_TO_AVOID:
        avoided.add(cause.node)
    remembered = dict(list(failures.items())[-_NODES_REMEMBERED:])
    return {"node_failures": remembered, "avoided_nodes": sorted(avoided) or None}


def _failure(situation: Situation, cause: Cause) -> FailureStatus:
    return FailureStatus(
        reason=cause.reason,
        message=cause.message[:MESSAGE_MAX_LENGTH],
        pod=cause.pod,
        node=cause.node,
        rank=cause.rank,
        exit_code=cause.exit_code,
        advice=cause.advice or None,
        attempt=situation.attempt,
    )


def stop_non_finite(situation: Situation, cause: Cause) -> Verdict:
    """Return the verdict on a loss that was not finite, and ended its gang.

    Under Warn only a gang ends at one that began before the user wrote that, who does not want the run to be lost.
    """
    policy, field = situation.run.spec.restarts.on_non_finite, "spec.restarts.onNonFinite"
    if policy == "Fail":
        return fail(situation, cause)
    why = field if policy == "Suspend" else f"{field} was not Warn when the attempt began"
    return hold(situation, cause, why=why)


def hold(situation: Situation, cause: Cause, *, why: str, kept: bool = False) -> Verdict:
    """Return the commit of a suspension in the case that the cause names; `why` names the field that asks for it."""
    message = (
        f"{cause.message}: the run is suspended ({why}). Change what may be changed, "
        "or set spec.suspend to true and back to false, to go on from the latest checkpoint"
    )
    generation = situation.run.metadata.generation
    return begin_attempt(
        situation,
        kept=kept,
        changes={
            "hold": HoldStatus(reason=cause.reason, message=message, generation=generation),
            "failure": _failure(situation, cause),
        },
    )


def fail(situation: Situation, cause: Cause) -> Verdict:
    """Return the commit of a bad end."""
    return finish(
        situation,
        succeeded=Says("False", cause.reason, cause.message),
        prepared=say_prepared(situation),
        changes={"failure": _failure(situation, cause)},
    )


def finish(
    situation: Situation,
    *,
    succeeded: Says,
    prepared: Says | None,
    kept: bool = False,
    changes: dict[str, Any],
) -> Verdict:
    """Return the commit of the run's end."""
    good = succeeded.status == "True"
    ended = Says("False", succeeded.reason, succeeded.message)
    return accept(
        situation,
        Verdict(
            stage="Succeeded" if good else "Failed",
            prepared=prepared,
            server_ready=ended if situation.run.spec.rollout_servers is not None else None,
            pods_ready=ended,
            succeeded=succeeded,
            finished=True,
            stalled=not good,
            changes={
                "completion_time": situation.now,
                "usage": end_attempt(situation, kept=kept),
                **changes,
            },
            commit=True,
        ),
    )


def present_refs(situation: Situation, refs: tuple[ObjectRef, ...]) -> tuple[ObjectRef, ...]:
    """Return those of the objects that are there and that nobody is deleting already."""
    objects = situation.observed.objects
    return tuple(ref for ref in refs if ref in objects and not is_being_deleted(objects[ref]))


def old_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return what is left of ended attempts."""
    return present_refs(situation, situation.old_children)


def holding_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the children of an ended run that still hold something: live pods do. A job that ended keeps its logs.

    One that succeeded does before its last worker has ended: the training operator takes back what still runs then.
    """
    refs = [*situation.old_children, *service_refs(situation)]
    job = situation.gang.job
    succeeded = job is not None and job.phase == "Succeeded"
    if (situation.live_trainer_pods and not succeeded) or (job is not None and job.phase == "Pending"):
        refs.append(job_ref(situation.name, attempt=situation.attempt))
    prepare = situation.observed.objects.get(prepare_ref(situation.name))
    if prepare is not None and parse_prepare_state(prepare).phase == "Pending":
        refs.append(prepare_ref(situation.name))
    return present_refs(situation, tuple(refs))


def _lost_config_map(situation: Situation) -> tuple[Manifest, ...]:
    """Return the attempt's ConfigMap where its job is there and somebody deleted it: a late pod waits for it."""
    config_map = ObjectRef(*CONFIG_MAP, attempt_name(situation.name, attempt=situation.attempt))
    if situation.job is None or config_map in situation.observed.objects:
        return ()
    return attempt_children(situation)[:1]
