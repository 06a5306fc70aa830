"""The pods of a run: a node of the gang, a rollout server, and prepare.

It owns the pod spec, hence every path that a workload finds; it must not know which object runs the pod.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from posttrain.plan import labels, names, sources
from posttrain.plan.pod_environment import (
    prepare_environment,
    secret_environment,
    server_environment,
    trainer_environment,
)
from posttrain.plan.pod_inputs import (
    ACCESS_FOLDER,
    CLAIMS_FOLDER,
    CODE_FOLDER,
    CONFIG_FOLDER,
    FILES_FOLDER,
    RUNTIME_FOLDER,
    SERVER_PORT,
    SHARED_MEMORY_FOLDER,
    STORAGE_FOLDER,
    TERMINATION_FILE,
    PodInputs,
)
from posttrain.settings import Profile

TRAINER_CONTAINER = "pytorch"
"""The training operator injects the rendezvous into the container of this name, and its webhook asks for one."""
PREPARE_CONTAINER = "prepare"
SERVER_CONTAINER = "vllm"

_USER_ID = 10001
"""The user of the images; the volumes' group too."""
POD_SECURITY: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": _USER_ID,
    "runAsGroup": _USER_ID,
    "fsGroup": _USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
_TOKEN_SECONDS = 3600
_RUNTIME_SIZE = "64Mi"
_LOADING_SECONDS = 3600
"""After which a rollout server that does not answer yet is started anew: the last lines of its log are told then."""


def build_trainer_template(inputs: PodInputs) -> dict[str, Any]:
    """Return the pod template of every node of the gang."""
    run = inputs.run
    return _placed_template(
        inputs,
        container={
            "name": TRAINER_CONTAINER,
            "image": inputs.image,
            "command": ["python", "-m", "posttrain_workloads.launch", run.spec.method],
            "env": trainer_environment(inputs),
            "resources": _trainer_resources(inputs),
        },
        own_labels=labels.pod_labels(run.metadata.name, attempt=inputs.attempt, role=labels.ROLE_TRAINER),
        shared_memory=run.spec.resources.shared_memory or inputs.profile.shared_memory or inputs.trainer_memory,
        affinity=_affinity(inputs),
    )


