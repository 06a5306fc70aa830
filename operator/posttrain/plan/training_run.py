"""`plan_training_run`: what ought to be of a TrainingRun now.

It owns the decisions, as an ordered list of checks of which the first that finds something settles the matter; it must
not build an object's content, nor know how a PyTorchJob or a pod tells its state.

`status.attempt` is the commit point. Whatever ends an attempt (a failure, a suspension) is written as ONE status with
`attempt` one higher, its counters and its cause, before anything else is done about it (`status_first`); then what is
left of the old attempt is deleted, and a later plan, which observes nothing of it any more, makes the new one. So a
crash between any two writes neither loses nor repeats a count, and there are never two gangs.

A live attempt is never rendered again: once its PyTorchJob is observed, plans want it as its ConfigMap keeps it, and
leave the ConfigMap out of `objects` unless somebody deleted it. Prepare's are left out, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from posttrain.api.reasons import REASONS
from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import FailureStatus, ModelStatus, ProvenanceStatus
from posttrain.plan.attempts import NON_FINITE, completed_result, find_cause, settling_until
from posttrain.plan.children import (
    attempt_children,
    build_run_workload,
    child_refs,
    prepare_children,
    prepare_refs,
    run_children,
    service_children,
    service_refs,
)
from posttrain.plan.deadlines import active_deadline, pending_deadline, silences, stall_deadline
from posttrain.plan.objects import code_hash
from posttrain.plan.preparation import Preparation, is_needed, judge_preparation
from posttrain.plan.prepare_job import parse_prepare_state, prepare_ref
from posttrain.plan.queueing import awaiting_quota, kueue_missing, priority_class_missing, quota_lost
from posttrain.plan.quota import end_workload, withdraw
from posttrain.plan.references import foresee_end
from posttrain.plan.sandbox import IMAGE_KEY
from posttrain.plan.servers import never_answers
from posttrain.plan.signal import find_loss
from posttrain.plan.situation import Situation
from posttrain.plan.sources import is_commit
from posttrain.plan.status import Says, Verdict, carry_facts, derive_events, next_status
from posttrain.plan.types import Manifest, Observed, Plan
from posttrain.plan.verdicts import (
    MESSAGE_MAX_LENGTH,
    accept,
    begin_attempt,
    build_cause,
    charge,
    explain_gang,
    explain_unserved,
    fail,
    finish,
    go_on,
    hold,
    holding_refs,
    old_refs,
    pin_profile,
    pin_spec,
    present_refs,
    refuse,
    say_prepared,
    stop_non_finite,
)
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
    workloadPriorityClass, and what the flavors of a queue ask of the pods.
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
    found = (check(situation) for check in _CHECKS)
    return next(verdict for verdict in found if verdict is not None)


# --- The run as such -------------------------------------------------------------------------------------------------


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


def spec_invalid(situation: Situation) -> Verdict | None:
    """The spec asks for something that cannot be: nothing is made until it is changed."""
    if not situation.problems:
        return None
    return refuse(situation, "InvalidSpec", "\n".join(str(problem) for problem in situation.problems))


def spec_changed(situation: Situation) -> Verdict | None:
    """The spec is not the accepted one (what the API server cannot see, inside `args`), or the code is not."""
    accepted = situation.provenance
    if accepted.config_hash is not None and accepted.config_hash != situation.config_hash:
        return refuse(
            situation,
            "SpecChanged",
            f"the spec now has the hash {situation.config_hash}, and the run was accepted with {accepted.config_hash}: "
            "change it back, or give the changed run another name",
        )
    files = situation.code
    if files is not None and accepted.code_hash is not None and accepted.code_hash != code_hash(files):
        return refuse(
            situation,
            "SpecChanged",
            f"the code's snapshot is gone, and what is there now has the hash {code_hash(files)} instead of "
            f"{accepted.code_hash}: restore it, or give the run another name",
        )
    return None


def name_conflict(situation: Situation) -> Verdict | None:
    """An object that is not the run's bears a child's name: it is never adopted."""
    taken = sorted(child_refs(situation) & situation.observed.foreign)
    if not taken:
        return None
    named = ", ".join(f"{ref.kind} {ref.name}" for ref in taken)
    message = f"{named} exists and does not belong to this run: delete it, or rename the run"
    return refuse(situation, "NameConflict", message)


def child_rejected(situation: Situation) -> Verdict | None:
    """The API server, a webhook or a quota refuses an object that the run needs."""
    rejected = situation.observed.rejected
    if not rejected:
        return None
    message = "\n".join(f"{ref.kind} {ref.name} was refused: {rejected[ref]}" for ref in sorted(rejected))
    return refuse(situation, "ChildRejected", message)


def code_missing(situation: Situation) -> Verdict | None:
    """The run's own code is not there yet."""
    code = situation.run.spec.code
    if code is None or situation.code is not None:
        return None
    message = f"waiting for the code: there is no ConfigMap {code.config_map_name}"
    if code.path is not None:
        message = f"waiting for the code: there is no folder {code.path}"
    return _awaiting(message)


