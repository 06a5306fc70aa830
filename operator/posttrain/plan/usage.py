"""GPU seconds: how many a run held, how many of them led to steps that were kept, what they cost.

It owns that arithmetic, carried forward from plan to plan; it must not decide when an attempt ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from posttrain.api.training_run_status import Progress, UsageStatus
from posttrain.plan.manifests import is_live, parse_time, terminated_state
from posttrain.plan.situation import Situation
from posttrain.plan.trainer_pod import TRAINER_CONTAINER
from posttrain.plan.types import Manifest

_EVERY = timedelta(seconds=60)
"""A status that changed with every look at the clock would be written with every look."""
_TENTH = Decimal("0.1")
_CENT = Decimal("0.01")
_SECONDS_PER_HOUR = Decimal(3600)


def carry_usage(situation: Situation) -> UsageStatus | None:
    """Return the usage with the time since it was last counted: a pod holds its GPUs from its start to its end."""
    usage = situation.status.usage
    recent = usage is not None and usage.accounted_until and situation.now - usage.accounted_until < _EVERY
    live = (*situation.live_trainer_pods, *situation.live_server_pods)
    if recent and any(_ended(pod) is None for pod in live):
        return usage
    return _count(situation)


def end_attempt(situation: Situation, *, kept: bool) -> UsageStatus | None:
    """Return the usage when an attempt ends; unless it was stopped after a checkpoint, its lost steps are waste."""
    usage = _count(situation)
    if usage is None:
        return None
    held = _number(usage.attempt_gpu_seconds)
    wasted = Decimal(0) if kept else held * _lost_share(situation.attempt_progress)
    return _add(situation, usage, seconds=Decimal(0), wasted=wasted, attempt=Decimal(0))


def _count(situation: Situation) -> UsageStatus | None:
    usage, now = situation.status.usage, situation.now
    since = usage.accounted_until if usage else None
    spec = situation.run.spec
    seconds = _held_by(situation.trainer_pods, since=since, now=now) * spec.resources.gpus_per_node
    seconds += _held_by(situation.server_pods, since=since, now=now) * spec.server_gpus
    if not seconds:
        return usage
    usage = usage or UsageStatus()
    counted = _add(
        situation, usage, seconds=seconds, wasted=Decimal(0), attempt=_number(usage.attempt_gpu_seconds) + seconds
    )
    return counted.model_copy(update={"accounted_until": now})


def _held_by(pods: Iterable[Manifest], *, since: datetime | None, now: datetime) -> Decimal:
    return _seconds(sum((_held(pod, since=since, now=now) for pod in pods), start=timedelta(0)))


def _held(pod: Manifest, *, since: datetime | None, now: datetime) -> timedelta:
    """Return for how long a pod held its GPUs after `since`: from the kubelet's first sight of it to its end."""
    started, ended = parse_time((pod.get("status") or {}).get("startTime")), _ended(pod)
    if started is None or (ended is None and not is_live(pod, now=now)):
        return timedelta(0)
    begin = max(started, since) if since is not None else started
    return max(min(ended or now, now) - begin, timedelta(0))


def _ended(pod: Manifest) -> datetime | None:
    return parse_time((terminated_state(pod, TRAINER_CONTAINER) or {}).get("finishedAt"))


def _lost_share(progress: Progress | None) -> Decimal:
    """Return the share of an attempt's steps after its newest checkpoint; all of it where none was kept."""
    if progress is None or progress.attempt_start_step is None or progress.step is None:
        return Decimal(1)
    start, end = progress.attempt_start_step, progress.step
    saved = progress.checkpoint.step if progress.checkpoint else start
    kept = min(max(saved, start), end)
    return Decimal(end - kept) / Decimal(end - start) if end > start else Decimal(1)


def _add(
    situation: Situation, usage: UsageStatus, *, seconds: Decimal, wasted: Decimal, attempt: Decimal
) -> UsageStatus:
    total = _number(usage.gpu_seconds) + seconds
    waste = _number(usage.wasted_gpu_seconds) + wasted.quantize(_TENTH)
    changes: dict[str, Any] = {
        "gpu_seconds": str(total),
        "wasted_gpu_seconds": str(waste),
        "productive_gpu_seconds": str(total - waste),
        "attempt_gpu_seconds": str(attempt),
    }
    price = situation.profile.price_per_gpu_hour
    if price is not None:
        changes["cost"] = str((total * Decimal(price) / _SECONDS_PER_HOUR).quantize(_CENT))
    return usage.model_copy(update=changes)


def _seconds(duration: timedelta) -> Decimal:
    return Decimal(str(duration.total_seconds())).quantize(_TENTH)


def _number(text: str | None) -> Decimal:
    return Decimal(text) if text else Decimal(0)
