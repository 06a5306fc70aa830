"""Quota as a run sees it: what it waits for, in words, and what is owed to Kueue at this moment.

It owns the condition QuotaReserved and the answers to Kueue that no decision is needed for; it must not decide whether
an attempt begins or ends, nor know how a Workload is written.
"""

from __future__ import annotations

from posttrain.api.conditions import QUOTA_RESERVED, SUCCEEDED, find_condition
from posttrain.plan.kueue import (
    PREEMPTED,
    WorkloadState,
    build_finish,
    build_pods_ready,
    build_release,
    workload_ref,
)
from posttrain.plan.manifests import is_being_deleted
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says
from posttrain.plan.types import ObjectRef, StatusPatch


def explain_quota(situation: Situation) -> Says:
    """Return whether quota is reserved for the run, and if not, why not."""
    ask, workload = situation.ask, situation.workload
    if ask is None:
        if situation.problems and not situation.attempt:
            return Says("False", "InvalidSpec", "no gang is made until the spec is mended")
        ignored = situation.run.spec.resources.queue_name
        message = f"spec.resources.queueName ({ignored}) is ignored: there are no queues here" if ignored else ""
        return Says("True", "NoQueue", message)
    if not situation.observed.kueue:
        return Says("False", "KueueMissing")
    if workload is None:
        when = "once everything is prepared" if not situation.attempt else "now"
        return Says("False", "QuotaPending", f"quota is asked for {when}, from the queue {ask.queue}")
    if workload.eviction is None and workload.reserved and workload.ask != ask:
        message = "quota is reserved for another spec than the present one: it is given back, and asked for anew"
        return Says("False", "QuotaPending", message)
    return _explain_workload(workload)


def say_unused(situation: Situation, why: Says) -> Says | None:
    """Return `why` no gang is wanted as the condition says it; None while the run still holds what a gang needs.

    Without a queue that is as long as anything of a gang is there. Its shape may be changed by then.
    """
    if situation.workload is not None:
        return None
    return None if situation.ask is None and (situation.holds_gang or situation.is_begun) else why


def is_taken_unsaid(situation: Situation) -> bool:
    """Return whether the condition has to say that quota is held before anything is made of a gang.

    Where there is no Workload to compare with, the API server would let the gang's shape be changed meanwhile.
    """
    said = find_condition(situation.status.conditions, QUOTA_RESERVED)
    unsaid = said is not None and said.status == "False"
    return unsaid and situation.ask is None and explain_quota(situation).status == "True"


def _explain_workload(workload: WorkloadState) -> Says:
    eviction = workload.eviction
    if workload.being_deleted or workload.finished:
        return Says("False", "QuotaLost", "the run's Workload was ended by somebody else: quota is asked for anew")
    if not workload.active:
        return Says("False", "WorkloadDeactivated", eviction.message if eviction is not None else "")
    if eviction is not None:
        waits = workload.message if not workload.reserved and workload.message != eviction.message else ""
        told = f"{waits} (before that: {eviction.message})" if waits else eviction.message
        return Says("False", "Preempted" if eviction.reason == PREEMPTED else "QuotaLost", told)
    if workload.admitted:
        flavors = f", in {', '.join(workload.flavors)}" if workload.flavors else ""
        return Says("True", "QuotaReserved", f"admitted by ClusterQueue {workload.cluster_queue}{flavors}")
    if workload.unavailable:
        return Says("False", "QueueUnavailable", workload.message)
    return Says("False", "QuotaPending", workload.message or f"waiting in the queue {workload.ask.queue}")


def report_pods_ready(situation: Situation) -> tuple[StatusPatch, ...]:
    """Return the write that tells Kueue whether the gang runs; without it a gang counts as one that never starts."""
    if situation.ask is None or situation.workload is None or not situation.has_quota:
        return ()
    patch = build_pods_ready(situation.workload, ready=situation.gang.runs, now=situation.now)
    return (patch,) if patch is not None else ()


def release(situation: Situation) -> tuple[StatusPatch, ...]:
    """Return the write that gives back what an evicted Workload still holds, once nothing of a gang is there."""
    workload = situation.workload
    if workload is None or workload.eviction is None or workload.finished or workload.being_deleted:
        return ()
    if not workload.reserved or situation.holds_gang:
        return ()
    return (build_release(workload, now=situation.now),)


def end_workload(situation: Situation, *, good: bool) -> tuple[StatusPatch, ...]:
    """Return the write that finishes the Workload of a run that has ended, once nothing of its gang is there."""
    workload = situation.workload
    if workload is None or situation.holds_gang:
        return ()
    said = find_condition(situation.status.conditions, SUCCEEDED)
    patch = build_finish(workload, good=good, message=said.message if said else "", now=situation.now)
    return (patch,) if patch is not None else ()


def withdraw(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the Workload for deletion, once nothing of a gang is there: quota and place in the queue are given up."""
    ref = workload_ref(situation.name)
    manifest = situation.observed.objects.get(ref)
    if manifest is None or is_being_deleted(manifest) or situation.holds_gang:
        return ()
    return (ref,)
