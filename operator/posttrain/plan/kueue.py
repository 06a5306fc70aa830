"""Kueue: everything that knows its Workload, a request for quota and the answer to it.

It owns how a run's Workload is written, how its state is read, and the patches with which the owner of a Workload
answers Kueue; it must not decide when any of that is done.

Kueue asks three things of an owner, as its own job integrations do them (sigs.k8s.io/kueue v0.19,
pkg/controller/jobframework/reconciler.go). To stop what runs when the Workload is Evicted, and when all of it is gone
to release the quota, which stays taken until then: in one patch, for `admission` may be null only where QuotaReserved
is False, and a Workload that is left Admitted is never queued again. To keep PodsReady, by which Kueue tells a gang
that never starts. To say when it has Finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from posttrain.plan import labels, names
from posttrain.plan.manifests import is_being_deleted, parse_time
from posttrain.plan.objects import build_metadata
from posttrain.plan.pod_inputs import Assignment, PodInputs
from posttrain.plan.trainer_pod import build_server_template, build_trainer_template
from posttrain.plan.types import Manifest, ObjectRef, StatusPatch

API_VERSION = "kueue.x-k8s.io/v1beta2"
KIND = "Workload"
POD_SET = "trainer"
SERVER_POD_SET = "server"

PREEMPTED = "Preempted"
NODE_FAILURES = "NodeFailures"

_QUEUED_AT_ONCE = frozenset({PREEMPTED, NODE_FAILURES})
"""Reasons of an eviction after which the owner queues the Workload itself; after any other Kueue does, in its time."""

_UNAVAILABLE = frozenset({"Inadmissible", "Misconfigured", "Suspended"})
"""Reasons of QuotaReserved for a queue that is missing or stopped: up to v0.18, and from then on."""

_READ_BY_KUEUE = ("nodeSelector", "tolerations", "priorityClassName", "runtimeClassName")
"""What of a pod's spec decides on flavors and amounts (a RuntimeClass has an overhead), besides its resources."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a run asks its queue for, as far as a user may change it."""

    queue: str
    pods: int
    """Nodes of the gang, and rollout servers."""
    profile: str
    """Name of the profile; empty: the default one."""


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """Why Kueue takes a reservation back."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class WorkloadState:
    """What a Workload says of itself."""

    manifest: Manifest
    ask: Ask
    priority_class: str | None
    priority: int | None
    active: bool
    reserved: bool
    """Quota is taken: also while the Workload is evicted, until its owner releases it."""
    admitted: bool
    """What it is for may run: quota is reserved, every admission check has passed, and nobody wants it back."""
    eviction: Eviction | None
    finished: bool
    unavailable: bool
    """The queue is missing or stopped."""
    message: str
    """Why it is not admitted."""
    pending_since: datetime | None
    being_deleted: bool
    cluster_queue: str
    flavors: tuple[str, ...]
    """ResourceFlavors that the quota is reserved in."""
    by_topology: bool
    """Kueue has chosen nodes by their topology."""


def workload_ref(run: str) -> ObjectRef:
    """Return the reference to a run's Workload."""
    return ObjectRef(API_VERSION, KIND, names.workload_name(run))


# --- What a Workload asks --------------------------------------------------------------------------------------------


def build_workload(inputs: PodInputs, *, ask: Ask, priority_class: str | None, priority: int | None) -> Manifest:
    """Return the Workload that asks for the quota of the whole gang.

    No finalizer: a deleted run may free its quota some seconds before its last pod is gone, which the scheduler bears.
    `active` is left out: it is the administrator's and Kueue's own. Kueue refuses a class without its number.
    """
    run = inputs.run
    servers = run.spec.rollout_servers
    pod_sets = [_pod_set(POD_SET, build_trainer_template(inputs), count=run.spec.resources.num_nodes)]
    if servers is not None:
        pod_sets.append(_pod_set(SERVER_POD_SET, build_server_template(inputs), count=servers.pods))
    spec: dict[str, Any] = {"queueName": ask.queue}
    if priority_class is not None:
        reference = {"group": "kueue.x-k8s.io", "kind": "WorkloadPriorityClass", "name": priority_class}
        spec |= {"priorityClassRef": reference} | ({"priority": priority} if priority is not None else {})
    spec["podSets"] = pod_sets
    own_labels = {**labels.run_labels(run.metadata.name), labels.PROFILE: ask.profile}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": build_metadata(run, name=names.workload_name(run.metadata.name), labels=own_labels),
        "spec": spec,
    }


