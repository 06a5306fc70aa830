"""The checks that end an attempt: done, suspended, failed, too long, silent.

It owns in which cases an attempt ends; it must not count what that costs, nor find a failure's cause.
"""

from __future__ import annotations

from posttrain.api.reasons import REASONS
from posttrain.api.training_run_status import ModelStatus
from posttrain.plan.acceptance import explain_obstacle
from posttrain.plan.attempts import NON_FINITE, completed_result, find_cause, settling_until
from posttrain.plan.deadlines import active_deadline, pending_deadline, stall_deadline
from posttrain.plan.signal import find_loss, say_non_finite
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says, Verdict
from posttrain.plan.verdicts import (
    begin_attempt,
    build_cause,
    charge,
    explain_gang,
    fail,
    finish,
    go_on,
    hold,
    hold_nothing,
    say_prepared,
    stop_non_finite,
)

_UNTIL_MENDED = frozenset({"InvalidSpec", "SpecChanged", "ReferencePending"})
"""What keeps an attempt from being made until a person acts, and is not tried again meanwhile."""


def non_finite(situation: Situation) -> Verdict | None:
    """A loss or gradient norm is not a number: no later step mends that, unless the user says otherwise."""
    progress = situation.attempt_progress
    if progress is None or progress.non_finite is None or situation.run.spec.restarts.on_non_finite == "Warn":
        return None
    cause = build_cause(situation, NON_FINITE, say_non_finite(progress.non_finite))
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
    changes = {"attempt_queued_time": None} | ({} if held else {"hold": None})
    return hold_nothing(situation, stage="Suspended", says=says, changes=changes)


def withheld(situation: Situation) -> Verdict | None:
    """No gang can be made before somebody mends something: nobody knows when, so nothing is held for it meanwhile."""
    obstacle = explain_obstacle(situation)
    if situation.was_created or obstacle is None or obstacle.reason not in _UNTIL_MENDED:
        return None
    deadlines = active_deadline(situation), pending_deadline(situation)
    return hold_nothing(situation, stage="Pending", says=obstacle, changes={"hold": None}, deadlines=deadlines)


def signal_lost(situation: Situation) -> Verdict | None:
    """There is nothing good to learn any more, and the user chose not to go on then."""
    loss = find_loss(situation)
    if loss is None:
        return None
    cause = build_cause(situation, loss.reason, loss.message)
    return hold(situation, cause, why=loss.field, kept=True) if loss.policy == "Suspend" else fail(situation, cause)


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
    obstacle = explain_obstacle(situation) if not situation.was_created else None
    waiting = obstacle or explain_gang(situation)
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
