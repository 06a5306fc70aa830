"""Kueue's queues for tests: a ClusterQueue with a flavor of its own, and priorities.

It owns how they are written and removed; it must not know what is queued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.cluster.any_cluster import Cluster
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION

VERSION = "kueue.x-k8s.io/v1beta2"
QUEUE = "queue"
"""Name of the LocalQueue that `serve_queue` makes."""


def build_local_queue(namespace: str, *, name: str = QUEUE) -> dict[str, Any]:
    """Return a LocalQueue of the ClusterQueue that bears the namespace's name."""
    return {
        "apiVersion": VERSION,
        "kind": "LocalQueue",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterQueue": namespace},
    }


@contextmanager
def serve_queue(cluster: Cluster, namespace: str, *, gpus: int) -> Iterator[str]:
    """Make flavor and ClusterQueue, named as the namespace, and the LocalQueue in it; remove them at the end.

    The flavor's pods go to nodes that are played. A higher priority preempts.
    """
    quotas = {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": str(gpus)}
    resources = [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()]
    flavor = {
        "apiVersion": VERSION,
        "kind": "ResourceFlavor",
        "metadata": {"name": namespace},
        "spec": {"nodeLabels": dict(NODE_SELECTOR), "tolerations": [dict(TOLERATION)]},
    }
    cluster_queue = {
        "apiVersion": VERSION,
        "kind": "ClusterQueue",
        "metadata": {"name": namespace},
        "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [
                {"coveredResources": list(quotas), "flavors": [{"name": namespace, "resources": resources}]}
            ],
        },
    }
    cluster.apply([flavor, cluster_queue, build_local_queue(namespace)])
    yield QUEUE
    cluster.kubectl("delete", "clusterqueue,resourceflavor", namespace, "--wait=false")


def build_priority(name: str, *, value: int) -> dict[str, Any]:
    """Return a WorkloadPriorityClass."""
    return {"apiVersion": VERSION, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}


def condition_of(workload: Mapping[str, Any], type_: str) -> dict[str, Any]:
    """Return a condition of a Workload; empty where it has none of that type."""
    conditions = (workload.get("status") or {}).get("conditions") or ()
    return next((dict(condition) for condition in conditions if condition["type"] == type_), {})