def _pod_set(name: str, template: Mapping[str, Any], *, count: int) -> dict[str, Any]:
    """Return as much of a pod template as Kueue reads."""
    pod = template["spec"]
    (container,) = pod["containers"]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [{"name": container["name"], "resources": container["resources"]}],
        **{key: pod[key] for key in _READ_BY_KUEUE if key in pod},
    }
    if "nodeAffinity" in pod.get("affinity", {}):
        spec["affinity"] = {"nodeAffinity": pod["affinity"]["nodeAffinity"]}
    return {"name": name, "count": count, "template": {"spec": spec}}


# --- What Kueue answers ----------------------------------------------------------------------------------------------


def parse_workload(manifest: Manifest) -> WorkloadState:
    """Return what a Workload says.

    Conditions are read, never `admission`, which an end leaves in place.
    """
    spec, status = manifest.get("spec") or {}, manifest.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    evicted = conditions.get("Evicted")
    eviction = None
    if _holds(evicted) and evicted is not None:
        eviction = Eviction(reason=evicted.get("reason") or "", message=evicted.get("message") or "")
    active = spec.get("active", True)
    reserved, finished = _holds(conditions.get("QuotaReserved")), _holds(conditions.get("Finished"))
    being_deleted = is_being_deleted(manifest)
    admission = status.get("admission") or {}
    assigned = admission.get("podSetAssignments") or ()
    reservation = conditions.get("QuotaReserved") or {}
    queued = parse_time(reservation.get("lastTransitionTime")) if eviction is not None and not reserved else None
    return WorkloadState(
        manifest=manifest,
        ask=_parse_ask(manifest),
        priority_class=(spec.get("priorityClassRef") or {}).get("name"),
        priority=spec.get("priority"),
        active=active,
        reserved=reserved,
        admitted=reserved
        and _holds(conditions.get("Admitted"))
        and eviction is None
        and active
        and not finished
        and not being_deleted,
        eviction=eviction,
        finished=finished,
        unavailable=not reserved and reservation.get("reason") in _UNAVAILABLE,
        message=_awaited_checks(status) if reserved else reservation.get("message") or "",
        pending_since=queued or parse_time(manifest["metadata"].get("creationTimestamp")),
        being_deleted=being_deleted,
        cluster_queue=admission.get("clusterQueue") or "",
        flavors=tuple(sorted({name for part in assigned for name in (part.get("flavors") or {}).values()})),
        by_topology=any(part.get("topologyAssignment") or part.get("delayedTopologyRequest") for part in assigned),
    )


def _holds(condition: Mapping[str, Any] | None) -> bool:
    return condition is not None and condition.get("status") == "True"


def _parse_ask(manifest: Manifest) -> Ask:
    spec = manifest.get("spec") or {}
    return Ask(
        queue=spec.get("queueName") or "",
        pods=sum(pod_set.get("count", 1) for pod_set in spec.get("podSets") or ()),
        profile=(manifest["metadata"].get("labels") or {}).get(labels.PROFILE, ""),
    )


def _awaited_checks(status: Mapping[str, Any]) -> str:
    checks = [check for check in status.get("admissionChecks") or () if check.get("state") != "Ready"]
    told = [f"{check['name']}: {check.get('message') or check.get('state') or 'Pending'}" for check in checks]
    return "quota is reserved; admission checks are awaited" + (f" ({'; '.join(told)})" if told else "")


def missing_flavors(workload: WorkloadState, flavors: Mapping[str, Manifest]) -> tuple[str, ...]:
    """Return the flavors of a reservation that nobody knows."""
    return tuple(name for name in workload.flavors if name not in flavors)


