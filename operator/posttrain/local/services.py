"""What the controllers of long-lived pods do, for as much as a plan uses: Deployment and StatefulSet.

It owns which pods one of them has, what its status says of them, and how long a container that ended waits for its
restart; it must not start or end anything. Its pod template is a plan's for good: pods are made, never rolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from posttrain.local.jobs import Outcome
from posttrain.local.pods import build_pod, is_being_deleted, is_ready
from posttrain.plan.types import Manifest

STEADY = timedelta(minutes=10)
"""A container that ran so long begins anew with the delays before its restarts."""

_BACKOFF_BASE = timedelta(seconds=10)
_BACKOFF_LIMIT = timedelta(minutes=5)


def reconcile_service(service: Manifest, pods: Sequence[Manifest], *, now: datetime) -> Outcome:
    """Return what becomes of a Deployment or a StatefulSet: its pods are `<name>-0` to `<name>-<n-1>`, all at once.

    A Deployment has one pod: behind the address of its Service there is one port here.
    """
    name, spec = service["metadata"]["name"], service["spec"]
    existing = {pod["metadata"]["name"] for pod in pods}
    more: dict[str, Any] = {}
    if service["kind"] == "StatefulSet":
        more = {"subdomain": spec["serviceName"]}
    else:
        assert spec["replicas"] == 1, "no plan has a Deployment of several pods"
    missing = tuple(
        build_pod(service, spec["template"], name=pod, restart_policy="Always", now=now, hostname=pod, **more)
        for pod in (f"{name}-{index}" for index in range(spec["replicas"]))
        if pod not in existing
    )
    ready = sum(1 for pod in pods if is_ready(pod) and not is_being_deleted(pod))
    status = {
        "observedGeneration": service["metadata"]["generation"],
        "replicas": len(pods) + len(missing),
        **({"readyReplicas": ready} if ready else {}),
    }
    return Outcome(status=status, create=missing)


def restart_delay(ends: int) -> timedelta:
    """Return how long a container waits for its restart that has ended so often before: at first not at all.

    Source: the kubelet's back-off, pkg/kubelet/kubelet.go (10 s, doubled up to 5 minutes).
    """
    return min(_BACKOFF_BASE * 2 ** (ends - 1), _BACKOFF_LIMIT) if ends else timedelta()
