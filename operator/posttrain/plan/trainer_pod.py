"""The pods of a run: a node of the gang, a rollout server, and prepare.

It owns the pod spec, hence every path and variable that a workload finds; it must not know which object runs the pod.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract import environment
from posttrain.contract.config import ResolvedSource
from posttrain.plan import labels, names, sources
from posttrain.plan.deepspeed import STAGES
from posttrain.plan.fsdp import build_fsdp_environment
from posttrain.plan.objects import CONFIG_FILE, DEEPSPEED_FILE
from posttrain.plan.quantities import parse_quantity
from posttrain.settings import Profile, Settings

TRAINER_CONTAINER = "pytorch"
"""The training operator injects the rendezvous into the container of this name, and its webhook asks for one."""
PREPARE_CONTAINER = "prepare"
SERVER_CONTAINER = "vllm"
SERVER_PORT = 8000
SERVER_KEY = "key"
"""In the Secret that the rollout servers and the gang read."""

CONFIG_FOLDER = "/etc/posttrain"
STORAGE_FOLDER = "/mnt/storage"
CLAIMS_FOLDER = "/mnt/claims"
FILES_FOLDER = "/mnt/files"
CODE_FOLDER = "/code"
RUNTIME_FOLDER = "/run/posttrain"
ACCESS_FOLDER = "/var/run/posttrain"
SHARED_MEMORY_FOLDER = "/dev/shm"
TERMINATION_FILE = "/dev/termination-log"

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

_RESERVED_ENV_PREFIXES = ("POSTTRAIN_", "KUBEFLOW_TRAINER_", "PET_", "ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_")
_RESERVED_ENV = frozenset(
    {
        "DISABLE_KUBEFLOW_INTEGRATION",
        "GROUP_RANK",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "RANK",
        "TOKENIZERS_PARALLELISM",
        "VLLM_API_KEY",
        "VLLM_SERVER_DEV_MODE",
        "WORLD_SIZE",
    }
)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a queue asks of the pods that use the quota reserved in it: where they run, and how they are marked."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PodInputs:
    """Everything that the pods of one attempt are made from."""

    run: TrainingRun
    settings: Settings
    profile: Profile
    image: str
    attempt: int
    config: str
    """Name of the ConfigMap with its config.json."""
    sources: Mapping[str, ResolvedSource]
    code: list[dict[str, str]] | None
    """`items` of the code volume (empty: whatever the ConfigMap holds); None without own code."""
    avoided_nodes: tuple[str, ...] = ()
    assignment: Assignment = Assignment()
    sandbox_urls: tuple[str, ...] = ()
    """Where programs out of completions run."""


def is_reserved_variable(name: str) -> bool:
    """Return whether the platform sets the environment variable, so that a user may not."""
    return name in _RESERVED_ENV or name.startswith(_RESERVED_ENV_PREFIXES)


def build_trainer_template(inputs: PodInputs) -> dict[str, Any]:
    """Return the pod template of every node of the gang."""
    run = inputs.run
    return _placed_template(
        inputs,
        container={
            "name": TRAINER_CONTAINER,
            "image": inputs.image,
            "command": ["python", "-m", "posttrain_workloads.launch", run.spec.method],
            "env": [*_trainer_env(inputs), *_common_env(inputs), *_user_env(inputs)],
            "resources": _trainer_resources(inputs),
        },
        own_labels=labels.pod_labels(run.metadata.name, attempt=inputs.attempt, role=labels.ROLE_TRAINER),
        shared_memory=run.spec.resources.shared_memory or inputs.profile.shared_memory or _memory(inputs),
        affinity=_affinity(inputs),
    )


def build_server_template(inputs: PodInputs) -> dict[str, Any]:
    """Return the pod template of a rollout server: nothing but its readiness is asked, as loading takes its time."""
    run, profile = inputs.run, inputs.profile
    servers = run.spec.rollout_servers
    assert servers is not None
    cpu, memory = servers.cpu or profile.cpu, servers.memory or profile.memory
    values = {**profile.env, "OMP_NUM_THREADS": str(_threads(cpu, ranks=servers.engine_size))}
    return _placed_template(
        inputs,
        container={
            "name": SERVER_CONTAINER,
            "image": inputs.image,
            "command": ["python", "-m", "posttrain_workloads.serve"],
            "env": [
                *_given(inputs, values),
                *_common_env(inputs, reports=False),
                _variable(environment.LISTEN, f"0.0.0.0:{SERVER_PORT}"),
                _server_key(inputs),
                *_user_env(inputs),
            ],
            "ports": [{"name": "http", "containerPort": SERVER_PORT, "protocol": "TCP"}],
            "readinessProbe": {
                "httpGet": {"path": "/health", "port": SERVER_PORT},
                "periodSeconds": 5,
                "timeoutSeconds": 5,
                "failureThreshold": 6,
            },
            "resources": _resources(profile, cpu=cpu, memory=memory, gpus=servers.gpus_per_node, devices={}),
        },
        own_labels={**labels.run_labels(run.metadata.name), labels.ROLE: labels.ROLE_SERVER},
        shared_memory=profile.shared_memory or memory,
        affinity={},
        last_words="FallbackToLogsOnError",  # vLLM writes no message of its own
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
            "env": [_variable("OMP_NUM_THREADS", str(_threads(resources["cpu"], ranks=1))), *_common_env(inputs)],
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
        env_from=_secret_env(inputs),
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


def _memory(inputs: PodInputs) -> str:
    return inputs.run.spec.resources.memory or inputs.profile.memory


def _cpu(inputs: PodInputs) -> str:
    return inputs.run.spec.resources.cpu or inputs.profile.cpu


def _trainer_resources(inputs: PodInputs) -> dict[str, Any]:
    resources, profile = inputs.run.spec.resources, inputs.profile
    return _resources(
        profile,
        cpu=_cpu(inputs),
        memory=_memory(inputs),
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
    if inputs.profile.topology_key and inputs.run.spec.resources.num_nodes > 1:
        peers = labels.attempt_labels(inputs.run.metadata.name, attempt=inputs.attempt)
        affinity["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "podAffinityTerm": {
                        "topologyKey": inputs.profile.topology_key,
                        "labelSelector": {"matchLabels": peers},
                    },
                }
            ]
        }
    return affinity


# --- Environment -----------------------------------------------------------------------------------------------------


def _variable(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _secret(name: str, *, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _threads(cpu: str, *, ranks: int) -> int:
    return max(int(parse_quantity(cpu) / ranks), 1)


def _common_env(inputs: PodInputs, *, reports: bool = True) -> list[dict[str, Any]]:
    """Return the variables of every pod: paths, the Hub, and whom it reports to; what only serves scores nothing."""
    access = inputs.run.spec.access
    env = [
        _variable(environment.CONFIG, f"{CONFIG_FOLDER}/{CONFIG_FILE}"),
        _variable(environment.STORAGE, STORAGE_FOLDER),
        _variable(environment.RUNTIME, RUNTIME_FOLDER),
        _variable(environment.TERMINATION, TERMINATION_FILE),
        *(_report_env(inputs) if reports else ()),
        _field(environment.POD_NAME, "metadata.name"),
        _field(environment.NODE_NAME, "spec.nodeName"),
    ]
    for read in sources.read_claims(inputs.sources):
        mount = sources.claim_mount(read)
        env.append(_variable(environment.mount_variable(mount), f"{CLAIMS_FOLDER}/{read}"))
    if sources.reads_files(inputs.sources):
        env.append(_variable(environment.mount_variable(sources.FILES_MOUNT), FILES_FOLDER))
    if inputs.code is not None:
        env += [_variable(environment.CODE, CODE_FOLDER), _variable("PYTHONPATH", CODE_FOLDER)]
    # TRL tells the Hub of every trainer that is built; a platform's runs are nobody else's business.
    env += [_variable("HF_HOME", f"{STORAGE_FOLDER}/hf-home"), _variable("HF_HUB_DISABLE_TELEMETRY", "1")]
    if inputs.sandbox_urls and reports:
        env.append(_variable(environment.SANDBOX_URLS, ",".join(inputs.sandbox_urls)))
    if not sources.uses_hub(inputs.sources):
        env.append(_variable("HF_HUB_OFFLINE", "1"))
    if access.hub_endpoint:
        env.append(_variable("HF_ENDPOINT", access.hub_endpoint))
    if access.hub_token_secret_ref:
        token = access.hub_token_secret_ref
        env.append(_secret("HF_TOKEN", secret=token.name, key=token.key))
    sandbox = inputs.run.spec.used_sandbox if reports else None  # rollout servers reward nothing
    if sandbox is not None and sandbox.api_key_secret_ref is not None:
        api_key = sandbox.api_key_secret_ref
        env.append(_secret(environment.SANDBOX_KEY, secret=api_key.name, key=api_key.key))
    return [*env, _variable("PYTHONUNBUFFERED", "1"), _variable("TOKENIZERS_PARALLELISM", "false")]


def _report_env(inputs: PodInputs) -> list[dict[str, Any]]:
    run = inputs.run
    path = names.resource_path(namespace=run.metadata.namespace, run=run.metadata.name)
    url = f"{inputs.settings.progress_server.url.rstrip('/')}/{path}"
    return [
        _variable(environment.FACTS_URL, f"{url}/facts"),
        _variable(environment.STATUS_URL, f"{url}/status"),
        _variable(environment.TOKEN, f"{ACCESS_FOLDER}/token"),
        _variable(environment.CA_CERT, f"{ACCESS_FOLDER}/ca.crt"),
    ]


def _trainer_env(inputs: PodInputs) -> list[dict[str, Any]]:
    """Return what only the gang needs: the strategy, threads, the profile's and the trackers' variables."""
    spec = inputs.run.spec
    values = dict(inputs.profile.env)
    values["OMP_NUM_THREADS"] = str(_threads(_cpu(inputs), ranks=spec.resources.ranks_per_node))
    if spec.parallelism.strategy in STAGES:
        values["ACCELERATE_USE_DEEPSPEED"] = "true"
        values["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{CONFIG_FOLDER}/{DEEPSPEED_FILE}"
    elif spec.parallelism.strategy == "FSDP":
        values |= build_fsdp_environment(spec.parallelism)
    values |= _tracking_env(inputs)
    given = _given(inputs, values)
    servers = spec.rollout_servers
    if servers is None:
        return given
    addresses = names.server_addresses(inputs.run.metadata.name, replicas=servers.replicas, port=SERVER_PORT)
    return [*given, _variable(environment.ROLLOUT_SERVERS, ",".join(addresses)), _server_key(inputs)]


def _given(inputs: PodInputs, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return variables by name, without those that the user sets."""
    own = {variable.name for variable in _overridden(inputs)}
    return [_variable(name, value) for name, value in sorted(values.items()) if name not in own]