def build_server_template(inputs: PodInputs) -> dict[str, Any]:
    """Return the pod template of a rollout server, which has its time to load; once it answers, only that is asked."""
    run, profile = inputs.run, inputs.profile
    health: dict[str, Any] = {
        "httpGet": {"path": "/health", "port": SERVER_PORT},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
    }
    servers = run.spec.rollout_servers
    assert servers is not None
    cpu, memory = servers.cpu or profile.cpu, servers.memory or profile.memory
    own_labels = {**labels.run_labels(run.metadata.name), labels.ROLE: labels.ROLE_SERVER}
    return _placed_template(
        inputs,
        container={
            "name": SERVER_CONTAINER,
            "image": inputs.image,
            "command": ["python", "-m", "posttrain_workloads.serve"],
            "env": server_environment(inputs, servers, cpu=cpu),
            "ports": [{"name": "http", "containerPort": SERVER_PORT, "protocol": "TCP"}],
            "startupProbe": {**health, "failureThreshold": _LOADING_SECONDS // health["periodSeconds"]},
            "readinessProbe": {**health, "failureThreshold": 6},
            "resources": _resources(profile, cpu=cpu, memory=memory, gpus=run.spec.server_gpus, devices={}),
        },
        own_labels=own_labels,
        shared_memory=profile.shared_memory or memory,
        affinity=_near_each_other(inputs, own_labels) if servers.nodes_per_replica > 1 else {},
        last_words="FallbackToLogsOnError",  # vLLM writes none; where our plugin in it saw no cause, its log's end
        reports=False,
    )


def build_prepare_template(inputs: PodInputs) -> dict[str, Any]:
    """Return the pod template of prepare: a CPU pod that no profile and no override touches."""
    resources = {"cpu": inputs.settings.prepare_cpu, "memory": inputs.settings.prepare_memory}
    spec = _pod_spec(
        inputs,
        container={
            "name": PREPARE_CONTAINER,
            "image": inputs.image,
            "command": ["python", "-m", "posttrain_workloads.launch", "prepare"],
            "env": prepare_environment(inputs, cpu=resources["cpu"]),
            "resources": {"limits": resources, "requests": resources},
            "securityContext": container_security(),
        },
        env_from=[],
        volumes=[],
        mounts=[],
    )
    own_labels = labels.pod_labels(inputs.run.metadata.name, attempt=inputs.attempt, role=labels.ROLE_PREPARE)
    return {"metadata": {"labels": own_labels}, "spec": {**spec, "restartPolicy": "Never"}}


# --- The pod ---------------------------------------------------------------------------------------------------------


def _placed_template(
    inputs: PodInputs,
    *,
    container: dict[str, Any],
    own_labels: dict[str, str],
    shared_memory: str,
    affinity: dict[str, Any],
    last_words: str = "File",
    reports: bool = True,
) -> dict[str, Any]:
    """Return the template of a pod that computes: placed and marked by profile, user and reservation."""
    overrides, assigned = inputs.run.spec.pod_overrides, inputs.assignment
    given = (overrides.labels if overrides else None) or {}
    annotations = {**((overrides.annotations if overrides else None) or {}), **assigned.annotations}
    metadata: dict[str, Any] = {"labels": {**given, **assigned.labels, **own_labels}}
    if annotations:
        metadata["annotations"] = annotations
    security = container_security(add=("IPC_LOCK",) if inputs.profile.allow_ipc_lock else ())
    spec = _pod_spec(
        inputs,
        container={**container, "securityContext": security},
        env_from=secret_environment(inputs),
        volumes=[{"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}],
        mounts=[{"name": "dshm", "mountPath": SHARED_MEMORY_FOLDER}],
        last_words=last_words,
        reports=reports,
    )
    return {"metadata": metadata, "spec": {**spec, **_placement(inputs, affinity=affinity)}}


def _pod_spec(
    inputs: PodInputs,
    *,
    container: dict[str, Any],
    env_from: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    mounts: list[dict[str, Any]],
    last_words: str = "File",
    reports: bool = True,
) -> dict[str, Any]:
    run = inputs.run
    overrides = run.spec.pod_overrides
    spec: dict[str, Any] = {
        "serviceAccountName": run.spec.access.service_account_name or names.service_account_name(run.metadata.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": inputs.settings.termination_grace_seconds,
        "securityContext": dict(POD_SECURITY),
        "containers": [
            {
                **container,
                **({"envFrom": env_from} if env_from else {}),
                "terminationMessagePath": TERMINATION_FILE,
                "terminationMessagePolicy": last_words,
                "volumeMounts": [*_mounts(inputs, reports=reports), *mounts],
            }
        ],
        "volumes": [*_volumes(inputs, reports=reports), *volumes],
    }
    if overrides and overrides.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in overrides.image_pull_secrets]
    return spec


def container_security(*, add: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the security context of a container in the restricted Pod Security Standard, but for what is added."""
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if add:
        capabilities["add"] = list(add)
    return {"allowPrivilegeEscalation": False, "capabilities": capabilities}


def _volumes(inputs: PodInputs, *, reports: bool) -> list[dict[str, Any]]:
    run = inputs.run
    name = run.metadata.name
    claim = run.spec.checkpoints.storage.claim_name or names.claim_name(name)
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": inputs.config}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "runtime", "emptyDir": {"medium": "Memory", "sizeLimit": _RUNTIME_SIZE}},
    ]
    if reports:
        volumes.append(_access_volume(inputs))
    for read in sources.read_claims(inputs.sources):
        volume = {"claimName": read, "readOnly": True}
        volumes.append({"name": _volume_name(read), "persistentVolumeClaim": volume})
    if sources.reads_files(inputs.sources):
        volumes.append({"name": sources.FILES_MOUNT, "hostPath": {"path": "/", "type": "Directory"}})
    if inputs.code is not None:
        items = {"items": inputs.code} if inputs.code else {}
        volumes.append({"name": "code", "configMap": {"name": names.code_name(name), **items}})
    return volumes


def _access_volume(inputs: PodInputs) -> dict[str, Any]:
    """Return what a pod reports with: a token for its run alone, and the authority of who takes the reports."""
    metadata, authority = inputs.run.metadata, inputs.settings.progress_server.ca_config_map
    token = {
        "path": "token",
        "audience": names.resource_path(namespace=metadata.namespace, run=metadata.name),
        "expirationSeconds": _TOKEN_SECONDS,
    }
    items = [{"key": "ca.crt", "path": "ca.crt"}]
    projected = [{"serviceAccountToken": token}, {"configMap": {"name": authority, "items": items}}]
    return {"name": "access", "projected": {"sources": projected}}


def _mounts(inputs: PodInputs, *, reports: bool) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "storage", "mountPath": STORAGE_FOLDER, "subPath": inputs.run.metadata.name},
        {"name": "runtime", "mountPath": RUNTIME_FOLDER},
    ]
    if reports:
        mounts.append({"name": "access", "mountPath": ACCESS_FOLDER, "readOnly": True})
    for read in sources.read_claims(inputs.sources):
        mounts.append({"name": _volume_name(read), "mountPath": f"{CLAIMS_FOLDER}/{read}", "readOnly": True})
    if sources.reads_files(inputs.sources):
        mounts.append({"name": sources.FILES_MOUNT, "mountPath": FILES_FOLDER, "readOnly": True})
    if inputs.code is not None:
        mounts.append({"name": "code", "mountPath": CODE_FOLDER, "readOnly": True})
    return mounts


def _volume_name(claim: str) -> str:
    """Return the name of the volume of a claim that is read: a label, whatever the claim's own length."""
    name = sources.claim_mount(claim)
    return name if len(name) <= 63 else f"claim-{hashlib.sha256(claim.encode()).hexdigest()[:16]}"


# --- Resources and placement -----------------------------------------------------------------------------------------


def _trainer_resources(inputs: PodInputs) -> dict[str, Any]:
    resources, profile = inputs.run.spec.resources, inputs.profile
    return _resources(
        profile,
        cpu=inputs.trainer_cpu,
        memory=inputs.trainer_memory,
        gpus=resources.gpus_per_node,
        devices=resources.devices or {},
    )


def _resources(
    profile: Profile, *, cpu: str, memory: str, gpus: int, devices: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    amounts = {"cpu": cpu, "memory": memory}
    if gpus:
        amounts[profile.gpu_resource] = str(gpus)
    amounts |= {**profile.devices, **devices}
    # Requests as the limits: the kubelet evicts the pods of a node that runs out by how far they exceed their requests.
    return {"limits": amounts, "requests": amounts}


def _placement(inputs: PodInputs, *, affinity: dict[str, Any]) -> dict[str, Any]:
    profile, resources = inputs.profile, inputs.run.spec.resources
    overrides = inputs.run.spec.pod_overrides
    placement: dict[str, Any] = {}
    node_selector = {
        **profile.node_selector,
        **(overrides.node_selector or {} if overrides else {}),
        **inputs.assignment.node_selector,
    }
    if node_selector:
        placement["nodeSelector"] = node_selector
    tolerations = [t.model_dump(by_alias=True, exclude_none=True) for t in profile.tolerations]
    if overrides and overrides.tolerations:
        tolerations += [t.to_data() for t in overrides.tolerations]
    tolerations += [dict(t) for t in inputs.assignment.tolerations if t not in tolerations]
    if tolerations:
        placement["tolerations"] = tolerations
    if affinity:
        placement["affinity"] = affinity
    if profile.scheduler_name:
        placement["schedulerName"] = profile.scheduler_name
    if profile.runtime_class_name:
        placement["runtimeClassName"] = profile.runtime_class_name
    if resources.priority_class_name:
        placement["priorityClassName"] = resources.priority_class_name
    return placement


def _affinity(inputs: PodInputs) -> dict[str, Any]:
    affinity: dict[str, Any] = {}
    if inputs.avoided_nodes:
        term = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(inputs.avoided_nodes)}
        affinity["nodeAffinity"] = {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}
        }
    if inputs.run.spec.resources.num_nodes > 1:
        affinity |= _near_each_other(inputs, labels.attempt_labels(inputs.run.metadata.name, attempt=inputs.attempt))
    return affinity


def _near_each_other(inputs: PodInputs, peers: Mapping[str, str]) -> dict[str, Any]:
    """Return the wish for a place near the pods of these labels, where the profile says what is near."""
    if not inputs.profile.topology_key:
        return {}
    term = {"topologyKey": inputs.profile.topology_key, "labelSelector": {"matchLabels": dict(peers)}}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
