"""KWOK, which plays the kubelets of nodes that are not there.

It owns fake nodes and what is played on them; it must not touch a real node.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.components import KWOK, program
from tests.cluster.processes import Process

PREFIX = "sim.posttrain.dev"
"""A pod's annotations `sim.posttrain.dev/<what>`, set at any time, say what its fake kubelet plays: `exit-code`,
`reason`, `message` and `after` (a duration) for its containers' end, `evict` (a message) for its eviction."""
SESSION = f"{PREFIX}/session"
OURS = f"s{uuid.uuid4().hex[:8]}"
"""The value of that label: a cluster may have objects of several processes' tests."""
TAINT = "kwok.x-k8s.io/node"
TOLERATION = {"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}
NODE_SELECTOR = {"type": "kwok", SESSION: OURS}
"""With the toleration what a pod needs to get to a fake node that this process made."""
PLAYED = f"{PREFIX}/played"
"""Label of a fake node as long as KWOK plays its kubelet: who started that KWOK."""
_SIMULATION = Path(__file__).with_name("kwok-stages.yaml")
# KWOK has none built in when it gets a configuration.
_UPSTREAM_STAGES = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-delete.yaml",
)


def build_kwok(folder: Path, *, kubeconfig: Path, env: Mapping[str, str] | None = None) -> Process:
    """Return its process, which is not started yet; it plays the nodes of this process and no others."""
    files = [*(KWOK.folder / "manifests" / name for name in _UPSTREAM_STAGES), _SIMULATION]
    stages = folder / "kwok-stages.yaml"
    stages.write_text("\n---\n".join(file.read_text(encoding="utf-8") for file in files))
    argv = [
        program(KWOK, "kwok"),
        f"--kubeconfig={kubeconfig}",
        f"--config={stages}",
        "--manage-all-nodes=false",
        # By annotation it would not notice when a node is no longer its own.
        f"--manage-nodes-with-label-selector={PLAYED}={OURS}",
        "--cidr=10.250.0.0/16",
        "--node-ip=10.251.0.1",
        "--node-lease-duration-seconds=40",  # more, and the controller manager sees the nodes flap
    ]
    return Process("kwok", argv, folder=folder, env=env)


def build_fake_node(name: str, *, gpus: int, cpu: int, memory: str) -> dict[str, Any]:
    """Return a node that KWOK takes care of."""
    resources = {"cpu": str(cpu), "memory": memory, "pods": "110", "nvidia.com/gpu": str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                PLAYED: OURS,
                **NODE_SELECTOR,
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
            },
        },
        "spec": {"taints": [{"key": TAINT, "value": "fake", "effect": "NoSchedule"}]},
        "status": {"allocatable": resources, "capacity": resources},
    }


def simulation(**plays: str) -> dict[str, str]:
    """Return annotations for a pod: `simulation(exit_code="1", message="out of memory", after="2s")`."""
    return {f"{PREFIX}/{name.replace('_', '-')}": value for name, value in plays.items()}


def next_names(taken: Iterable[str], count: int) -> list[str]:
    """Return `count` names for fake nodes that none has yet."""
    used = set(taken)
    free = (name for number in range(len(used) + count) if (name := f"fake-{number}") not in used)
    return [next(free) for _ in range(count)]
