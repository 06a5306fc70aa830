"""Pods as a kubelet and a controller show them: made from a template, and their status at each point of their life.

It owns what a pod's manifest and status look like; it must not start or end anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any

from posttrain.local.container import Ended
from posttrain.plan.types import Manifest

_TERMINATION_MAX_BYTES = 4096
_KILLED = 137


def format_time(time: datetime) -> str:
    """Return a time as Kubernetes writes it, with the microseconds that tell two processes' ends apart."""
    return time.isoformat().replace("+00:00", "Z")


def new_metadata(metadata: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
    """Return the metadata of an object that is created now."""
    return {**metadata, "uid": str(uuid.uuid4()), "creationTimestamp": format_time(now), "generation": 1}


def build_pod(
    job: Manifest,
    template: Mapping[str, Any],
    *,
    name: str,
    labels: Mapping[str, str] = MappingProxyType({}),
    env: tuple[tuple[str, str], ...] = (),
    restart_policy: str = "Never",
    now: datetime,
    **spec: Any,
) -> Manifest:
    """Return a pod of a job or a service, its variables `env` appended to the container's own.

    `spec` are further fields of its spec.
    """
    container, *others = template["spec"]["containers"]
    assert not others, "a plan's pods have one container"
    own = template["metadata"]
    metadata = {
        "name": name,
        "namespace": job["metadata"]["namespace"],
        "labels": {**own.get("labels", {}), **labels},
        **({"annotations": dict(own["annotations"])} if "annotations" in own else {}),
        "ownerReferences": [
            {
                "apiVersion": job["apiVersion"],
                "kind": job["kind"],
                "name": job["metadata"]["name"],
                "uid": job["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
    appended = [{"name": key, "value": value} for key, value in env]
    whole_spec = {
        **template["spec"],
        **spec,
        "restartPolicy": restart_policy,
        "containers": [{**container, "env": [*container.get("env", ()), *appended]}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": new_metadata(metadata, now=now),
        "spec": whole_spec,
        "status": {"phase": "Pending", "conditions": [_condition("PodScheduled", "True", now=now)]},
    }


def is_owned_by(pod: Manifest, job: Manifest) -> bool:
    """Return whether the job is the pod's controller."""
    owners = pod["metadata"].get("ownerReferences", ())
    return any(owner["uid"] == job["metadata"]["uid"] for owner in owners)


def is_finished(pod: Manifest) -> bool:
    """Return whether the pod's container has ended."""
    return pod["status"]["phase"] in {"Succeeded", "Failed"}


def is_being_deleted(pod: Manifest) -> bool:
    """Return whether the pod goes as soon as its container has ended."""
    return "deletionTimestamp" in pod["metadata"]


def is_restarted(pod: Manifest) -> bool:
    """Return whether the pod's container is started again when it ends."""
    return bool(pod["spec"]["restartPolicy"] == "Always")


def is_ready(pod: Manifest) -> bool:
    """Return whether the pod's container serves, or, where nobody asks it, runs."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def grace_seconds(pod: Manifest) -> int:
    """Return how long the pod's container may take to end."""
    return int(pod["spec"].get("terminationGracePeriodSeconds", 30))


def running_status(pod: Manifest, *, started_at: datetime) -> dict[str, Any]:
    """Return the status of a pod whose container has started, for the first time or again."""
    time = format_time(started_at)
    # Where a probe asks, it says when.
    ready = "readinessProbe" not in pod["spec"]["containers"][0]
    container = _container(pod, ready=ready, state={"running": {"startedAt": time}})
    if "containerStatuses" in pod["status"]:
        container["restartCount"] += 1
    return {
        "startTime": time,
        **pod["status"],
        "phase": "Running",
        "conditions": _ready_conditions(pod, str(ready), now=started_at),
        "containerStatuses": [container],
    }


def probed_status(pod: Manifest, *, ready: bool, now: datetime) -> dict[str, Any]:
    """Return the status of a pod whose readiness probe gives another answer than before."""
    (container,) = pod["status"]["containerStatuses"]
    return {
        **pod["status"],
        "conditions": _ready_conditions(pod, str(ready), now=now),
        "containerStatuses": [{**container, "ready": ready}],
    }


def ended_status(pod: Manifest, ended: Ended, *, message: str) -> dict[str, Any]:
    """Return the status of a pod whose container has ended; `message` is what it wrote into its termination file."""
    succeeded = ended.exit_code == 0
    terminated = {
        "exitCode": ended.exit_code,
        **({"signal": ended.signal} if ended.signal is not None else {}),
        "reason": "Completed" if succeeded else "Error",
        "startedAt": format_time(ended.started_at),
        "finishedAt": format_time(ended.finished_at),
    }
    text = message.encode()[:_TERMINATION_MAX_BYTES].decode(errors="ignore")
    return _terminated_status(pod, {**terminated, **({"message": text} if text else {})}, now=ended.finished_at)


def vanished_status(pod: Manifest, *, now: datetime) -> dict[str, Any]:
    """Return the status of a pod whose container runtime was killed: nobody knows its exit code."""
    (container,) = pod["status"]["containerStatuses"]
    terminated = {
        "exitCode": _KILLED,
        "reason": "ContainerStatusUnknown",
        "message": "the process that watched over the container was killed",
        "startedAt": container["state"]["running"]["startedAt"],
        "finishedAt": format_time(now),
    }
    return _terminated_status(pod, terminated, now=now)


def lost_status(pod: Manifest, *, now: datetime) -> dict[str, Any]:
    """Return the status of a pod of an earlier `posttrain run` that was killed: its node, so to say, was lost."""
    disruption = {
        **_condition("DisruptionTarget", "True", now=now),
        "reason": "DeletionByTaintManager",
        "message": "the `posttrain run` that this pod belonged to has ended without ending it",
    }
    return {
        **pod["status"],
        "phase": "Failed",
        "reason": "NodeLost",
        "message": disruption["message"],
        "conditions": [*_ready_conditions(pod, "False", now=now), disruption],
    }


def _terminated_status(pod: Manifest, terminated: dict[str, Any], *, now: datetime) -> dict[str, Any]:
    if is_restarted(pod):
        name = pod["spec"]["containers"][0]["name"]
        waiting = {"reason": "CrashLoopBackOff", "message": f"back-off restarting failed container {name}"}
        again = _container(pod, ready=False, state={"waiting": waiting})
        return {
            **pod["status"],
            "conditions": _ready_conditions(pod, "False", now=now),
            "containerStatuses": [{**again, "lastState": {"terminated": terminated}}],
        }
    return {
        **pod["status"],
        "phase": "Succeeded" if terminated["exitCode"] == 0 else "Failed",
        "conditions": _ready_conditions(pod, "False", now=now),
        "containerStatuses": [_container(pod, ready=False, state={"terminated": terminated})],
    }


def _container(pod: Manifest, *, ready: bool, state: dict[str, Any]) -> dict[str, Any]:
    container = pod["spec"]["containers"][0]
    before: dict[str, Any] = next(iter(pod["status"].get("containerStatuses", ())), {})
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": ready,
        "started": "running" in state,
        "restartCount": before.get("restartCount", 0),
        "state": state,
        **({"lastState": before["lastState"]} if "lastState" in before else {}),
    }


def _ready_conditions(pod: Manifest, status: str, *, now: datetime) -> list[dict[str, Any]]:
    kept = [c for c in pod["status"]["conditions"] if c["type"] == "PodScheduled"]
    return [*kept, *(_condition(type_, status, now=now) for type_ in ("ContainersReady", "Ready"))]


def _condition(type_: str, status: str, *, now: datetime) -> dict[str, Any]:
    return {"type": type_, "status": status, "lastTransitionTime": format_time(now)}
