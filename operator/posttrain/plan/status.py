"""The status of a TrainingRun: what is carried into it from the facts, and how a verdict is told in conditions.

It owns every field that the operator writes; it must not decide what the verdict is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from posttrain.api import conditions
from posttrain.api.conditions import Condition, ConditionStatus, find_condition, next_condition
from posttrain.api.reasons import REASONS
from posttrain.api.training_run_status import CheckpointsStatus, ProvenanceStatus, Stage, TrainingRunStatus
from posttrain.plan.attempts import gang_hash
from posttrain.plan.manifests import container_status
from posttrain.plan.situation import Situation
from posttrain.plan.trainer_pod import TRAINER_CONTAINER
from posttrain.plan.types import Event, Manifest, ObjectRef, StatusPatch
from posttrain.plan.usage import carry_usage

_BRIEF_LENGTH = 240
_QUOTA_EVENTS = frozenset(
    {"QuotaReserved", "Preempted", "QuotaLost", "QueueUnavailable", "WorkloadDeactivated", "KueueMissing"}
)
_GANG_EVENTS = frozenset({"AllPodsRunning", "NodeUnreachable", "SandboxFailed"})
_DIGEST = re.compile(r"(?:[a-z-]+://)?(?P<image>[^@\s]+@sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Says:
    """What a condition says; without a message, the catalogue's."""

    status: ConditionStatus
    reason: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found: the state of the run in people's words, and what is to be done.

    A condition that is None stays as it was. With `commit`, nothing is done before the status that it makes is written;
    what is done then is judged from that.
    """

    stage: Stage
    succeeded: Says
    accepted: Says | None = None
    prepared: Says | None = None
    quota_reserved: Says | None = None
    server_ready: Says | None = None
    pods_ready: Says | None = None
    signal_healthy: Says | None = None
    finished: bool = False
    stalled: bool = False
    keep_conditions: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    objects: tuple[Manifest, ...] = ()
    deletes: tuple[ObjectRef, ...] = ()
    patches: tuple[StatusPatch, ...] = ()
    deadlines: tuple[datetime, ...] = ()
    commit: bool = False
    delete_run: bool = False


def carry_facts(situation: Situation) -> TrainingRunStatus:
    """Return the status with the facts of this moment: they hold whatever is decided; carrying twice adds nothing."""
    status, run = situation.status, situation.run
    changes: dict[str, Any] = {
        "observed_generation": run.metadata.generation,
        "method": run.spec.method.upper(),
        "gpus": run.spec.gpus,
        "progress": None,
    }
    if situation.attempt:
        changes |= {"usage": carry_usage(situation), "provenance": _carry_provenance(situation)}
    if situation.attempt and status.completion_time is None:
        changes |= _times_of_attempt(situation)
    return status.model_copy(update={**changes, **_from_progress(situation)})


def _times_of_attempt(situation: Situation) -> dict[str, Any]:
    status, gang, now = situation.status, situation.gang, situation.now
    times: dict[str, Any] = {}
    workload = situation.workload
    waits = situation.ask is not None and workload is not None and not workload.reserved
    served = situation.run.spec.own_sandbox is not None or situation.run.spec.rollout_servers is not None
    if (waits or (served and situation.has_quota)) and not situation.was_created and status.attempt_queued_time is None:
        times["attempt_queued_time"] = (workload.pending_since if workload is not None and waits else None) or now
    if gang.job is not None and status.attempt_created_time is None:
        times["attempt_created_time"] = gang.job.created or now
    if gang.runs and status.gang_hash is None:
        times |= {
            "attempt_running_time": now,
            "gang_hash": gang_hash(gang.pods),
            "start_time": status.start_time or now,
        }
    return times


def _from_progress(situation: Situation) -> dict[str, Any]:
    progress, status = situation.progress, situation.status
    if progress is None:
        return {}
    restarts = status.restarts
    if restarts is not None:
        restarts = restarts.model_copy(update={"steps_lost": progress.steps_lost or 0})
    saved = progress.checkpoint
    kept = CheckpointsStatus(
        latest_step=saved.step if saved else None,
        latest_uri=saved.uri if saved else None,
        count=progress.checkpoints_saved,
    )
    return {"restarts": restarts, "checkpoints": kept if progress.checkpoints_saved else status.checkpoints}


def _carry_provenance(situation: Situation) -> ProvenanceStatus | None:
    """Return what is pinned, with what only the first attempt's pods could tell: versions, and the image's digest."""
    provenance, progress = situation.status.provenance, situation.progress
    if provenance is None:
        return None
    changes: dict[str, Any] = {}
    if provenance.versions is None and progress is not None and progress.versions:
        changes["versions"] = dict(progress.versions)
    image = (provenance.image_digests or {}).get("trainer")
    if image is not None and "@sha256:" not in image:
        found = (
            _DIGEST.fullmatch(str(container_status(pod, TRAINER_CONTAINER).get("imageID", "")))
            for pod in situation.gang.pods
        )
        digest = next((match["image"] for match in found if match), None)
        if digest is not None:
            changes["image_digests"] = {**(provenance.image_digests or {}), "trainer": digest}
    return provenance.model_copy(update=changes)


def next_status(situation: Situation, verdict: Verdict) -> TrainingRunStatus:
    """Return the status that tells of a verdict."""
    told = situation.status.conditions if verdict.keep_conditions else _conditions(situation, verdict)
    return situation.status.model_copy(update={**verdict.changes, "stage": verdict.stage, "conditions": told})


def _conditions(situation: Situation, verdict: Verdict) -> list[Condition]:
    previous = situation.status.conditions
    succeeded = verdict.succeeded
    # The whole story is told once, the status being bounded; what derives from it repeats its beginning.
    settled = Says("True", succeeded.reason, _brief(succeeded.message))
    under_way = Says("False", succeeded.reason, _brief(succeeded.message))
    said: dict[str, Says | None] = {
        conditions.ACCEPTED: verdict.accepted,
        conditions.PREPARED: verdict.prepared,
        conditions.QUOTA_RESERVED: _in_brief(verdict.quota_reserved),
        conditions.SERVER_READY: _in_brief(verdict.server_ready),
        conditions.PODS_READY: _in_brief(verdict.pods_ready),
        conditions.SUCCEEDED: succeeded,
        conditions.FINISHED: settled if verdict.finished else under_way,
        conditions.READY: settled if succeeded.status == "True" else under_way,
        conditions.STALLED: settled if verdict.stalled else under_way,
        conditions.SIGNAL_HEALTHY: verdict.signal_healthy,
    }
    types = conditions.WATCHED_CONDITIONS if situation.run.spec.is_watched else conditions.TRAINING_RUN_CONDITIONS
    told = []
    for type_ in types:
        known = find_condition(previous, type_)
        says = said[type_] or (Says(known.status, known.reason, known.message) if known else Says("Unknown", "Pending"))
        told.append(
            next_condition(
                known,
                type_=type_,
                status=says.status,
                reason=says.reason,
                message=says.message or REASONS[says.reason].message,
                now=situation.now,
                observed_generation=situation.run.metadata.generation,
            )
        )
    return told


def _in_brief(says: Says | None) -> Says | None:
    return replace(says, message=_brief(says.message)) if says is not None else None


def _brief(message: str) -> str:
    first = message.partition("\n")[0]
    return first if len(first) <= _BRIEF_LENGTH else first[: _BRIEF_LENGTH - 2] + " …"


def derive_events(before: TrainingRunStatus, after: TrainingRunStatus) -> tuple[Event, ...]:
    """Return the events that tell of the difference between two statuses."""
    events = []
    failure = after.failure
    goes_on = after.completion_time is None and after.hold is None
    if failure is not None and failure != before.failure and goes_on:
        known = find_condition(after.conditions, conditions.ACCEPTED)
        refused = known is not None and known.status == "False"
        when = " when what keeps it from being made is mended" if refused else ""
        message = f"{failure.message}; attempt {after.attempt} follows{when}"
        events.append(Event(type="Warning", reason=failure.reason, message=message))
    accepted = _news(before, after, conditions.ACCEPTED)
    if accepted is not None:
        events.append(_event(accepted, good=accepted.status == "True"))
    prepared = _news(before, after, conditions.PREPARED)
    if prepared is not None and prepared.reason == "Prepared":
        events.append(_event(prepared, good=True))
    quota = _news(before, after, conditions.QUOTA_RESERVED)
    if quota is not None and quota.reason in _QUOTA_EVENTS:
        events.append(_event(quota, good=quota.status == "True"))
    pods_ready = _news(before, after, conditions.PODS_READY)
    if pods_ready is not None and pods_ready.reason in _GANG_EVENTS:
        events.append(_event(pods_ready, good=pods_ready.status == "True"))
    succeeded = _news(before, after, conditions.SUCCEEDED)
    events += _signal_events(before, after, told_already=succeeded.reason if succeeded is not None else "")
    if succeeded is not None and (after.completion_time is not None or succeeded.reason != "InProgress"):
        told_already = accepted is not None and accepted.reason == succeeded.reason
        if not told_already:
            held = after.stage == "Suspended" and after.hold is None
            events.append(_event(succeeded, good=succeeded.status == "True" or held))
    return tuple(events)


def _signal_events(before: TrainingRunStatus, after: TrainingRunStatus, *, told_already: str) -> list[Event]:
    """Return the event of a signal that was lost or is back: that it was there from the beginning is no news."""
    signal = _news(before, after, conditions.SIGNAL_HEALTHY)
    old = find_condition(before.conditions, conditions.SIGNAL_HEALTHY)
    if signal is None or signal.reason == told_already:
        return []
    was_lost = old is not None and old.status == "False"
    return [_event(signal, good=signal.status == "True")] if signal.status == "False" or was_lost else []


def _news(before: TrainingRunStatus, after: TrainingRunStatus, type_: str) -> Condition | None:
    old, new = find_condition(before.conditions, type_), find_condition(after.conditions, type_)
    if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
        return None
    return new


def _event(condition: Condition, *, good: bool) -> Event:
    return Event(type="Normal" if good else "Warning", reason=condition.reason, message=condition.message)
