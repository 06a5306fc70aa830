"""When a run is looked at again: its deadlines, from the spec and the times in its status.

It owns their arithmetic; it must not decide what follows when one has passed.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from posttrain.plan.manifests import is_live, silent_from
from posttrain.plan.situation import Situation


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


def stall_deadline(situation: Situation) -> datetime | None:
    """Return when the next fact or beat of a running gang must have come."""
    running_since, progress = situation.status.attempt_running_time, situation.attempt_progress
    if running_since is None:
        return None
    heard = progress.last_beat_time if progress else None
    seconds = situation.run.spec.restarts.progress_deadline_seconds
    return max(heard or running_since, running_since) + timedelta(seconds=seconds)


def silences(situation: Situation) -> tuple[datetime, ...]:
    """Return when pods that are being deleted count as gone, should nothing more be heard of their nodes."""
    times = (silent_from(pod) for pod in situation.trainer_pods if is_live(pod, now=situation.now))
    return tuple(time for time in times if time is not None)
