"""When a run is looked at again: its deadlines, from the spec and the times in its status.

It owns their arithmetic; it must not decide what follows when one has passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from posttrain.plan import labels
from posttrain.plan.manifests import is_live, last_alive, parse_time, pod_phase, pods_of_role, silent_from
from posttrain.plan.prepare_job import prepare_ref
from posttrain.plan.situation import Situation
from posttrain.plan.types import Manifest


def active_deadline(situation: Situation) -> datetime | None:
    """Return when the run must have ended: activeDeadlineSeconds after its first gang ran."""
    seconds, since = situation.run.spec.active_deadline_seconds, situation.status.start_time
    return since + timedelta(seconds=seconds) if seconds is not None and since is not None else None


def pending_deadline(situation: Situation) -> datetime | None:
    """Return when the gang must run: pendingDeadlineSeconds after its wait for quota, else its job, began.

    None once it ran.
    """
    seconds, status = situation.run.spec.pending_deadline_seconds, situation.status
    since = status.attempt_queued_time or status.attempt_created_time
    if seconds is None or since is None or status.attempt_running_time is not None:
        return None
    return since + timedelta(seconds=seconds)


def prepare_deadline(situation: Situation) -> datetime | None:
    """Return when a pod of prepare must run: pendingDeadlineSeconds after its job was made, or after one last ran.

    None while one runs. Of a pod that ran and is gone, what it had told itself is known, also to an operator that
    began later.
    """
    seconds = situation.run.spec.pending_deadline_seconds
    job = situation.observed.objects.get(prepare_ref(situation.name))
    made = parse_time(job["metadata"].get("creationTimestamp")) if job is not None else None
    pods = pods_of_role(situation.observed.pods, labels.ROLE_PREPARE)
    runs = any(is_live(pod, now=situation.now) and pod_phase(pod) != "Pending" for pod in pods)
    if seconds is None or made is None or runs:
        return None
    departed = pods_of_role(situation.observed.departed, labels.ROLE_PREPARE)
    alive = (last_alive(pod) for pod in (*pods, *departed))
    progress = situation.attempt_progress
    heard = progress.last_beat_time if progress is not None else None
    since = max(time for time in (made, heard, *alive) if time is not None)
    return since + timedelta(seconds=seconds)


def stall_deadline(situation: Situation) -> datetime | None:
    """Return when the next fact or beat of a running gang must have come."""
    running_since, progress = situation.status.attempt_running_time, situation.attempt_progress
    if running_since is None:
        return None
    heard = progress.last_beat_time if progress else None
    seconds = situation.run.spec.restarts.progress_deadline_seconds
    return max(heard or running_since, running_since) + timedelta(seconds=seconds)


def silences(situation: Situation, pods: Iterable[Manifest]) -> tuple[datetime, ...]:
    """Return when those of them that are being deleted count as gone, should nothing more be heard of their nodes."""
    times = (silent_from(pod) for pod in pods if is_live(pod, now=situation.now))
    return tuple(time for time in times if time is not None)