def model_missing(situation: Situation) -> Verdict | None:
    """The model is what another run ends with, and that one has not ended well yet."""
    reference = situation.run.spec.model.run_ref
    if reference is None or situation.provenance.model_source is not None:
        return None
    made = situation.referenced_run
    if made is None:
        return _awaiting(f"waiting for the model of run {reference.name}: there is no such run")
    if made.failure is not None:
        return refuse(situation, "ReferenceFailed", made.failure)
    if not made.finished:
        return _awaiting(f"waiting for the model of run {reference.name}, which is {made.stage}")
    return None


def _awaiting(message: str) -> Verdict:
    return Verdict(
        stage="Pending",
        accepted=Says("False", "ReferencePending", message),
        succeeded=Says("False", "InProgress", message),
    )


def servers_unprotected(situation: Situation) -> Verdict | None:
    """Its rollout servers would take weights from everybody: nothing is begun."""
    settings = situation.settings
    if situation.attempt or situation.run.spec.rollout_servers is None:
        return None
    if settings.enforces_network_policies or settings.open_rollout_servers:
        return None
    return refuse(situation, "NetworkPolicyNotEnforced", REASONS["NetworkPolicyNotEnforced"].message)


# --- Before the first attempt ----------------------------------------------------------------------------------------


def suspended_before_start(situation: Situation) -> Verdict | None:
    """The user asked us to stop, and no gang was made yet."""
    if situation.attempt or not situation.run.spec.suspend:
        return None
    job = situation.observed.objects.get(prepare_ref(situation.name))
    unfinished = job is not None and parse_prepare_state(job).phase == "Pending"
    deletes = present_refs(situation, prepare_refs(situation)) if unfinished else ()
    return accept(
        situation,
        Verdict(
            stage="Suspended",
            prepared=Says("False", "Suspended") if unfinished else None,
            pods_ready=Says("False", "Suspended"),
            succeeded=Says("False", "Suspended"),
            deletes=deletes,
        ),
    )


def preparing(situation: Situation) -> Verdict | None:
    """Inputs are checked and fetched by a CPU pod before any GPU is held."""
    if situation.attempt:
        return None
    preparation = judge_preparation(situation)
    if preparation.state not in ("Wanted", "Running"):
        return None
    return accept(
        situation,
        Verdict(
            stage="Preparing",
            prepared=Says("False", "Preparing"),
            succeeded=Says("False", "InProgress", REASONS["Preparing"].message),
            objects=prepare_children(situation) if preparation.state == "Wanted" else (),
            deadlines=(preparation.look_again,) if preparation.look_again else (),
        ),
    )


def prepare_failed(situation: Situation) -> Verdict | None:
    """Prepare found problems: all of them are the user's to mend, so nothing is tried again."""
    if situation.attempt:
        return None
    preparation = judge_preparation(situation)
    if preparation.state != "Failed":
        return None
    failure = FailureStatus(
        reason=preparation.reason,
        message=preparation.message[:MESSAGE_MAX_LENGTH],
        pod=preparation.pod,
        exit_code=preparation.exit_code,
        advice=preparation.advice or None,
        attempt=0,
    )
    says = Says("False", preparation.reason, preparation.message)
    return finish(situation, succeeded=says, prepared=says, changes={"failure": failure})


