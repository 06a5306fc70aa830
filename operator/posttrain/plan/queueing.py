"""The checks about quota: it is asked for when everything is prepared, waited for, lost, and given back.

It owns when a gang may exist by its queue; it must not know how Kueue tells it, nor what a lost attempt costs.

The Workload is the run's, not an attempt's. It is written only while it holds no reservation: what Kueue has reserved
quota for is not changed under it, and a later operator's idea of it is asked for at the next reservation.
"""

from __future__ import annotations

from posttrain.plan.children import build_run_workload
from posttrain.plan.kueue import NODE_FAILURES, missing_flavors
from posttrain.plan.quota import release, withdraw
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says, Verdict
from posttrain.plan.verdicts import begin_attempt, build_cause, fail, go_on, refuse


def kueue_missing(situation: Situation) -> Verdict | None:
    """The run names a queue and there is no Kueue: nothing is begun that could never be admitted."""
    if situation.attempt or situation.ask is None or situation.observed.kueue:
        return None
    message = (
        f"spec.resources.queueName is {situation.ask.queue}, and Kueue is not installed in this cluster: install it, "
        "or leave queueName out"
    )
    return refuse(situation, "KueueMissing", message)


def priority_class_missing(situation: Situation) -> Verdict | None:
    """The priority in the queue does not resolve yet."""
    missing = _missing_priority_class(situation)
    if situation.attempt or missing is None:
        return None
    return Verdict(stage="Pending", accepted=missing, succeeded=Says("False", "InProgress", missing.message))


def _missing_priority_class(situation: Situation) -> Says | None:
    wanted, workload = situation.run.spec.resources.workload_priority_class, situation.workload
    if situation.ask is None or wanted is None or wanted in situation.observed.priorities:
        return None
    if workload is not None and workload.priority_class == wanted:
        return None
    return Says("False", "ReferencePending", f"waiting for the priority: there is no WorkloadPriorityClass {wanted}")


def quota_lost(situation: Situation) -> Verdict | None:
    """The gang is there and its quota is not, or not any more: it ends with a checkpoint, and costs no budget.

    Where Kueue itself is gone there is no quota left that the gang could hold from others.
    """
    if not situation.was_created or situation.has_quota or not situation.observed.kueue:
        return None
    if situation.gang.job is not None and situation.gang.job.phase == "Succeeded":
        return None
    status, workload = situation.status, situation.workload
    eviction = workload.eviction if workload is not None else None
    never_ran = status.attempt_running_time is None
    return begin_attempt(
        situation,
        kept=eviction is None or eviction.reason != NODE_FAILURES,
        changes={"attempt_queued_time": status.attempt_queued_time} if never_ran else {},
    )


def awaiting_quota(situation: Situation) -> Verdict | None:
    """Nothing of a gang is there, and its quota is not: it is asked for, and waited for in the queue."""
    if situation.was_created:
        return None
    if situation.has_quota:
        return _unusable_quota(situation)
    ask, workload = situation.ask, situation.workload
    if situation.is_begun:
        return go_on(situation)  # what was made for the reservation that is lost goes before there is another
    if ask is None:
        return go_on(situation, deletes=withdraw(situation))
    if not situation.observed.kueue:
        return go_on(situation)
    if workload is not None and (workload.finished or (workload.reserved and workload.ask != ask)):
        return go_on(situation, deletes=withdraw(situation))
    if workload is not None and (workload.reserved or workload.being_deleted):
        return go_on(situation, patches=release(situation))
    missing = _missing_priority_class(situation)
    if missing is not None:
        return go_on(situation, waits=missing)
    return go_on(situation, objects=(build_run_workload(situation, ask=ask),))


def _unusable_quota(situation: Situation) -> Verdict | None:
    """Return what keeps a gang from using its quota."""
    workload = situation.workload
    if workload is None:
        return None
    if workload.by_topology:
        return fail(
            situation,
            build_cause(
                situation,
                "TopologyUnsupported",
                f"ClusterQueue {workload.cluster_queue} has placed the pods by "
                f"topology (flavors: {', '.join(workload.flavors)}), which posttrain does not support",
            ),
        )
    missing = missing_flavors(workload, situation.observed.flavors)
    if not missing:
        return None
    told = f"there is no ResourceFlavor {', '.join(missing)}"
    if any(ref.kind == "ResourceFlavor" for ref in situation.observed.unread):
        told = f"ResourceFlavor {', '.join(missing)} cannot be read"
    return go_on(situation, waits=Says("False", "FlavorMissing", f"quota is reserved; {told}"))
