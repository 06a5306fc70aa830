"""The checks before the first attempt: prepare, and what is pinned when it is done.

It owns when a run's first attempt begins; it must not judge what prepare found.
"""

from __future__ import annotations

from posttrain.api.reasons import REASONS
from posttrain.api.training_run_status import FailureStatus, ProvenanceStatus
from posttrain.plan.children import prepare_children, prepare_refs
from posttrain.plan.preparation import Preparation, judge_preparation
from posttrain.plan.prepare_job import parse_prepare_state, prepare_ref
from posttrain.plan.quota import say_unused
from posttrain.plan.sandbox import IMAGE_KEY
from posttrain.plan.situation import Situation
from posttrain.plan.sources import is_commit
from posttrain.plan.status import Says, Verdict
from posttrain.plan.verdicts import (
    MESSAGE_MAX_LENGTH,
    accept,
    begin_attempt,
    finish,
    pin_profile,
    pin_spec,
    present_refs,
    say_prepared,
)


def suspended_before_start(situation: Situation) -> Verdict | None:
    """The user asked us to stop, and no gang was made yet."""
    if situation.attempt or not situation.run.spec.suspend:
        return None
    job = situation.observed.objects.get(prepare_ref(situation.name))
    unfinished = job is not None and parse_prepare_state(job).phase == "Pending"
    deletes = present_refs(situation, prepare_refs(situation)) if unfinished else ()
    says = Says("False", "Suspended")
    return accept(
        situation,
        Verdict(
            stage="Suspended",
            prepared=says if unfinished else None,
            quota_reserved=say_unused(situation, says),
            pods_ready=says,
            succeeded=says,
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
    obstacle = preparation.obstacle
    told = f"prepare waits: {obstacle.message}" if obstacle else REASONS["Preparing"].message
    return accept(
        situation,
        Verdict(
            stage="Preparing",
            prepared=obstacle or Says("False", "Preparing"),
            succeeded=Says("False", "InProgress", told),
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
