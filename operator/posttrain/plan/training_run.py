"""`plan_training_run`: what ought to be of a TrainingRun now.

It owns the decisions, as an ordered list of checks of which the first that finds something settles the matter; it must
not build an object's content, nor know how a PyTorchJob or a pod tells its state.

`status.attempt` is the commit point. Whatever ends an attempt (a failure, a suspension) is written as ONE status with
`attempt` one higher, its counters and its cause, before anything else is done about it (`status_first`); then what is
left of the old attempt is deleted, and a later plan, which observes nothing of it any more, makes the new one. So a
crash between any two writes neither loses nor repeats a count, and there are never two gangs.

An attempt is never rendered again: once its ConfigMap is observed, plans want its PyTorchJob as that keeps it, also the
one that is yet to be made, and leave the ConfigMap out of `objects` unless somebody deleted it. Prepare's are left out,
too.

What keeps a child from being made, a refused spec among it, keeps a run from beginning anything, and nothing from
ending: what an attempt's checks find then is done all the same, and only what they would make is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from posttrain.api.training_run import TrainingRun
from posttrain.plan.acceptance import (
    code_missing,
    explain_obstacle,
    model_missing,
    servers_unprotected,
)
from posttrain.plan.children import (
    attempt_children,
    build_run_workload,
    outdated_configs,
    prepare_children,
    run_children,
    service_children,
)
from posttrain.plan.deadlines import silences
from posttrain.plan.endings import (
    attempt_failed,
    completed,
    deadline_exceeded,
    non_finite,
    pending_deadline_exceeded,
    signal_lost,
    stalled,
    suspend_requested,
    suspended,
    withheld,
)
from posttrain.plan.predecessors import is_stuck, predecessors_silences
from posttrain.plan.preparation import is_needed
from posttrain.plan.prepare_job import prepare_ref
from posttrain.plan.queueing import awaiting_quota, kueue_missing, priority_class_missing, quota_lost
from posttrain.plan.quota import end_workload
from posttrain.plan.references import foresee_end
from posttrain.plan.servers import never_answers
from posttrain.plan.situation import Situation
from posttrain.plan.start import dry_run, first_attempt, prepare_failed, preparing, suspended_before_start
from posttrain.plan.status import Says, Verdict, carry_facts, derive_events, next_status
from posttrain.plan.types import Manifest, Observed, Plan
from posttrain.plan.verdicts import build_cause, explain_unserved, fail, go_on, holding_refs, refuse
from posttrain.settings import Settings

Check = Callable[[Situation], Verdict | None]

_REFERRED_PATIENCE = timedelta(minutes=1)
"""How often a run that outlives its TTL looks whether others still refer to it."""


def plan_training_run(run: TrainingRun, observed: Observed, *, now: datetime, settings: Settings) -> Plan:
    """Return what ought to be of `run`, from what is observed of it. Its args need not have been checked."""
    before = run.status
    situation = _carried(Situation(run=run, status=before, observed=observed, now=now, settings=settings))
    verdict = _judge(situation)
    status_first = False
    while verdict.commit:
        status_first = True
        status = next_status(situation, verdict)
        situation = _carried(Situation(run=run, status=status, observed=observed, now=now, settings=settings))
        verdict = _judge(situation)
    status = next_status(situation, verdict)
    waits = [(deadline - now).total_seconds() for deadline in verdict.deadlines if deadline > now]
    ends_later = verdict.delete_run and status_first
    return Plan(
        objects=verdict.objects,
        deletes=verdict.deletes,
        patches=verdict.patches,
        delete_run=verdict.delete_run and not ends_later,
        status=status,
        status_first=status_first,
        requeue_after=0.0 if ends_later else min(waits, default=None),
        events=derive_events(before, status),
    )


def preview_training_run(
    run: TrainingRun, *, now: datetime, settings: Settings, beside: Sequence[TrainingRun] = ()
) -> tuple[Manifest, ...]:
    """Return every object that a run begins with: its own, prepare's, the first attempt's.

    Revisions that prepare would resolve stand in the first attempt's config as they are written in the spec, and the
    model of another run where one of `beside`, or of only that name, will put it. Only a cluster knows the number of a
    workloadPriorityClass, and what the flavors of a queue ask of the pods. The spec must have no problems.
    """
    reference = run.spec.model.run_ref
    runs = {reference.name: foresee_end(reference.name, beside=beside)} if reference is not None else {}
    observed = Observed(runs=runs, server_key="<made by the operator>")
    situation = Situation(run=run, status=run.status, observed=observed, now=now, settings=settings)
    prepare = prepare_children(situation) if is_needed(situation) else ()
    first = replace(situation, status=run.status.model_copy(update={"attempt": 1}))
    workload = (build_run_workload(first, ask=first.ask),) if first.ask is not None else ()
    return (
        *run_children(situation),
        *prepare,
        *workload,
        *service_children(first),
        *attempt_children(first),
    )


def _carried(situation: Situation) -> Situation:
    return replace(situation, status=carry_facts(situation))


def _judge(situation: Situation) -> Verdict:
    verdict = _find(situation, _CHECKS)
    assert verdict is not None, "the last check finds something"
    return verdict


def _find(situation: Situation, checks: Sequence[Check]) -> Verdict | None:
    found = (check(situation) for check in checks)
    return next((verdict for verdict in found if verdict is not None), None)


# --- Checks ----------------------------------------------------------------------------------------------------------


def finished(situation: Situation) -> Verdict | None:
    """The run has ended: that stays so. What still holds GPUs goes, and at its TTL the resource itself."""
    ended, stage = situation.status.completion_time, situation.status.stage
    if ended is None or stage is None:
        return None
    ttl = situation.run.spec.ttl_seconds_after_finished
    expires = ended + timedelta(seconds=ttl) if ttl is not None else None
    if expires is not None and situation.observed.referrers:
        # Whoever starts from this model must still find it.
        expires = max(expires, situation.now + _REFERRED_PATIENCE)
    return Verdict(
        stage=stage,
        succeeded=Says("Unknown", "Pending"),
        keep_conditions=True,
        deletes=holding_refs(situation),
        patches=end_workload(situation, good=stage == "Succeeded"),
        deadlines=(expires,) if expires is not None else (),
        delete_run=expires is not None and expires <= situation.now,
    )


def obstructed(situation: Situation) -> Verdict | None:
    """No child can be made as the spec wants it: nothing is made. What ends meanwhile ends, and what is to go goes."""
    obstacle = explain_obstacle(situation)
    if obstacle is None:
        return None
    stalled = obstacle.reason != "PredecessorEnding" or is_stuck(situation)
    silences = predecessors_silences(situation)
    refusal = replace(refuse(situation, obstacle.reason, obstacle.message), stalled=stalled, deadlines=silences)
    begun = situation.attempt or prepare_ref(situation.name) in situation.observed.objects
    if situation.status.provenance is None or (situation.problems and not begun):
        return refusal
    verdict = _find(situation, _ATTEMPT_CHECKS if situation.attempt else _PREPARE_CHECKS)
    if verdict is None:
        return refusal
    if verdict.commit:
        return replace(verdict, accepted=obstacle)
    waited_for = situation.attempt and not situation.was_created and situation.status.attempt_queued_time is None
    since = {"attempt_queued_time": situation.now} if waited_for else {}
    return replace(
        verdict,
        accepted=obstacle,
        succeeded=obstacle,
        stalled=stalled,
        objects=(),
        deletes=(*verdict.deletes, *outdated_configs(situation)),
        deadlines=(*verdict.deadlines, *silences),
        changes={**since, **verdict.changes},
    )


def cleaning_up(situation: Situation) -> Verdict | None:
    """Something of an ended attempt is still there: two gangs must never write to one storage."""
    live = situation.live_trainer_pods
    jobs = [ref for ref in situation.old_children if ref.kind == "PyTorchJob"]
    if situation.was_created or not (jobs or live):
        return None
    return go_on(
        situation,
        message=f"attempt {situation.attempt} waits for the end of the one before (live pods: {len(live)})",
        deadlines=silences(situation, situation.trainer_pods),
    )


def server_never_answers(situation: Situation) -> Verdict | None:
    """A rollout server has ended again and again: no gang is made to wait for it."""
    ended = never_answers(situation) if not situation.was_created else None
    if ended is None:
        return None
    return fail(
        situation,
        build_cause(situation, "CrashLooping", ended),
    )


def awaiting_services(situation: Situation) -> Verdict | None:
    """The gang would find no sandbox, or not every rollout server: it would hold its GPUs for nothing."""
    return go_on(situation) if explain_unserved(situation) is not None else None


def starting(situation: Situation) -> Verdict | None:
    """Nothing stands in the way of the attempt: its job is made."""
    if situation.was_created:
        return None
    return go_on(situation, objects=attempt_children(situation))


def running(situation: Situation) -> Verdict | None:
    """The gang is on its way."""
    return go_on(situation)


_PREPARE_CHECKS: tuple[Check, ...] = (
    suspended_before_start,  # the user asked us to stop, and nothing ran yet
    preparing,  # a CPU pod checks and fetches
    prepare_failed,  # it found problems
    dry_run,  # that was all that was asked for
)

_ATTEMPT_CHECKS: tuple[Check, ...] = (
    non_finite,  # the loss is no number: nothing that follows is worth its price
    completed,  # the gang is done
    suspend_requested,  # the user asked us to stop: whatever ends from here on ends because of that
    suspended,  # nothing is to be started
    signal_lost,  # there is nothing good to learn any more, and the user chose an end or a suspension
    quota_lost,  # the queue wants its quota back: whatever ends from here on ends because of that
    attempt_failed,  # the gang died: find the cause, then restart or give up
    deadline_exceeded,  # ran past activeDeadlineSeconds
    pending_deadline_exceeded,  # waited past pendingDeadlineSeconds
    stalled,  # nothing was heard past progressDeadlineSeconds
    withheld,  # nothing of an attempt is there before somebody mends what keeps it from being made
    cleaning_up,  # the attempt before is not gone yet
    awaiting_quota,  # nothing of an attempt is there before its quota
    server_never_answers,  # what generates for it ends again and again
    awaiting_services,  # nothing of a gang is there before what generates for it, and what runs its programs
    starting,  # make the attempt's job
    running,  # wait for events
)

_CHECKS: tuple[Check, ...] = (
    finished,  # terminal stays terminal
    obstructed,  # the spec is refused, or a child cannot be made as it is wanted
    code_missing,  # a reference does not resolve yet
    model_missing,  # the run whose model it starts from has not ended well yet
    servers_unprotected,  # others could hand weights over to its servers
    kueue_missing,  # the user asks for a queue, and there are none
    priority_class_missing,  # its priority does not resolve yet
    *_PREPARE_CHECKS,
    first_attempt,  # pin everything, count to one
    *_ATTEMPT_CHECKS,
)