def dry_run(situation: Situation) -> Verdict | None:
    """The checks were all that was asked for."""
    if situation.attempt or not situation.run.spec.prepare.dry_run:
        return None
    preparation = judge_preparation(situation)
    provenance = _with_commits(situation, preparation)
    return finish(
        situation,
        succeeded=Says("True", "DryRun"),
        prepared=say_prepared(situation),
        changes={"provenance": provenance},
    )


def first_attempt(situation: Situation) -> Verdict | None:
    """Everything is prepared: the run is pinned as it is now, and its first attempt begins."""
    if situation.attempt:
        return None
    commits = _with_commits(situation, judge_preparation(situation))
    pinned = pin_profile(situation)
    provenance = commits.model_copy(
        update={
            "image_digests": {"trainer": situation.image, **_sandbox_image(situation)},
            "profile": pinned.profile,
            "profile_name": pinned.profile_name,
        }
    )
    return begin_attempt(situation, changes={"provenance": provenance})


def _sandbox_image(situation: Situation) -> dict[str, str]:
    return {IMAGE_KEY: situation.sandbox_image} if situation.run.spec.own_sandbox is not None else {}


def _with_commits(situation: Situation, preparation: Preparation) -> ProvenanceStatus:
    written = {key: source.revision for key, source in situation.sources.items() if is_commit(source)}
    commits = {**written, **preparation.commits}
    return pin_spec(situation).model_copy(
        update={"model_commit": commits.pop("model", None), "dataset_commits": commits or None}
    )


# --- An attempt's end ------------------------------------------------------------------------------------------------


def non_finite(situation: Situation) -> Verdict | None:
    """A loss or gradient norm is not a number: no later step mends that."""
    progress = situation.attempt_progress
    if progress is None or progress.non_finite is None:
        return None
    found = progress.non_finite
    cause = build_cause(situation, NON_FINITE, f"{found.metric} was not finite at step {found.step}")
    return stop_non_finite(situation, cause)


def completed(situation: Situation) -> Verdict | None:
    """The job succeeded and the gang itself says that its work is complete."""
    result = completed_result(situation.gang)
    if result is None:
        return None
    status = situation.status
    uri = (result.artifacts or {}).get("model")
    return finish(
        situation,
        succeeded=Says("True", "Completed", result.message),
        prepared=say_prepared(situation),
        kept=True,
        changes={
            "model": ModelStatus(uri=uri) if uri else None,
            "start_time": status.start_time or status.attempt_created_time,
        },
    )


def suspend_requested(situation: Situation) -> Verdict | None:
    """The user asked us to stop a gang: its attempt ends with a checkpoint, and costs no budget."""
    if not situation.run.spec.suspend or not situation.was_created:
        return None
    return begin_attempt(situation, kept=True)


def suspended(situation: Situation) -> Verdict | None:
    """The run waits: for the user, who suspended it, or because it was held for a loss that was not finite."""
    spec, hold = situation.run.spec, situation.status.hold
    generation = situation.run.metadata.generation or 0
    held = hold is not None and not spec.suspend and generation <= (hold.generation or 0)
    if not spec.suspend and not held:
        return None
    live = len(situation.live_trainer_pods)
    waiting = f"; pods that still write a checkpoint and end: {live}" if live else ""
    says = Says("False", "Suspended", REASONS["Suspended"].message.rstrip(".") + waiting)
    if held and hold is not None:
        says = Says("False", hold.reason, hold.message + waiting)
    return accept(
        situation,
        Verdict(
            stage="Suspended",
            prepared=say_prepared(situation),
            server_ready=says if situation.run.spec.rollout_servers is not None else None,
            pods_ready=says,
            succeeded=says,
            quota_reserved=says if situation.ask is not None and situation.workload is None else None,
            changes={"attempt_queued_time": None} | ({} if held else {"hold": None}),
            deletes=(
                *old_refs(situation),
                *present_refs(situation, service_refs(situation)),
                *withdraw(situation),
            ),
            deadlines=silences(situation),
        ),
    )


