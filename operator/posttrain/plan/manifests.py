"""What a plan reads of observed objects and pods.

It owns the way into Kubernetes' JSON; it must not judge what it finds there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from posttrain.plan import labels
from posttrain.plan.types import Manifest

_SILENCE = timedelta(seconds=120)
_SET_UP_REASONS = frozenset({"ContainerCreating", "PodInitializing"})
_LIVE_PHASES = frozenset({"Pending", "Running", "Unknown"})


def parse_time(text: str | None) -> datetime | None:
    """Return the time in an RFC 3339 text, or None for none."""
    return datetime.fromisoformat(text) if text else None


def is_being_deleted(manifest: Mapping[str, Any]) -> bool:
    """Return whether somebody has asked for the object's deletion already."""
    return manifest["metadata"].get("deletionTimestamp") is not None


def pod_phase(pod: Mapping[str, Any]) -> str:
    """Return a pod's phase; a pod that no kubelet has seen is Pending."""
    return str((pod.get("status") or {}).get("phase") or "Pending")


def silent_from(pod: Mapping[str, Any]) -> datetime | None:
    """Return when a pod that is being deleted counts as gone although it is still listed.

    `deletionTimestamp` already includes the grace period. A kubelet that is alive is done soon after it; that of a
    lost node never is, and would hold the run for as long as the node's object exists.
    """
    deleted = parse_time(pod["metadata"].get("deletionTimestamp"))
    return deleted + _SILENCE if deleted is not None else None


def deletion_requested(pod: Mapping[str, Any]) -> datetime | None:
    """Return when somebody asked for the pod's deletion."""
    deleted = parse_time(pod["metadata"].get("deletionTimestamp"))
    grace = pod["metadata"].get("deletionGracePeriodSeconds") or 0
    return deleted - timedelta(seconds=grace) if deleted is not None else None


def last_alive(pod: Mapping[str, Any]) -> datetime | None:
    """Return the latest moment at which a pod's containers are known to have run; None where none ever did."""
    if pod_phase(pod) == "Pending":
        return None
    status = pod.get("status") or {}
    ends = ((one.get("state") or {}).get("terminated") or {} for one in status.get("containerStatuses") or ())
    told = (status.get("startTime"), pod["metadata"].get("deletionTimestamp"), *(end.get("finishedAt") for end in ends))
    return max((time for time in map(parse_time, told) if time is not None), default=None)


def is_live(pod: Mapping[str, Any], *, now: datetime) -> bool:
    """Return whether a pod's containers may still run."""
    silent = silent_from(pod)
    return pod_phase(pod) in _LIVE_PHASES and (silent is None or silent > now)


def is_out_of_sight(pod: Mapping[str, Any]) -> bool:
    """Return whether a pod's node has fallen silent: whether its containers still run, nobody knows.

    The node controller takes `Ready` from such a pod and leaves the rest as the kubelet told it last: a container that
    is ready, in a pod that is not. A kubelet that answers says both or neither, there being no readiness gates.
    """
    ready = pod_condition(pod, "Ready")
    containers = (pod.get("status") or {}).get("containerStatuses") or ()
    told = bool(containers) and all(container.get("ready") for container in containers)
    return told and pod_phase(pod) == "Running" and ready is not None and ready.get("status") == "False"


def is_being_set_up(pod: Mapping[str, Any]) -> bool:
    """Return whether a pod's node has yet to bring what its containers need: volumes, and the pod's own network.

    While an image is pulled a container is said to wait alike; but then the pod is ready to start containers
    (KEP-3085, from Kubernetes 1.29 on).
    """
    if pod_phase(pod) != "Pending" or node_name(pod) is None or is_being_deleted(pod):
        return False
    status = pod["status"]
    ready = pod_condition(pod, "PodReadyToStartContainers") or {}
    containers = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    waiting = ((container.get("state") or {}).get("waiting") or {} for container in containers)
    return ready.get("status") != "True" and all(state.get("reason") in _SET_UP_REASONS for state in waiting)


def scheduled_time(pod: Mapping[str, Any]) -> datetime | None:
    """Return when a pod was bound to its node, else when it was made."""
    scheduled = pod_condition(pod, "PodScheduled") or {}
    return parse_time(scheduled.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp"))


def is_of_attempt(pod: Mapping[str, Any], attempt: int) -> bool:
    """Return whether a pod belongs to that attempt's gang."""
    own = pod["metadata"].get("labels") or {}
    return own.get(labels.ROLE) == labels.ROLE_TRAINER and own.get(labels.ATTEMPT) == str(attempt)


def pods_of_role(pods: Iterable[Manifest], role: str) -> tuple[Manifest, ...]:
    """Return the pods of that role, the earliest created first."""
    chosen = [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(labels.ROLE) == role]
    return tuple(sorted(chosen, key=lambda p: (p["metadata"].get("creationTimestamp") or "", p["metadata"]["name"])))


def node_name(pod: Mapping[str, Any]) -> str | None:
    """Return the node that a pod is bound to."""
    return (pod.get("spec") or {}).get("nodeName")


def container_status(pod: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return the status of one container; empty where there is none yet."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((dict(status) for status in statuses if status.get("name") == container), {})


def terminated_state(pod: Mapping[str, Any], container: str) -> dict[str, Any] | None:
    """Return `state.terminated` of one container (exitCode, reason, message, finishedAt), or None before its end."""
    return (container_status(pod, container).get("state") or {}).get("terminated")


def pod_condition(pod: Mapping[str, Any], type_: str) -> dict[str, Any] | None:
    """Return the pod's condition of that type."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((dict(condition) for condition in conditions if condition.get("type") == type_), None)
