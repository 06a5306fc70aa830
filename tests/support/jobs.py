"""PyTorchJobs for tests, as small as the training operator takes them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from tests.cluster.kwok import NODE_SELECTOR, TOLERATION


def build_pytorchjob(
    name: str,
    *,
    workers: int = 1,
    gpus: int = 1,
    annotations: Mapping[str, str] | None = None,
    container_name: str = "pytorch",
) -> dict[str, Any]:
    """Return a job of one master and some workers for nodes that are played; its pods are not restarted."""
    template = {
        "metadata": {"annotations": dict(annotations or {})},
        "spec": {
            "nodeSelector": NODE_SELECTOR,
            "tolerations": [TOLERATION],
            "containers": [
                {
                    "name": container_name,
                    "image": "registry.test/trainer:1",
                    "resources": {"limits": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": str(gpus)}},
                }
            ],
        },
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                role: {"replicas": replicas, "restartPolicy": "Never", "template": deepcopy(template)}
                for role, replicas in (("Master", 1), ("Worker", workers))
            },
        },
    }
