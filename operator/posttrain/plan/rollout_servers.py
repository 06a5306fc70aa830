"""Rollout servers: everything that knows the StatefulSet, the Service and the Secret that they are made of.

It owns how a run's vLLM servers are written and what their pods tell; it must not decide when they are wanted.

They belong to the run, not to an attempt: a gang that restarts finds the model loaded. Like an attempt's job they are
frozen: their ConfigMap keeps the StatefulSet as it was made. The Secret with their key is created with them and never
looked at again: the operator has no right to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from posttrain.api.training_run import TrainingRun
from posttrain.plan import labels, names
from posttrain.plan.manifests import container_status, is_being_deleted, pod_condition, pods_of_role
from posttrain.plan.objects import build_metadata
from posttrain.plan.pod_inputs import SERVER_KEY, SERVER_PORT, PodInputs
from posttrain.plan.trainer_pod import SERVER_CONTAINER, build_server_template
from posttrain.plan.types import Manifest, ObjectRef

API_VERSION = "apps/v1"
KIND = "StatefulSet"

RESTARTS_MAX = 5
"""After so many restarts without an answer in between a server will not answer any more."""


def servers_ref(run: str) -> ObjectRef:
    """Return the reference to the StatefulSet of a run's servers."""
    return ObjectRef(API_VERSION, KIND, names.server_name(run))


def servers_config_ref(run: str) -> ObjectRef:
    """Return the reference to the ConfigMap that they read."""
    return ObjectRef("v1", "ConfigMap", names.server_name(run))


def build_stateful_set(inputs: PodInputs) -> Manifest:
    """Return the servers: all at once, and a pod that is lost comes back under its name, hence its address.

    An update never restarts a pod.
    """
    run = inputs.run
    servers = run.spec.rollout_servers
    assert servers is not None
    name = names.server_name(run.metadata.name)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": build_metadata(run, name=name, labels=labels.run_labels(run.metadata.name)),
        "spec": {
            "serviceName": name,
            "replicas": servers.pods,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": _selector(run)},
            "template": build_server_template(inputs),
        },
    }


def build_service(run: TrainingRun) -> Manifest:
    """Return the Service that gives each server a name, also before it answers."""
    name = names.server_name(run.metadata.name)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(run, name=name, labels=labels.run_labels(run.metadata.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _selector(run),
            "ports": [{"name": "http", "port": SERVER_PORT, "protocol": "TCP", "targetPort": SERVER_PORT}],
        },
    }


def build_key_secret(run: TrainingRun, *, key: str) -> Manifest:
    """Return the Secret with the key that servers and trainer share."""
    name = names.server_key_name(run.metadata.name, uid=run.metadata.uid or "")
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": build_metadata(run, name=name, labels=labels.run_labels(run.metadata.name)),
        "type": "Opaque",
        "immutable": True,
        "stringData": {SERVER_KEY: key},
    }


def _selector(run: TrainingRun) -> dict[str, str]:
    return {labels.RUN: run.metadata.name, labels.ROLE: labels.ROLE_SERVER}


# --- What their pods tell --------------------------------------------------------------------------------------------


def find_servers(run: TrainingRun, pods: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """Return those of the pods that the servers consist of, the earliest created first.

    By their names, too: a copy that somebody makes of one, to look into it, bears the same labels.
    """
    wanted = run.spec.rollout_servers.pods if run.spec.rollout_servers is not None else 0
    return tuple(pod for pod in pods_of_role(pods, labels.ROLE_SERVER) if _ordinal(run, pod) in range(wanted))


def is_ready(pod: Manifest) -> bool:
    """Return whether a server answers."""
    ready = pod_condition(pod, "Ready")
    return ready is not None and ready.get("status") == "True" and not is_being_deleted(pod)


def restarts_of(pod: Manifest) -> int:
    """Return how often a server's container was started again."""
    return int(container_status(pod, SERVER_CONTAINER).get("restartCount") or 0)


def count_restarts(pods: Iterable[Manifest]) -> dict[str, int]:
    """Return how often each server was started again that was, by its pod's UID."""
    return {pod["metadata"]["uid"]: restarts for pod in pods if (restarts := restarts_of(pod))}


def count_ready(run: TrainingRun, pods: Iterable[Manifest]) -> int:
    """Return how many servers answer, with all of their nodes."""
    servers = run.spec.rollout_servers
    if servers is None:
        return 0
    ordinals = (_ordinal(run, pod) for pod in pods if is_ready(pod))
    ready = Counter(ordinal // servers.nodes_per_replica for ordinal in ordinals if ordinal is not None)
    return sum(1 for nodes in ready.values() if nodes == servers.nodes_per_replica)


def _ordinal(run: TrainingRun, pod: Manifest) -> int | None:
    return names.server_ordinal(run.metadata.name, name=pod["metadata"]["name"])
