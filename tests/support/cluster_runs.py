"""TrainingRuns in a test cluster: made with the few fields that a test is about, and waited for.

It owns their shape and the waiting; it must not judge what a test sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.contract.result import Result, to_termination_message
from posttrain.plan import labels, names
from posttrain.plan.types import Manifest
from tests.cluster.any_cluster import Cluster
from tests.cluster.kwok import simulation
from tests.support.builders import build_spec

WAIT_SECONDS = 90.0
COMPLETED = Result(reason="Completed", message="trained", artifacts={"model": "pvc://shared/demo/model"})


def enforce_gpu_quota(cluster: Cluster, namespace: str, *, gpus: int) -> None:
    """Let a namespace have pods of so many GPUs in all, from now on."""
    hard = {"requests.nvidia.com/gpu": str(gpus)}
    metadata = {"name": "gpus", "namespace": namespace}
    cluster.apply([{"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}}])
    cluster.await_json(
        *("resourcequota", "gpus", "--namespace", namespace),
        until=lambda quota: (quota.get("status") or {}).get("hard") == hard,
        what="the quota to be in force",
    )


class ClusterRun:
    """One run in a namespace."""

    def __init__(self, cluster: Cluster, namespace: str, name: str = "demo") -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.name = name

    def apply(self, **changes: Any) -> None:
        """Make the run: two nodes with a GPU each, no prepare, the claim `shared`.

        `changes` replace fields of its spec, and None removes one.
        """
        spec: dict[str, Any] = {
            "resources": {"numNodes": 2, "gpusPerNode": 1},
            "prepare": {"enabled": False},
            "checkpoints": {"storage": {"claimName": "shared"}, "everySteps": 5},
        }
        self.cluster.apply(
            [
                {
                    "apiVersion": "posttrain.dev/v1alpha1",
                    "kind": "TrainingRun",
                    "metadata": {"name": self.name, "namespace": self.namespace},
                    "spec": build_spec(**{**spec, **changes}),
                }
            ]
        )

    def patch(self, spec: Mapping[str, Any]) -> None:
        """Change fields of its spec."""
        body = json.dumps({"spec": spec})
        self.kubectl("patch", "trainingrun", self.name, "--type=merge", "--patch", body)

    def kubectl(self, *args: str) -> str:
        """Run kubectl in its namespace."""
        return self.cluster.kubectl(*args, "--namespace", self.namespace)

    def read(self) -> Manifest:
        """Return the run as it stands."""
        found: Manifest = self.cluster.get("trainingrun", self.name, "--namespace", self.namespace)
        return found

    def status(self) -> dict[str, Any]:
        """Return its status; empty before the first."""
        return dict(self.read().get("status") or {})

    def await_status(
        self, until: Callable[[dict[str, Any]], Any], *, what: str, seconds: float = WAIT_SECONDS
    ) -> dict[str, Any]:
        """Poll the status until `until` is true of it, and return it."""
        found = self.cluster.await_json(
            "trainingrun",
            self.name,
            "--namespace",
            self.namespace,
            until=lambda run: run.get("status") and until(run["status"]),
            what=f"{what} of {self.name}",
            seconds=seconds,
        )
        return dict(found["status"])

    def await_stage(self, stage: str, *, attempt: int | None = None, seconds: float = WAIT_SECONDS) -> dict[str, Any]:
        """Wait for a stage, in that attempt."""
        return self.await_status(
            lambda status: status.get("stage") == stage and attempt in (None, status.get("attempt")),
            what=f"stage {stage}",
            seconds=seconds,
        )

    def await_running(self, *, attempt: int = 1, pods: int = 2) -> list[Manifest]:
        """Wait until every pod of an attempt runs, and the operator knows it; return the pods."""
        self.await_status(
            lambda status: status.get("attempt") == attempt and status.get("attemptRunningTime"),
            what=f"attempt {attempt} running",
        )
        found = self.pods(attempt=attempt)
        assert len(found) == pods
        return found

    def pods(self, *, attempt: int) -> list[Manifest]:
        """Return the pods of an attempt's gang."""
        selector = f"{labels.RUN}={self.name},{labels.ATTEMPT}={attempt},{labels.ROLE}={labels.ROLE_TRAINER}"
        found: list[Manifest] = self.cluster.get("pods", "--namespace", self.namespace, "--selector", selector)["items"]
        return found

    def end_pod(self, node: int, *, attempt: int = 1, exit_code: int, **plays: str) -> None:
        """Let the pod of a node of the gang end."""
        name = names.pod_name(self.name, attempt=attempt, node=node)
        played = simulation(exit_code=str(exit_code), **plays)
        self.kubectl("annotate", "pod", name, *(f"{key}={value}" for key, value in played.items()))

    def complete(self, *, attempt: int = 1, pods: int = 2) -> dict[str, Any]:
        """Let a running gang end well, and return the status of the run's end."""
        # The job has succeeded when its master has: its workers are taken away then.
        for node in reversed(range(pods)):
            self.end_pod(node, attempt=attempt, exit_code=0, message=to_termination_message(COMPLETED))
        return self.await_stage("Succeeded")

    def events(self) -> list[tuple[str, str]]:
        """Return type and reason of its events, in the order in which they happened."""
        found = self.cluster.get(
            "events", "--namespace", self.namespace, f"--field-selector=involvedObject.name={self.name}"
        )
        items = sorted(found["items"], key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [(event["type"], event["reason"]) for event in items]

    def await_event(self, reason: str) -> None:
        """Wait for an event of it: events come after the status that they tell of."""
        self.cluster.await_json(
            "events",
            "--namespace",
            self.namespace,
            f"--field-selector=involvedObject.name={self.name}",
            until=lambda events: any(event["reason"] == reason for event in events["items"]),
            what=f"the event {reason} of {self.name}",
        )


def tiny(**changes: Any) -> dict[str, Any]:
    """Return fields of a spec that trains the tiny model for a few steps, in two pods."""
    args = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "logging_steps": 1,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return {
        "model": {"source": "pvc://inputs/model", "dtype": "float32"},
        "datasets": [{"source": "pvc://inputs/train.jsonl"}],
        "sft": {"args": args},
        "resources": {"numNodes": 2, "gpusPerNode": 0},
        "prepare": {"enabled": True},
        "checkpoints": {"storage": {"claimName": "shared"}, "everySteps": 3},
        **changes,
    }


def reasons(status: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return status and reason of every condition by its type."""
    return {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions") or ()}


def message_of(status: Mapping[str, Any], type_: str) -> str:
    """Return the message of a condition."""
    return next(str(c.get("message", "")) for c in status.get("conditions") or () if c["type"] == type_)