def build_assignment(workload: WorkloadState, flavors: Mapping[str, Manifest], *, pod_set: str) -> Assignment:
    """Return what the flavors of a reservation, and the admission checks, ask of its pods (Kueue's pkg/podset)."""
    status = workload.manifest.get("status") or {}
    assigned = (status.get("admission") or {}).get("podSetAssignments") or ()
    own = {name for part in assigned if part["name"] == pod_set for name in (part.get("flavors") or {}).values()}
    specs: list[Mapping[str, Any]] = [flavors[name].get("spec") or {} for name in sorted(own)]
    checks = status.get("admissionChecks") or ()
    updates = [part for check in checks for part in check.get("podSetUpdates") or () if part.get("name") == pod_set]
    return Assignment(
        node_selector=_merge([*(spec.get("nodeLabels") for spec in specs), *(u.get("nodeSelector") for u in updates)]),
        tolerations=tuple(toleration for part in (*specs, *updates) for toleration in part.get("tolerations") or ()),
        labels=_merge(update.get("labels") for update in updates),
        annotations=_merge(update.get("annotations") for update in updates),
    )


def _merge(parts: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    return {key: value for part in parts for key, value in (part or {}).items()}


# --- What its owner says ---------------------------------------------------------------------------------------------


def build_release(workload: WorkloadState, *, now: datetime) -> StatusPatch:
    """Return the patch that gives the quota of an evicted Workload back, and lets it be queued again.

    `reclaimablePods` would survive the eviction and make the next reservation too small. PodsReady is the owner's.
    """
    eviction = workload.eviction
    if eviction is None:
        raise ValueError("only an evicted Workload is released")
    changes = [
        _condition("QuotaReserved", "False", "Pending", eviction.message),
        _condition("Admitted", "False", "NoReservation", "The workload has no reservation"),
        _condition("Requeued", str(eviction.reason in _QUEUED_AT_ONCE), eviction.reason, eviction.message),
    ]
    if _find(workload, "PodsReady") is not None:
        changes.append(_condition("PodsReady", "False", "WaitForStart", "Not all pods are ready or succeeded"))
    nothing = {"admission": None, "reclaimablePods": None}
    return _patch(workload, changes, now=now, others=nothing)


def build_pods_ready(workload: WorkloadState, *, ready: bool, now: datetime) -> StatusPatch | None:
    """Return the patch that tells Kueue whether the gang runs; None where it knows.

    A gang that has not run yet is told by the condition's absence.
    """
    known = _find(workload, "PodsReady") or {}
    if ready == _holds(known):
        return None
    if not ready:
        lost = _condition("PodsReady", "False", "WaitForRecovery", "The gang has failed and is being restarted")
        return _patch(workload, [lost], now=now)
    word = "Recovered" if known.get("reason") == "WaitForRecovery" else "Started"
    return _patch(workload, [_condition("PodsReady", "True", word, "Every pod of the gang runs")], now=now)


def build_finish(workload: WorkloadState, *, good: bool, message: str, now: datetime) -> StatusPatch | None:
    """Return the patch that ends a Workload, hence its hold on quota or its place in the queue; None where it has."""
    if workload.finished or workload.being_deleted:
        return None
    finished = _condition("Finished", "True", "Succeeded" if good else "Failed", message)
    return _patch(workload, [finished], now=now)


def _find(workload: WorkloadState, type_: str) -> Mapping[str, Any] | None:
    return next((condition for condition in _conditions(workload) if condition["type"] == type_), None)


def _conditions(workload: WorkloadState) -> list[dict[str, Any]]:
    return list((workload.manifest.get("status") or {}).get("conditions") or ())


def _condition(type_: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": message}


def _patch(
    workload: WorkloadState,
    changes: Iterable[Mapping[str, Any]],
    *,
    now: datetime,
    others: Mapping[str, Any] | None = None,
) -> StatusPatch:
    """Return a patch with every condition as it ought to be: a merge patch replaces the list as a whole."""
    metadata = workload.manifest["metadata"]
    conditions = {condition["type"]: condition for condition in _conditions(workload)}
    for change in changes:
        known = conditions.get(change["type"]) or {}
        same = known.get("status") == change["status"]
        since = known["lastTransitionTime"] if same else now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        conditions[change["type"]] = {
            **change,
            "lastTransitionTime": since,
            "observedGeneration": metadata.get("generation", 1),
        }
    return StatusPatch(
        ref=ObjectRef.of(workload.manifest),
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        body={"status": {**(others or {}), "conditions": list(conditions.values())}},
    )