def signal_lost(situation: Situation) -> Verdict | None:
    """There is nothing good to learn any more, and the user chose not to go on then."""
    loss = find_loss(situation)
    if loss is None:
        return None
    cause = build_cause(situation, loss.reason, loss.message)
    return hold(situation, cause, field=loss.field, kept=True) if loss.policy == "Suspend" else fail(situation, cause)


def attempt_failed(situation: Situation) -> Verdict | None:
    """The gang has died, or lost a pod: the cause is found, and charged to its budget."""
    if not situation.was_created:
        return None
    until = settling_until(situation.gang, now=situation.now)
    if until is not None:
        return go_on(situation, deadlines=(until,))
    cause = find_cause(situation.gang, now=situation.now)
    if cause is None:
        return None
    return stop_non_finite(situation, cause) if cause.reason == NON_FINITE else charge(situation, cause)


def deadline_exceeded(situation: Situation) -> Verdict | None:
    """The run takes longer than the user allowed."""
    deadline = active_deadline(situation)
    if deadline is None or situation.now < deadline:
        return None
    seconds = situation.run.spec.active_deadline_seconds
    return fail(
        situation,
        build_cause(
            situation,
            "DeadlineExceeded",
            f"the run did not end within {seconds} s of its first start (spec.activeDeadlineSeconds)",
        ),
    )


def pending_deadline_exceeded(situation: Situation) -> Verdict | None:
    """The gang waits for its pods longer than the user allowed."""
    deadline = pending_deadline(situation)
    if deadline is None or situation.now < deadline:
        return None
    seconds = situation.run.spec.pending_deadline_seconds
    waiting = explain_gang(situation)
    return fail(
        situation,
        build_cause(
            situation,
            "PendingDeadlineExceeded",
            f"the gang did not run within {seconds} s (spec.pendingDeadlineSeconds): {waiting.message}",
        ),
    )


def stalled(situation: Situation) -> Verdict | None:
    """Nothing was heard of a running gang for too long."""
    deadline = stall_deadline(situation)
    if deadline is None or situation.now < deadline:
        return None
    progress = situation.attempt_progress
    where = f" at step {progress.step}" if progress and progress.step is not None else ""
    seconds = situation.run.spec.restarts.progress_deadline_seconds
    return charge(
        situation,
        build_cause(
            situation,
            "ProgressStalled",
            f"nothing was heard of the gang for {seconds} s{where}",
            budget="infrastructure",
        ),
    )


# --- An attempt on its way -------------------------------------------------------------------------------------------


def cleaning_up(situation: Situation) -> Verdict | None:
    """Something of an ended attempt is still there: two gangs must never write to one storage."""
    live = situation.live_trainer_pods
    jobs = [ref for ref in situation.old_children if ref.kind == "PyTorchJob"]
    if situation.was_created or not (jobs or live):
        return None
    return go_on(
        situation,
        message=f"attempt {situation.attempt} waits for the end of the one before (live pods: {len(live)})",
        deadlines=silences(situation),
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


_CHECKS: tuple[Check, ...] = (
    finished,  # terminal stays terminal
    spec_invalid,  # the user asked for something that cannot be
    spec_changed,  # it is another spec than the accepted one
    name_conflict,  # a child's name is taken
    child_rejected,  # the API server does not take a child
    code_missing,  # a reference does not resolve yet
    model_missing,  # the run whose model it starts from has not ended well yet
    servers_unprotected,  # others could hand weights over to its servers
    kueue_missing,  # the user asks for a queue, and there are none
    priority_class_missing,  # its priority does not resolve yet
    suspended_before_start,  # the user asked us to stop, and nothing ran yet
    preparing,  # a CPU pod checks and fetches
    prepare_failed,  # it found problems
    dry_run,  # that was all that was asked for
    first_attempt,  # pin everything, count to one
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
    cleaning_up,  # the attempt before is not gone yet
    awaiting_quota,  # nothing of an attempt is there before its quota
    server_never_answers,  # what generates for it ends again and again
    awaiting_services,  # nothing of a gang is there before what generates for it, and what runs its programs
    starting,  # make the attempt's job
    running,  # wait for events
)