def _server_key(inputs: PodInputs) -> dict[str, Any]:
    metadata = inputs.run.metadata
    secret = names.server_key_name(metadata.name, uid=metadata.uid or "")
    return _secret(environment.ROLLOUT_KEY, secret=secret, key=SERVER_KEY)


def _tracking_env(inputs: PodInputs) -> dict[str, str]:
    tracking = inputs.run.spec.tracking
    values: dict[str, str] = {}
    if "WandB" in tracking.report_to:
        named = {
            "WANDB_PROJECT": tracking.project,
            "WANDB_ENTITY": tracking.entity,
            "WANDB_RUN_GROUP": tracking.group,
        }
        values |= {name: value for name, value in named.items() if value is not None}
    if "MLflow" in tracking.report_to and tracking.project is not None:
        values["MLFLOW_EXPERIMENT_NAME"] = tracking.project
    if "TensorBoard" in tracking.report_to:
        values["TENSORBOARD_LOGGING_DIR"] = f"{STORAGE_FOLDER}/tensorboard"
    return values


def _overridden(inputs: PodInputs) -> tuple[Any, ...]:
    overrides = inputs.run.spec.pod_overrides
    return overrides.env or () if overrides else ()


def _user_env(inputs: PodInputs) -> list[dict[str, Any]]:
    return [_variable(variable.name, variable.value) for variable in _overridden(inputs)]


def _secret_env(inputs: PodInputs) -> list[dict[str, Any]]:
    overrides, tracking = inputs.run.spec.pod_overrides, inputs.run.spec.tracking
    secrets = list(overrides.env_from_secrets or ()) if overrides else []
    if tracking.secret_ref and tracking.secret_ref not in secrets:
        secrets.append(tracking.secret_ref)
    return [{"secretRef": {"name": name}} for name in secrets]
